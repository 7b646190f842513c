"""Lowering grouped_mm: rows sorted by expert, one matrix per group.

    sort = aten.sort(ids.reshape(-1));  offs = aten.searchsorted(sort[0], arange(E), right=True, out_int32=True)
    rows = x[sort[1] // K];  y = _grouped_mm(rows, weight.transpose(-2, -1), offs);  ...
    out = y[inverse of sort[1]].reshape(T, K, H).sum(1)

Every shape follows from the inputs' shapes: no value is read on the host.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from moe_fx.passes.lowering.slots import flat, operands, sum_over_slots, zero_unless
from moe_fx.passes.lowering.table import RoutedRows, expert_linear_call
from torch.fx import Node

from moe_fx.experts import expert_linear, per_row
from moe_fx.formats import WeightFormat
from moe_fx.pipeline import Layer
from moe_fx.program import Program
from moe_fx.rewrite import Emitter
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["lower_to_grouped_mm"]

aten = torch.ops.aten


def lower_to_grouped_mm(layer: Layer, program: Program, emit: Emitter) -> tuple[Node, list[str]]:
    """Write the layer; returns its value and why faster ways were passed over."""
    tokens, ids, slots, params, shared = operands(layer)
    device = tensor_of(ids).device
    order = emit(aten.sort.default, flat(emit, ids))
    sorted_ids, perm = emit(operator.getitem, order, 0), emit(operator.getitem, order, 1)
    experts = emit(aten.arange.default, layer.num_experts, dtype=torch.int64, device=device, pin_memory=False)
    offsets = emit(aten.searchsorted.Tensor, sorted_ids, experts, out_int32=True, right=True)
    valid = None
    if not layer.in_range:
        # Ids that name no expert: those beyond sort behind all others, and grouped_mm skips their rows; negative ones
        # sort before, with the rows of the first expert. The value of either is zero.
        below, above = emit(aten.lt.Scalar, sorted_ids, layer.num_experts), emit(aten.ge.Scalar, sorted_ids, 0)
        valid = emit(aten.logical_and.default, below, above)
        sorted_ids = emit(aten.clamp.default, sorted_ids, 0, layer.num_experts - 1)
    routed = RoutedRows(emit, offsets, sorted_ids)
    reasons: list[str] = []

    def linear(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
        written, passed_over = expert_linear_call("grouped_mm", routed, rows, tensors, form)
        reasons.extend(passed_over)
        return written

    token_of_row = emit(aten.floor_divide.default, perm, layer.top_k)
    rows = emit(aten.index.Tensor, tokens, [token_of_row])
    slot_rows = [emit(aten.index.Tensor, flat(emit, slot), [perm]) for slot in slots]
    output = emit.inline(
        layer.body,
        [rows, *slot_rows, *params, *shared],
        {expert_linear: linear, per_row: lambda param, _: emit(aten.index.Tensor, param, [sorted_ids])},
    )
    if valid is not None:
        output = zero_unless(emit, valid, output)
    unsorted = emit(aten.index.Tensor, output, [_inverse(emit, perm)])
    return sum_over_slots(emit, unsorted, layer.top_k), reasons


def _inverse(emit: Emitter, perm: Node) -> Node:
    """The permutation that undoes ``perm [S]``, by one scatter."""
    (size,) = shape_of(perm) or (0,)
    count = size if isinstance(size, int) else emit(aten.sym_size.int, perm, 0)
    device = tensor_of(perm).device
    places = emit(aten.arange.default, count, dtype=torch.int64, device=device, pin_memory=False)
    return emit(aten.scatter.src, emit(aten.zeros_like.default, perm, pin_memory=False), 0, perm, places)
