"""Layers that add to what is there: the residual stream, a shared expert, what a padding mask left out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import ASKS, BATCHED, ArgmaxSigmoid, H, Listed, MaxOfSoftmax, SwiGLU, style


class Normed(Listed):
    """Experts and router read what is normed, and the result is added to what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(H)

    def added(self, x, rows):
        ids, weights = self.router(rows)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            x = x.index_add(0, token, expert(rows[token]) * weights[token, slot, None])
        return x

    def forward(self, x):
        return self.added(x, self.norm(x))

    def plain(self, x):
        return x + super().plain(self.norm(x))


class InPlace(Normed):
    """Into a copy, expert after expert and slot after slot, by masks of batch and sequence."""

    def added(self, x, rows):
        ids, weights = self.router(rows.reshape(-1, H))
        ids, weights = (each.view(*x.shape[:-1], self.K) for each in (ids, weights))
        out = x.clone()
        for e, expert in enumerate(self.experts):
            for k in range(self.K):
                mask = ids[..., k] == e
                out[mask] = out[mask] + weights[..., k][mask].unsqueeze(-1) * expert(rows[mask])
        return out


class Scaled(Normed):
    """One expert for each token; a vector for each expert beside its modules; it is asked whether it has rows."""

    route, K = MaxOfSoftmax, 1

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Embedding(self.E, H)

    def added(self, x, rows):
        ids, weights = (each.squeeze(-1) for each in self.router(rows.reshape(-1, H)))
        ids, weights = ids.view(x.shape[:-1]), weights.view(x.shape[:-1])
        out = x.clone()
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                out[mask] = out[mask] + weights[mask].unsqueeze(-1) * expert(rows[mask]) * self.scale.weight[e]
        return out

    def expert(self, rows, e):
        return super().expert(rows, e) * self.scale.weight[e]


class Several(nn.Module):
    layer, count = Normed, 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer() for _ in range(self.count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def plain(self, x):
        for layer in self.layers:
            x = layer.plain(x)
        return x


style("added_to_the_token_in_two_layers", layers=2)(Several)


@style("added_to_a_copy_of_the_token_in_three_layers", layers=3, **BATCHED)
class SeveralInPlace(Several):
    layer, count = InPlace, 3


style("written_to_a_copy_with_a_vector_for_each_module_if_any", **ASKS, **BATCHED)(Scaled)


@style("added_to_a_shared_expert_weights_one_wide", **BATCHED)
class OneWide(Listed):
    """Llama 4 in a loop: ids and weights [T, 1], of which the rows are read as they are."""

    route, K = ArgmaxSigmoid, 1

    def __init__(self) -> None:
        super().__init__()
        self.shared = SwiGLU()

    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, weights = self.router(rows)
        out = self.shared(rows)
        for e, expert in enumerate(self.experts):
            token = torch.where(ids[:, 0] == e)[0]
            out.index_add_(0, token, expert(rows[token]) * weights[token])
        return out.view_as(x)

    def beside(self, x):
        return self.shared(x)


@style("tokens_packed_by_a_padding_mask", **ASKS, **BATCHED)
class Packed(Listed):
    """Padding is left out before the router sees it, and stays as it was."""

    def forward(self, x):
        mask = x[..., 0] > -1.5
        out = torch.zeros_like(x)
        out[mask] = self.packed(x[mask])
        return x + out

    def packed(self, rows):
        ids, weights = self.router(rows)
        chosen = F.one_hot(ids, self.E).permute(2, 1, 0)
        out = torch.zeros_like(rows)
        for hit in chosen.sum(dim=(-1, -2)).greater(0).nonzero():
            e = hit[0]
            slot, token = torch.where(chosen[e])
            out.index_add_(0, token, self.experts[e](rows[token]) * weights[token, slot, None])
        return out

    def plain(self, x):
        return x + super().plain(x) * (x[..., :1] > -1.5)
