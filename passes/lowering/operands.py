"""What an expert linear multiplies in each format, written with plain ops: activations, weights, and the scales after.

none             rows @ weight
weight-only      rows @ qdata * scale                                 one scale per output channel
dynamic          quantized rows @ qdata * row scale * scale
int4             rows @ ((nibbles - 8 - zero) * scale)                one scale per group of inputs
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from moe_fx.formats import Int4WeightOnly, PerChannel, Unquantized, WeightFormat
from moe_fx.formats.per_channel import LARGEST_ACTIVATION, SMALLEST_SCALE
from moe_fx.rewrite import Emitter
from moe_fx.shapes import Dim, shape_of, tensor_of

__all__ = ["cast", "int4_halves", "left_operand", "rescaled", "weight_operand"]

aten = torch.ops.aten


def cast(emit: Emitter, node: Node, dtype: torch.dtype) -> Node:
    return node if tensor_of(node).dtype is dtype else emit(aten.to.dtype, node, dtype)


def left_operand(
    emit: Emitter, rows: Node, form: WeightFormat, dtype: torch.dtype | None = None
) -> tuple[Node, Node | None]:
    """The rows to multiply, and a float32 scale ``[R, 1]`` for the product where activations are quantized.

    Quantized activations are of ``dtype``; by default, of a float dtype in which their products can be summed.
    """
    if not (isinstance(form, PerChannel) and form.dynamic):
        return rows, None
    # In float32, so that eager and compiled code agree on every rounding.
    wide = cast(emit, rows, torch.float32)
    bound = LARGEST_ACTIVATION[form.dtype]
    largest = emit(aten.amax.default, emit(aten.abs.default, wide), [-1], True)
    scale = emit(aten.clamp_min.default, emit(aten.div.Scalar, largest, bound), SMALLEST_SCALE)
    if form.dtype is torch.int8:
        steps = emit(aten.round.default, emit(aten.mul.Tensor, wide, emit(aten.reciprocal.default, scale)))
        values = emit(aten.clamp.default, steps, -128, 127)
    else:
        steps = emit(aten.clamp.default, emit(aten.div.Tensor, wide, scale), -bound, bound)
        values = emit(aten.to.dtype, steps, form.dtype)
    # bfloat16 holds every int8 and every float8 value; float16 does too, but not the sum of their products.
    exact = torch.bfloat16 if tensor_of(rows).dtype is torch.bfloat16 else torch.float32
    return cast(emit, values, dtype or exact), scale


def weight_operand(emit: Emitter, tensors: Sequence[Node], form: WeightFormat, dtype: torch.dtype) -> Node:
    """The weights to multiply with in ``dtype``: ``[..., N, K]``, or ``[..., K, N]`` if unquantized and transposed."""
    if isinstance(form, Unquantized | PerChannel):
        return cast(emit, tensors[0], dtype)
    assert isinstance(form, Int4WeightOnly), form
    *lead, outputs, half = shape_of(tensors[0]) or ()
    shifts = emit(
        aten.arange.start_step, 0, 8, 4, dtype=torch.uint8, device=tensor_of(tensors[0]).device, pin_memory=False
    )
    pairs = emit(aten.bitwise_right_shift.Tensor, emit(aten.unsqueeze.default, tensors[0], -1), shifts)
    nibbles = emit(aten.bitwise_and.Scalar, pairs, 15)
    return _scaled_groups(emit, nibbles, tensors, form, dtype, [*[-1 for _ in lead], outputs, 2 * half])


def int4_halves(emit: Emitter, tensors: Sequence[Node], form: Int4WeightOnly, dtype: torch.dtype) -> tuple[Node, Node]:
    """The weights of the even inputs and those of the odd ones, each ``[R, N, K / 2]``: every byte is read once."""
    _, outputs, half = shape_of(tensors[0]) or ()
    low = emit(aten.bitwise_and.Scalar, tensors[0], 15)
    high = emit(aten.bitwise_right_shift.Tensor_Scalar, tensors[0], 4)
    size = [-1, outputs, half]
    return (
        _scaled_groups(emit, low, tensors, form, dtype, size),
        _scaled_groups(emit, high, tensors, form, dtype, size),
    )


def _scaled_groups(
    emit: Emitter, nibbles: Node, tensors: Sequence[Node], form: Int4WeightOnly, dtype: torch.dtype, size: Sequence[Dim]
) -> Node:
    """What nibbles stand for, in ``size``: its last dimension is cut into as many groups as there are scales."""
    scale = tensors[1]
    (*_, count) = shape_of(scale) or ()
    groups = [*size[:-1], count, size[-1] // count]
    steps = emit(aten.sub.Scalar, cast(emit, emit(aten.reshape.default, nibbles, groups), dtype), 8)
    if not form.symmetric:
        steps = emit(aten.sub.Tensor, steps, cast(emit, emit(aten.unsqueeze.default, tensors[2], -1), dtype))
    weight = emit(aten.mul.Tensor, steps, cast(emit, emit(aten.unsqueeze.default, scale, -1), dtype))
    return emit(aten.reshape.default, weight, size)


def rescaled(emit: Emitter, product: Node, dtype: torch.dtype, *scales: Node | None) -> Node:
    """The product times its scales, in ``dtype``. Scales are float32, and so is the arithmetic."""
    for scale in scales:
        if scale is not None:
            product = emit(aten.mul.Tensor, product, scale)
    return cast(emit, product, dtype)
