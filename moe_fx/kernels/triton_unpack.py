"""Stored weights widened in registers, and the product of a tile of rows with them.

int8 and int4 become bfloat16 without a conversion instruction: 0x4300 + n is the bfloat16 128 + n for n < 128, so a
byte permutation and a subtraction make two weights at once (conversions from integers run at a quarter of that rate,
and would bound the kernel instead of memory). For int4 the subtraction can be left out as well: what it would have
taken off a product is a multiple of the sum of the row, see :func:`moe_fx.kernels.triton_int4.int4_step`.
"""

from __future__ import annotations

from moe_fx.kernels.triton_or_none import jit, tl

__all__ = ["dot", "int8_to_float", "nibbles", "nibbles_as_bytes", "products_done", "widened", "word_to_float"]


@jit()
def int8_to_float(w, dtype: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 a, b, c, d;
                prmt.b32 a, $2, 0x43434343, 0x4140;
                prmt.b32 b, $2, 0x43434343, 0x4342;
                and.b32 c, a, 0xff80ff80;
                and.b32 d, b, 0xff80ff80;
                and.b32 a, a, 0xff7fff7f;
                and.b32 b, b, 0xff7fff7f;
                sub.bf16x2 $0, a, c;
                sub.bf16x2 $1, b, d;
                }
                """,
                "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 a, b, c;
                xor.b32 c, $2, 0x80808080;
                prmt.b32 a, c, 0x64646464, 0x4140;
                prmt.b32 b, c, 0x64646464, 0x4342;
                mov.b32 c, 0x64806480;
                sub.f16x2 $0, a, c;
                sub.f16x2 $1, b, c;
                }
                """,
                "=r,=r,r", [w], dtype=tl.float16, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        return w.to(dtype)


@jit()
def products_done(ASM: tl.constexpr):
    """Wait until this warp group's matrix instructions have read their operands: before weights are widened that are
    the left operand of the next ones.

    Triton 3.6 keeps such operands in registers and writes those of a loop's next turn while the last turn's are still
    read, unless what is multiplied is used in between (triton-lang/triton issue 9433).
    """
    if ASM:
        tl.inline_asm_elementwise(
            "{ wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0; }", "=r", [], tl.int32, is_pure=False, pack=1
        )


@jit()
def word_to_float(w, dtype: tl.constexpr, BITS: tl.constexpr, PART: tl.constexpr, ASM: tl.constexpr):
    """Of words of 8 or 16 bits that hold integers of BITS: those at place PART, as dtype.

    Two words side by side, in a register, become two results in one, as a matrix instruction takes its left operand.
    Words of 16 bits lie there as their results do, and need only be shifted.
    """
    SHIFT: tl.constexpr = BITS * PART
    if not ASM:
        if BITS == 8:
            return ((((w.to(tl.int32) >> SHIFT) & 255) ^ 128) - 128).to(tl.float32).to(dtype)
        else:
            return (((w.to(tl.int32) >> SHIFT) & 15) - 8).to(tl.float32).to(dtype)
    else:
        WIDE: tl.constexpr = w.dtype.primitive_bitwidth == 16
        SPREAD: tl.constexpr = "mov.b32 t, $1; " if WIDE else "cvt.u32.u16 t, $1; prmt.b32 t, t, 0, 0x4140; "
        MOVED: tl.constexpr = "{ .reg .b32 t, a, b; " + SPREAD + f"shr.b32 t, t, {SHIFT}; "
        KINDS: tl.constexpr = "=r,r" if WIDE else "=r,h"
        if dtype == tl.bfloat16:
            # int8: 128 and the low seven bits, less 128 or (of a negative number) 256.
            BF16: tl.constexpr = (
                "lop3.b32 a, t, 0x007f007f, 0x43004300, 0xea; lop3.b32 b, t, 0x00800080, 0x43004300, 0xea; "
                if BITS == 8
                else "lop3.b32 a, t, 0x000f000f, 0x43004300, 0xea; mov.b32 b, 0x43084308; "
            )
            return tl.inline_asm_elementwise(
                MOVED + BF16 + "sub.bf16x2 $0, a, b; }", KINDS, [w], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            F16: tl.constexpr = (
                "lop3.b32 a, t, 0x00ff00ff, 0x64806480, 0x6a; mov.b32 b, 0x64806480; "
                if BITS == 8
                else "lop3.b32 a, t, 0x000f000f, 0x64006400, 0xea; mov.b32 b, 0x64086408; "
            )
            return tl.inline_asm_elementwise(
                MOVED + F16 + "sub.f16x2 $0, a, b; }", KINDS, [w], dtype=tl.float16, is_pure=True, pack=2
            )


@jit()
def nibbles(w, dtype: tl.constexpr, SHIFTED: tl.constexpr, ASM: tl.constexpr):
    """Bytes [BN, B] to what their low and their high four bits mean: two of [BN, B], less 8, or 128 more if SHIFTED.

    SHIFTED (bfloat16 only, where 128 to 143 are exact) saves the subtractions, a quarter of all instructions.
    """
    if ASM:
        if SHIFTED:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 l, h;
                and.b32 l, $4, 0x0f0f0f0f;
                shr.u32 h, $4, 4;
                and.b32 h, h, 0x0f0f0f0f;
                prmt.b32 $0, l, 0x43434343, 0x4140;
                prmt.b32 $1, l, 0x43434343, 0x4342;
                prmt.b32 $2, h, 0x43434343, 0x4140;
                prmt.b32 $3, h, 0x43434343, 0x4342;
                }
                """,
                "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        elif dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 l, h, c, p, q, r, s;
                and.b32 l, $4, 0x0f0f0f0f;
                shr.u32 h, $4, 4;
                and.b32 h, h, 0x0f0f0f0f;
                prmt.b32 p, l, 0x43434343, 0x4140;
                prmt.b32 q, l, 0x43434343, 0x4342;
                prmt.b32 r, h, 0x43434343, 0x4140;
                prmt.b32 s, h, 0x43434343, 0x4342;
                mov.b32 c, 0x43084308;
                sub.bf16x2 $0, p, c;
                sub.bf16x2 $1, q, c;
                sub.bf16x2 $2, r, c;
                sub.bf16x2 $3, s, c;
                }
                """,
                "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 l, h, c, p, q, r, s;
                and.b32 l, $4, 0x0f0f0f0f;
                shr.u32 h, $4, 4;
                and.b32 h, h, 0x0f0f0f0f;
                prmt.b32 p, l, 0x64646464, 0x4140;
                prmt.b32 q, l, 0x64646464, 0x4342;
                prmt.b32 r, h, 0x64646464, 0x4140;
                prmt.b32 s, h, 0x64646464, 0x4342;
                mov.b32 c, 0x64086408;
                sub.f16x2 $0, p, c;
                sub.f16x2 $1, q, c;
                sub.f16x2 $2, r, c;
                sub.f16x2 $3, s, c;
                }
                """,
                "=r,=r,=r,=r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
    else:
        shift: tl.constexpr = 128.0 if SHIFTED else -8.0
        low = (w & 15).to(tl.float32) + shift
        high = (w >> 4).to(tl.float32) + shift
        return low.to(dtype), high.to(dtype)


@jit()
def nibbles_as_bytes(w, ASM: tl.constexpr):
    """Bytes [BN, B] to 16 times what their low and their high four bits mean: two int8 of [BN, B]."""
    if ASM:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 l;
            shl.b32 l, $2, 4;
            lop3.b32 $0, l, 0xf0f0f0f0, 0x80808080, 0x6a;
            lop3.b32 $1, $2, 0xf0f0f0f0, 0x80808080, 0x6a;
            }
            """,
            "=r,=r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low = ((w & 15).to(tl.int32) - 8) * 16
        high = ((w >> 4).to(tl.int32) - 8) * 16
        return low.to(tl.int8), high.to(tl.int8)


@jit()
def widened(w, dtype: tl.constexpr, ASM: tl.constexpr):
    if w.dtype == tl.int8:
        return int8_to_float(w, dtype, ASM)
    else:
        return w.to(dtype)


@jit()
def dot(a, w, acc, SWAP: tl.constexpr, TRANSPOSED: tl.constexpr):
    """acc + a @ w^T for a [BM, BK] and w [BN, BK] ([BK, BN] if TRANSPOSED); SWAP: the transpose of all that.

    Swapped, few rows become the narrow side of a wide matrix instruction, and weights its left operand.
    """
    if TRANSPOSED:
        w = tl.trans(w)
    if SWAP:
        return tl.dot(w, tl.trans(a), acc, out_dtype=acc.dtype)
    else:
        return tl.dot(a, tl.trans(w), acc, out_dtype=acc.dtype)
