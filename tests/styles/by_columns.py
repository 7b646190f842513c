"""Tables by token and expert, read column by column; lists sorted by column; ids of a group and of an expert in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import ASKS, BATCHED, H, Listed, MaxOfSoftmax, Router, Simple, Stacked, style
from styles.dispatcher import Gated


class OfOneHot(Simple):
    """Where columns of one-hot rows are not zero."""

    def places(self, rows, e):
        return torch.where(rows[..., e])

    def forward(self, x):
        ids, weights = self.router(x)
        rows = F.one_hot(ids, self.E)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = self.places(rows, e)
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


style("columns_of_one_hot_rows_where")(OfOneHot)


@style("columns_of_one_hot_rows_above_zero")
class AboveZero(OfOneHot):
    def places(self, rows, e):
        return (rows[:, :, e] > 0).nonzero().unbind(-1)


@style("columns_of_one_hot_rows_added_up")
class AddedUp(OfOneHot):
    """Some slot of the token names the expert; the weight is that of all that do."""

    def forward(self, x):
        ids, weights = self.router(x)
        rows = F.one_hot(ids, self.E)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token = rows[..., e].sum(-1).nonzero(as_tuple=True)[0]
            weight = (weights * rows[..., e]).sum(-1)
            out.index_add_(0, token, self.expert(x[token], e) * weight[token].unsqueeze(1))
        return out


@style("columns_of_one_hot_rows_of_hit_experts", **ASKS)
class OfHit(OfOneHot):
    def forward(self, x):
        ids, weights = self.router(x)
        rows = F.one_hot(ids, self.E)
        out = torch.zeros_like(x)
        for hit in rows.sum(dim=(0, 1)).nonzero().squeeze(-1):
            e = hit.item()
            token, slot = torch.where(rows[..., e])
            if token.numel() == 0:
                continue
            out.index_add_(0, token, self.expert(x[None, token].reshape(-1, H), e) * weights[token, slot, None])
        return out


@style("columns_of_a_bool_mask_written_to_a_copy_switch", **BATCHED)
class OfBool(Listed):
    route, K = MaxOfSoftmax, 1

    def forward(self, x):
        ids, weights = (each.view(*x.shape[:-1]) for each in self.router(x.reshape(-1, H)))
        mask = F.one_hot(ids, self.E).bool()
        out = x.clone()
        for e, expert in enumerate(self.experts):
            chosen = mask[:, :, e]
            out[chosen] = expert(x[chosen]).to(out.dtype)
        return weights.unsqueeze(-1) * out


@style("columns_of_a_scattered_mask_into_a_bin_for_each_expert")
class Bins(Listed):
    def forward(self, x):
        probs = self.router.linear(x).softmax(-1)
        ids = probs.topk(self.K, dim=-1)[1]
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, ids, True)
        table = probs.masked_fill(~chosen, 0.0)
        table = table / table.sum(dim=-1, keepdim=True)
        bins = x.new_zeros(self.E, *x.shape)
        for e, expert in enumerate(self.experts):
            token = chosen[:, e].nonzero(as_tuple=True)[0]
            bins[e, token] = expert(x[token])
        return torch.einsum("te,eth->th", table, bins)


@style("rows_numbered_by_a_mask_that_selects_them")
class Selected(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slots = ids == e
            chosen = slots.any(1)
            token = torch.arange(x.shape[0]).masked_select(chosen)
            rows = x.masked_select(chosen.unsqueeze(1)).view(-1, H)
            weight = weights.masked_select(slots).unsqueeze(1)
            out.scatter_add_(0, token.unsqueeze(1).expand(-1, H), expert(rows) * weight)
        return out


@style("slots_weighted_and_scattered_by_a_mask", **BATCHED)
class Scattered(Listed):
    def forward(self, x):
        ids, weights = (each.view(*x.shape[:-1], self.K) for each in self.router(x.reshape(-1, H)))
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = (ids == e).any(dim=-1)
            weight = torch.where(ids == e, weights, torch.zeros_like(weights)).sum(dim=-1)
            put = torch.zeros_like(x).masked_scatter(chosen.unsqueeze(-1), expert(x[chosen]))
            out = out + put * weight.unsqueeze(-1)
        return out


class Sorted(Gated, Listed):
    """Places of a table, sorted by its columns: every expert takes its part of them."""

    def listed(self, table):
        column, order = torch.nonzero(table)[:, 1].sort(stable=True)
        return torch.nonzero(table)[order, 0], column

    def forward(self, x):
        table = self.gates(x)
        token, column = self.listed(table)
        parts = x[token].split((table > 0).sum(0).tolist())
        results = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, token, results * table[token, column].unsqueeze(1))

    def plain(self, x):
        results = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (results * self.gates(x).unsqueeze(-1)).sum(1)


style("places_sorted_by_their_column", **ASKS)(Sorted)


@style("places_in_the_order_of_columns", **ASKS)
class Ordered(Sorted):
    def listed(self, table):
        places = table.nonzero()
        return places[places[:, 1].argsort(stable=True)].unbind(1)


@style("places_of_the_table_turned_around", **ASKS)
class Turned(Sorted):
    def listed(self, table):
        column, token = table.t().nonzero(as_tuple=True)
        return token, column


class OfGroup(Router):
    """A group for each token, and the best experts in it."""

    groups = 2

    def __init__(self, experts: int, k: int, hidden: int = H) -> None:
        super().__init__(experts, k, hidden)
        self.group = nn.Linear(hidden, self.groups)

    def forward(self, x):
        group_weight, group = self.group(x).softmax(-1).max(-1)
        scores = self.linear(x).view(-1, self.groups, self.experts // self.groups)
        scores = torch.where(group[:, None] == 0, scores[:, 0], scores[:, 1])
        weight, within = scores.softmax(-1).topk(self.k)
        return group.unsqueeze(-1) * (self.experts // self.groups) + within, group_weight.unsqueeze(-1) * weight


@style("group_then_experts_within_of_those_named", **ASKS)
class Named(Stacked):
    """Python goes over the numbers of the experts that are named."""

    route = OfGroup

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in torch.unique(ids).tolist():
            token, slot = (ids == e).nonzero().unbind(-1)
            out[token] += weights[token, slot].unsqueeze(-1) * self.expert(x[token], e)
        return out


@style("rows_scattered_by_a_wide_mask_times_a_column_of_the_table", **BATCHED)
class Weighted(Listed):
    """A mask and a table of the same choice; each result in zeros of its own."""

    def forward(self, x):
        ids, weights = (each.view(*x.shape[:-1], self.K) for each in self.router(x.reshape(-1, H)))
        table = x.new_zeros(*x.shape[:-1], self.E).scatter(-1, ids, weights)
        chosen = torch.zeros_like(table, dtype=torch.bool).scatter(-1, ids, True)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = chosen[..., e]
            put = torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1).expand_as(x), expert(x[mask]))
            out = out + put * table[..., e].unsqueeze(-1)
        return out


@style("sum_of_weights_kept_beside_the_sum_of_rows")
class KeptBeside(Listed):
    """The same weights are added to the rows and to what the sum is divided by."""

    def forward(self, x):
        weights, ids = self.router.linear(x).log_softmax(-1).exp().topk(self.K, dim=-1)
        total, norm = torch.zeros_like(x), x.new_zeros(x.shape[0], 1)
        for e, expert in enumerate(self.experts):
            for k in range(self.K):
                token = torch.nonzero(ids[:, k] == e).flatten()
                weight = weights[token, k].unsqueeze(1)
                total.index_add_(0, token, weight * expert(x[token]))
                norm.index_add_(0, token, weight)
        return total / norm
