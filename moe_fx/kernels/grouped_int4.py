"""``moe_fx::grouped_mm_int4``: as ``moe_fx::grouped_mm``, over packed int4 weights; widens one expert at a time."""

from __future__ import annotations

import torch

from moe_fx.formats import Int4WeightOnly
from moe_fx.kernels.grouped_amx import grouped_mm_amx, unfit

__all__ = ["grouped_mm_int4"]


@torch.library.custom_op("moe_fx::grouped_mm_int4", mutates_args=())
def grouped_mm_int4(
    rows: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, offsets: torch.Tensor
) -> torch.Tensor:
    """Multiply each group of consecutive rows with its own expert's weights.

    Args:
        rows: ``[S, K]``, ordered by expert.
        qdata: uint8 ``[E, N, K / 2]``, scale: ``[E, N, groups]``, zero: int8 ``[E, N, groups]`` or None; see
            :class:`moe_fx.Int4WeightOnly`.
        offsets: int32 ``[E]``, where each expert's rows end; rows behind the last give zero.

    Returns:
        ``[S, N]`` in the dtype of ``rows``.
    """
    form = Int4WeightOnly(2 * qdata.shape[-1] // scale.shape[-1], symmetric=zero is None)
    out = rows.new_empty(rows.shape[0], qdata.shape[1])
    if scale.dtype is torch.bfloat16 and unfit(rows, qdata, form.group_size) is None:
        grouped_mm_amx(rows, qdata, offsets, out, scale, zero)
        out[offsets[-1] :] = 0
        return out
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            tensors = [tensor[expert] for tensor in (qdata, scale, zero) if tensor is not None]
            torch.mm(rows[start:end], form.dequantize(*tensors).to(rows.dtype).t(), out=out[start:end])
            start = end
    out[start:] = 0
    return out


@grouped_mm_int4.register_fake
def _(
    rows: torch.Tensor, qdata: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, offsets: torch.Tensor
) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], qdata.shape[1])
