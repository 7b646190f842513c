"""What happens to a tile of products before it is stored: scales, bias, activation, the routing weight."""

from __future__ import annotations

from moe_fx.kernels.triton_or_none import jit, tl

__all__ = ["activated", "column_halves", "gated", "of_columns", "rescaled"]


@jit()
def _sigmoid(x, ASM: tl.constexpr):
    """1 / (1 + e^-x); ASM: by the hardware's approximations as they are, zero where a number is too small to be normal.

    What the compiler puts around them for such numbers is 8 of the 27 instructions that a tile of gate and up takes for
    each result behind its loop, where nothing is multiplied.
    """
    if ASM:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sigmoid(x)


@jit()
def activated(x, ACT: tl.constexpr, ASM: tl.constexpr = False):
    if ACT == "silu":
        return x * _sigmoid(x, ASM)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # tanh(z) = 2 sigmoid(2 z) - 1
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), ASM)
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "relu_squared":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACT == "none")
        return x


@jit()
def gated(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, ASM: tl.constexpr = False):
    if ACT == "clamped_swiglu":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1.0) * gate * _sigmoid(gate * ALPHA, ASM)
    else:
        return activated(gate, ACT, ASM) * up


@jit()
def column_halves(x):
    """The first and the last half of the columns of x [R, C], which are products: in other registers of a thread."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@jit()
def of_columns(scales, bias, rows, FMT: tl.constexpr, BIAS: tl.constexpr):
    """The scales of the columns that these rows of the weights make, and their bias; numbers where there are none."""
    scale = 1.0
    added = 0.0
    if FMT == "dynamic" or FMT == "widened":
        scale = tl.load(scales + rows)
    if BIAS:
        added = tl.load(bias + rows).to(tl.float32)
    return scale, added


@jit()
def rescaled(acc, row_scale, column_scale, bias, slot, SCALED: tl.constexpr, FMT: tl.constexpr, SLOT: tl.constexpr,
             BIAS: tl.constexpr):  # fmt: skip
    """Products [BM, BN] times the scales of their row (if SCALED) and column; the routing weight before (1) or after
    (2) bias.
    """
    acc = acc.to(tl.float32)
    if SCALED:
        acc = acc * row_scale[:, None]
    if FMT == "dynamic" or FMT == "widened":
        acc = acc * column_scale[None, :]
    if SLOT == 1:
        acc = acc * slot[:, None]
    if BIAS:
        acc = acc + bias[None, :]
    if SLOT == 2:
        acc = acc * slot[:, None]
    return acc
