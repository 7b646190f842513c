"""What looks like layers of `styles/cut_and_joined.py` and `styles/turned_and_numbered.py`, with one thing wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lookalikes_put_and_stacked import LOOKALIKES, lookalike
from styles.base import Simple
from styles.cut_and_joined import FastMoE, Padded
from styles.turned_and_numbered import Added, AnySlot, Remainder, Turned

__all__ = ["LOOKALIKES", "lookalike"]


class Grouped(Simple):
    """Rows sorted by expert, a grouped product for each projection."""

    def counts(self, ids):
        return F.one_hot(ids.flatten(), self.E).sum(0)

    def ends(self, ids):
        return self.counts(ids).cumsum(0).to(torch.int32)

    def product(self, rows, weight, ends):
        return torch.ops.moe_fx.grouped_mm(rows, weight.transpose(1, 2), ends)

    def forward(self, x):
        ids, weights = self.router(x)
        order, ends = ids.flatten().argsort(stable=True), self.ends(ids)
        hidden = self.act(self.product(x[order // self.K], self.up, ends))
        done = self.product(hidden, self.down, ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // self.K, done)


@lookalike("grouped_by_counts_in_float16", "a sum of more than 2048 is rounded in float16")
class CountedInHalf(Grouped):
    def counts(self, ids):
        return F.one_hot(ids.flatten(), self.E).half().sum(0)


@lookalike("grouped_by_counts_in_bfloat16", "a sum of more than 256 is rounded in bfloat16")
class CountedInBfloat16(Grouped):
    def counts(self, ids):
        return (ids.flatten()[:, None] == torch.arange(self.E)).bfloat16().sum(0)


@lookalike("all_experts_by_numbers_in_bfloat16", "256 and 257 are the same number in bfloat16")
class NumbersInBfloat16(Simple):
    E = 300

    def forward(self, x):
        ids, weights = self.router(x)
        named = (ids.unsqueeze(-1) == torch.arange(self.E, dtype=torch.bfloat16)).to(x.dtype)
        table = (named * weights.unsqueeze(-1)).sum(1)
        done = torch.bmm(self.act(torch.bmm(x.expand(self.E, -1, -1), self.up.mT)), self.down.mT)
        return torch.einsum("eth,te->th", done, table)


@lookalike(
    "sliced_by_counts_from_the_second_row_on", "all rows but the last are moved to another expert", shape=(2, 5, 16)
)
class FromTheSecond(FastMoE):
    def grouped(self, rows, number, counts):
        parts, base, rows = [], 1, torch.cat([rows, rows[:1]])
        for e in range(self.E):
            many = counts[e].item()
            parts.append(F.linear(rows[base : base + many], self.weights[number][e]))
            base += many
        return torch.cat(parts) + torch.repeat_interleave(self.biases[number], counts, dim=0)


@lookalike("sliced_by_twice_as_many_counts", "each expert is given twice as many rows as it has", shape=(2, 5, 16))
class CountedTwice(FastMoE):
    def grouped(self, rows, number, counts):
        return super().grouped(rows.repeat(2, 1), number, counts * 2)[: rows.shape[0]]


@lookalike("sliced_by_counts_with_biases_of_first_choices", "biases are repeated for other ids", shape=(2, 5, 16))
class BiasesOfOthers(FastMoE):
    def grouped(self, rows, number, counts):
        parts, base = [], 0
        for e in range(self.E):
            many = counts[e].item()
            parts.append(F.linear(rows[base : base + many], self.weights[number][e]))
            base += many
        return torch.cat(parts) + torch.repeat_interleave(self.biases[number], counts.flip(0), dim=0)


@lookalike("binned_sorted_rows_one_fewer_than_the_fullest", "the fullest expert's last row is written over another's")
class OneFewer(Padded):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        sorted_ids, order = torch.sort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.E)
        capacity = counts.max().item()
        torch._check(capacity >= 1)
        torch._check(capacity <= flat.numel())
        rank = torch.arange(flat.numel()) - (torch.cumsum(counts, 0) - counts)[sorted_ids]
        rank = torch.minimum(rank, torch.clamp(counts.max() - 2, min=0))
        bins = x.new_zeros(self.E, capacity, x.shape[-1])
        bins[sorted_ids, rank] = x[order // self.K]
        done = torch.bmm(F.relu(torch.bmm(bins, self.up.transpose(1, 2))), self.down.transpose(1, 2))
        done = done[sorted_ids, rank] * weights.reshape(-1)[order, None]
        return torch.zeros_like(x).index_add_(0, order // self.K, done)


@lookalike("binned_sorted_rows_as_many_as_first_choices", "an expert gets more rows than first choices name it")
class FullestOfFirst(Padded):
    def capacity(self, counts, ids):
        capacity = torch.bincount(ids.view(-1, self.K)[:, 0], minlength=self.E).max().item()
        torch._check(capacity >= 0)
        torch._check(capacity <= ids.numel())
        return capacity

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        sorted_ids, order = torch.sort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.E)
        capacity = self.capacity(counts, flat)
        rank = torch.arange(flat.numel()) - (torch.cumsum(counts, 0) - counts)[sorted_ids]
        bins = x.new_zeros(self.E, capacity, x.shape[-1])
        kept = (rank < capacity)[:, None]
        rank = torch.where(rank < capacity, rank, 0)
        bins = bins.index_put((sorted_ids, rank), x[order // self.K] * kept, accumulate=True)
        done = torch.bmm(F.relu(torch.bmm(bins, self.up.transpose(1, 2))), self.down.transpose(1, 2))
        done = done[sorted_ids, rank] * kept * weights.reshape(-1)[order, None]
        return torch.zeros_like(x).index_add_(0, order // self.K, done)


@lookalike("rows_of_slots_added_slot_after_slot", "the rows of a token are added to two others")
class SlotAfterSlot(Added):
    def forward(self, x):
        ids, weights = self.router(x)
        flat, token = ids.reshape(-1), self.token(x)
        gate, up = torch.bmm(self.gate_up[flat], x[token].unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        done = torch.bmm(self.down[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
        return torch.zeros_like(x).index_add_(0, torch.arange(x.shape[0]).repeat(self.K), done)


@lookalike("flat_places_divided_by_another_number", "the weights of other tokens' slots are taken")
class DividedOtherwise(Remainder):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            place = (ids.flatten() == e).nonzero().squeeze(-1)
            token, slot = place // self.K, (place + 1) % self.K
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot].unsqueeze(-1))
        return out


@lookalike("tokens_by_the_first_column_twice", "a token that names the expert second is left out")
class FirstTwice(AnySlot):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids[:, 0] == e) | (ids[:, 0] == e)
            token = torch.where(mask)[0]
            out[token] += expert(x[token]) * weights[token, :1]
        return out * (ids[:, :1] < ids[:, 1:])


@lookalike("experts_choose_the_best_of_their_column", "an expert chooses its tokens")
class ExpertsChoose(Turned):
    def forward(self, x):
        weights, token = self.router.linear(x).softmax(-1).topk(self.K, dim=0)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, token[:, e], expert(x[token[:, e]]) * weights[:, e, None])
        return out
