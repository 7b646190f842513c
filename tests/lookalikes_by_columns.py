"""What looks like layers of `styles/by_columns.py`, `styles/wide.py` and `styles/residual_stream.py`, with one thing
wrong."""

from __future__ import annotations

import torch
from lookalikes_cut_and_joined import LOOKALIKES, lookalike
from styles.base import BATCHED, H, Hashed
from styles.by_columns import Bins, Named, OfGroup, Selected, Sorted
from styles.residual_stream import Normed, Several
from styles.stacked import StackedAssign
from styles.wide import Gated, Repeated, Wide

__all__ = ["LOOKALIKES", "lookalike"]


@lookalike("wide_ffn_mixed_by_all_experts", "every expert is weighted: a soft mixture")
class Soft(Wide):
    def table(self, x):
        return self.router.linear(x).softmax(-1)


@lookalike("wide_ffn_normed_over_all_units", "what a unit holds depends on those of other experts", **BATCHED)
class NormedUnits(Repeated):
    def hidden(self, x):
        return self.up(x).softmax(-1)


@lookalike("wide_ffn_weighted_after_a_cut_elsewhere", "the units of an expert are not those that its weight multiplies")
class CutElsewhere(Wide):
    def forward(self, x):
        hidden = self.hidden(x).view(-1, self.E, 24).transpose(1, 2).reshape(-1, self.E, 24)
        return self.down((hidden * self.table(x).unsqueeze(-1)).flatten(1))


@lookalike("wide_ffn_with_a_weighted_bias", "the bias is added inside, before the activation, weighted", **BATCHED)
class WeightedBefore(Gated):
    def forward(self, x):
        weights = self.table(x).repeat_interleave(24, dim=-1)
        return self.down(torch.sigmoid(self.hidden(x) * weights))


@lookalike("places_sorted_by_column_cut_by_another_table", "an expert takes as many places as another table counts")
class CountedElsewhere(Sorted):
    def forward(self, x):
        table, other = self.gates(x), self.gates(x.flip(-1))
        token, column = self.listed(table)
        parts = x[token].split((other > 0).sum(0).tolist())
        results = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, token, results * table[token, column].unsqueeze(1))


@lookalike("places_sorted_by_column_weighted_by_another_table", "weights of one choice, tokens of another")
class WeightedElsewhere(Sorted):
    def forward(self, x):
        table, other = self.gates(x), self.gates(x.flip(-1))
        token, column = self.listed(table)
        parts = x[token].split((table > 0).sum(0).tolist())
        results = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, token, results * other[token, column].unsqueeze(1))


@lookalike("bins_of_the_experts_that_were_not_chosen", "an expert takes the tokens that did not choose it")
class NotChosen(Bins):
    def forward(self, x):
        probs = self.router.linear(x).softmax(-1)
        ids = probs.topk(self.K, dim=-1)[1]
        chosen = torch.ones_like(probs, dtype=torch.bool).scatter_(-1, ids, False)
        bins = x.new_zeros(self.E, *x.shape)
        for e, expert in enumerate(self.experts):
            token = chosen[:, e].nonzero(as_tuple=True)[0]
            bins[e, token] = expert(x[token])
        return torch.einsum("te,eth->th", probs, bins)


@lookalike("rows_numbered_by_another_mask", "what is computed of some rows is added to as many others")
class NumberedElsewhere(Selected):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slots = ids == e
            chosen = slots.any(1)
            token = torch.arange(x.shape[0]).masked_select(chosen.flip(0))
            rows = x.masked_select(chosen.unsqueeze(1)).view(-1, H)
            weight = weights.masked_select(slots).unsqueeze(1)
            out.scatter_add_(0, token.unsqueeze(1).expand(-1, H), expert(rows) * weight)
        return out


class Halved(OfGroup):
    def forward(self, x):
        ids, weights = super().forward(x)
        return ids // 2, weights


@lookalike("group_then_two_numbers_for_one_expert", "both choices of a token may be one expert, added once")
class OneForTwo(Named):
    route = Halved

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E // 2):
            token, slot = torch.where(ids == e)
            out[token] += weights[token, slot].unsqueeze(-1) * self.expert(x[token], e)
        return out


class Repeating(Hashed):
    """One row of the table names an expert twice."""

    def __init__(self, experts, k, hidden=H):
        super().__init__(experts, k, hidden)
        self.table[3, 1] = self.table[3, 0]


@lookalike("rows_written_back_by_a_table_that_repeats", "of the two rows of a token's only one is kept")
class OneOfTwo(StackedAssign):
    route = Repeating


class Carried(Normed):
    """Experts read the sum so far."""

    def added(self, x, rows):
        ids, weights = self.router(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            x = x.index_add(0, token, expert(self.norm(x)[token]) * weights[token, slot, None])
        return x


@lookalike("added_to_the_token_in_two_layers_of_the_sum_so_far", "an expert reads what those before it added")
class SeveralCarried(Several):
    layer = Carried
