"""MoE layers small enough to print: the two source forms, with every part optional or replaceable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram

writes_parts = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="before 2.13 torch.export does not trace writes to a part as long as data say"
)


def swiglu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def interleaved_clamped_swiglu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def relu_squared(h: torch.Tensor) -> torch.Tensor:
    return F.relu(h).square()


class Toy(nn.Module):
    """A router and ``num_experts`` experts; ``forward(x [T, H])``. Subclasses write the experts out."""

    def __init__(
        self, *, num_experts: int = 4, top_k: int = 2, hidden: int = 8, inner: int = 16,
        activation: Callable = swiglu, gated: bool = True, bias: bool = False, transposed: bool = False,
        weight_before: bool = False, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        self.E, self.K, self.activation, self.bias, self.transposed = (
            num_experts,
            top_k,
            activation,
            bias,
            transposed,
        )
        self.weight_before = weight_before
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator).mul_(0.3).to(dtype))

        wide = 2 * inner if gated else inner
        up, down = (wide, hidden), (hidden, inner)
        self.router = parameter(num_experts, hidden)
        self.up = parameter(num_experts, *(reversed(up) if transposed else up))
        self.down = parameter(num_experts, *(reversed(down) if transposed else down))
        if bias:
            self.up_bias, self.down_bias = parameter(num_experts, wide), parameter(num_experts, hidden)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = F.linear(x, self.router).float().softmax(-1)
        weights, ids = scores.topk(self.K, dim=-1)
        return ids, (weights / weights.sum(-1, keepdim=True)).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.route(x)
        return self.experts(x, ids, weights)


class Gathered(Toy):
    """Every row gathers its expert's weight; ``bmm`` applies it."""

    up_ids = down_ids = None

    def apply(self, rows, weight, ids):
        if self.transposed:
            return torch.bmm(rows.unsqueeze(1), weight[ids]).squeeze(1)
        return torch.bmm(weight[ids], rows.unsqueeze(-1)).squeeze(-1)

    def experts(self, x, ids, weights):
        flat = ids.reshape(-1)
        rows, slot = x.repeat_interleave(self.K, 0), weights.reshape(-1, 1)
        if self.weight_before:
            rows = rows * slot
        h = self.apply(rows, self.up, flat)
        h = self.activation(h + self.up_bias[flat] if self.bias else h)
        y = self.apply(h, self.down, self.down_routing(flat))
        y = y + self.down_bias[flat] if self.bias else y
        y = y if self.weight_before else y * slot
        return y.view(-1, self.K, y.shape[-1]).sum(1)

    def down_routing(self, flat):
        return flat


class Grouped(Toy):
    """Rows sorted by expert, multiplied group by group (bfloat16: the op exports in no other dtype)."""

    counted = None
    #: histc counts floats on a CPU, integers on a GPU too
    count_dtype = torch.float32

    def __init__(self, **options) -> None:
        super().__init__(dtype=torch.bfloat16, **options)

    def experts(self, x, ids, weights):
        flat = ids.reshape(-1)
        ordered, perm = torch.sort(flat)
        last = (self.counted or self.E) - 1
        offs = torch.histc(ordered.to(self.count_dtype), bins=self.E, min=0, max=last).cumsum(0, dtype=torch.int32)
        rows, slot = x[perm // self.K], weights.reshape(-1)[self.slot_order(perm)].unsqueeze(-1)
        if self.weight_before:
            rows = rows * slot
        up, down = (self.up, self.down) if self.transposed else (self.up.mT, self.down.mT)
        none = (ordered >= self.E).unsqueeze(-1)
        h = torch._grouped_mm(rows, up, offs).masked_fill(none, 0)
        h = self.activation(h + self.up_bias[ordered.clamp(max=self.E - 1)] if self.bias else h)
        y = torch._grouped_mm(h, down, offs)
        y = y + self.down_bias[ordered.clamp(max=self.E - 1)] if self.bias else y
        y = y.masked_fill(none, 0)
        y = y if self.weight_before else y * slot
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.shape[0], device=perm.device)
        return y[inverse].view(-1, self.K, y.shape[-1]).sum(1)

    def slot_order(self, perm):
        return perm


def export(model: nn.Module, tokens: int = 6, dynamic: bool = True, hidden: int = 8) -> ExportedProgram:
    parameter = next(model.parameters())
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(1)).to(parameter)
    shapes = ({0: Dim("tokens", min=2, max=512)},) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model.eval(), (x,), dynamic_shapes=shapes)
