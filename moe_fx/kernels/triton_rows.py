"""Kernels over rows: activations quantized row by row, and the sum of each token's slots."""

from __future__ import annotations

import torch

from moe_fx.formats.per_channel import LARGEST_ACTIVATION, SMALLEST_SCALE, quantize_activations
from moe_fx.kernels.triton_or_none import INTERPRETED, jit, tl, wrapped

__all__ = ["quantize_rows", "quantize_rows_reference", "sum_slots", "sum_slots_reference"]


def quantize_rows_reference(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows [R, N]`` as int8 or float8_e4m3fn values and a float32 scale ``[R]``."""
    values, scale = quantize_activations(rows.float(), dtype)
    return values, scale.squeeze(-1)


@jit()
def quantize_rows_kernel(rows, values, scales, N, stride, BOUND: tl.constexpr, SMALLEST: tl.constexpr,
                         BLOCK: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """One row per program; rounded as :func:`quantize_rows_reference` does, to the bit."""
    r = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    x = tl.load(rows + r * stride + n, mask=n < N, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.math.div_rn(tl.max(tl.abs(x), 0), BOUND), SMALLEST)
    tl.store(scales + r, scale)
    if values.dtype.element_ty == tl.int8:
        # Rounded to the nearest integer, ties to even. By adding 3 * 2^22 the product would be rounded once, as one
        # multiply-add, and not twice as the reference does.
        steps = x * tl.math.div_rn(1.0, scale)
        if ASM:
            steps = tl.inline_asm_elementwise(
                "cvt.rni.f32.f32 $0, $1;", "=f,f", [steps], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            steps = (steps + 12582912.0) - 12582912.0
        steps = tl.minimum(tl.maximum(steps, -128.0), 127.0)
    else:
        steps = tl.math.div_rn(x, tl.broadcast_to(scale, (BLOCK,)))
        steps = tl.minimum(tl.maximum(steps, -BOUND), BOUND)
    tl.store(values + r * N + n, steps.to(values.dtype.element_ty), mask=n < N)


def quantize_rows(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`quantize_rows_reference`, in one kernel; the last dimension must be dense."""
    count, width = rows.shape
    values = rows.new_empty((count, width), dtype=dtype)
    scales = rows.new_empty((count,), dtype=torch.float32)
    block = 1 << (width - 1).bit_length()
    wrapped(quantize_rows_kernel)[(count,)](
        rows, values, scales, width, rows.stride(0),
        BOUND=LARGEST_ACTIVATION[dtype], SMALLEST=SMALLEST_SCALE, BLOCK=block, ASM=not INTERPRETED,
        num_warps=8 if block > 4096 else 4,
    )  # fmt: skip
    return values, scales


def sum_slots_reference(rows: torch.Tensor, ids: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """``rows [T*K, H]`` to ``[T, H]`` of ``dtype``: the float32 sum over slots whose id names an expert."""
    by_token = rows.unflatten(0, ids.shape)
    valid = ((ids >= 0) & (ids < num_experts)).unsqueeze(-1)
    return torch.where(valid, by_token, 0).float().sum(1).to(dtype)


@jit()
def sum_slots_kernel(rows, ids, out, E, H, K: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        expert = tl.load(ids + t * K + slot)
        valid = (expert >= 0) & (expert < E)
        total += tl.load(rows + (t * K + slot) * H + h, mask=(h < H) & valid, other=0.0).to(tl.float32)
    tl.store(out + t * H + h, total.to(out.dtype.element_ty), mask=h < H)


def sum_slots(rows: torch.Tensor, ids: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """As :func:`sum_slots_reference`, in one kernel and in the same order every time; both operands contiguous."""
    count, top_k = ids.shape
    hidden = rows.shape[1]
    out = rows.new_empty((count, hidden), dtype=dtype)
    block = 512 if count < 64 else 1024
    wrapped(sum_slots_kernel)[(count, -(-hidden // block))](
        rows, ids, out, num_experts, hidden, K=top_k, BLOCK=block, num_warps=4
    )
    return out
