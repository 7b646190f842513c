"""The lower pass: write every layer in the form that was planned for it."""

from __future__ import annotations

from typing import Any

import torch
from moe_fx.passes.lowering.choices import lower_choices
from moe_fx.passes.lowering.fused import lower_to_fused
from moe_fx.passes.lowering.gather import lower_to_gather
from moe_fx.passes.lowering.grouped import lower_to_grouped_mm
from moe_fx.passes.lowering.linear import lower_to_linear
from moe_fx.passes.lowering.slots import operands
from moe_fx.passes.lowering.table import RoutedRows, expert_linear_call
from torch.fx import Node

from moe_fx.experts import expert_linear, experts, per_row
from moe_fx.pipeline import Work
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["leftover", "lower_layers"]

LOWERINGS = {
    "grouped_mm": lower_to_grouped_mm, "linear": lower_to_linear, "gather": lower_to_gather, "fused": lower_to_fused,
}  # fmt: skip


def lower_layers(work: Work) -> None:
    program = work.program
    # Only what the layers read may vanish with them; an input that nobody ever read stays.
    read = {param for layer in work.layers for param in (*layer.originals, *operands(layer)[3])}
    values = FakeValues(program.fake_mode)
    for layer in work.layers:
        node, dtype, ids = layer.node, tensor_of(layer.node).dtype, operands(layer)[1]
        emit = Emitter(program.graph, node, values)
        lowered, reasons = LOWERINGS[layer.lowering](layer, program, emit)
        if tensor_of(lowered).dtype is not dtype:
            lowered = emit(torch.ops.aten.to.dtype, lowered, dtype)
        layer.why = "; ".join([layer.why, *dict.fromkeys(reasons)])
        layer.output = (layer.output[0], lowered.name)
        replace(node, lowered)
        erase_dead(program.graph, [node])
        if layer.lowering == "fused":
            lower_choices(ids, values)
    for linear in work.linears:
        _lower_linear(linear.node, Emitter(program.graph, linear.node, values))
    program.drop_weights({param for param in read if param in program.weights})


def _lower_linear(node: Node, emit: Emitter) -> None:
    """Write a quantized linear that is no expert's: as the linears of experts are."""
    given: Any = node.args
    rows, tensors, form = given
    *lead, inputs = shape_of(rows) or ()
    flat = emit(torch.ops.aten.reshape.default, rows, [-1, inputs]) if len(lead) != 1 else rows
    kept = [emit(torch.ops.moe_fx.kept.default, tensor) for tensor in tensors]
    result, _ = expert_linear_call("linear", RoutedRows(emit), flat, kept, form)
    if len(lead) != 1:
        sizes = [
            size if isinstance(size, int) else emit(torch.ops.aten.sym_size.int, rows, place)
            for place, size in enumerate(lead)
        ]
        result = emit(torch.ops.aten.reshape.default, result, [*sizes, shape_of(result)[-1]])
    replace(node, result)
    erase_dead(node.graph, [node])


def leftover(node: Node) -> str | None:
    """What LOWERED does not allow, or None: the stage's verifier."""
    if node.target in (experts, expert_linear, per_row):
        return "a call that exists only between raise and lower"
    return None
