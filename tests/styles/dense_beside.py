"""Every expert on all tokens, with something beside the sum, or of which only its rows are taken."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import ASKS, BATCHED, GeGLU, H, I, Listed, MoE, Sequence, SwiGLU, normal, style


class Dense(Listed):
    """A table [.., E] of weights, and a loop that adds up."""

    def table(self, x):
        probs = self.router.linear(x).softmax(dim=-1)
        weights, ids = probs.topk(self.K, dim=-1)
        return torch.zeros_like(probs).scatter(-1, ids, weights)

    def start(self, x):
        return torch.zeros_like(x)

    def end(self, out, x):
        return out

    def forward(self, x):
        table, out = self.table(x), self.start(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * table[..., e : e + 1]
        return self.end(out, x)

    def plain(self, x):
        table = self.table(x)
        return self.end(
            self.start(x) + sum(expert(x) * table[..., e, None] for e, expert in enumerate(self.experts)), x
        )


@style("dense_loop_then_residual", **BATCHED)
class ThenResidual(Dense):
    """The token is added at the end, and a norm follows."""

    def end(self, out, x):
        return F.layer_norm(x + out, (H,))


@style("dense_loop_then_shared_expert")
class ThenShared(Dense):
    """The shared expert is added at the end."""

    def __init__(self):
        super().__init__()
        self.shared = GeGLU()

    def end(self, out, x):
        return out + self.shared(x)


@style("dense_loop_onto_a_shared_expert", **BATCHED)
class OntoShared(ThenShared):
    """MixLoRA: adapters' experts are added to what the base layer makes."""

    kind = Sequence

    def start(self, x):
        return self.shared(x)

    def end(self, out, x):
        return out


@style("dense_loop_onto_a_bias", **BATCHED)
class OntoBias(Dense):
    """It starts with a bias of the features alone."""

    def __init__(self):
        super().__init__()
        self.bias = normal(H)

    def start(self, x):
        return self.bias


@style("rows_of_experts_that_see_every_token")
class SeesEveryToken(Listed):
    """llm-compressor: experts see all tokens, to be calibrated, and their own rows are taken."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x)[token] * weights[token, slot, None])
        return out


@style("rows_of_experts_that_see_every_token_if_any", **ASKS)
class SeesEveryTokenIfAny(Listed):
    """The same, where an expert without rows adds nothing."""

    kind = Sequence

    def forward(self, x):
        ids, weights = self.router(x)
        mask = F.one_hot(ids, self.E).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(mask[e])
            results = expert(x)
            if token.numel() > 0:
                out.index_add_(0, token, results[token] * weights[token, slot, None])
        return out


class Wide(MoE):
    """All experts' first matrices in one linear; their hidden units weighted, of which all are then summed at once."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(H, self.E * I)
        self.down = normal(self.E, I, H)

    def expert(self, rows, e):
        h = self.up(rows).unflatten(-1, (self.E, I))[..., e, :]
        return F.relu(h) @ self.down[e]

    def hidden(self, x):
        ids, weights = self.router(x.view(-1, H))
        table = torch.zeros(ids.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights).view(*x.shape[:-1], self.E, 1)
        return F.relu(self.up(x)).unflatten(-1, (self.E, I)) * table


@style("weighted_units_of_all_experts_einsum", **BATCHED)
class UnitsEinsum(Wide):
    """Sigma-MoE in one einsum over experts and units."""

    def forward(self, x):
        return torch.einsum("...ei,eih->...h", self.hidden(x), self.down)


@style("weighted_units_of_all_experts_matmul", **BATCHED)
class UnitsMatmul(Wide):
    """The same as one matrix of all experts' units."""

    def forward(self, x):
        return self.hidden(x).flatten(-2) @ self.down.view(self.E * I, H)


@style("gate_and_up_of_all_experts_in_one_linear", **BATCHED)
class GateUpInOne(MoE):
    """One linear makes gate and up of all experts; the table is in the last einsum."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Linear(H, self.E * 2 * I)
        self.down = normal(self.E, I, H)

    def units(self, x):
        gate, up = self.gate_up(x).view(*x.shape[:-1], self.E, 2 * I).chunk(2, dim=-1)
        return F.silu(gate) * up

    def expert(self, rows, e):
        return self.units(rows)[..., e, :] @ self.down[e]

    def forward(self, x):
        ids, weights = self.router(x.view(-1, H))
        table = torch.zeros(ids.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights).view(*x.shape[:-1], self.E)
        return torch.einsum("bsei,eih,bse->bsh", self.units(x), self.down, table)


class Normed(nn.Sequential):
    """An expert with norms of its own, and the token added."""

    def __init__(self):
        super().__init__(nn.LayerNorm(H), SwiGLU(), nn.LayerNorm(H))

    def forward(self, x):
        return x + super().forward(x)


@style("rows_of_experts_with_norms_of_their_own", **BATCHED)
class WithNorms(Listed):
    """The weights of a token's slots are summed in its row."""

    kind = Normed

    def forward(self, x):
        probs = self.router.linear(x).softmax(dim=-1)
        weights, ids = probs.topk(self.K, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            token = mine.any(dim=-1)
            out[token] += expert(x[token]) * (weights[token] * mine[token]).sum(dim=-1, keepdim=True)
        return out

    def plain(self, x):
        weights, ids = self.router.linear(x).softmax(dim=-1).topk(self.K, dim=-1)
        return sum(
            expert(x) * (weights * (ids == e)).sum(dim=-1, keepdim=True) for e, expert in enumerate(self.experts)
        )
