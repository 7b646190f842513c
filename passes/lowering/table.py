"""The table: lowering x format -> how an expert linear is written.

A new format adds one row per lowering; a new lowering one column. An emitter that cannot be used in a
situation says so in words, and the next one of its cell is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from moe_fx.passes.lowering.operands import cast, int4_halves, left_operand, rescaled, weight_operand
from torch.fx import Node

from moe_fx.formats import (
    AnyLinear,
    Float8Dynamic,
    Float8WeightOnly,
    Int4WeightOnly,
    Int8Dynamic,
    Int8WeightOnly,
    PerChannel,
    Unquantized,
    WeightFormat,
)  # fmt: skip
from moe_fx.kernels import fused_experts, grouped_amx, grouped_int4, grouped_mm, kept
from moe_fx.kernels.triton_or_none import unavailable
from moe_fx.rewrite import Emitter
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["RoutedRows", "expert_linear_call", "unfit_reasons"]

aten = torch.ops.aten

FORMATS: tuple[type[WeightFormat], ...] = (
    Unquantized, Int8WeightOnly, Int8Dynamic, Float8WeightOnly, Float8Dynamic, Int4WeightOnly,
)  # fmt: skip


@dataclass(frozen=True)
class RoutedRows:
    """What an emitter may read. ``offsets`` and ``expert_of_row`` where the lowering has them.

    Attributes:
        offsets: int32 ``[E]``, where each expert's rows end (grouped_mm).
        expert_of_row: int64 ``[R]`` (grouped_mm, gather).
        ids: ``[T, K]``, where rows are slots or tokens in their own order (fused).
    """

    emit: Emitter
    offsets: Node | None = None
    expert_of_row: Node | None = None
    ids: Node | None = None
    #: activations that were quantized once for several experts
    quantized: dict[tuple[Node, WeightFormat], tuple[Node, Node | None]] = field(default_factory=dict)

    def left(self, rows: Node, form: WeightFormat) -> tuple[Node, Node | None]:
        """The rows to multiply, and the scale of the product; see :func:`left_operand`."""
        if (rows, form) not in self.quantized:
            self.quantized[rows, form] = left_operand(self.emit, rows, form)
        return self.quantized[rows, form]


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
    for cell in TABLE[lowering][type(form)]:
        reason = cell.unfit(rows, tensors, form)
        if reason is None:
            return cell.emit(routed, rows, tensors, form), passed_over
        passed_over.append(reason)
    raise AssertionError(f"the last cell of {lowering} x {form.name} fits everything")


def unfit_reasons(lowering: str, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> list[str]:
    """Why no way of a lowering can write an expert linear; empty if one can."""
    reasons = [cell.unfit(rows, tensors, form) for cell in TABLE[lowering][type(form)]]
    return [] if None in reasons else [reason for reason in reasons if reason is not None]


def _dtype(node: Node) -> torch.dtype:
    value = tensor_of(node)
    assert value is not None
    return value.dtype


# grouped_mm --------------------------------------------------------------------------------------------------------


def _sizes(tensors: Sequence[Node], form: WeightFormat) -> list[int]:
    """The last two sizes of the weights, unpacked."""
    *_, outputs, inputs = shape_of(tensors[0]) or ()
    return [int(outputs), int(inputs) * (2 if isinstance(form, Int4WeightOnly) else 1)]


def _shape(tensors: Sequence[Node], form: WeightFormat) -> str:
    return " x ".join(map(str, _sizes(tensors, form)))


def _native_unfit(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> str | None:
    dtype = _dtype(rows)
    if dtype is not torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        return f"aten._grouped_mm compiles in bfloat16 only (before torch 2.15), not {name}: moe_fx::grouped_mm"
    if tensor_of(rows).device.type == "cpu" and _amx_unfit(rows, tensors, form) is None:
        return "on this CPU moe_fx::grouped_mm multiplies in AMX tiles, from weights as they are stored"
    if any(size % 8 for size in _sizes(tensors, form)):
        return f"aten._grouped_mm needs strides of 16 bytes, weights are {_shape(tensors, form)}: moe_fx::grouped_mm"
    strides = tensor_of(tensors[0]).stride()
    if 1 not in strides[-2:]:
        return f"aten._grouped_mm needs rows or columns that lie together, strides are {strides}: moe_fx::grouped_mm"
    return None


def _amx_unfit(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> str | None:
    if isinstance(form, Unquantized) and form.transposed:
        return "the AMX kernel reads weights [E, N, K], not [E, K, N]"
    return grouped_amx.unfit(tensor_of(rows), tensor_of(tensors[0]))


def _widening_unfit(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> str | None:
    if tensor_of(rows).device.type == "cpu":
        return "on CPU moe_fx::grouped_mm widens one expert's weights at a time, aten._grouped_mm needs all at once"
    return _native_unfit(rows, tensors, form)


def _scaled_unfit(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> str | None:
    device = tensor_of(rows).device
    if device.type != "cuda":
        return f"torch._scaled_grouped_mm needs a GPU of compute capability 9.0, not {device.type}"
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
    if capability != (9, 0):
        found = "none here" if capability is None else ".".join(map(str, capability))
        return f"torch._scaled_grouped_mm needs a GPU of compute capability 9.0, found {found}"
    if any(size % 16 for size in _sizes(tensors, form)):
        return f"torch._scaled_grouped_mm needs multiples of 16, weights are {_shape(tensors, form)}"
    if _dtype(rows) is not torch.bfloat16:
        return f"torch._scaled_grouped_mm gives bfloat16, not {_dtype(rows)}"
    return None


def _matrices(routed: RoutedRows, weight: Node, form: WeightFormat) -> Node:
    """``[E, K, N]``."""
    if isinstance(form, Unquantized) and form.transposed:
        return weight
    return routed.emit(aten.transpose.int, weight, -2, -1)


def _grouped_native(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    left, row_scale = routed.left(rows, form)
    if not isinstance(form, Unquantized):
        tensors = [routed.emit(torch.ops.moe_fx.kept.default, tensor) for tensor in tensors]
    weight = weight_operand(routed.emit, tensors, form, _dtype(left))
    product = routed.emit(aten._grouped_mm.default, left, _matrices(routed, weight, form), routed.offsets)
    return rescaled(routed.emit, product, _dtype(rows), row_scale, _chosen_scale(routed, tensors, form))


def _grouped_own(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    left, row_scale = routed.left(rows, form)
    matrices = _matrices(routed, tensors[0], form)
    product = routed.emit(torch.ops.moe_fx.grouped_mm.default, left, matrices, routed.offsets)
    return rescaled(routed.emit, product, _dtype(rows), row_scale, _chosen_scale(routed, tensors, form))


def _grouped_own_int4(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    qdata, scale, *zero = tensors
    target = torch.ops.moe_fx.grouped_mm_int4.default
    return routed.emit(target, rows, qdata, scale, zero[0] if zero else None, routed.offsets)


def _grouped_scaled(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    emit = routed.emit
    left, row_scale = left_operand(emit, rows, form, torch.float8_e4m3fn)
    return emit(
        aten._scaled_grouped_mm.default, left, emit(aten.transpose.int, tensors[0], -2, -1),
        emit(aten.squeeze.dim, row_scale, -1), tensors[1], routed.offsets,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def _chosen_scale(routed: RoutedRows, tensors: Sequence[Node], form: WeightFormat) -> Node | None:
    """The output scales of each row's expert: ``[R, N]``."""
    if not isinstance(form, PerChannel):
        return None
    return routed.emit(aten.index.Tensor, tensors[1], [routed.expert_of_row])


# linear: tensors are those of one expert ---------------------------------------------------------------------------


def _linear(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    emit = routed.emit
    left, row_scale = routed.left(rows, form)
    weight = weight_operand(emit, tensors, form, _dtype(left))
    if isinstance(form, Unquantized) and form.transposed:
        weight = emit(aten.transpose.int, weight, 0, 1)
    product = emit(aten.linear.default, left, weight)
    return rescaled(emit, product, _dtype(rows), row_scale, tensors[1] if isinstance(form, PerChannel) else None)


def _linear_as_traced(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    assert isinstance(form, AnyLinear)
    node: Node = routed.emit.inline(form.graph_of([tensor_of(tensor) for tensor in tensors]), [rows, *tensors], {})
    return node


# gather: multiply and sum, which Inductor fuses with the reading of the chosen weights -------------------------------


def _gather(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    emit = routed.emit
    transposed = isinstance(form, Unquantized) and form.transposed
    left, row_scale = routed.left(rows, form)
    # Sums of products are kept in float32; float64 stays what it is.
    wide = _dtype(left) if _dtype(left) is torch.float64 else torch.float32
    weights = tensors[:1] if isinstance(form, PerChannel) else tensors
    chosen = [emit(aten.index.Tensor, tensor, [routed.expert_of_row]) for tensor in weights]
    beside, summed = (-1, -2) if transposed else (-2, -1)
    column = cast(emit, emit(aten.unsqueeze.default, left, beside), wide)
    if isinstance(form, Int4WeightOnly):
        product = _pairwise_product(emit, int4_halves(emit, chosen, form, wide), column)
    else:
        product = emit(aten.mul.Tensor, weight_operand(emit, chosen, form, wide), column)
    result = emit(aten.sum.dim_IntList, product, [summed])
    return rescaled(emit, result, _dtype(rows), row_scale, _chosen_scale(routed, tensors, form))


def _pairwise_product(emit: Emitter, halves: tuple[Node, Node], column: Node) -> Node:
    """Weights of even and odd inputs ``[R, N, K / 2]`` times their inputs ``[R, 1, K]``, added in pairs."""
    *_, inputs = shape_of(column) or ()
    pairs = emit(aten.reshape.default, column, [-1, 1, inputs // 2, 2])
    even, odd = (
        emit(aten.mul.Tensor, half, emit(aten.select.int, pairs, -1, place)) for place, half in enumerate(halves)
    )
    return emit(aten.add.Tensor, even, odd)


# fused: tensors are stacked over experts; rows are those of tokens, or of slots ---------------------------------------


def _fused_unfit(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> str | None:
    reason = unavailable(tensor_of(rows).device)
    if reason is not None:
        return reason
    dtype = _dtype(rows)
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the fused kernels multiply in bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if isinstance(form, Unquantized) and _dtype(tensors[0]) is not dtype:
        return f"the fused kernels multiply {dtype} rows with {dtype} weights, not {_dtype(tensors[0])}"
    if not all(tensor_of(tensor).is_contiguous() for tensor in tensors):
        return "the fused kernels read contiguous weights, and these would be copied at every call"
    if isinstance(form, Int4WeightOnly) and form.group_size % 32:
        return f"the fused kernels take int4 groups of multiples of 32 inputs, not {form.group_size}"
    return None


def _fused(routed: RoutedRows, rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
    fixed = isinstance((shape_of(routed.ids) or (None,))[0], int)
    target = (torch.ops.moe_fx.slot_linear if fixed else torch.ops.moe_fx.slot_linear_any).default
    transposed = isinstance(form, Unquantized) and form.transposed
    return routed.emit(target, rows, routed.ids, list(tensors), form.name, transposed)


_WIDENED = (Cell(_grouped_native, _widening_unfit), Cell(_grouped_own))

TABLE: dict[str, dict[type[WeightFormat], tuple[Cell, ...]]] = {
    "grouped_mm": {
        Unquantized: (Cell(_grouped_native, _native_unfit), Cell(_grouped_own)),
        Int8WeightOnly: _WIDENED,
        Int8Dynamic: _WIDENED,
        Float8WeightOnly: _WIDENED,
        Float8Dynamic: (Cell(_grouped_scaled, _scaled_unfit), *_WIDENED),
        Int4WeightOnly: (Cell(_grouped_native, _widening_unfit), Cell(_grouped_own_int4)),
    },
    "linear": {**dict.fromkeys(FORMATS, (Cell(_linear),)), AnyLinear: (Cell(_linear_as_traced),)},
    "gather": dict.fromkeys(FORMATS, (Cell(_gather),)),
    # What does not fit in one linear is written as grouped_mm for the whole layer: see fused.py.
    "fused": dict.fromkeys(FORMATS, (Cell(_fused, _fused_unfit),)),
}

assert grouped_mm is not None  # importing them registers the ops
assert fused_experts is not None
assert grouped_int4 is not None
assert kept is not None
