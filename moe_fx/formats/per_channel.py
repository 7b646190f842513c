"""One scale per output channel of a weight, or per row of activations: what the int8 and float8 formats share.

Weights are quantized as torchao does for ``PerRow()``: the largest absolute value of a channel, divided by the largest
of the target dtype in the weight's own dtype, is the scale, kept in float32. A channel of zeros gets the smallest
scale, and stays zero. Symmetric int8 is that of Jacob et al. 2018, section 2.1, with zero point 0.
"""

from __future__ import annotations

import torch

from moe_fx.formats.base import WeightFormat, slices_of_experts

__all__ = ["PerChannel", "quantize_activations", "quantize_weights"]

#: what the largest value of a channel of weights becomes; 127.5 is centred between -128 and 127
LARGEST_WEIGHT = {torch.int8: 127.5, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
#: and of a row of activations: at 127.5 it would lie between two steps, and the last bit of a division would decide
LARGEST_ACTIVATION = {torch.int8: 127.0, torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
SMALLEST_SCALE = torch.finfo(torch.float32).eps


def quantize_weights(weights: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize along the last dimension.

    Args:
        weights: ``[..., K]`` of any float dtype.
        dtype: int8 or float8_e4m3fn.

    Returns:
        qdata ``[..., K]`` of ``dtype``, and scale float32 ``[..., 1]``; their product is nearly ``weights``.
    """
    return _quantize(weights, dtype, LARGEST_WEIGHT[dtype])


def quantize_activations(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`quantize_weights`, for rows of activations."""
    return _quantize(rows, dtype, LARGEST_ACTIVATION[dtype])


def _quantize(rows: torch.Tensor, dtype: torch.dtype, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = rows.aminmax(dim=-1, keepdim=True)
    scale = (torch.maximum(-low, high) / largest).float().clamp_min(SMALLEST_SCALE)
    if dtype is torch.int8:
        # Multiplied by the reciprocal, as torchao does: a division would now and then round another way.
        return torch.mul(rows, 1 / scale).round_().clamp_(-128, 127).to(dtype), scale
    return torch.div(rows, scale).clamp_(-largest, largest).to(dtype), scale


class PerChannel(WeightFormat):
    """Tensors: ``qdata [E, N, K]`` of ``dtype``, ``scale`` float32 ``[E, N]``.

    Attributes:
        dtype: of the weights.
        dynamic: activations are quantized in the same way, row by row, when they come.
    """

    user_facing = False
    dtype: torch.dtype
    dynamic = False
    tensor_names = ("qdata", "scale")

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        qdata = torch.empty(weight.shape, dtype=self.dtype, device=weight.device)
        scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
        for some in slices_of_experts(weight):
            qdata[some], step = quantize_weights(weight[some].detach(), self.dtype)
            scale[some] = step.squeeze(-1)
        return qdata, scale

    def dequantize(self, *tensors: torch.Tensor) -> torch.Tensor:
        qdata, scale = tensors
        return qdata.to(scale.dtype) * scale.unsqueeze(-1)

    def linear(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        if not self.dynamic:
            return super().linear(rows, *tensors)
        wide = torch.float64 if rows.dtype is torch.float64 else torch.float32
        values, scale = quantize_activations(rows.to(wide), self.dtype)
        return super().linear(values.to(wide) * scale.to(wide), *tensors).to(rows.dtype)
