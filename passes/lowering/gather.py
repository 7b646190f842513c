"""Lowering gather: each row multiplies with its own expert's weight; only the chosen experts are read.

    y = (weight[ids.reshape(-1)] * rows.unsqueeze(-2)).sum(-1)

Compiled, the gather, the product and the sum are one loop over the chosen weights, which are read once and never
copied. Best for very few tokens; eagerly, and for many tokens, the gathered weights take memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from moe_fx.passes.lowering.slots import flat, operands, rows_by_slot, sum_over_slots, zero_unless
from moe_fx.passes.lowering.table import RoutedRows, expert_linear_call
from torch.fx import Node

from moe_fx.experts import expert_linear, per_row
from moe_fx.formats import WeightFormat
from moe_fx.pipeline import Layer
from moe_fx.program import Program
from moe_fx.rewrite import Emitter

__all__ = ["lower_to_gather"]

aten = torch.ops.aten


def lower_to_gather(layer: Layer, program: Program, emit: Emitter) -> tuple[Node, list[str]]:
    """Write the layer; returns its value and why faster ways were passed over."""
    tokens, ids, slots, params, shared = operands(layer)
    experts = flat(emit, ids)
    valid = None
    if not layer.in_range:
        below, above = emit(aten.lt.Scalar, experts, layer.num_experts), emit(aten.ge.Scalar, experts, 0)
        valid = emit(aten.logical_and.default, below, above)
        experts = emit(aten.clamp.default, experts, 0, layer.num_experts - 1)
    routed = RoutedRows(emit, expert_of_row=experts)

    def linear(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
        return expert_linear_call("gather", routed, rows, tensors, form)[0]

    output = emit.inline(
        layer.body,
        [rows_by_slot(emit, tokens, layer.top_k), *(flat(emit, slot) for slot in slots), *params, *shared],
        {expert_linear: linear, per_row: lambda param, _: emit(aten.index.Tensor, param, [experts])},
    )
    if valid is not None:
        output = zero_unless(emit, valid, output)
    return sum_over_slots(emit, output, layer.top_k), []
