"""int4 weights widened all at once: for so many rows per expert that unpacking in every tile would cost more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_fx.formats import Int4WeightOnly
from moe_fx.kernels.triton_or_none import jit, tl, wrapped

__all__ = ["widen_int4", "widen_int4_reference"]


def widen_int4_reference(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """qdata uint8 ``[E, N, K/2]``, scale (and zero) ``[E, N, groups]`` as weights ``[E, N, K]``."""
    qdata, scale = tensors[:2]
    group_size = 2 * qdata.shape[-1] // scale.shape[-1]
    return Int4WeightOnly(group_size, symmetric=len(tensors) == 2).dequantize(*tensors).to(dtype)


@jit()
def widen_int4_kernel(qdata, scale, zero, out, HALF, GROUP_BYTES, ZERO: tl.constexpr, BLOCK: tl.constexpr):
    """One row of weights per program, BLOCK bytes at a time."""
    row = tl.program_id(0).to(tl.int64)
    groups = HALF // GROUP_BYTES
    for start in range(0, HALF, BLOCK):
        j = start + tl.arange(0, BLOCK)
        there = j < HALF
        packed = tl.load(qdata + row * HALF + j, mask=there, other=0)
        group = row * groups + j // GROUP_BYTES
        step = tl.load(scale + group, mask=there, other=0.0).to(tl.float32)
        low = (packed & 15).to(tl.float32) - 8.0
        high = (packed >> 4).to(tl.float32) - 8.0
        if ZERO:
            shift = tl.load(zero + group, mask=there, other=0).to(tl.float32)
            low -= shift
            high -= shift
        pairs = tl.interleave(low * step, high * step).to(out.dtype.element_ty)
        k = 2 * start + tl.arange(0, 2 * BLOCK)
        tl.store(out + row * 2 * HALF + k, pairs, mask=k < 2 * HALF)


def widen_int4(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """As :func:`widen_int4_reference`, in one kernel."""
    qdata, scale = tensors[0].contiguous(), tensors[1].contiguous()
    experts, outputs, half = qdata.shape
    out = qdata.new_empty((experts, outputs, 2 * half), dtype=dtype)
    zero = tensors[2].contiguous() if len(tensors) > 2 else scale
    wrapped(widen_int4_kernel)[(experts * outputs,)](
        qdata, scale, zero, out, half, half // scale.shape[-1], ZERO=len(tensors) > 2, BLOCK=1024, num_warps=4
    )
    return out
