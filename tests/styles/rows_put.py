"""Loops that put an expert's results into zeros of their own, or over copies of the rows, and then add it all up."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import BATCHED, BestThenSoftmax, GeGLU, GroupLimited, H, Listed, Sequence, Stacked, style


@style("rows_put_into_zeros_then_weighted")
class PutThenWeighted(Listed):
    """The commonest: results in zeros, weighted as they are added."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            chosen = mine.any(dim=-1)
            y = torch.zeros_like(x)
            y[chosen] = expert(x[chosen])
            out = out + y * (weights * mine).sum(dim=-1, keepdim=True)
        return out


@style("rows_put_stacked_and_summed")
class PutStacked(Stacked):
    """Weighted before they are put; all stacked and summed."""

    route = BestThenSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        results = []
        for e in range(self.E):
            mine = ids == e
            chosen = mine.any(dim=-1)
            result = torch.zeros_like(x)
            result[chosen] = self.expert(x[chosen], e) * (weights * mine).sum(dim=-1)[chosen].unsqueeze(-1)
            results.append(result)
        return torch.stack(results, dim=1).sum(dim=1)


@style("rows_put_summed_by_python", **BATCHED)
class PutSum(Listed):
    """[B, S, H] all the way; `sum` begins with 0."""

    kind = GeGLU

    def forward(self, x):
        ids, weights = self.router(x.reshape(-1, H))
        ids, weights = ids.view(*x.shape[:2], -1), weights.view(*x.shape[:2], -1)
        results = []
        for e, expert in enumerate(self.experts):
            mine = ids == e
            chosen = mine.any(dim=-1)
            result = x.new_zeros(x.shape)
            result[chosen] = expert(x[chosen])
            results.append((weights * mine).sum(dim=-1, keepdim=True) * result)
        return sum(results)


@style("rows_put_at_places_by_token_and_slot")
class PutAtPlaces(Listed):
    """A token's row once, as its ids are distinct; index_copy into zeros."""

    kind = Sequence
    route = GroupLimited
    E = 8

    def forward(self, x):
        ids, weights = self.router(x)
        out = self.beside(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            rows = expert(x[token]) * weights[token, slot, None]
            out = out + torch.zeros_like(x).index_copy(0, token, rows)
        return out

    def beside(self, x):
        return torch.tanh(x)


@style("rows_put_times_table_column")
class PutTable(Listed):
    """The places of a column's mask; the weight is a column of a table."""

    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            place = torch.nonzero((ids == e).any(dim=-1)).squeeze(-1)
            part = torch.zeros_like(x)
            part[place] = expert(x[place])
            out += table[:, e : e + 1] * part
        return out


@style("rows_put_by_expert_in_one_tensor")
class PutByExpert(Stacked):
    """One tensor of zeros [E, T, H], written expert by expert."""

    def forward(self, x):
        ids, weights = self.router(x)
        results = torch.zeros(self.E, *x.shape, dtype=x.dtype)
        for e in range(self.E):
            mine = ids == e
            chosen = mine.any(dim=-1)
            results[e, chosen] = self.expert(x[chosen], e) * (weights * mine).sum(dim=-1)[chosen][:, None]
        return results.sum(dim=0)


@style("rows_put_masked_scatter_added_in_float32")
class PutScattered(Stacked):
    """A model in bfloat16: masked_scatter, and a sum in float32."""

    def __init__(self):
        super().__init__()
        self.bfloat16()

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x, dtype=torch.float32)
        for e in range(self.E):
            mine = ids == e
            chosen = mine.any(dim=-1)
            part = torch.zeros_like(x).masked_scatter(chosen[:, None], self.expert(x[chosen], e))
            out = out + part.float() * (weights * mine).sum(dim=-1, keepdim=True)
        return out.to(x.dtype)


@style("rows_scattered_element_by_element")
class ScatteredElements(Listed):
    """Each element of a row by its token's number: gather, and scatter into zeros."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            place = torch.nonzero(mine.any(dim=-1)).squeeze(-1)
            at = place.unsqueeze(-1).expand(-1, H)
            rows = expert(x.gather(0, at)) * (weights * mine).sum(dim=-1)[place].unsqueeze(-1)
            out = out + torch.zeros_like(x).scatter(0, at, rows)
        return out


@style("rows_written_by_the_only_column_of_ids")
class OnlyColumn(Listed):
    """Top 1: the only column of the ids; every row is written once, and weighted at the end."""

    K = 1

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.empty_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids[..., 0] == e
            out[chosen] = expert(x[chosen])
        return out * weights


@style("rows_added_into_zeros_then_summed_in_turn")
class AddedIntoZeros(Listed):
    """index_add into zeros of its own, for every expert."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out = out + torch.zeros_like(x).index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@style("masked_copies_of_kept_choices_nllb")
class KeptChoices(Listed):
    """NLLB whole: two argmaxes, places in turn held to a capacity, what is left renormalised; rows of masked copies."""

    kind = Sequence
    #: an expert's places, in thirds of all tokens; with less than all, choices are dropped, and count zero
    thirds = 3

    def choices(self, logits):
        probs = logits.softmax(dim=-1)
        first = F.one_hot(probs.argmax(dim=-1), self.E)
        second = F.one_hot(logits.masked_fill(first.bool(), float("-inf")).argmax(dim=-1), self.E)
        return probs, first, second

    def table(self, x):
        probs, first, second = self.choices(self.router.linear(x))
        places = torch.cumsum(first, dim=0) - 1, torch.cumsum(second, dim=0) - 1
        places[1].add_(torch.sum(first, dim=0, keepdim=True))
        capacity = self.thirds * x.shape[0] // 3
        first, second = first * torch.lt(places[0], capacity), second * torch.lt(places[1], capacity)
        one, two = ((probs * mask).sum(dim=1) for mask in (first, second))
        total = torch.clamp(one + two, min=torch.finfo(probs.dtype).eps)
        return (one / total)[:, None] * first + (two / total)[:, None] * second

    def forward(self, x):
        table = self.table(x)
        mask = table.bool()
        copies = torch.einsum("bm,be->ebm", x, mask)
        for e, expert in enumerate(self.experts):
            chosen = mask[:, e]
            results = expert(copies[e, chosen])
            results *= 0.8
            copies[e, chosen] = torch.einsum("b,be->be", table[chosen, e], results)
        return copies.sum(dim=0)

    def plain(self, x):
        return sum(self.table(x)[:, e, None] * (expert(x) * 0.8) for e, expert in enumerate(self.experts))


@style("masked_copies_of_dropped_choices_nllb")
class DroppedChoices(KeptChoices):
    """Many of them dropped: their weights are zero, which is no matter of the experts."""

    thirds = 1


@style("masked_copies_of_unpadded_tokens_nllb")
class Unpadded(KeptChoices):
    """Tokens that are masked out are nobody's."""

    def choices(self, logits):
        probs, first, second = super().choices(logits)
        unpadded = (logits.amax(dim=-1, keepdim=True) > 0).to(first.dtype)
        return probs, first * unpadded, second * unpadded


@style("masked_copies_cloned_by_sums_of_masks")
class ClonedCopies(KeptChoices):
    """The mask is the sum of both choices', and rows are read of copies that stay as they were."""

    def forward(self, x):
        _, first, second = self.choices(self.router.linear(x))
        table, mask = self.table(x), (first + second).bool()
        copies = torch.einsum("bm,be->ebm", x, mask.to(x.dtype))
        out = copies.clone()
        for e, expert in enumerate(self.experts):
            chosen = mask[:, e]
            out[e, chosen] = torch.einsum("b,be->be", table[chosen, e], expert(copies[e, chosen]) * 0.8)
        return out.sum(dim=0)


@style("rows_of_expanded_tokens_put_by_expert")
class ExpandedTokens(Listed):
    """Tokens are expanded for all experts, and each reads its own of these."""

    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights)
        mask = torch.zeros_like(table).scatter(1, ids, 1.0).bool()
        tokens, out = x.unsqueeze(0).expand(self.E, -1, -1), torch.zeros(self.E, *x.shape)
        for e, expert in enumerate(self.experts):
            chosen = mask[:, e]
            out[e, chosen] = table[chosen, e][:, None] * expert(tokens[e, chosen])
        return out.sum(dim=0)
