"""Rows and weights in float8 e4m3, for sums of products: what float8 dynamic means, for few tokens.

Rows are quantized where they are read, by the largest of the whole row: the first projection looks for it itself, and
leaves for the second the largest of each tile of its results. Products of four pairs are added in float16, in which
they are exact but for the sum's rounding (2^-11; the result's own in bfloat16 is 2^-9), and from there on in float32.
So that they fit, rows are 256 times smaller.
"""

from __future__ import annotations

from moe_fx.kernels.triton_or_none import jit, tl
from moe_fx.kernels.triton_rows import scale_of_largest

__all__ = ["float8_products", "largest_of_tile"]


@jit()
def largest_of_tile(x):
    """The largest absolute value [1] of float32 x [N]; not a number where one of them is none."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 0, keep_dims=True).to(tl.float32, bitcast=True)


@jit()
def _quantized(x, inverse, ASM: tl.constexpr):
    """float32 x [SP, 4 * BK] times inverse [SP], in float8, as float16 divided by 256: int32 of two of these, [SP, BK]
    of the first two of four, and of the last two.
    """
    SP: tl.constexpr = x.shape[0]
    BK: tl.constexpr = x.shape[1] // 4
    steps = x * inverse[:, None]
    if ASM:
        even, odd = tl.split(tl.reshape(steps, (SP, BK, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b16 l, h;
            .reg .b32 c;
            cvt.rn.satfinite.e4m3x2.f32 l, $3, $2;
            cvt.rn.satfinite.e4m3x2.f32 h, $5, $4;
            mov.b32 c, 0x1c001c00;
            cvt.rn.f16x2.e4m3x2 $0, l;
            cvt.rn.f16x2.e4m3x2 $1, h;
            mul.rn.f16x2 $0, $0, c;
            mul.rn.f16x2 $1, $1, c;
            }
            """,
            "=&r,=&r,f,f,f,f", [first, second, third, fourth], (tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        halves = (steps.to(tl.float8e4nv).to(tl.float32) * 0.00390625).to(tl.float16)
        even, odd = tl.split(tl.reshape(halves.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF, (SP, BK * 2, 2)))
        return tl.split(tl.reshape(even | (odd << 16), (SP, BK, 2)))


@jit()
def _dot4_float8(low, high, weights, ASM: tl.constexpr):
    """Two partial sums of four products, of two float16 each in low and high and four float8 in weights: all int32."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b16 l, h;
            .reg .b32 a, b;
            mov.b32 {l, h}, $3;
            cvt.rn.f16x2.e4m3x2 a, l;
            cvt.rn.f16x2.e4m3x2 b, h;
            mul.rn.f16x2 a, a, $1;
            fma.rn.f16x2 $0, b, $2, a;
            }
            """,
            "=r,r,r,r", [low, high, weights], tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        even = _product(low, weights, 0) + _product(high, weights, 2)
        odd = _product(low >> 16, weights, 1) + _product(high >> 16, weights, 3)
        even = even.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return even | (odd.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@jit()
def _product(halves, weights, byte: tl.constexpr):
    row = (halves & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return row * ((weights >> (8 * byte)) & 255).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@jit()
def _add(a, b, ASM: tl.constexpr):
    """Sums of two float16 each in int32."""
    if ASM:
        return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    else:
        low = _half(a, 0) + _half(b, 0)
        high = _half(a, 16) + _half(b, 16)
        low = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low | (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@jit()
def _half(words, bit: tl.constexpr):
    return ((words >> bit) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit()
def _dot16(low, high, weights, ASM: tl.constexpr):
    """[SP, N, BK / 4] float32: the products of sixteen inputs added; low and high [SP, BK], weights [SP, N, BK]."""
    words = _dot4_float8(low[:, None, :], high[:, None, :], weights, ASM)
    words = tl.reshape(words, (words.shape[0], words.shape[1], words.shape[2] // 4, 2, 2))
    even, odd = tl.split(words)
    first, second = tl.split(_add(even, odd, ASM))
    total = _add(first, second, ASM)
    return _half(total, 0) + _half(total, 16)


@jit()
def _words(
    w, u, valid, k0, length, TWO: tl.constexpr, MASKED: tl.constexpr, EVEN_K: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Those from k0 on at w and u [SP, N, BK]; the first twice, if there are not two."""
    mask = valid[:, :, None]
    if EVEN_K == 0:
        mask = mask & (k0 + tl.arange(0, BK) < length)[None, None, :]
    words = tl.load(w + k0, mask=mask, other=0) if MASKED else tl.load(w + k0)
    words_up = words
    if TWO:
        words_up = tl.load(u + k0, mask=mask, other=0) if MASKED else tl.load(u + k0)
    return words, words_up


@jit()
def _add_products(acc, acc_up, rows, inverse, words, words_up, k0, K, TWO: tl.constexpr, ASM: tl.constexpr):
    inputs = (k0 * 4 + tl.arange(0, words.shape[2] * 4))[None, :]
    x = tl.load(rows + inputs, mask=inputs < K, other=0.0).to(tl.float32)
    low, high = _quantized(x, inverse, ASM)
    acc += _dot16(low, high, words, ASM)
    if TWO:
        acc_up += _dot16(low, high, words_up, ASM)
    return acc, acc_up


@jit()
def float8_products(
    a, largest, w, u, source, a_stride, first, first_up, valid, K, TILES, MADE: tl.constexpr, MOST: tl.constexpr,
    BOUND: tl.constexpr, SMALLEST: tl.constexpr, TWO: tl.constexpr, MASKED: tl.constexpr, EVEN_K: tl.constexpr,
    ASM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[SP, N] float32, twice: rows ``source`` [SP] of a times the rows first and first_up [SP, N] of w, u.

    K inputs, a multiple of 16. MADE: ``largest`` [*, TILES] is of parts of the rows of a. MOST: at least as many as K,
    or TILES. valid [SP, N]: which rows of w and u there are, if MASKED. BK: how many words of four inputs at a time.
    """
    SP: tl.constexpr = first.shape[0]
    N: tl.constexpr = first.shape[1]
    length = K // 16 * 4
    k = tl.arange(0, BK)
    w = w.to(tl.pointer_type(tl.int32)) + first[:, :, None] * length + k[None, None, :]
    u = u.to(tl.pointer_type(tl.int32)) + first_up[:, :, None] * length + k[None, None, :]
    rows = a + source[:, None] * a_stride
    n = tl.arange(0, MOST)[None, :]
    acc = tl.zeros((SP, N, BK // 4), tl.float32)
    acc_up = acc
    if MADE:
        values = tl.load(largest + source[:, None] * TILES + n, mask=n < TILES, other=0.0)
    else:
        # The first weights are under way while the row's largest is looked for.
        words, words_up = _words(w, u, valid, 0, length, TWO, MASKED, EVEN_K, BK)
        values = tl.load(rows + n, mask=n < K, other=0.0).to(tl.float32)
    scale = scale_of_largest(tl.abs(values), BOUND, SMALLEST)
    inverse = tl.math.div_rn(1.0, scale)
    if not MADE:
        acc, acc_up = _add_products(acc, acc_up, rows, inverse, words, words_up, 0, K, TWO, ASM)
    for k0 in range(0 if MADE else BK, length, BK):
        words, words_up = _words(w, u, valid, k0, length, TWO, MASKED, EVEN_K, BK)
        acc, acc_up = _add_products(acc, acc_up, rows, inverse, words, words_up, k0, K, TWO, ASM)
    scale = scale[:, None] * 256.0
    return tl.sum(acc, 2) * scale, tl.sum(acc_up, 2) * scale
