"""Rows as integers in three digits of base 256, so that stored integers are multiplied as they are.

    row = (65536 * d0 + 256 * d1 + d2) * scale        scale: a power of two; digits from -128 to 127

To widen a weight to the dtype of the rows takes an instruction or two (int8: 2, int4: 0.9), and bounds a kernel of few
rows. The digits of a row are few: they are made once, and integer matrix instructions take the weights as bytes (int4:
0.4). Their sums are exact. So are a row's numbers, down to 2^-14 of its largest (float16: 2^-11); what is smaller is
off by at most 2^-22 of the largest, as float32 sums of a few terms of that size are. A row that is not finite makes
results that are not a number.
"""

from __future__ import annotations

import torch

from moe_fx.kernels.triton_or_none import after_previous, before_next, jit, overlapped, overlaps, tl
from moe_fx.kernels.triton_rows import apart

__all__ = ["joined", "split_digits", "split_digits_reference"]


def split_digits_reference(rows: torch.Tensor, pairs_apart: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits of ``rows [R, N]``, int8 ``[R, 3 * N]``, the highest of all columns first, and the float32 scale ``[R]``.

    pairs_apart: the even columns first, then the odd ones.
    """
    rows = (apart(rows) if pairs_apart else rows).float()
    exponent = rows.abs().amax(-1).view(torch.int32) >> 23
    scale = ((exponent.clamp(22) - 21) << 23).view(torch.float32)
    whole = (rows.double() / scale.unsqueeze(-1)).nan_to_num().round().int()
    last = ((whole + 128) & 255) - 128
    middle = (((whole - last >> 8) + 128) & 255) - 128
    first = (whole - last >> 8) - middle >> 8
    return torch.cat([first, middle, last], -1).to(torch.int8), torch.where(exponent == 255, torch.nan, scale)


@jit()
def split_digits_kernel(rows, out, scales, N, stride, APART: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """A row per program."""
    after_previous(OVERLAP)
    before_next(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    mask = n < N
    x = tl.load(rows + r * stride + n, mask=mask, other=0.0).to(tl.float32)
    # The largest of their bits: the largest of the numbers would not be one that is none.
    exponent = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 0) >> 23
    held = tl.maximum(exponent, 22)
    scale = ((held - 21) << 23).to(tl.float32, bitcast=True)
    tl.store(scales + r, tl.where(exponent == 255, float("nan"), scale))
    # Added to 1.5 * 2^23, a number below 2^22 is rounded to an integer, which is what the bits differ by.
    steps = x * ((275 - held) << 23).to(tl.float32, bitcast=True) + 12582912.0
    whole = steps.to(tl.int32, bitcast=True) - 0x4B400000
    last = ((whole + 128) & 255) - 128
    rest = (whole - last) >> 8
    middle = ((rest + 128) & 255) - 128
    to = out + r * 3 * N
    if APART:
        to += (n % 2) * (N // 2) + n // 2
    else:
        to += n
    tl.store(to, ((rest - middle) >> 8).to(tl.int8), mask=mask)
    tl.store(to + N, middle.to(tl.int8), mask=mask)
    tl.store(to + 2 * N, last.to(tl.int8), mask=mask)


def split_digits(rows: torch.Tensor, pairs_apart: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`split_digits_reference`, in one kernel; the last dimension must be dense."""
    count, width = rows.shape
    out = rows.new_empty((count, 3 * width), dtype=torch.int8)
    scales = rows.new_empty((count,), dtype=torch.float32)
    block = 1 << (width - 1).bit_length()
    overlapped(split_digits_kernel)[(count,)](
        rows, out, scales, width, rows.stride(0), APART=pairs_apart, BLOCK=block, OVERLAP=overlaps(),
        num_warps=4 if block <= 2048 else 8 if block <= 4096 else 16,
    )  # fmt: skip
    return out, scales


@jit()
def joined(acc, BM: tl.constexpr, FMT: tl.constexpr):
    """[BM, N] float32, the products of rows, from those of their digits [4 * BM, N], of which the fourth are none.

    FMT "int4": the weights were 16 times as large.
    """
    digit = tl.arange(0, 4)
    worth = tl.where(digit == 0, 65536.0, tl.where(digit == 1, 256.0, tl.where(digit == 2, 1.0, 0.0)))
    if FMT == "int4":
        worth = worth * 0.0625
    acc = tl.reshape(acc.to(tl.float32), (4, BM, acc.shape[1]))
    return tl.sum(acc * worth[:, None, None], 0)
