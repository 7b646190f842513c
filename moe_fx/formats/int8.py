"""int8 weight-only: symmetric, one scale per output channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moe_fx.formats.base import WeightFormat, slices_of_experts

__all__ = ["Int8WeightOnly"]


@dataclass(frozen=True)
class Int8WeightOnly(WeightFormat):
    """Symmetric int8 weights with one scale per output channel; activations stay in their own dtype.

    ``scale[n] = max_k |w[n, k]| / 127`` (in the weight's dtype) and ``qdata = round(w / scale)``, ties to
    even, within [-127, 127]; the scheme of Jacob et al. 2018, "Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference", section 2.1, with zero point 0. A channel of
    zeros has scale 0 and stays exactly zero.

    Tensors: ``qdata int8 [E, N, K]``, ``scale [E, N]`` in the weight's dtype.
    """

    name = "int8_weight_only"
    tensor_names = ("qdata", "scale")

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        qdata = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scale = torch.empty(weight.shape[:-1], dtype=weight.dtype, device=weight.device)
        for some in slices_of_experts(weight):
            low, high = weight[some].detach().aminmax(dim=-1)
            scale[some] = torch.maximum(-low.float(), high.float()) / 127
            # Divide by the scale as it is stored, so that its rounding is not an error of every weight.
            step = scale[some].float().unsqueeze(-1)
            steps = torch.div(weight[some].detach(), step.masked_fill(step == 0, math.inf))
            qdata[some] = steps.round_().clamp_(-127, 127)
        return qdata, scale

    def dequantize(self, *tensors: torch.Tensor) -> torch.Tensor:
        qdata, scale = tensors
        return qdata.to(scale.dtype) * scale.unsqueeze(-1)
