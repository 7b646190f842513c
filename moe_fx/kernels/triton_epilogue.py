"""What happens to a tile of products before it is stored: scales, bias, activation, the routing weight."""

from __future__ import annotations

from moe_fx.kernels.triton_or_none import jit, tl

__all__ = ["activated", "gated", "of_columns", "rescaled"]


@jit()
def activated(x, ACT: tl.constexpr):
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # tanh(z) = 2 sigmoid(2 z) - 1
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "relu_squared":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACT == "none")
        return x


@jit()
def gated(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    if ACT == "clamped_swiglu":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1.0) * gate * tl.sigmoid(gate * ALPHA)
    else:
        return activated(gate, ACT) * up


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
