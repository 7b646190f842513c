"""Lowering linear: every expert is a few plain linears, applied to all token rows; rows not routed to it count zero.

    for e in range(E):
        hit = ids == e                                              # [T, K]
        out += where(hit.any(1), body(x, where(hit, s, 0).sum(1), weight[e]), 0)

No size depends on the routing, so it exports and compiles in one graph; that costs E/K times the multiplications. Any
technique made for linears applies.
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
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["lower_to_linear"]

aten = torch.ops.aten


def lower_to_linear(layer: Layer, program: Program, emit: Emitter) -> tuple[Node, list[str]]:
    """Write the layer; returns its value and why faster ways were passed over."""
    tokens, ids, slots, params, shared = operands(layer)
    # A token that meets an expert at most once has one slot value for it; otherwise slots are rows of their own.
    by_token = layer.distinct
    if not by_token:
        tokens, ids = rows_by_slot(emit, tokens, layer.top_k), flat(emit, ids)
        slots = [flat(emit, slot) for slot in slots]
    routed = RoutedRows(emit)
    split = [_split(layer, program, param) for param in params]
    total: list[Node] = []

    def linear(rows: Node, tensors: Sequence[Node], form: WeightFormat) -> Node:
        return expert_linear_call("linear", routed, rows, tensors, form)[0]

    def shown(param: Node, rows: Node) -> Node:
        return emit(aten.unsqueeze.default, param, 0)

    def write(expert: int) -> None:
        hit = emit(aten.eq.Scalar, ids, expert)
        weights = [
            emit(aten.select.int, param, 0, expert) if parts is None else parts[expert]
            for param, parts in zip(params, split, strict=True)
        ]
        own = [_slot_of_expert(emit, slot, hit) if by_token else slot for slot in slots]
        output = emit.inline(layer.body, [tokens, *own, *weights, *shared], {expert_linear: linear, per_row: shown})
        met = emit(aten.any.dim, hit, 1) if by_token else hit
        output = zero_unless(emit, met, output)
        if tensor_of(output).dtype in (torch.bfloat16, torch.float16):
            output = emit(aten.to.dtype, output, torch.float32)
        first = total[-1] if total else emit(aten.zeros_like.default, output, pin_memory=False)
        total.append(emit(aten.add.Tensor, first, output))

    emit.repeat(1, write)
    emit.repeat(layer.num_experts - 1, lambda expert: write(expert + 1))
    result = total[-1]
    return (result if by_token else sum_over_slots(emit, result, layer.top_k)), []


def _slot_of_expert(emit: Emitter, slot: Node, hit: Node) -> Node:
    """``[T, K, ...]`` to ``[T, ...]``: the value of the one slot in which each token meets the expert."""
    shape, value = shape_of(slot), tensor_of(slot)
    assert shape is not None
    assert value is not None
    for _ in shape[2:]:
        hit = emit(aten.unsqueeze.default, hit, -1)
    zero = emit(aten.scalar_tensor.default, 0, dtype=value.dtype, device=value.device)
    return emit(aten.sum.dim_IntList, emit(aten.where.self, hit, slot, zero), [1])


def _split(layer: Layer, program: Program, param: Node) -> list[Node] | None:
    """One weight per expert, where the storage asks for it; None where experts are read from the stacked tensor."""
    weight = program.weights.get(param)
    if layer.storage != "per_expert" or weight is None:
        return None
    module, _, name = weight.fqn.rpartition(".")
    return [
        program.add_weight(f"{module}.{expert}.{name}".lstrip("."), weight.tensor[expert])
        for expert in range(layer.num_experts)
    ]
