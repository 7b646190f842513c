"""Rows sorted by expert, cut into parts by where each expert's begin and end, and joined again.

One projection at a time, with rows behind them, counted or cut in ways of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import (
    ASKS,
    BATCHED,
    Apart,
    BestThenSoftmax,
    H,
    I,
    Listed,
    Router,
    Simple,
    Stacked,
    Unnormalised,
    normal,
    style,
)


class SplitAndPadded(Apart):
    """torchtitan: the first rows, as many as are counted, are split; rows of zeros are put behind the results."""

    def counts(self, ids):
        return torch.bincount(ids.flatten(), minlength=self.E)

    def forward(self, x):
        ids, weights = self.router(x)
        order = torch.argsort(ids.flatten(), stable=True)
        token = (order // self.K).reshape(-1, 1).expand(-1, H)
        rows = torch.gather(x, 0, token)
        counts = self.counts(ids).tolist()
        padding = rows.shape[0] - sum(counts)
        parts = torch.split(rows[: sum(counts)], counts, dim=0)
        done = torch.cat([self.expert(part, e) for e, part in enumerate(parts)])
        done = torch.vstack((done, done.new_zeros((padding, H))))
        return torch.zeros_like(x).scatter_add(0, token, done * weights.flatten()[order, None])


style("sorted_first_rows_split_and_padded_torchtitan", **ASKS)(SplitAndPadded)


@style("sorted_first_rows_split_counted_by_adding_ones", **ASKS)
class CountedByAdding(SplitAndPadded):
    def counts(self, ids):
        flat = ids.flatten()
        return torch.zeros(self.E, dtype=torch.long).scatter_add_(0, flat, torch.ones_like(flat))


@style("sorted_first_rows_split_counted_by_index_add", **ASKS)
class CountedByIndexAdd(SplitAndPadded):
    def counts(self, ids):
        flat = ids.flatten()
        return torch.zeros(self.E, dtype=torch.long).index_add(0, flat, torch.ones_like(flat))


@style("sorted_rows_sliced_by_offsets_one_projection_at_a_time", torch="2.13", **BATCHED)
class ByOffsets(Stacked):
    """A grouped_mm of one's own: offsets with a zero in front, slices, and the results joined; three of them."""

    def grouped(self, rows, weight, offsets):
        ends = torch.zeros(self.E + 1, dtype=offsets.dtype)
        ends[1:] = offsets
        return torch.cat([F.linear(rows[ends[e] : ends[e + 1]], weight[e]) for e in range(self.E)])

    def forward(self, x):
        rows = x.view(-1, H)
        ids, weights = self.router(rows)
        order = ids.view(-1).argsort(stable=True)
        offsets = torch.histc(ids.float(), bins=self.E, min=0, max=self.E - 1).cumsum(0, dtype=torch.int32)
        gate, up = self.grouped(rows[order // self.K], self.gate_up, offsets).chunk(2, dim=-1)
        done = self.grouped(F.silu(gate) * up, self.down, offsets)
        back = torch.zeros_like(done)
        back[order] = done
        back = torch.bmm(weights.unsqueeze(1), back.view(-1, self.K, H))
        return back.squeeze(1).view_as(x)


@style("sorted_rows_multiplied_into_parts_of_zeros", **ASKS)
class IntoParts(Stacked):
    """The fallback of transformers' grouped_mm: each expert's product is written where its rows are."""

    def grouped(self, rows, weight, offsets):
        out = torch.zeros(rows.shape[0], weight.shape[1], dtype=rows.dtype)
        start = 0
        for e, end in enumerate(offsets.tolist()):
            if start == end:
                continue
            torch.mm(rows[start:end], weight[e].t(), out=out[start:end])
            start = end
        return out

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        order = torch.argsort(flat)
        counts = torch.histc(flat[order].float(), bins=self.E, min=0, max=self.E - 1)
        offsets = torch.cumsum(counts, 0, dtype=torch.int32)
        gate, up = self.grouped(x[order // self.K], self.gate_up, offsets).chunk(2, dim=-1)
        done = self.grouped(F.silu(gate) * up, self.down, offsets) * weights.reshape(-1)[order, None]
        return done[torch.argsort(order)].view(-1, self.K, H).sum(1)


@style("sorted_rows_sliced_by_counts_with_repeated_biases_fastmoe", **BATCHED)
class FastMoE(Listed):
    """FastMoE: a linear of all experts at a time, whose biases are repeated as often as an expert has rows."""

    kind = nn.Identity
    route = BestThenSoftmax

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([normal(self.E, I, H), normal(self.E, H, I)])
        self.biases = nn.ParameterList([normal(self.E, I), normal(self.E, H)])

    def expert(self, rows, e):
        hidden = F.gelu(F.linear(rows, self.weights[0][e], self.biases[0][e]))
        return F.linear(hidden, self.weights[1][e], self.biases[1][e])

    def grouped(self, rows, number, counts):
        parts, base = [], 0
        for e in range(self.E):
            many = counts[e].item()
            parts.append(F.linear(rows[base : base + many], self.weights[number][e]))
            base += many
        return torch.cat(parts) + torch.repeat_interleave(self.biases[number], counts, dim=0)

    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, weights = self.router(rows)
        flat = ids.view(-1)
        _, order = torch.sort(flat)
        counts = torch.zeros(self.E, dtype=torch.long).scatter_add_(0, flat, torch.ones_like(flat))
        taken = torch.index_select(rows, 0, torch.div(order, self.K, rounding_mode="floor"))
        done = self.grouped(F.gelu(self.grouped(taken, 0, counts)), 1, counts)
        back = torch.zeros_like(done)
        back.index_copy_(0, order, done)
        return torch.bmm(weights.view(-1, 1, self.K), back.view(-1, self.K, H)).reshape(x.shape)


class OneOfAffinities(Router):
    """BASE: one expert, weighted by the sigmoid of how near its centroid is."""

    def forward(self, x):
        affinities = x.matmul(self.linear.weight.transpose(0, 1))
        ids = torch.topk(affinities, dim=1, k=1).indices
        return ids, torch.sigmoid(affinities.gather(1, ids))


@style("sorted_rows_split_and_joined_base_layer", **ASKS)
class BaseLayer(Listed):
    """fairseq's BASE layer: the row itself, and what its expert adds to it in part."""

    K, route = 1, OneOfAffinities

    def beside(self, x):
        _, weights = self.router(x)
        return (1 - weights) * x

    def forward(self, x):
        centroids = self.router.linear.weight
        ids = torch.topk(x.matmul(centroids.transpose(0, 1)), dim=1, k=1).indices.view(-1)
        ids, order = torch.sort(ids)
        counts = torch.zeros(self.E, dtype=torch.long).index_add_(0, ids, torch.ones_like(ids)).tolist()
        rows = x[order]
        alpha = torch.sigmoid((rows * centroids[ids]).sum(-1)).unsqueeze(1)
        done = torch.cat([expert(part) for expert, part in zip(self.experts, rows.split(counts), strict=True)])
        rows = alpha * done + (1 - alpha) * rows
        back = torch.empty_like(order).scatter_(0, order, torch.arange(0, order.size(0)))
        return rows[back]


@style("sorted_ends_taken_one_by_one_hidream", **ASKS)
class EndsAsTensors(Listed):
    """Where each expert's rows end is compared and sliced with as a tensor that holds a number."""

    route = Unnormalised

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        order = flat.argsort()
        ends = flat.bincount(minlength=self.E).cumsum(0)
        token = order // self.K
        out = torch.zeros_like(x)
        for e, end in enumerate(ends):
            start = 0 if e == 0 else ends[e - 1]
            if start == end:
                continue
            mine = token[start:end]
            done = self.experts[e](x[mine])
            done.mul_(weights.view(-1, 1)[order[start:end]])
            out.scatter_reduce_(0, mine.view(-1, 1).repeat(1, x.shape[-1]), done, reduce="sum")
        return out


class UniqueInOrder(Simple):
    """Sorted ids, each once, with how many there are of it: an expert without rows is not among them."""

    def forward(self, x):
        ids, weights = self.router(x)
        experts, order = torch.sort(ids.flatten())
        experts, counts = torch.unique_consecutive(experts, return_counts=True)
        token = torch.div(order, self.K, rounding_mode="floor")
        slot = order - token * self.K
        out, start = torch.zeros_like(x), 0
        for e, many in zip(experts.tolist(), counts.tolist(), strict=True):
            mine, own = token[start : start + many], slot[start : start + many]
            out.index_add_(0, mine, self.expert(x[mine], e) * weights[mine, own, None])
            start += many
        return out


style("sorted_unique_consecutive", **ASKS)(UniqueInOrder)


@style("sorted_unique_consecutive_of_ids_by_argsort", **ASKS)
class UniqueByArgsort(UniqueInOrder):
    def forward(self, x):
        ids, weights = self.router(x)
        order = ids.flatten().argsort(stable=True)
        experts, counts = torch.unique_consecutive(ids.flatten()[order], return_counts=True)
        out, start = torch.zeros_like(x), 0
        for e, many in zip(experts.tolist(), counts.tolist(), strict=True):
            mine = order[start : start + many]
            done = self.expert(x[mine // self.K], e) * weights.flatten()[mine, None]
            out.index_add_(0, mine // self.K, done)
            start += many
        return out


@style("sorted_parts_written_over_from_end_to_end", **ASKS)
class WrittenOver(Simple):
    """histc of ids [T, K]; ends and starts as lists of Python's."""

    def forward(self, x):
        ids, weights = self.router(x)
        order = torch.argsort(ids.view(-1), stable=True)
        ends = torch.histc(ids.float(), bins=self.E, min=0, max=self.E - 1).long().cumsum(0).tolist()
        rows = x[order // self.K]
        done = torch.empty_like(rows)
        for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if start == end:
                continue
            done[start:end] = self.expert(rows[start:end], e)
        done *= weights.view(-1, 1)[order]
        out = torch.empty_like(done)
        out[order] = done
        return out.view(-1, self.K, H).sum(1)


class Padded(Simple):
    """Rows sorted by expert, put where their rank is in bins as long as the fullest."""

    def capacity(self, counts, ids):
        capacity = counts.max().item()
        torch._check(capacity >= 0)
        torch._check(capacity <= ids.numel())
        return capacity

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        sorted_ids, order = torch.sort(flat, stable=True)
        counts = torch.bincount(flat, minlength=self.E)
        starts = torch.cumsum(counts, 0) - counts
        rank = torch.arange(flat.numel()) - starts[sorted_ids]
        bins = x.new_zeros(self.E, self.capacity(counts, flat), H)
        bins[sorted_ids, rank] = x[order // self.K]
        done = torch.bmm(F.relu(torch.bmm(bins, self.up.transpose(1, 2))), self.down.transpose(1, 2))
        done = done[sorted_ids, rank] * weights.reshape(-1)[order, None]
        return torch.zeros_like(x).index_add_(0, order // self.K, done)


style("binned_sorted_rows_as_many_as_the_fullest")(Padded)


@style("binned_sorted_rows_by_expert_and_rank")
class PaddedForAll(Padded):
    def capacity(self, counts, ids):
        return ids.numel()
