"""int8 weight-only: symmetric, one scale per output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fx.formats.base import WeightFormat

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
        # One expert at a time: the float32 working copy stays the size of one expert.
        for expert in range(weight.shape[0]):
            rows = weight[expert].detach().float()
            scale[expert] = rows.abs().amax(-1) / 127
            # Divide by the scale as it is stored, so that its rounding is not an error of every weight.
            step = scale[expert].float().unsqueeze(-1)
            steps = torch.where(step > 0, rows / step, 0)
            qdata[expert] = steps.round_().clamp_(-127, 127).to(torch.int8)
        return qdata, scale

    def dequantize(self, *tensors: torch.Tensor) -> torch.Tensor:
        qdata, scale = tensors
        return qdata.to(scale.dtype) * scale.unsqueeze(-1)
