"""Rows as integers in two digits of base 256, block by block, for sums of products of stored integers.

    16 numbers of a row = (256 * high + low) * scale    scale: a power of two; high from -128 to 127, low from 0 to 255

Four products of bytes and their sum are one instruction, so that stored integers are multiplied as they are (compare
:mod:`moe_fx.kernels.triton_digits`, for matrix instructions). A block of 16 has a scale of its own: whoever makes 16
numbers can split them, and no kernel need look for the largest of a row. A number is exact down to 2^-7 of the largest
of its block (float16: 2^-4); what is smaller is off by at most 2^-15 of that. A block that is not finite makes results
that are not a number.
"""

from __future__ import annotations

import torch

from moe_fx.kernels.triton_or_none import jit, tl
from moe_fx.kernels.triton_rows import apart

__all__ = ["BLOCK_INPUTS", "integer_products", "split_blocks_reference", "store_blocks"]

#: how many inputs share a scale
BLOCK_INPUTS = 16


def split_blocks_reference(rows: torch.Tensor, pairs_apart: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits of ``rows [R, N]``, int8 ``[R, 2 * N]``, the high ones first, and the float32 scales ``[R, N / 16]``.

    Low digits are stored as bytes without a sign. pairs_apart: of both, the even columns first, then the odd ones.
    """
    blocks = rows.float().unflatten(-1, (-1, BLOCK_INPUTS))
    exponent = blocks.abs().amax(-1).view(torch.int32) >> 23
    scale = ((exponent.clamp(15) - 14) << 23).view(torch.float32)
    whole = (blocks.double() / scale.unsqueeze(-1)).nan_to_num(0, 0, 0).round().int().flatten(-2)
    planes = [apart(each) if pairs_apart else each for each in (whole >> 8, whole & 255)]
    digits = torch.cat(planes, -1).to(torch.uint8).view(torch.int8)
    return digits, torch.where(exponent == 255, torch.nan, scale)


@jit()
def _block_steps(x, AXIS: tl.constexpr):
    """float32 x, blocks along AXIS (the last), as integers of 16 bits times the second, a scale without that axis."""
    # The largest of their bits: the largest of the numbers would not be one that is none.
    exponent = tl.max(tl.abs(x).to(tl.int32, bitcast=True), AXIS, keep_dims=True) >> 23
    held = tl.maximum(exponent, 15)
    scale = ((held - 14) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(exponent == 255, float("nan"), scale)
    # Added to 1.5 * 2^23, a number below 2^22 is rounded to an integer, which is what the bits differ by.
    steps = x * ((268 - held) << 23).to(tl.float32, bitcast=True) + 12582912.0
    return steps.to(tl.int32, bitcast=True) - 0x4B400000, tl.max(scale, AXIS)


@jit()
def store_blocks(x, out, scales, first, N, APART: tl.constexpr):
    """Split float32 x [B, 16], the numbers from column ``first`` on of the row whose digits and scales are out, scales.

    N, the columns of the row, is a multiple of 16; those beyond it are not stored.
    """
    whole, scale = _block_steps(x, 1)
    block = first // 16 + tl.arange(0, x.shape[0])
    tl.store(scales + block, scale, mask=block < N // 16)
    n = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    if APART:
        to = out + (n % 2) * (N // 2) + n // 2
    else:
        to = out + n
    tl.store(to, (whole >> 8).to(tl.int8), mask=n < N)
    tl.store(to + N, whole.to(tl.int8), mask=n < N)


@jit()
def _dot4(digits, weights, total, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """total and the sum of the products of four digits and four weights, of int32 that hold four bytes each."""
    if ASM:
        if SIGNED:
            return tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [digits, weights, total], tl.int32, is_pure=True, pack=1
            )
        else:
            return tl.inline_asm_elementwise(
                "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [digits, weights, total], tl.int32, is_pure=True, pack=1
            )
    else:
        for byte in tl.static_range(4):
            digit = ((digits << (24 - 8 * byte)) >> 24) if SIGNED else (digits >> (8 * byte)) & 255
            total += digit * ((weights << (24 - 8 * byte)) >> 24)
        return total


@jit()
def _upper_halves(words, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0xf0f0f0f0, 0x80808080, 0x6a;", "=r,r", [words], tl.int32, is_pure=True, pack=1
        )
    else:
        return (words & -0x0F0F0F10) ^ -0x7F7F7F80


@jit()
def _of_weights(rows, words, group_scale, INT4: tl.constexpr, ASM: tl.constexpr):
    """[SP, N, BK / 4] float32: rows times weights [SP, N, BK], int32 of four bytes, added by sixteen bytes.

    rows: as _rows_of_digits reads them. group_scale: of int4 weights, for each sixteen bytes.
    """
    even_high = rows[0][:, None, :]
    even_low = rows[1][:, None, :]
    scale = rows[4][:, None, :]
    none = tl.zeros(words.shape, tl.int32)
    if INT4:
        # A nibble holds its number and 8; as the upper half of a byte, with the highest bit turned, it is 16 times it.
        odd_high = rows[2][:, None, :]
        odd_low = rows[3][:, None, :]
        scale_two = rows[5][:, None, :]
        low = _upper_halves(words << 4, ASM)
        high = _upper_halves(words, ASM)
        total = _dot4(odd_high, high, _dot4(even_high, low, none, True, ASM), True, ASM) * 256
        total = _dot4(odd_low, high, _dot4(even_low, low, total, False, ASM), False, ASM)
    else:
        total = _dot4(even_low, words, _dot4(even_high, words, none, True, ASM) * 256, False, ASM)
    SP: tl.constexpr = words.shape[0]
    N: tl.constexpr = words.shape[1]
    PLACES: tl.constexpr = words.shape[2] // 4
    if INT4:
        one, two = tl.split(tl.sum(tl.reshape(total, (SP, N, PLACES, 2, 2)), 4))
        return (one.to(tl.float32) * scale + two.to(tl.float32) * scale_two) * group_scale
    else:
        return tl.sum(tl.reshape(total, (SP, N, PLACES, 4)), 3).to(tl.float32) * scale


@jit()
def _load(pointers, mask):
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0)


@jit()
def _packed(digits):
    """[..., 4] int32 as int32 of four bytes, their lowest eight bits."""
    byte = tl.arange(0, 4)
    for _ in tl.static_range(len(digits.shape) - 1):
        byte = byte[None]
    return tl.sum((digits & 255) << (byte * 8), len(digits.shape) - 1)


@jit()
def _rows_split(x, k0, K, INT4: tl.constexpr, EVEN_K: tl.constexpr, SP: tl.constexpr, BK: tl.constexpr):
    """What :func:`_rows_of_digits` reads, of rows at x [SP] that are split here, of 2-byte numbers."""
    PER_WORD: tl.constexpr = 8 if INT4 else 4
    n = tl.arange(0, BK * PER_WORD)[None, :] + k0 * PER_WORD
    rows = tl.load(x[:, None] + n) if EVEN_K else tl.load(x[:, None] + n, mask=n < K, other=0.0)
    rows = tl.reshape(rows.to(tl.float32), (SP, BK * PER_WORD // 16, 16))
    whole, scale = _block_steps(rows, 2)
    if INT4:
        # As [place, block, word, byte, even or odd].
        whole = tl.permute(tl.reshape(whole, (SP, BK, 4, 2)), (0, 1, 3, 2))
        even_high, odd_high = tl.split(_packed(whole >> 8))
        even_low, odd_low = tl.split(_packed(whole))
        scale, scale_two = tl.split(tl.reshape(scale, (SP, BK // 4, 2)))
        return even_high, even_low, odd_high, odd_low, scale, scale_two
    else:
        whole = tl.reshape(whole, (SP, BK, 4))
        high = _packed(whole >> 8)
        low = _packed(whole)
        return high, low, high, low, scale, scale


@jit()
def _rows_of_digits(digits, scales, k0, length, INT4: tl.constexpr, EVEN_K: tl.constexpr, BK: tl.constexpr):
    """The digits [SP, BK] of rows at digits [SP], four to a word (int4: of even and of odd inputs), and their scales
    [SP, BK / 4], two where sixteen bytes of weights are two blocks.
    """
    k = tl.arange(0, BK)[None, :] + k0
    place = tl.arange(0, BK // 4)[None, :] + k0 // 4
    read = None if EVEN_K else k < length
    read_scales = None if EVEN_K else place * 4 < length
    words = digits.to(tl.pointer_type(tl.int32))[:, None] + k
    high = _load(words, read)
    if INT4:
        odd_high = _load(words + length, read)
        low = _load(words + length * 2, read)
        odd_low = _load(words + length * 3, read)
        scale = _load(scales[:, None] + place * 2, read_scales)
        scale_two = _load(scales[:, None] + (place * 2 + 1), read_scales)
        return high, low, odd_high, odd_low, scale, scale_two
    else:
        low = _load(words + length, read)
        scale = _load(scales[:, None] + place, read_scales)
        return high, low, high, low, scale, scale


@jit()
def integer_products(
    a, a_scale, w, u, w_scale, u_scale, source, a_stride, first, first_up, valid, K, SPLIT: tl.constexpr,
    GROUP: tl.constexpr, TWO: tl.constexpr, MASKED: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """[SP, N] float32, twice: rows ``source`` [SP] of a times the rows first and first_up [SP, N] of w, u.

    a is in digits, with scales a_scale, if SPLIT; else it is split here. valid [SP, N]: which rows of w and u there
    are, if MASKED. K inputs. GROUP: int8: 0; int4: how many inputs share one of the scales w_scale, u_scale. BK: how
    many words of four bytes of weights at a time.
    """
    INT4: tl.constexpr = GROUP != 0
    # Weights are read by sixteen bytes, of 16 inputs or 32, which one group holds.
    length = (K // 32 if INT4 else K // 16) * 4
    k = tl.arange(0, BK)
    places = tl.arange(0, BK // 4)
    words = w.to(tl.pointer_type(tl.int32)) + first[:, :, None] * length + k[None, None, :]
    words_up = u.to(tl.pointer_type(tl.int32)) + first_up[:, :, None] * length + k[None, None, :]
    acc = tl.zeros((first.shape[0], first.shape[1], BK // 4), tl.float32)
    acc_up = acc
    for k0 in range(0, length, BK):
        mask = valid[:, :, None] if MASKED else None
        some = mask
        if EVEN_K == 0:
            mask = mask & (k0 + k < length)[None, None, :]
            some = some & (k0 + places * 4 < length)[None, None, :]
        weights = _load(words + k0, mask)
        if TWO:
            weights_up = _load(words_up + k0, mask)
        of_group = 1.0
        of_group_up = 1.0
        if INT4:
            group = ((k0 * 8 + places * 32) // GROUP)[None, None, :]
            of_group = _load(w_scale + first[:, :, None] * (K // GROUP) + group, some).to(tl.float32)
            if TWO:
                of_group_up = _load(u_scale + first_up[:, :, None] * (K // GROUP) + group, some).to(tl.float32)
        if SPLIT:
            rows = _rows_of_digits(a + source * 2 * K, a_scale + source * (K // 16), k0, length, INT4, EVEN_K, BK)
        else:
            rows = _rows_split(a + source * a_stride, k0, K, INT4, EVEN_K, first.shape[0], BK)
        acc += _of_weights(rows, weights, of_group, INT4, ASM)
        if TWO:
            acc_up += _of_weights(rows, weights_up, of_group_up, INT4, ASM)
    # int4: the weights were 16 times as large.
    worth: tl.constexpr = 0.0625 if INT4 else 1.0
    return tl.sum(acc, 2) * worth, tl.sum(acc_up, 2) * worth
