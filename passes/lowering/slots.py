"""Steps that several lowerings share: operands, flat slots, the sum over slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from moe_fx.pipeline import Layer
from moe_fx.rewrite import Emitter
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["beside", "flat", "operands", "rows_by_slot", "sum_over_slots", "zero_unless"]

aten = torch.ops.aten


def operands(layer: Layer) -> tuple[Node, Node, Sequence[Node], Sequence[Node], Sequence[Node]]:
    """tokens, ids, slots, params and shared of the layer's node."""
    tokens, ids, slots, params, shared, _ = layer.node.args
    given: Any = (tokens, ids, slots, params, shared)
    return given


def flat(emit: Emitter, slot: Node) -> Node:
    """``[T, K, ...]`` to ``[T*K, ...]``."""
    shape = shape_of(slot)
    assert shape is not None
    return emit(aten.reshape.default, slot, [-1, *shape[2:]])


def rows_by_slot(emit: Emitter, tokens: Node, top_k: int) -> Node:
    """``[T, ...]`` to ``[T*K, ...]``: each token's row K times."""
    shape = shape_of(tokens)
    assert shape is not None
    repeated = emit(aten.expand.default, emit(aten.unsqueeze.default, tokens, 1), [-1, top_k, *shape[1:]])
    return emit(aten.reshape.default, repeated, [-1, *shape[1:]])


def sum_over_slots(emit: Emitter, rows: Node, top_k: int) -> Node:
    """``[T*K, ...]`` to ``[T, ...]``."""
    shape = shape_of(rows)
    assert shape is not None
    return emit(aten.sum.dim_IntList, emit(aten.reshape.default, rows, [-1, top_k, *shape[1:]]), [1])


def beside(emit: Emitter, condition: Node, rows: Node) -> Node:
    """``condition [R]``, or ``[R, 1]``, with as many dimensions as ``rows [R, ...]`` has."""
    for _ in range(len(shape_of(rows) or ()) - len(shape_of(condition) or ())):
        condition = emit(aten.unsqueeze.default, condition, -1)
    return condition


def zero_unless(emit: Emitter, condition: Node, rows: Node) -> Node:
    """``rows [R, ...]`` where ``condition [R]`` holds, elsewhere zero (whatever stands there, NaN too)."""
    wide = beside(emit, condition, rows)
    dtype = tensor_of(rows).dtype
    zero = emit(aten.scalar_tensor.default, 0.0, dtype=dtype, device=tensor_of(rows).device)
    return emit(aten.where.self, wide, rows, zero)
