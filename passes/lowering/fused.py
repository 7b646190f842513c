"""Lowering fused: this library's Triton kernels, which gather, multiply, activate and weigh without moving a row.

A body that the kernels know (known_bodies.py), whole:

    y = moe_fx.fused_experts(x, ids, s, [up], [], "none", False, [down], None, "none", False, "gate_up", "silu", ...)

any other, its linears:

    up = moe_fx.slot_linear(x, ids, [weight], ...);  ...;  y = down.reshape(T, K, H).sum(1)

Where the kernels do not run, grouped_mm is written. The ops that a compiler looks into take part in its planning; those
that it does not (``*_any``) choose their tiles at run time, where the number of tokens is not fixed in the graph, and
can load by descriptors, where it is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from moe_fx.passes.lowering.grouped import lower_to_grouped_mm
from moe_fx.passes.lowering.known_bodies import KnownBody, Linear, known_body
from moe_fx.passes.lowering.slots import flat, operands, sum_over_slots, zero_unless
from moe_fx.passes.lowering.table import RoutedRows, expert_linear_call, unfit_reasons
from torch.fx import Node

from moe_fx.experts import expert_linear, per_row
from moe_fx.formats import Unquantized, WeightFormat
from moe_fx.kernels.fused_experts import fused_experts
from moe_fx.kernels.fused_projection import Projection, in_registers
from moe_fx.kernels.fused_tiles import loads_by_descriptor
from moe_fx.matcher import Miss
from moe_fx.pipeline import Layer
from moe_fx.program import Program
from moe_fx.rewrite import Emitter
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["lower_to_fused"]

aten = torch.ops.aten
assert fused_experts is not None  # importing it registers the ops


def lower_to_fused(layer: Layer, program: Program, emit: Emitter) -> tuple[Node, list[str]]:
    """Write the layer; returns its value and why faster ways were passed over."""
    reasons = _unfit(layer)
    if reasons:
        layer.lowering = "grouped_mm"
        written, more = lower_to_grouped_mm(layer, program, emit)
        return written, [*(f"{reason}: grouped_mm" for reason in reasons), *more]
    body = known_body(layer.body)
    if isinstance(body, Miss):
        reason = f"the body is not fused as a whole: {body.wanted} expected, found {body.found}"
        return _by_linears(layer, emit), [reason]
    unfit = _whole_unfit(layer, body)
    return (_by_linears(layer, emit), [unfit]) if unfit is not None else (_whole(layer, body, emit), [])


def _given(layer: Layer) -> dict[Node, Node]:
    """By placeholder of the body, the node of the program that it stands for; ids are no input of it."""
    tokens, _, slots, params, shared = operands(layer)
    placeholders = layer.body.graph.find_nodes(op="placeholder")
    return dict(zip(placeholders, [tokens, *slots, *params, *shared], strict=True))


def _unfit(layer: Layer) -> list[str]:
    """Why the kernels cannot multiply in this layer."""
    given, reasons = _given(layer), []
    tokens = operands(layer)[0]
    if len(shape_of(tokens) or ()) != 2:
        return [f"the fused kernels take rows of rank 2, tokens are of shape {shape_of(tokens)}"]
    for node in layer.body.graph.find_nodes(op="call_function", target=expert_linear):
        linear: Any = node.args
        reasons += unfit_reasons("fused", tokens, [given[tensor] for tensor in linear[1]], linear[2])
        rows = linear[0]
        if rows.target is aten.to.dtype and rows.args[1] is not tensor_of(tokens).dtype:
            reasons.append(f"the fused kernels multiply in the tokens' dtype, not {rows.args[1]}")
    return list(dict.fromkeys(reasons))


def _whole_unfit(layer: Layer, body: KnownBody) -> str | None:
    """Why a known body is not computed by one op."""
    given = _given(layer)
    dtype = tensor_of(operands(layer)[0]).dtype
    if tensor_of(layer.node).dtype not in (dtype, torch.float32):
        return f"the layer yields {tensor_of(layer.node).dtype} of {dtype} tokens"
    if body.slot is not None and len(shape_of(given[body.slot]) or ()) != 2:
        return f"a routing weight of shape {shape_of(given[body.slot])}"
    return None


def _transposed(form: WeightFormat) -> bool:
    return isinstance(form, Unquantized) and form.transposed


def _whole(layer: Layer, body: KnownBody, emit: Emitter) -> Node:
    given = _given(layer)
    tokens, ids, *_ = operands(layer)
    ops = torch.ops.moe_fx
    count = (shape_of(ids) or (None,))[0]
    up, down = body.up, body.down
    seen = isinstance(count, int) and not all(
        _loads_by_descriptor(linear, given, tensor_of(tokens).dtype, count * layer.top_k, layer.num_experts)
        for linear in (*up, down)
    )
    return emit(
        (ops.fused_experts if seen else ops.fused_experts_any).default,
        tokens, ids, None if body.slot is None else given[body.slot],
        [given[tensor] for linear in up for tensor in linear.tensors],
        [given[linear.bias] for linear in up if linear.bias is not None], up[0].form.name, _transposed(up[0].form),
        [given[tensor] for tensor in down.tensors], None if down.bias is None else given[down.bias],
        down.form.name, _transposed(down.form),
        body.gated, body.activation, float(body.alpha), float(body.limit), body.slot_before, _yielded(layer),
    )  # fmt: skip


def _loads_by_descriptor(
    linear: Linear, given: dict[Node, Node], dtype: torch.dtype, num_slots: int, num_experts: int
) -> bool:
    tensors = [tensor_of(given[tensor]) for tensor in linear.tensors]
    projection = Projection(tensors, linear.form.name, _transposed(linear.form))
    return loads_by_descriptor(projection.kind, num_slots, num_experts, in_registers(projection, dtype))


def _yielded(layer: Layer) -> torch.dtype:
    """The dtype of the result: a float32 sum that is only rounded to the tokens' dtype is rounded by the op."""
    dtype = tensor_of(operands(layer)[0]).dtype
    rounded = all(user.target is aten.to.dtype and user.args[1] is dtype for user in layer.node.users)
    return dtype if rounded and layer.node.users else tensor_of(layer.node).dtype


def _by_linears(layer: Layer, emit: Emitter) -> Node:
    tokens, ids, slots, params, shared = operands(layer)
    experts = flat(emit, ids)
    valid = None
    if not layer.in_range:
        below, above = emit(aten.lt.Scalar, experts, layer.num_experts), emit(aten.ge.Scalar, experts, 0)
        valid = emit(aten.logical_and.default, below, above)
        experts = emit(aten.clamp.default, experts, 0, layer.num_experts - 1)
    routed = RoutedRows(emit, ids=ids)

    def linear(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
        return expert_linear_call("fused", routed, rows, tensors, form)[0]

    # Only what is no linear needs a token's row once for every slot.
    linears = layer.body.graph.find_nodes(op="call_function", target=expert_linear)
    x = layer.body.graph.find_nodes(op="placeholder")[0]
    gathered = all(user in linears or user.target is per_row for user in x.users)
    if not gathered:
        repeated = emit(aten.expand.default, emit(aten.unsqueeze.default, tokens, 1), [-1, layer.top_k, -1])
        tokens = emit(aten.reshape.default, repeated, [-1, *(shape_of(tokens) or ())[1:]])
    output = emit.inline(
        layer.body,
        [tokens, *(flat(emit, slot) for slot in slots), *params, *shared],
        {expert_linear: linear, per_row: lambda param, _: emit(aten.index.Tensor, param, [experts])},
    )
    if valid is not None:
        output = zero_unless(emit, valid, output)
    return sum_over_slots(emit, output, layer.top_k)
