"""Every expert on every token, one after another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import (
    BATCHED,
    Apart,
    BestThenSoftmax,
    GeGLU,
    H,
    I,
    Interleaved,
    Listed,
    MaxOfSoftmax,
    MoE,
    ReLU2,
    Sequence,
    Simple,
    Sorted,
    TwoArgmaxes,
    normal,
    style,
    swiglu,
)


@style("dense_loop_scatter_table")
class DenseLoop(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter_(1, ids, weights)
        out = torch.zeros_like(x)
        for e in range(self.E):
            out = out + table[:, e : e + 1] * self.experts[e](x)
        return out


@style("dense_loop_one_hot_table", **BATCHED)
class DenseOneHot(Interleaved):
    """[B, S, H] all the way; the table from one-hot rows; a sum that starts with None."""

    def forward(self, x):
        ids, weights = self.router(x.flatten(0, 1))
        ids, weights = ids.unflatten(0, x.shape[:2]), weights.unflatten(0, x.shape[:2])
        table = (F.one_hot(ids, self.E).to(x.dtype) * weights[..., None]).sum(dim=-2)
        out = None
        for e in range(self.E):
            y = self.expert(x, e) * table[..., e, None]
            out = y if out is None else out + y
        return out


@style("dense_loop_masked_softmax")
class DenseMaskedSoftmax(Apart):
    """The table is a softmax over logits, -inf where not chosen; a slice of a stack per expert."""

    route = BestThenSoftmax

    def forward(self, x):
        logits = self.router.linear(x)
        best = logits.topk(self.K, dim=-1).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, True)
        table = logits.masked_fill(~chosen, float("-inf")).softmax(dim=-1)
        return sum(table[:, e].unsqueeze(-1) * self.expert(x, e) for e in range(self.E))


@style("dense_loop_equal_ids_sum")
class DenseEqual(Listed):
    """The weight of an expert is what its slots add up to, zero if there are none."""

    kind = GeGLU
    route = TwoArgmaxes

    def forward(self, x):
        ids, weights = self.router(x)
        out = 0
        for e, expert in enumerate(self.experts):
            weight = ((ids == e) * weights).sum(dim=-1, keepdim=True)
            out = out + expert(x) * weight
        return out


@style("dense_loop_where_weight")
class DenseWhere(Simple):
    """``torch.where`` picks a slot's weight or zero; a loop over slots in one over experts."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            y = self.expert(x, e)
            for k in range(self.K):
                out += torch.where(ids[:, k] == e, weights[:, k], 0.0).unsqueeze(-1) * y
        return out


@style("stack_gather")
class StackGather(Listed):
    """All results stacked; each slot gathers its own."""

    route = Sorted

    def forward(self, x):
        ids, weights = self.router(x)
        every = torch.stack([expert(x) for expert in self.experts], dim=1)
        chosen = torch.gather(every, 1, ids.unsqueeze(-1).expand(-1, -1, H))
        return (chosen * weights.unsqueeze(-1)).sum(dim=1)


@style("stack_take_along_dim", dynamic=False, **BATCHED)
class StackTake(Listed):
    """[B, S, H] all the way; ``take_along_dim`` broadcasts the ids."""

    def forward(self, x):
        ids, weights = self.router(x.flatten(0, 1))
        ids, weights = ids.unflatten(0, x.shape[:2]), weights.unflatten(0, x.shape[:2])
        every = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (torch.take_along_dim(every, ids[..., None], dim=-2) * weights[..., None]).sum(-2)


@style("stack_index_by_ids")
class StackIndex(Listed):
    kind = ReLU2

    def forward(self, x):
        ids, weights = self.router(x)
        every = torch.stack([expert(x) for expert in self.experts])
        chosen = every[ids, torch.arange(x.shape[0])[:, None]]
        return (weights[:, None] @ chosen).squeeze(1)


@style("stack_einsum_gate", **BATCHED)
class StackEinsum(Listed):
    kind = Sequence

    def forward(self, x):
        ids, weights = self.router(x.view(-1, H))
        gates = torch.zeros(ids.shape[0], self.E).scatter(1, ids, weights).view(*x.shape[:2], self.E)
        every = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return torch.einsum("bse,bseh->bsh", gates, every)


@style("dense_loop_equal_ids_batched", **BATCHED)
class DenseEqualBatched(Listed):
    """[B, S, H] all the way: the weight of an expert by its ids, [B, S, K]."""

    def forward(self, x):
        ids, weights = self.router(x.flatten(0, 1))
        ids, weights = ids.unflatten(0, x.shape[:2]), weights.unflatten(0, x.shape[:2])
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * torch.where(ids == e, weights, 0.0).sum(-1, keepdim=True)
        return out


@style("dense_loop_parameter_dict")
class DenseDict(MoE):
    """Weights in a dictionary, named by what they are and by their expert."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"gate": (H, I), "up": (H, I), "down": (I, H)}
        self.p = nn.ParameterDict({f"{w}_{e}": normal(*shapes[w]) for w in shapes for e in range(self.E)})

    def expert(self, rows, e):
        return swiglu(rows @ self.p[f"gate_{e}"], rows @ self.p[f"up_{e}"]) @ self.p[f"down_{e}"]

    def forward(self, x):
        ids, weights = self.router(x)
        return sum(self.expert(x, e) * (weights * (ids == e)).sum(-1, keepdim=True) for e in range(self.E))


@style("dense_loop_called_twice", layers=2)
class DenseTwice(MoE):
    """The same experts in two layers; up and down in turn in one list."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(normal(*shape) for _ in range(self.E) for shape in ((H, I), (I, H)))

    def expert(self, rows, e):
        return F.relu(rows @ self.w[2 * e]) @ self.w[2 * e + 1]

    def layer(self, x):
        ids, weights = self.router(x)
        return sum(self.expert(x, e) * (weights * (ids == e)).sum(-1, keepdim=True) for e in range(self.E))

    def forward(self, x):
        return self.layer(self.layer(x))

    def plain(self, x):
        return super().plain(super().plain(x))


@style("dense_loop_softmax_of_scattered_batched", **BATCHED)
class DenseScatteredBatched(Listed):
    """[B, S, H] all the way: the table is a softmax of the best logits among minus infinity."""

    route = BestThenSoftmax

    def forward(self, x):
        logits = self.router.linear(x)
        best, ids = logits.topk(self.K, dim=-1)
        table = torch.full_like(logits, float("-inf")).scatter(-1, ids, best).softmax(dim=-1)
        return sum(table[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


@style("where_top1", **BATCHED)
class WhereOne(Listed):
    """One expert per token: of every expert's results, ``torch.where`` takes those of its tokens."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        weights, ids = self.router.linear(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y = torch.where((ids == e)[..., None], expert(x), y)
        return y * weights[..., None]


@style("where_slots_first_by_default")
class WhereSlots(Simple):
    """Each slot takes one expert's results; the first expert's are there to begin with."""

    K = 3

    def forward(self, x):
        ids, weights = self.router(x)
        every = [self.expert(x, e) for e in range(self.E)]
        out = torch.zeros_like(x)
        for k in range(self.K):
            chosen = every[0]
            for e in range(1, self.E):
                chosen = torch.where(ids[:, k : k + 1] == e, every[e], chosen)
            out = out + weights[:, k : k + 1] * chosen
        return out


@style("dense_loop_where_results_top1")
class WhereResults(Listed):
    """One expert per token: what each expert computes, or zero, added up; weighted at the end."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        weights, ids = self.router.linear(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + torch.where((ids == e)[:, None], expert(x), 0.0)
        return out * weights[:, None]


@style("dense_loop_masked_probability_top1")
class MaskedProbability(Simple):
    """One expert per token: its probability from among all, where it was chosen."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        probs = self.router.linear(x).softmax(-1)
        ids = probs.argmax(-1)
        out = torch.zeros_like(x)
        for e in range(self.E):
            out = out + ((ids == e) * probs[:, e])[:, None] * self.expert(x, e)
        return out


@style("dense_loop_masked_results")
class MaskedResults(Listed):
    """Results times weights, masked by whether the expert is among a token's; experts with bias."""

    kind = Sequence

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = (ids == e).any(dim=-1, keepdim=True)
            weight = (weights * (ids == e)).sum(dim=-1, keepdim=True)
            out = out + torch.where(chosen, expert(x) * weight, torch.zeros_like(x))
        return out


@style("dense_loop_table_by_places")
class TableByPlaces(Listed):
    """The table of routing weights written at [token, expert]."""

    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E)
        table[torch.arange(x.shape[0]).unsqueeze(1), ids] = weights
        return sum(table[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))
