"""Weights widened all at once: for so many rows per expert that widening them in every tile would cost more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_fx.formats import Int4WeightOnly
from moe_fx.kernels.triton_or_none import INTERPRETED, jit, tl, wrapped
from moe_fx.kernels.triton_unpack import widened

__all__ = ["widen", "widen_int4", "widen_int4_reference", "widen_reference"]


def widen_reference(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 or float8 values in ``dtype``, still to be scaled."""
    return weight.to(dtype)


@jit()
def widen_kernel(weight, out, COUNT, BLOCK: tl.constexpr, ASM: tl.constexpr):
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(weight + j, mask=j < COUNT)
    tl.store(out + j, widened(values, out.dtype.element_ty, ASM), mask=j < COUNT)


def widen(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As :func:`widen_reference`, in one kernel; contiguous. (torch's own is at a third of the memory's speed.)"""
    weight = weight.contiguous()
    out = weight.new_empty(weight.shape, dtype=dtype)
    wrapped(widen_kernel)[(-(-weight.numel() // 8192),)](
        weight, out, weight.numel(), BLOCK=8192, ASM=not INTERPRETED, num_warps=8
    )
    return out


def widen_int4_reference(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """qdata uint8 ``[E, N, K/2]``, scale (and zero) ``[E, N, groups]`` as weights ``[E, N, K]``."""
    qdata, scale = tensors[:2]
    group_size = 2 * qdata.shape[-1] // scale.shape[-1]
    return Int4WeightOnly(group_size, symmetric=len(tensors) == 2).dequantize(*tensors).to(dtype)


@jit()
def widen_int4_kernel(qdata, scale, zero, out, COUNT, GROUP_BYTES: tl.constexpr, ZERO: tl.constexpr,
                      BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK bytes per program: rows and their groups follow one another without a gap."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    j = start + tl.arange(0, BLOCK)
    there = j < COUNT
    packed = tl.load(qdata + j, mask=there, other=0)
    group = j // GROUP_BYTES
    step = tl.load(scale + group, mask=there, other=0.0).to(tl.float32)
    low = (packed & 15).to(tl.float32) - 8.0
    high = (packed >> 4).to(tl.float32) - 8.0
    if ZERO:
        shift = tl.load(zero + group, mask=there, other=0).to(tl.float32)
        low -= shift
        high -= shift
    pairs = tl.interleave(low * step, high * step).to(out.dtype.element_ty)
    k = 2 * start + tl.arange(0, 2 * BLOCK)
    tl.store(out + k, pairs, mask=k < 2 * COUNT)


def widen_int4(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """As :func:`widen_int4_reference`, in one kernel."""
    qdata, scale = tensors[0].contiguous(), tensors[1].contiguous()
    experts, outputs, half = qdata.shape
    out = qdata.new_empty((experts, outputs, 2 * half), dtype=dtype)
    zero = tensors[2].contiguous() if len(tensors) > 2 else scale
    wrapped(widen_int4_kernel)[(-(-qdata.numel() // 2048),)](
        qdata, scale, zero, out, qdata.numel(), GROUP_BYTES=half // scale.shape[-1], ZERO=len(tensors) > 2,
        BLOCK=2048, num_warps=4,
    )  # fmt: skip
    return out
