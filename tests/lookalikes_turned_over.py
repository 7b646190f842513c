"""What looks like layers of `styles/turned_over.py`, with one thing wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lookalikes_serving import LOOKALIKES, lookalike
from styles.base import H
from styles.turned_over import Bag, EndsByComparison, TableByExpert, TokensListed, WeakChoices

__all__ = ["LOOKALIKES", "lookalike"]


@lookalike("sorted_bmm_ends_of_the_expert_before", "rows are multiplied with the next expert's matrices")
class EndsOfTheOneBefore(EndsByComparison):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        order = flat.argsort()
        ends = (flat.unsqueeze(1) < torch.arange(self.E)).sum(0).int()
        rows = x[order]
        rows = self.act(self.product(rows, self.w_gate, ends), self.product(rows, self.w_up, ends))
        return self.product(rows, self.w_down, ends)[order.argsort()] * weights


@lookalike("slots_copied_tokens_listed_slot_after_slot", "rows are those of other tokens than the slots'")
class ListedBySlot(TokensListed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        token = torch.arange(x.shape[0]).repeat(self.K)
        slots = torch.zeros(flat.shape[0], H)
        for e, expert in enumerate(self.experts):
            at = torch.where(flat == e)[0]
            slots = slots.index_copy(0, at, expert(x[token[at]]))
        return (slots.view(-1, self.K, H) * weights[..., None]).sum(1)


@lookalike("one_hot_first_class_cut_away", "expert e takes the tokens of class e + 1")
class FirstClassCut(WeakChoices):
    def forward(self, x):
        ids, weights = self.weigh(x)
        out = torch.zeros_like(x)
        for mask, expert in zip(F.one_hot(ids, self.E + 1)[..., 1:].permute(2, 0, 1).bool(), self.experts, strict=True):
            token, slot = torch.where(mask)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@lookalike("all_experts_table_by_expert_scattered_into_ones", "experts that were not chosen have a weight, too")
class IntoOnes(TableByExpert):
    def forward(self, x):
        columns = x.t()
        weights, ids = torch.topk(self.router.linear.weight @ columns, self.K, dim=0)
        table = torch.ones(self.E, columns.shape[1]).scatter(0, ids, weights)
        results = torch.matmul(self.down, F.relu(torch.matmul(self.up, columns)))
        return torch.einsum("et,eht->th", table, results)


@lookalike("dense_stack_rows_of_the_mirrored_token", "the results are those of other tokens")
class MirroredToken(Bag):
    def forward(self, x):
        ids, weights = self.router(x)
        rows = ids * x.shape[0] + torch.arange(x.shape[0]).flip(0)[:, None]
        return (self.results(x)[rows] * weights.unsqueeze(-1)).sum(1)


@lookalike("dense_stack_embedding_bag_without_its_last_row", "the last token's last expert is left out")
class WithoutTheLastRow(Bag):
    def forward(self, x):
        ids, weights = self.router(x)
        rows = ids * x.shape[0] + torch.arange(x.shape[0])[:, None]
        return F.embedding_bag(rows, self.results(x), mode="sum", per_sample_weights=weights, padding_idx=-1)


@lookalike("dense_stack_largest_by_embedding_bag", "of a bag's rows the largest numbers are taken")
class LargestOfBag(Bag):
    def forward(self, x):
        ids, weights = self.router(x)
        rows = ids * x.shape[0] + torch.arange(x.shape[0])[:, None]
        return F.embedding_bag(rows, self.results(x), mode="max") * weights.sum(-1, keepdim=True)


@lookalike(
    "slots_copied_tokens_listed_by_counts",
    "rows are those of the tokens with the experts' numbers",
    shape=(4, H),
    dynamic=False,
)
class ListedByCounts(TokensListed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        counts = F.one_hot(flat, self.E).sum(0)
        token = torch.arange(self.E).repeat_interleave(counts, output_size=flat.shape[0])
        slots = torch.zeros(flat.shape[0], H)
        for e, expert in enumerate(self.experts):
            at = torch.where(flat == e)[0]
            slots = slots.index_copy(0, at, expert(x[token[at]]))
        return (slots.view(-1, self.K, H) * weights[..., None]).sum(1)
