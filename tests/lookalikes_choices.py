"""Look-alikes of masks and choices: see `lookalikes.py`. Of each, the report says why it was left."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lookalikes import BATCHED, LOOKALIKES, lookalike
from styles.base import Apart, Listed, Sequence

__all__ = ["BATCHED", "LOOKALIKES", "REASONS", "lookalike"]

#: what the report says, by name
REASONS = {
    "table_above_the_kth_score": "of equal ones more than K pass",
    "two_argmaxes_of_scores_times_zero": "which may repeat",
    "two_argmaxes_of_other_scores": "which may repeat",
    "rows_times_one_hot_into_biased_experts": "an expert's output that is zero wherever its routing weight is",
    "rows_beyond_a_capacity_left_out": "tokens can be dropped, as it takes 2 rows of an expert at most",
    "experts_that_read_the_residual_so_far": "a sum that nothing in the loop reads",
    "table_of_tokens_that_experts_chose": "scattered along another dimension than the experts'",
}


class Dense(Apart):
    def table(self, scores):
        raise NotImplementedError

    def forward(self, x):
        table = self.table(self.router.linear(x).softmax(dim=-1))
        h = self.act(torch.einsum("th,ehi->tei", x, self.w_gate), torch.einsum("th,ehi->tei", x, self.w_up))
        return torch.einsum("te,teh->th", table, torch.einsum("tei,eih->teh", h, self.w_down))


@lookalike("table_above_the_kth_score", "of scores that are equal, more than K pass")
class AboveKth(Dense):
    def table(self, scores):
        kept = scores * (scores >= scores.topk(self.K, dim=-1).values[..., -1:])
        return kept / kept.sum(dim=-1, keepdim=True)


@lookalike("two_argmaxes_of_scores_times_zero", "where all others are zero, the second choice is the first one again")
class TimesZero(Dense):
    def table(self, scores):
        first = F.one_hot(scores.argmax(dim=-1), self.E).to(scores.dtype)
        second = F.one_hot((scores * (1 - first)).argmax(dim=-1), self.E).to(scores.dtype)
        return (scores * first).sum(-1, keepdim=True) * first + (scores * second).sum(-1).unsqueeze(-1) * second


@lookalike("two_argmaxes_of_other_scores", "what is left out of one router's scores is the other's best")
class OtherScores(Dense):
    def table(self, scores):
        first, other = scores.argmax(dim=-1), scores.flip(-1)
        left = other.masked_fill(F.one_hot(other.argmax(dim=-1), self.E).bool(), float("-inf"))
        hots = [F.one_hot(ids, self.E).to(scores.dtype) for ids in (first, left.argmax(dim=-1))]
        one, two = ((scores * hot).sum(-1).unsqueeze(-1) * hot for hot in hots)
        return one + two


@lookalike("rows_times_one_hot_into_biased_experts", "an expert makes something of the zeros that are not its rows")
class BiasedExperts(Listed):
    K = 1
    kind = Sequence

    def forward(self, x):
        ids, weights = self.router(x)
        hot, out = F.one_hot(ids.squeeze(-1), self.E).to(x.dtype), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x * hot[:, e : e + 1]) * weights
        return out


@lookalike("rows_beyond_a_capacity_left_out", "an expert takes no more than its first two rows")
class FirstRows(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, slots = (places[:2] for places in torch.where(ids == e))
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


@lookalike("experts_that_read_the_residual_so_far", "an expert reads what those before it have added")
class ReadsTheSum(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == e)
            out = out.index_add(0, rows, expert(out[rows]) * weights[rows, slots, None])
        return out


@lookalike("table_of_tokens_that_experts_chose", "an expert chooses its three best tokens")
class ExpertsChoose(Dense):
    def table(self, scores):
        best, tokens = scores.topk(3, dim=0)
        return torch.zeros_like(scores).scatter(0, tokens, best)
