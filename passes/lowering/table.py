"""The table: lowering x format -> how an expert linear is written.

A new format adds one row per lowering; a new lowering one column. An emitter that cannot be used in a
situation says so in words, and the next one of its cell is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from moe_fx.formats import Int8WeightOnly, Unquantized, WeightFormat
from moe_fx.kernels import grouped_mm as kernel
from moe_fx.rewrite import Emitter
from moe_fx.shapes import tensor_of

__all__ = ["RoutedRows", "expert_linear_call"]

aten = torch.ops.aten


@dataclass(frozen=True)
class RoutedRows:
    """What an emitter may read. ``offsets`` and ``expert_of_row`` where the lowering has them.

    Attributes:
        offsets: int32 ``[E]``, where each expert's rows end (grouped_mm).
        expert_of_row: int64 ``[R]`` (grouped_mm, gather).
    """

    emit: Emitter
    offsets: Node | None = None
    expert_of_row: Node | None = None


Emit = Callable[[RoutedRows, Node, Sequence[Node], WeightFormat], Node]


@dataclass(frozen=True)
class Cell:
    """One way to write an expert linear. ``unfit`` says what stands against it, or None."""

    emit: Emit
    unfit: Callable[[Node, Sequence[Node], WeightFormat], str | None] = lambda rows, tensors, form: None


def expert_linear_call(
    lowering: str, routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat
) -> tuple[Node, list[str]]:
    """Write an expert linear; also the reasons why better ways were passed over."""
    passed_over: list[str] = []
    for cell in TABLE[lowering, type(form)]:
        reason = cell.unfit(rows, tensors, form)
        if reason is None:
            return cell.emit(routed, rows, tensors, form), passed_over
        passed_over.append(reason)
    raise AssertionError(f"the last cell of {lowering} x {form.name} fits everything")


def _accumulation_dtype(rows: Node) -> torch.dtype:
    dtype = tensor_of(rows).dtype
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


# grouped_mm --------------------------------------------------------------------------------------------------------


def _native_unfit(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> str | None:
    dtype, weight = tensor_of(rows).dtype, tensor_of(tensors[0])
    assert weight is not None
    if dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        return f"aten._grouped_mm compiles in bfloat16 only (before torch 2.15), not {name}: moe_fx::grouped_mm"
    if any(isinstance(size, int) and size % 8 for size in weight.shape[1:]):
        shape = " x ".join(str(size) for size in weight.shape[1:])
        return f"aten._grouped_mm needs strides of 16 bytes, weights are {shape}: moe_fx::grouped_mm"
    return None


def _native_int8_unfit(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> str | None:
    if tensor_of(rows).device.type == "cpu":
        return (
            "on CPU moe_fx::grouped_mm widens one expert's int8 weights at a time, aten._grouped_mm needs all at once"
        )
    return _native_unfit(rows, tensors, form)


def _matrices(routed: RoutedRows, weight: Node, form: WeightFormat) -> Node:
    """``[E, K, N]``."""
    if isinstance(form, Unquantized) and form.transposed:
        return weight
    return routed.emit(aten.transpose.int, weight, -2, -1)


def _grouped_native(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    return routed.emit(aten._grouped_mm.default, rows, _matrices(routed, tensors[0], form), routed.offsets)


def _grouped_own(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    matrices = _matrices(routed, tensors[0], form)
    return routed.emit(torch.ops.moe_fx.grouped_mm.default, rows, matrices, routed.offsets)


def _grouped_int8_native(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    dtype = tensor_of(rows).dtype
    widened = routed.emit(aten.to.dtype, tensors[0], dtype)
    return _scaled_rows(routed, _grouped_native(routed, rows, [widened], form), tensors[1])


def _grouped_int8_own(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    return _scaled_rows(routed, _grouped_own(routed, rows, tensors[:1], form), tensors[1])


def _scaled_rows(routed: RoutedRows, rows: Node, scale: Node) -> Node:
    """Each row times the output scales of its expert."""
    return routed.emit(aten.mul.Tensor, rows, routed.emit(aten.index.Tensor, scale, [routed.expert_of_row]))


# linear: tensors are those of one expert ---------------------------------------------------------------------------


def _linear(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    weight = tensors[0]
    if isinstance(form, Unquantized) and form.transposed:
        weight = routed.emit(aten.transpose.int, weight, 0, 1)
    return routed.emit(aten.linear.default, rows, weight)


def _linear_int8(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    widened = routed.emit(aten.to.dtype, tensors[0], tensor_of(rows).dtype)
    return routed.emit(aten.mul.Tensor, routed.emit(aten.linear.default, rows, widened), tensors[1])


# gather: multiply and sum, which Inductor fuses with the reading of the chosen weights -------------------------------


def _gather(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    emit, wide = routed.emit, _accumulation_dtype(rows)
    transposed = isinstance(form, Unquantized) and form.transposed
    chosen = emit(aten.index.Tensor, tensors[0], [routed.expert_of_row])
    beside, summed = (-1, -2) if transposed else (-2, -1)
    column = emit(aten.unsqueeze.default, rows, beside)
    product = emit(aten.mul.Tensor, _cast(emit, chosen, wide), _cast(emit, column, wide))
    return _cast(emit, emit(aten.sum.dim_IntList, product, [summed]), tensor_of(rows).dtype)


def _gather_int8(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    return _scaled_rows(routed, _gather(routed, rows, tensors, form), tensors[1])


def _cast(emit: Emitter, node: Node, dtype: torch.dtype) -> Node:
    return node if tensor_of(node).dtype is dtype else emit(aten.to.dtype, node, dtype)


TABLE: dict[tuple[str, type[WeightFormat]], tuple[Cell, ...]] = {
    ("grouped_mm", Unquantized): (Cell(_grouped_native, _native_unfit), Cell(_grouped_own)),
    ("grouped_mm", Int8WeightOnly): (Cell(_grouped_int8_native, _native_int8_unfit), Cell(_grouped_int8_own)),
    ("linear", Unquantized): (Cell(_linear),),
    ("linear", Int8WeightOnly): (Cell(_linear_int8),),
    ("gather", Unquantized): (Cell(_gather),),
    ("gather", Int8WeightOnly): (Cell(_gather_int8),),
}

assert kernel is not None  # importing it registers the op
