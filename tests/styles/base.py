"""A zoo of MoE layers: the same equation as real authors write it, each in its own way.

Nothing here knows how a layer is recognised: a style is in the zoo because models are written so. All are dropless and
choose K of E experts per token. ``MoE.plain`` is the equation, token by token, against which each style can be held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

H, I = 16, 24  # noqa: E741


@dataclass(frozen=True)
class Style:
    """How to build a style and what to trace it with.

    Attributes:
        build: makes the module. through: what traces it; ``moe_fx.export`` if Python asks for data.
        dynamic: whether any number of tokens is reasonable. shape: of the input. layers: how many MoE layers it has.
        torch: the oldest that traces it.
    """

    build: Callable[[], nn.Module]
    through: Literal["export", "moe_fx.export"] = "export"
    dynamic: bool = True
    shape: tuple[int, ...] = (6, H)
    layers: int = 1
    torch: str = "2.11"


STYLES: dict[str, Style] = {}


def style(name: str, **options) -> Callable:
    """Registers a module under a name that says how it is written."""

    def register(build: type[nn.Module]) -> type[nn.Module]:
        STYLES[name] = Style(build, **options)
        return build

    return register


ASKS = dict(through="moe_fx.export")
BATCHED = dict(shape=(2, 5, H))


def normal(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.3)


# Routers: rows [T, H] to ids and weights [T, K].


class Router(nn.Module):
    """Mixtral: softmax, then the best, made to add up to one."""

    def __init__(self, experts: int, k: int, hidden: int = H) -> None:
        super().__init__()
        self.experts, self.k = experts, k
        self.linear = nn.Linear(hidden, experts, bias=False)

    def forward(self, x):
        probs = F.softmax(self.linear(x), dim=1, dtype=torch.float)
        weights, ids = torch.topk(probs, self.k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        return ids, weights.to(x.dtype)


class Unnormalised(Router):
    """OLMoE: as they come out of the softmax."""

    def forward(self, x):
        weights, ids = self.linear(x).softmax(-1, dtype=torch.float).topk(self.k, dim=-1)
        return ids, weights.to(x.dtype)


class BestThenSoftmax(Router):
    """gpt-oss: the best logits, then softmax among them."""

    def forward(self, x):
        logits, ids = torch.topk(self.linear(x), self.k, dim=-1)
        return ids, F.softmax(logits, dim=1, dtype=logits.dtype)


class SigmoidWithBias(Router):
    """DeepSeek V3 without groups: a bias takes part in the choice, not in the weight."""

    def __init__(self, experts: int, k: int, hidden: int = H) -> None:
        super().__init__(experts, k, hidden)
        self.register_buffer("bias", torch.randn(experts) * 0.1)

    def choice(self, scores):
        return scores + self.bias

    def forward(self, x):
        scores = self.linear(x).float().sigmoid()
        ids = torch.topk(self.choice(scores), k=self.k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5
        return ids, weights.to(x.dtype)


class GroupLimited(SigmoidWithBias):
    """DeepSeek V3: first the best groups of experts, by the sum of their best two."""

    groups, best_groups = 4, 2

    def choice(self, scores):
        choice = scores + self.bias
        grouped = choice.view(-1, self.groups, self.experts // self.groups)
        best = torch.topk(grouped.topk(2, dim=-1)[0].sum(dim=-1), k=self.best_groups, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(grouped[..., 0]).scatter_(1, best, 1)
        mask = mask.unsqueeze(-1).expand(-1, self.groups, self.experts // self.groups).reshape(-1, self.experts)
        return choice.masked_fill(~mask.bool(), 0.0)


class ArgmaxSigmoid(Router):
    """One expert, weighted by the sigmoid of its logit."""

    def forward(self, x):
        logits = self.linear(x)
        ids = logits.argmax(dim=-1, keepdim=True)
        return ids, torch.sigmoid(logits.gather(-1, ids))


class MaxOfSoftmax(Router):
    """Switch: one expert, weighted by its probability."""

    def forward(self, x):
        weights, ids = self.linear(x).softmax(dim=-1).max(dim=-1, keepdim=True)
        return ids, weights


class Sorted(Router):
    """All probabilities sorted, of which the first are kept."""

    def forward(self, x):
        weights, ids = self.linear(x).softmax(dim=-1).sort(dim=-1, descending=True)
        weights, ids = weights[:, : self.k], ids[:, : self.k]
        return ids, weights / weights.sum(-1, keepdim=True)


class TwoArgmaxes(Router):
    """PhiMoE: the best, then the best of the others."""

    def forward(self, x):
        logits = self.linear(x)
        first = logits.argmax(dim=-1, keepdim=True)
        others = logits.scatter(-1, first, float("-inf"))
        second = others.argmax(dim=-1, keepdim=True)
        weights = torch.cat([logits.softmax(-1).gather(-1, first), others.softmax(-1).gather(-1, second)], dim=-1)
        return torch.cat([first, second], dim=-1), weights


class Hashed(Router):
    """Experts by table: the signs of a few projections are the row's entry."""

    def __init__(self, experts: int, k: int, hidden: int = H) -> None:
        super().__init__(experts, k, hidden)
        self.register_buffer("planes", torch.randn(hidden, 4))
        self.register_buffer("table", torch.stack([torch.randperm(experts)[:k] for _ in range(16)]))
        self.register_buffer("places", torch.tensor([1, 2, 4, 8]))

    def forward(self, x):
        ids = self.table[((x @ self.planes > 0) * self.places).sum(-1)]
        return ids, self.linear(x).sigmoid().gather(1, ids)


# Activations of gate and up.


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def clamped_swiglu(gate, up):
    gate, up = gate.clamp(max=1.0), up.clamp(min=-1.0, max=1.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


class SwiGLU(nn.Module):
    act = staticmethod(F.silu)

    def __init__(self, hidden: int = H, inner: int = I) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class GeGLU(SwiGLU):
    act = nn.GELU()


class ReLU2(nn.Module):
    """Nemotron: no gate, the square of relu."""

    def __init__(self, hidden: int = H, inner: int = I) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Sequence(nn.Sequential):
    """Tutorials: two linears with bias and relu between."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(H, I), nn.ReLU(), nn.Linear(I, H), nn.Dropout(0.1))


# The equation, and where the parameters live.


class MoE(nn.Module):
    E, K = 4, 2
    route: type[Router] = Router
    #: whether the routing weight multiplies what goes into an expert rather than what comes out
    before = False

    def __init__(self) -> None:
        super().__init__()
        self.router = self.route(self.E, self.K)

    def expert(self, rows, e):
        raise NotImplementedError

    def beside(self, x):
        """What is added to the experts' sum."""
        return 0

    def plain(self, x):
        """The equation, token by token."""
        rows = x.reshape(-1, H)
        ids, weights = self.router(rows)
        sums = []
        for row, chosen, slots in zip(rows, ids.tolist(), weights, strict=True):
            total = torch.zeros_like(row)
            for e, weight in zip(chosen, slots, strict=True):
                total += self.expert(row[None] * weight, e)[0] if self.before else self.expert(row[None], e)[0] * weight
            sums.append(total)
        return torch.stack(sums).view(x.shape) + self.beside(x)


class Listed(MoE):
    """Experts as modules in a list."""

    kind: type[nn.Module] = SwiGLU

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(self.kind() for _ in range(self.E))

    def expert(self, rows, e):
        return self.experts[e](rows)


class Stacked(MoE):
    """Weights as linears have them, [E, N, K], gate and up as halves of one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = normal(self.E, 2 * I, H)
        self.down = normal(self.E, H, I)

    def expert(self, rows, e):
        gate, up = F.linear(rows, self.gate_up[e]).chunk(2, dim=-1)
        return F.linear(swiglu(gate, up), self.down[e])


class Apart(MoE):
    """Weights to multiply from the right, [E, K, N], gate and up each for itself."""

    act = staticmethod(geglu)

    def __init__(self) -> None:
        super().__init__()
        self.w_gate, self.w_up = normal(self.E, H, I), normal(self.E, H, I)
        self.w_down = normal(self.E, I, H)

    def expert(self, rows, e):
        return self.act(rows @ self.w_gate[e], rows @ self.w_up[e]) @ self.w_down[e]


class Interleaved(MoE):
    """gpt-oss: [E, K, N] with biases, gate and up interleaved."""

    route = BestThenSoftmax

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.gate_up_proj_bias = normal(self.E, H, 2 * I), normal(self.E, 2 * I)
        self.down_proj, self.down_proj_bias = normal(self.E, I, H), normal(self.E, H)

    def act(self, h):
        return clamped_swiglu(h[..., ::2], h[..., 1::2])

    def expert(self, rows, e):
        h = rows @ self.gate_up_proj[e] + self.gate_up_proj_bias[e]
        return self.act(h) @ self.down_proj[e] + self.down_proj_bias[e]


class Simple(MoE):
    """No gate: up, relu or its square, down; [E, N, K]."""

    act = staticmethod(F.relu)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = normal(self.E, I, H), normal(self.E, H, I)

    def expert(self, rows, e):
        return F.linear(self.act(F.linear(rows, self.up[e])), self.down[e])
