"""Lowering linear: every expert is a few plain linears, applied to all token rows; rows not routed to it count zero.

    met = zeros(T, E, bool).scatter(1, ids, True)
    own = zeros(T, E).scatter(1, ids, s)
    for e in range(E):
        out += where(met[:, e], body(x, own[:, e], weight[e]), 0)

No size depends on the routing, so it exports and compiles in one graph; that costs E/K times the multiplications. Any
technique made for linears applies.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from moe_fx.passes.lowering.slots import beside, flat, operands, rows_by_slot, sum_over_slots
from moe_fx.passes.lowering.table import RoutedRows, expert_linear_call
from torch.fx import Node

from moe_fx.experts import expert_linear, per_row
from moe_fx.formats import Unquantized, WeightFormat
from moe_fx.pipeline import Layer
from moe_fx.program import Program
from moe_fx.rewrite import Emitter
from moe_fx.shapes import shape_of, tensor_of
from moe_fx.weights import DerivedWeight, StackedWeight

__all__ = ["lower_to_linear"]

aten = torch.ops.aten


def lower_to_linear(layer: Layer, program: Program, emit: Emitter) -> tuple[Node, list[str]]:
    """Write the layer; returns its value and why faster ways were passed over."""
    tokens, ids, slots, params, shared = operands(layer)
    # A token that meets an expert at most once has one slot value for it; otherwise slots are rows of their own.
    by_token = layer.distinct
    if by_token:
        columns, width = _expert_columns(emit, layer, ids)
        own_slots = [_unbind(emit, _spread(emit, columns, width, slot), 1) for slot in slots]
        met = _unbind(emit, _met(emit, columns, width), 1)
    else:
        tokens, ids = rows_by_slot(emit, tokens, layer.top_k), flat(emit, ids)
        flat_slots = [flat(emit, slot) for slot in slots]
    routed = RoutedRows(emit)
    quantized = _quantized(layer)
    split = [_by_expert(emit, layer, program, param, kept=param in quantized) for param in params]
    total: list[Node] = []
    zero: list[Node] = []

    def linear(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
        return expert_linear_call("linear", routed, rows, tensors, form)[0]

    def shown(param: Node, rows: Node) -> Node:
        return emit(aten.unsqueeze.default, param, 0)

    def write(expert: int) -> None:
        weights = [parts(expert) for parts in split]
        own = [slot(expert) for slot in own_slots] if by_token else flat_slots
        output = emit.inline(layer.body, [tokens, *own, *weights, *shared], {expert_linear: linear, per_row: shown})
        hit = beside(emit, met(expert) if by_token else emit(aten.eq.Scalar, ids, expert), output)
        value = tensor_of(output)
        zero[:] = zero or [emit(aten.scalar_tensor.default, 0.0, dtype=value.dtype, device=value.device)]
        output = emit(aten.where.self, hit, output, zero[0])
        if value.dtype in (torch.bfloat16, torch.float16):
            output = emit(aten.to.dtype, output, torch.float32)
        total[:] = [emit(aten.add.Tensor, total[0], output) if total else output]

    write(0)
    emit.repeat(layer.num_experts - 1, lambda expert: write(expert + 1))
    result = total[0]
    return (result if by_token else sum_over_slots(emit, result, layer.top_k)), []


def _expert_columns(emit: Emitter, layer: Layer, ids: Node) -> tuple[Node, int]:
    """Ids ``[T, K]`` as columns, and how many there are: a last one takes the ids that may name no expert."""
    if layer.in_range:
        return ids, layer.num_experts
    below, above = emit(aten.lt.Scalar, ids, layer.num_experts), emit(aten.ge.Scalar, ids, 0)
    beyond = emit(aten.full_like.default, ids, layer.num_experts, pin_memory=False)
    columns = emit(aten.where.self, emit(aten.logical_and.default, below, above), ids, beyond)
    return columns, layer.num_experts + 1


def _met(emit: Emitter, columns: Node, width: int) -> Node:
    """bool ``[T, width, 1]``: whether a token meets an expert."""
    size = [_rows(emit, columns), width]
    hits = emit(aten.new_zeros.default, columns, size, dtype=torch.bool, pin_memory=False)
    return emit(aten.unsqueeze.default, emit(aten.scatter.value, hits, 1, columns, True), -1)


def _spread(emit: Emitter, columns: Node, width: int, slot: Node) -> Node:
    """``[T, K, ...]`` to ``[T, width, ...]``: the value of the one slot in which a token meets an expert."""
    shape = shape_of(slot)
    assert shape is not None
    for place in range(2, len(shape)):
        columns = emit(aten.unsqueeze.default, columns, -1)
        columns = emit(aten.expand.default, columns, [-1] * place + [shape[place]])
    size = [_rows(emit, slot), width, *shape[2:]]
    return emit(aten.scatter.src, emit(aten.new_zeros.default, slot, size, pin_memory=False), 1, columns, slot)


def _rows(emit: Emitter, node: Node) -> int | Node:
    (rows, *_) = shape_of(node) or (0,)
    return rows if isinstance(rows, int) else emit(aten.sym_size.int, node, 0)


def _unbind(emit: Emitter, stacked: Node, dim: int) -> Callable[[int], Node]:
    """The parts of a tensor along a dimension, each written where it is first read."""
    parts = emit(aten.unbind.int, stacked, dim)
    return lambda place: emit(operator.getitem, parts, place)


def _quantized(layer: Layer) -> set[Node]:
    """The params that expert linears read in a format other than the model's own."""
    linears = layer.body.graph.find_nodes(op="call_function", target=expert_linear)
    read = {tensor for node in linears if not isinstance(node.args[2], Unquantized) for tensor in node.args[1]}
    params = layer.node.args[3]
    placeholders = layer.body.graph.find_nodes(op="placeholder")[1 + len(layer.node.args[2]) :]
    return {param for param, placeholder in zip(params, placeholders, strict=False) if placeholder in read}


def _by_expert(emit: Emitter, layer: Layer, program: Program, param: Node, kept: bool) -> Callable[[int], Node]:
    """One expert's part of a param. What is quantized is kept so by compilers that fold constants.

    A stack is kept as a whole: folded, each part would be a constant that holds the memory of all.
    """
    keep = torch.ops.moe_fx.kept.default
    parts = _split(layer, program, param)
    if parts is None:
        return _unbind(emit, emit(keep, param) if kept else param, 0)
    return (lambda expert: emit(keep, parts(expert))) if kept else parts


def _split(layer: Layer, program: Program, param: Node) -> Callable[[int], Node] | None:
    """One weight per expert, where the storage asks for it; None where experts are read from the stacked tensor."""
    weight = program.weights.get(param)
    # What the program makes of a weight, such as its experts first, has no values to keep apart.
    if layer.storage != "per_expert" or weight is None or isinstance(weight, DerivedWeight):
        return None
    if isinstance(weight, StackedWeight):
        return _unstacked(param)
    module, _, name = weight.fqn.rpartition(".")
    names = [f"{module}.{expert}.{name}".lstrip(".") for expert in range(layer.num_experts)]
    # The stacked tensor may itself be what quantizing made of a parameter.
    origin = next((old for old, new in layer.names.items() if weight.fqn in new), weight.fqn)
    if origin in layer.parts:  # the model itself holds one per expert
        names = [held + weight.fqn.removeprefix(origin) for held in layer.parts[origin]]
    nodes = program.apart(param, names)
    earlier = layer.names.get(origin, (weight.fqn,))
    layer.names[origin] = tuple(new for each in earlier for new in (names if each == weight.fqn else [each]))
    return nodes.__getitem__


def _unstacked(stack: Node) -> Callable[[int], Node]:
    """The weights that the model itself holds, one per expert."""
    parts: Any = stack.args[0]
    return parts.__getitem__
