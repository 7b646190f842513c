"""int4 weight-only: one scale, and perhaps one zero point, per group of inputs; two weights to a byte."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fx.errors import ConfigError
from moe_fx.formats.base import WeightFormat, slices_of_experts

__all__ = ["Int4WeightOnly", "packed"]

SMALLEST_SCALE = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Int4WeightOnly(WeightFormat):
    """int4 weights in groups along the input dimension K; activations stay in their own dtype.

    Symmetric: ``scale = max |w| / 7.5`` over a group, ``q = round(w / scale)`` within [-8, 7]. Asymmetric: the range
    of a group, widened to hold 0, is divided into 15 steps, and ``zero`` is the q that means 0. Both are what
    torchao's ``IntxWeightOnlyConfig(torch.int4, PerGroup(group_size))`` does in bf16 and float32, bit for bit.

    Attributes:
        group_size: weights that share a scale; must be even and divide K.
        symmetric: without zero points.

    Tensors: ``qdata`` uint8 ``[E, N, K / 2]``: byte j holds ``q[2j] + 8`` in its low and ``q[2j + 1] + 8`` in its high
    four bits; ``scale [E, N, K / group_size]`` in the weight's dtype; if not symmetric, ``zero`` int8, shaped as
    ``scale``.

    Raises:
        ConfigError: a group_size that is not a positive even number.
    """

    group_size: int = 128
    symmetric: bool = True

    name = "int4_weight_only"

    def __post_init__(self) -> None:
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0 or size % 2:
            raise ConfigError(f"Int4WeightOnly.group_size={size!r} is not a positive even number, such as 32 or 128")
        if not isinstance(self.symmetric, bool):
            raise ConfigError(f"Int4WeightOnly.symmetric={self.symmetric!r} is not True or False")

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return ("qdata", "scale") if self.symmetric else ("qdata", "scale", "zero")

    def unfit(self, weight: torch.Tensor) -> str | None:
        width = weight.shape[-1]
        if width % self.group_size == 0:
            return None
        fitting = [size for size in (256, 128, 64, 32, 16, 8) if width % size == 0]
        return f"its {width} inputs are not a multiple of group_size={self.group_size}" + (
            f"; those that fit are {', '.join(map(str, fitting))}" if fitting else ""
        )

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *lead, width = weight.shape
        groups = width // self.group_size
        qdata = torch.empty(*lead, width // 2, dtype=torch.uint8, device=weight.device)
        scale = torch.empty(*lead, groups, dtype=weight.dtype, device=weight.device)
        zero = torch.zeros(*lead, groups, dtype=torch.int8, device=weight.device)
        for some in slices_of_experts(weight):
            grouped = weight[some].detach().unflatten(-1, (groups, self.group_size))
            if weight.dtype is torch.float16:
                grouped = grouped.float()  # the reciprocal of a small scale would be infinite
            low, high = grouped.aminmax(dim=-1)
            if self.symmetric:
                step = torch.maximum(-low, high) / 7.5
            else:
                low, high = low.clamp(max=0), high.clamp(min=0)
                step = (high - low) / 15
            step = step.clamp_min(SMALLEST_SCALE).to(weight.dtype).to(grouped.dtype)
            if not self.symmetric:
                zero[some] = (-8 - torch.round(low / step)).clamp_(-8, 7)
            steps = torch.round(grouped * (1 / step).unsqueeze(-1)) + zero[some].unsqueeze(-1)
            scale[some] = step
            qdata[some] = packed(steps.clamp_(-8, 7).flatten(-2).to(torch.int8))
        return (qdata, scale) if self.symmetric else (qdata, scale, zero)

    def dequantize(self, *tensors: torch.Tensor) -> torch.Tensor:
        qdata, scale = tensors[:2]
        nibbles = torch.stack([qdata & 15, qdata >> 4], dim=-1).flatten(-2)
        steps = nibbles.unflatten(-1, (scale.shape[-1], self.group_size)).to(scale.dtype) - 8
        if not self.symmetric:
            steps = steps - tensors[2].to(scale.dtype).unsqueeze(-1)
        return (steps * scale.unsqueeze(-1)).flatten(-2)


def packed(steps: torch.Tensor) -> torch.Tensor:
    """int8 values ``[..., K]`` within [-8, 7] as uint8 ``[..., K / 2]``, two to a byte."""
    nibbles = (steps + 8).view(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
