"""Loops that ask for rows, as older models and their forks have them; and ids and weights in other shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import ASKS, BATCHED, BestThenSoftmax, GeGLU, H, I, Listed, MaxOfSoftmax, MoE, Sequence, style


@style("places_as_lists_early_mixtral", **ASKS)
class PlacesAsLists(Listed):
    """The first Mixtral of transformers, and what was forked from it: places are turned into lists."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.E).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(mask[e])
            if token.shape[0] == 0:
                continue
            tokens, slots = token.tolist(), slot.tolist()
            rows = x[None, tokens].reshape(-1, H)
            out.index_add_(0, token, expert(rows) * weights[tokens, slots, None])
        return out


class Beside(Listed):
    """Experts that have rows are added to what is there."""

    def start(self, x):
        return x.clone()

    def beside(self, x):
        return self.start(x)

    def forward(self, x):
        ids, weights = self.router(x)
        out = self.start(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            if not mine.any():
                continue
            token, slot = torch.where(mine)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@style("experts_with_rows_added_to_the_token", **ASKS)
class AddedToToken(Beside):
    kind = Sequence


@style("experts_with_rows_added_to_a_shared_expert", **ASKS)
class AddedToShared(Beside):
    def __init__(self):
        super().__init__()
        self.shared = GeGLU()

    def start(self, x):
        return self.shared(x)


@style("sorted_ids_of_32_bits_megablocks", **ASKS)
class ShortIds(Listed):
    """The reference of megablocks: flat ids are made int32 before they are sorted and counted."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten().int()
        _, order = torch.sort(flat)
        counts = torch.histc(flat.float(), bins=self.E, min=0, max=self.E - 1).int()
        parts = x[order // self.K].split(counts.tolist())
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, order // self.K, rows * weights.flatten()[order].unsqueeze(-1))


@style("rows_copied_to_their_places")
class RowsCopied(Listed):
    """Top 1: index_copy of what each expert makes."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            place = torch.nonzero(ids.squeeze(-1) == e)[:, 0]
            out = out.index_copy(0, place, expert(x[place]))
        return out * weights


@style("modules_weights_stacked_and_gathered")
class WeightsStacked(Listed):
    """The weights of a list of modules are stacked whenever it runs, and looked up by ids."""

    route = BestThenSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        up, gate, down = (
            torch.stack([getattr(expert, name).weight for expert in self.experts])[ids] for name in ("w3", "w1", "w2")
        )
        units = F.silu(torch.einsum("th,tkih->tki", x, gate)) * torch.einsum("th,tkih->tki", x, up)
        return torch.einsum("tki,tkhi,tk->th", units, down, weights)


@style("gathered_projections_of_values_switchhead", **BATCHED)
class Values(MoE):
    """SwitchHead: one matrix for each expert; the router sees tokens, and the experts what a linear made of them."""

    def __init__(self):
        super().__init__()
        self.value = nn.Linear(H, I, bias=False)
        self.output = nn.Parameter(torch.randn(self.E, I, H) * 0.3)

    def expert(self, rows, e):
        return self.value(rows) @ self.output[e]

    def forward(self, x):
        weights, ids = torch.sigmoid(self.router.linear(x)).topk(self.K, dim=-1, sorted=False)
        out = torch.einsum("bsd,bskdh->bskh", self.value(x), self.output[ids])
        return (out * weights[..., None]).sum(-2)

    def plain(self, x):
        weights, ids = torch.sigmoid(self.router.linear(x)).topk(self.K, dim=-1)
        return sum((weights * (ids == e)).sum(-1, keepdim=True) * self.expert(x, e) for e in range(self.E))


class Turned(Listed):
    """Ids and weights [K, T]."""

    def turned(self, x):
        ids, weights = self.router(x)
        return ids.t(), weights.t()


@style("slots_before_tokens_where")
class TurnedWhere(Turned):
    def forward(self, x):
        ids, weights = self.turned(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[slot, token].unsqueeze(-1))
        return out


@style("slots_before_tokens_dense")
class TurnedDense(Turned):
    kind = Sequence

    def forward(self, x):
        ids, weights = self.turned(x)
        return sum(((ids == e) * weights).sum(0)[:, None] * expert(x) for e, expert in enumerate(self.experts))


@style("slots_before_tokens_one_after_another")
class TurnedSlots(Turned):
    def forward(self, x):
        ids, weights = self.turned(x)
        out = torch.zeros_like(x)
        for k in range(self.K):
            for e, expert in enumerate(self.experts):
                mine = ids[k] == e
                out[mine] += expert(x[mine]) * weights[k][mine].unsqueeze(-1)
        return out
