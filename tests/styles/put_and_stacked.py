"""Every expert's results in zeros of their own, stacked, of which each token takes its experts'; and single choices."""

from __future__ import annotations

import torch

from styles.base import (
    ASKS,
    BATCHED,
    BestThenSoftmax,
    GeGLU,
    H,
    Hashed,
    Listed,
    MaxOfSoftmax,
    Sequence,
    Stacked,
    Unnormalised,
    style,
)


class Put(Listed):
    """What every style here shares: results [T, E, H], zero where a token is another expert's."""

    def results(self, x, ids):
        results = []
        for e, expert in enumerate(self.experts):
            chosen = (ids == e).any(dim=-1)
            result = torch.zeros_like(x)
            result[chosen] = expert(x[chosen])
            results.append(result)
        return torch.stack(results, dim=x.dim() - 1)


@style("put_and_stacked_then_gathered")
class ThenGathered(Put):
    """The results of a token's experts, weighted and summed."""

    def forward(self, x):
        ids, weights = self.router(x)
        chosen = self.results(x, ids).gather(1, ids.unsqueeze(-1).expand(-1, -1, H))
        return (chosen * weights.unsqueeze(-1)).sum(dim=1)


@style("put_and_stacked_then_weighted_by_a_table", **BATCHED)
class ThenWeighted(Put):
    """[B, S, E, H] and a table [B, S, E] in an einsum."""

    kind = GeGLU

    def forward(self, x):
        ids, weights = self.router(x.view(-1, H))
        ids, weights = ids.view(*x.shape[:2], -1), weights.view(*x.shape[:2], -1)
        table = torch.zeros(*x.shape[:2], self.E, dtype=x.dtype).scatter(-1, ids, weights)
        return torch.einsum("bseh,bse->bsh", self.results(x, ids), table)


@style("put_into_one_tensor_if_an_expert_has_rows", **ASKS)
class IntoOneTensor(Listed):
    """Written to [T, E, H] at places, for experts with rows only; torch.where a token's experts are."""

    kind = Sequence

    def forward(self, x):
        ids, weights = self.router(x)
        results = x.new_zeros(x.shape[0], self.E, H)
        for e, expert in enumerate(self.experts):
            place = (ids == e).any(dim=-1).nonzero().flatten()
            if place.numel() > 0:
                results[place, e] = expert(x[place])
        chosen = results[torch.arange(x.shape[0]).unsqueeze(-1), ids]
        return torch.einsum("tk,tkh->th", weights, chosen)


@style("put_if_any_and_stacked_by_expert", **ASKS)
class IfAny(Stacked):
    """[E, T, H]; idle experts leave their zeros, and the table of weights is as high."""

    route = Unnormalised

    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights)
        results = []
        for e in range(self.E):
            result, chosen = torch.zeros_like(x), (ids == e).any(dim=-1)
            if chosen.sum() > 0:
                result[chosen] = self.expert(x[chosen], e)
            results.append(result)
        return (torch.stack(results) * table.T.unsqueeze(-1)).sum(dim=0)


@style("put_by_token_and_slot_weighted_then_gathered")
class WeightedInside(Listed):
    """Weighted as they are put: the weights of a token's slots travel with its rows."""

    route = BestThenSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        results = []
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            rows = expert(x[token]) * weights[token, slot].unsqueeze(-1)
            results.append(torch.zeros_like(x).index_copy(0, token, rows))
        results = torch.stack(results, dim=1)
        return results.gather(1, ids.unsqueeze(-1).expand(-1, -1, H)).sum(dim=1)


@style("stacked_of_which_one_is_taken_by_index")
class OneByIndex(Listed):
    """Top 1: every expert on every token, and a token's own of them."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        results = torch.stack([expert(x) for expert in self.experts])
        return results[ids.squeeze(-1), torch.arange(x.shape[0])] * weights


@style("stacked_last_of_which_one_is_gathered", **BATCHED)
class OneGathered(Listed):
    """Top 1: the experts are the last dimension, and so is the token's one."""

    K = 1
    route = MaxOfSoftmax
    kind = GeGLU

    def forward(self, x):
        ids, weights = self.router(x.view(-1, H))
        results = torch.stack([expert(x) for expert in self.experts], dim=-1)
        at = ids.view(*x.shape[:2], 1, 1).expand(-1, -1, H, -1)
        return weights.view(*x.shape[:2], 1) * results.gather(-1, at).squeeze(-1)


@style("stacked_with_an_expert_of_zeros")
class ExpertOfZeros(Listed):
    """The last expert is no module: whoever is routed to it gets nothing."""

    def __init__(self):
        super().__init__()
        del self.experts[-1]

    def expert(self, rows, e):
        return self.experts[e](rows) if e < len(self.experts) else torch.zeros_like(rows)

    def forward(self, x):
        ids, weights = self.router(x)
        results = torch.stack([self.expert(x, e) for e in range(self.E)], dim=1)
        return (results.gather(1, ids.unsqueeze(-1).expand(-1, -1, H)) * weights.unsqueeze(-1)).sum(dim=1)


@style("sorted_rows_written_by_masks_of_sorted_ids")
class SortedRowsWritten(Listed):
    """Rows sorted by expert, and masks over the sorted ids."""

    def forward(self, x):
        ids, weights = self.router(x)
        order = ids.flatten().argsort(stable=True)
        named, token = ids.flatten()[order], order // self.K
        rows = x[token]
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            out[named == e] = expert(rows[named == e])
        return torch.zeros_like(x).index_add(0, token, out * weights.flatten()[order].unsqueeze(-1))


class TwoTables(Hashed):
    """Two hash functions, each with a table of its own: they may agree."""

    def __init__(self, experts, k, hidden=H):
        super().__init__(experts, k, hidden)
        self.table = torch.randint(experts, (16, k))


@style("rows_of_experts_that_may_be_named_twice")
class NamedTwice(Listed):
    """A token's row once, with the sum of the weights of all slots that name the expert."""

    route = TwoTables

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            place = mine.any(dim=-1).nonzero().squeeze(-1)
            out[place] += expert(x[place]) * (weights * mine).sum(dim=-1)[place].unsqueeze(-1)
        return out


@style("dense_loop_of_experts_that_may_be_named_twice")
class DenseNamedTwice(Listed):
    """Every expert on every token, with that sum."""

    route = TwoTables

    def forward(self, x):
        ids, weights = self.router(x)
        return sum(
            (weights * (ids == e)).sum(dim=-1, keepdim=True) * expert(x) for e, expert in enumerate(self.experts)
        )
