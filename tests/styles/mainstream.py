"""Layers as they are written every day: buffers for a slot or for all, lists joined at the end, sums kept beside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import ASKS, BATCHED, Apart, H, Listed, MoE, ReLU2, Router, Sequence, Simple, normal, style


class BySlot(Listed):
    """Slot after slot: the rows of each expert that has any are written into zeros, weighted and added."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for k in range(self.K):
            part = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                mask = ids[:, k] == e
                if mask.any():
                    part[mask] = expert(x[mask])
            out = out + part * weights[:, k, None]
        return out


style("slots_of_written_rows_if_any", **ASKS)(BySlot)


@style("slots_of_scattered_rows_if_any", **ASKS, **BATCHED)
class BySlotScattered(BySlot):
    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, weights = self.router(rows)
        out = torch.zeros_like(rows)
        for k in range(self.K):
            part = torch.zeros_like(rows)
            for e, expert in enumerate(self.experts):
                mask = (ids[:, k] == e).unsqueeze(1)
                if mask.any():
                    part = part.masked_scatter(mask, expert(rows.masked_select(mask).view(-1, H)))
            out = out + part * weights[:, k, None]
        return out.view_as(x)


@style("slots_of_rows_scattered_element_by_element")
class BySlotOfRows(BySlot):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for k in range(self.K):
            part = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                token = torch.where(ids[:, k] == e)[0]
                part = part.scatter(0, token[:, None].expand(-1, H), expert(x[token]))
            out = out + part * weights[:, k : k + 1]
        return out


@style("buffer_of_slots_read_by_their_tokens_if_any", **ASKS)
class Buffer(Listed):
    """A slot's place is that of its result; its token is told by a division."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        done = torch.empty(flat.shape[0], H, dtype=x.dtype)
        for e, expert in enumerate(self.experts):
            place = (flat == e).nonzero().squeeze(-1)
            if place.numel() > 0:
                done[place] = expert(x[torch.div(place, self.K, rounding_mode="floor")])
        return (done * weights.flatten()[:, None]).view(-1, self.K, H).sum(1)


@style("buffer_of_weighted_slots_by_quotient_and_remainder")
class WeightedBuffer(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        done = x.new_empty(flat.shape[0], H)
        for e, expert in enumerate(self.experts):
            place = torch.where(flat == e)[0]
            token = place // self.K
            done[place] = expert(x[token]) * weights[token, place % self.K, None]
        return done.view(-1, self.K, H).sum(1)


@style("lists_of_rows_joined_and_added_at_once")
class Collected(Apart):
    """Where each expert's rows are, what it makes of them, and one sum in the end."""

    def forward(self, x):
        ids, weights = self.router(x)
        found = [torch.where(ids == e) for e in range(self.E)]
        done = torch.cat([self.expert(x[token], e) for e, (token, _) in enumerate(found)])
        token, slot = (torch.cat(column) for column in zip(*found, strict=True))
        return torch.zeros_like(x).index_add_(0, token, done * weights[token, slot].unsqueeze(-1))


@style("modulelist_added_twice_as_much_in_float32")
class Twice(Listed):
    """The scaling factor is an argument of the addition."""

    def expert(self, rows, e):
        return super().expert(rows, e) * 2

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros(x.shape, dtype=torch.float32)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]).float() * weights[token, slot].unsqueeze(-1), alpha=2)
        return out.to(x.dtype)


@style("experts_counted_as_a_number_of_python", **ASKS)
class Counted(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if int(mask.sum()) == 0:
                continue
            token, slot = mask.nonzero(as_tuple=True)
            out[token] = out[token] + expert(x[token]) * weights[token, slot].unsqueeze(-1)
        return out


@style("experts_without_rows_take_a_row_of_zeros_nemotron_h", **ASKS)
class DummyRow(Listed):
    """Every parameter is used: zeros go through an expert without rows, and add zeros."""

    kind = ReLU2

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.E).permute(2, 0, 1)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(mask[e])
            if token.numel() > 0:
                out.index_add_(0, token, expert(x[token]) * weights[token, slot].unsqueeze(-1))
            else:
                out = out + expert(torch.zeros_like(x[0]).unsqueeze(0))
        return out


class OneOfEachHalf(Router):
    def forward(self, x):
        halves = [half.topk(1, dim=-1) for half in self.linear(x).chunk(2, dim=-1)]
        ids = torch.cat([halves[0].indices, halves[1].indices + self.experts // 2], dim=-1)
        return ids, torch.cat([half.values for half in halves], dim=-1).softmax(-1)


@style("dense_loop_of_one_expert_of_each_half")
class OfEachHalf(Apart):
    """Ids of two choices, which cannot be the same."""

    route = OneOfEachHalf

    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E).scatter(-1, ids, weights)
        out = torch.zeros_like(x)
        for e, own in enumerate(table.unbind(-1)):
            out = out + own[:, None] * self.expert(x, e)
        return out


class GroupThenExpert(Router):
    def forward(self, x):
        group = self.linear(x)[:, :2].argmax(-1)
        within = self.linear(x).view(-1, 2, self.experts // 2)
        within = within.gather(1, group.view(-1, 1, 1).expand(-1, 1, self.experts // 2)).squeeze(1)
        weights, place = within.softmax(-1).max(-1)
        return (group * (self.experts // 2) + place)[:, None], weights[:, None]


@style("rows_copied_by_group_and_expert_within")
class TwoLevels(Listed):
    """The best group, and the best expert of it: its number is computed of both."""

    K, route = 1, GroupThenExpert

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = torch.nonzero(ids[:, 0] == e).flatten()
            out = out.index_copy(0, token, expert(x.index_select(0, token)))
        return out * weights


@style("slots_gathered_by_columns_taken_one_by_one")
class ByColumns(Simple):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for own, chosen in zip(weights.unbind(-1), ids.unbind(-1), strict=True):
            hidden = F.relu(torch.bmm(x[:, None, :], self.up[chosen].mT))
            out = torch.addcmul(out, own[:, None], torch.bmm(hidden, self.down[chosen].mT)[:, 0])
        return out


class Nearest(MoE):
    """One expert, that of the nearest centroid."""

    E, K = 4, 1

    def __init__(self):
        super().__init__()
        self.centroids = normal(self.E, H)
        self.experts = nn.ModuleList(Sequence() for _ in range(self.E))

    def plain(self, x):
        nearest = [int((self.centroids - row).norm(dim=-1).argmin()) for row in x]
        return torch.cat([self.experts[e](row[None]) for e, row in zip(nearest, x, strict=True)])

    def forward(self, x):
        ids = torch.cdist(x, self.centroids).argmin(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            out[mask] = expert(x[mask])
        return out


style("rows_written_by_the_nearest_centroid")(Nearest)
