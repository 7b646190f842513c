"""Layers as tutorials and ports write them: plain ops, every expert on every token, or counted by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import (
    BATCHED,
    BestThenSoftmax,
    H,
    I,
    Listed,
    MaxOfSoftmax,
    MoE,
    Sequence,
    Simple,
    normal,
    style,
)


@style("dense_stack_table_slot_after_slot", **BATCHED)
class SlotAfterSlot(Listed):
    """The table is filled column by column of the ids."""

    route = BestThenSoftmax

    def forward(self, x):
        ids, weights = self.router(x.flatten(0, 1))
        ids, weights = ids.unflatten(0, x.shape[:2]), weights.unflatten(0, x.shape[:2])
        every = torch.cat([expert(x).unsqueeze(-2) for expert in self.experts], dim=-2)
        table = torch.zeros(*x.shape[:2], self.E)
        for k in range(self.K):
            table.scatter_(-1, ids[..., k : k + 1], weights[..., k : k + 1])
        return (table.unsqueeze(-1) * every).sum(dim=-2)


class RoutedByEinsum(MoE):
    """A router that is a product of einsum, on an input of any batch and sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.wi, self.wo = nn.Parameter(torch.randn(H, self.E)), normal(self.E, H, I), normal(self.E, I, H)


@style("all_experts_einsum_router", **BATCHED)
class EinsumRouter(RoutedByEinsum):
    def forward(self, x):
        weights, ids = torch.einsum("bsd,de->bse", x, self.kernel).softmax(-1).topk(self.K)
        combine = torch.einsum("bsk,bske->bse", weights, F.one_hot(ids, self.E).to(x.dtype))
        h = F.relu(torch.einsum("bsd,edf->bsef", x, self.wi))
        return torch.einsum("bsed,bse->bsd", torch.einsum("bsef,efd->bsed", h, self.wo), combine)


@style("all_experts_one_einsum_router", **BATCHED)
class OneEinsumRouter(RoutedByEinsum):
    def forward(self, x):
        best, ids = (x @ self.kernel).topk(self.K)
        combine = (F.one_hot(ids, self.E) * best.softmax(-1)[..., None]).sum(-2)
        h = F.relu(torch.einsum("bsd,edf->bsef", x, self.wi))
        return torch.einsum("bsef,efd,bse->bsd", h, self.wo, combine)


@style("dense_loop_where_one_wide_ids", **BATCHED)
class WhereOneWide(Listed):
    """One expert per token; ids and weights keep a dimension for it; experts have biases."""

    K = 1
    kind = Sequence
    route = MaxOfSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        out = 0
        for e, expert in enumerate(self.experts):
            out = out + torch.where(ids == e, expert(x) * weights, torch.zeros_like(x))
        return out


@style("dense_loop_mask_times_weight_one_wide")
class MaskTimesWeight(Simple):
    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            out = out + self.expert(x, e) * (weights * (ids == e))
        return out


@style("dense_loop_mask_by_batch_and_sequence", **BATCHED)
class MaskByBatch(Simple):
    """One expert per token, whose ids stand by batch and sequence."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        weights, ids = self.router.linear(x).softmax(dim=-1).max(dim=-1)
        out = torch.zeros_like(x)
        for e in range(self.E):
            out = out + torch.where((ids == e)[..., None], self.expert(x, e) * weights[..., None], 0.0)
        return out


class SortedByHand(Simple):
    def forward(self, x):
        ids, weights = self.router(x)
        order = ids.flatten().argsort(stable=True)
        return self.sorted(x, ids, weights, order)


@style("sorted_counted_expert_by_expert", torch="2.13")
class CountedOneByOne(SortedByHand):
    """How many rows an expert has, is asked for each."""

    def sorted(self, x, ids, weights, order):
        ends = torch.stack([(ids.flatten() == e).sum() for e in range(self.E)]).cumsum(0)
        rows, start = x[order // self.K], 0
        out = torch.zeros_like(rows)
        for e in range(self.E):
            end = ends[e].item()
            out[start:end] = self.expert(rows[start:end], e)
            start = end
        slots = torch.empty_like(out)
        slots[order] = out
        return (slots.view(-1, self.K, H) * weights.unsqueeze(-1)).sum(1)


@style("sorted_ends_searched_index_add")
class EndsSearched(SortedByHand):
    """Where rows end is searched for; an expert's part of the places tells its tokens."""

    def sorted(self, x, ids, weights, order):
        ends = torch.searchsorted(ids.flatten()[order], torch.arange(self.E), right=True).tolist()
        out, start = torch.zeros_like(x), 0
        for e, end in enumerate(ends):
            places = order[start:end]
            token, start = places // self.K, end
            out.index_add_(0, token, self.expert(x[token], e) * weights.flatten()[places, None])
        return out


@style("sorted_split_histc_of_cast_ids")
class HistcOfCast(SortedByHand):
    """The ids are cast, and then flattened, to be counted."""

    def sorted(self, x, ids, weights, order):
        counts = torch.histc(ids.float().view(-1), bins=self.E, min=0, max=self.E - 1)
        token = order // self.K
        parts = x[token].split(counts.int().tolist())
        joined = torch.cat([self.expert(part, e) for e, part in enumerate(parts)])
        return torch.zeros_like(x).index_add_(0, token, joined * weights.flatten()[order, None])
