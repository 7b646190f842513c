"""Ids, masks and weights [K, T], turned around: what is done to them is done as they were, [T, K].

ids.t() == e                        =>     (ids == e).t()
(ids.t() == e) * w.t()              =>     ((ids == e) * w).t()
m.t().any(0)      m.t().sum(0)      =>     m.any(1)      m.sum(1)
w.t()[k]          w.t()[k, t]       =>     w[:, k]       w[t, k]
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["spell_turned"]

_aten = torch.ops.aten


def spell_turned(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such op; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        rule = RULES.get(op_name(node) or "")
        sources = [source for each in node.all_input_nodes if (source := _source(each)) is not None]
        if rule is None or not sources or any(memory_of(each) in written for each in (node, *sources)):
            continue
        emit = Emitter(graph, node, FakeValues(sources[0].meta["val"].fake_mode))
        if (made := rule(node, emit)) is not None:
            replace(node, made)
            erase_dead(graph, [node])


def _source(node: Any) -> Node | None:
    """A computed matrix of which a value is the transpose."""
    if op_name(node) != "aten::transpose":
        return None
    given = arguments(node)
    turned = len(shape_of(node) or ()) == 2 and given["dim0"] % 2 != given["dim1"] % 2
    source = given["self"]
    return source if turned and isinstance(source, Node) and source.op == "call_function" else None


def _is_whole(source: Node | None) -> bool:
    """Whether a matrix holds whole numbers, or truth values, such as ids and masks."""
    return source is not None and not tensor_of(source).dtype.is_floating_point


def _turned(emit: Emitter, value: Node) -> Node:
    return emit(_aten.transpose.int, value, 0, 1)


def _compared(node: Node, emit: Emitter) -> Node | None:
    source, number = _source(node.args[0]), node.args[1]
    if source is None or not _is_whole(source) or not isinstance(number, int):
        return None
    return _turned(emit, emit(node.target, source, number))


def _cast(node: Node, emit: Emitter) -> Node | None:
    source = _source(node.args[0])
    if source is None or not _is_whole(source) or node.target is not _aten.to.dtype:
        return None
    return _turned(emit, emit(_aten.to.dtype, source, node.args[1]))


def _multiplied(node: Node, emit: Emitter) -> Node | None:
    one, other = (_source(each) for each in node.args[:2])
    masks = (_aten.to.dtype,)
    of_mask = any(_is_whole(each) or (each is not None and each.target in masks) for each in (one, other))
    if one is None or other is None or not of_mask:
        return None
    return _turned(emit, emit(_aten.mul.Tensor, one, other))


def _reduced(node: Node, emit: Emitter) -> Node | None:
    given = arguments(node)
    source, dims = _source(given["self"]), given.get("dim")
    dim = dims[0] if isinstance(dims, list | tuple) and len(dims) == 1 else dims
    if source is None or not isinstance(dim, int) or given.get("keepdim") or given.get("dtype") is not None:
        return None
    return emit(node.target, source, [1 - dim % 2] if isinstance(dims, list | tuple) else 1 - dim % 2)


def _selected(node: Node, emit: Emitter) -> Node | None:
    given = arguments(node)
    source = _source(given["self"])
    return emit(_aten.select.int, source, 1 - given["dim"] % 2, given["index"]) if source is not None else None


def _indexed(node: Node, emit: Emitter) -> Node | None:
    given = arguments(node)
    source, indices = _source(given["self"]), given["indices"]
    if source is None or len(indices) != 2 or not all(isinstance(each, Node) for each in indices):
        return None
    with emit.graph.inserting_before(node):
        made = emit.graph.call_function(_aten.index.Tensor, (source, [indices[1], indices[0]]))
    made.meta.update(node.meta)  # of places, only values tell how many there are
    return made


RULES: dict[str, Callable[[Node, Emitter], Node | None]] = {
    "aten::eq": _compared,
    "aten::to": _cast,
    "aten::mul": _multiplied,
    "aten::any": _reduced,
    "aten::sum": _reduced,
    "aten::select": _selected,
    "aten::index": _indexed,
}
