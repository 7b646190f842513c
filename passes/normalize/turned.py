"""Ids, masks and weights [K, T], turned around: what is done to them is done as they were, [T, K].

ids.t() == e                        =>     (ids == e).t()
(ids.t() == e) * w.t()              =>     ((ids == e) * w).t()
w.t() / w.t().sum(0)                =>     (w / w.sum(1).unsqueeze(-1)).t()
m.t().any(0)      m.t().sum(0)      =>     m.any(1)      m.sum(1)
w.t()[k]          w.t()[k, t]       =>     w[:, k]       w[t, k]
zeros(E, T).scatter(0, ids.t(), w.t())   =>   zeros(T, E).scatter(1, ids, w).t()
ids = topk(scores, K, dim=0)[1]     =>     ids = topk(scores, K, dim=0)[1].t().t()
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.constants import filled_with
from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["spell_turned"]

_aten = torch.ops.aten

CHOOSING = frozenset({"aten::topk", "aten::sort", "aten::max"})


def spell_turned(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such op; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        if node.target is operator.getitem and op_name(node.args[0]) in CHOOSING and memory_of(node) not in written:
            _turn_twice(graph, node)
    for node in list(graph.nodes):
        rule = RULES.get(op_name(node) or "")
        sources = [source for each in node.all_input_nodes if (source := _beneath(each)) is not None]
        if rule is None or not sources or any(memory_of(each) in written for each in (node, *sources)):
            continue
        emit = Emitter(graph, node, FakeValues(sources[0].meta["val"].fake_mode))
        if (made := rule(node, emit)) is not None:
            replace(node, made)
            erase_dead(graph, [node])


def _turn_twice(graph: Graph, chosen: Node) -> None:
    """What is chosen along the first of two dimensions, seen as the transpose of what has a row for each token."""
    choice: Any = chosen.args[0]
    scores = tensor_of(choice.args[0])
    if scores is None or scores.dim() != 2 or not scores.is_floating_point() or arguments(choice)["dim"] not in (0, -2):
        return
    if len(shape_of(chosen) or ()) != 2:
        return
    emit = Emitter(graph, chosen.next, FakeValues(chosen.meta["val"].fake_mode))
    rows = _turned(emit, chosen)
    again = _turned(emit, rows)
    chosen.replace_all_uses_with(again, delete_user_cb=lambda user: user is not rows)


def _source(node: Any) -> Node | None:
    """A computed matrix of which a value is the transpose."""
    if op_name(node) != "aten::transpose":
        return None
    given = arguments(node)
    turned = len(shape_of(node) or ()) == 2 and given["dim0"] % 2 != given["dim1"] % 2
    source = given["self"]
    return source if turned and isinstance(source, Node) and source.op == "call_function" else None


def _beneath(node: Node) -> Node | None:
    """The matrix that is turned around, where it may have got a dimension behind."""
    return _source(node.args[0] if op_name(node) == "aten::unsqueeze" else node)


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


def _elementwise(node: Node, emit: Emitter) -> Node | None:
    """What is made of matrices that are all turned around, of numbers, and of a number for each row of theirs."""
    ranks = [len(shape_of(each) or ()) if isinstance(each, Node) else 0 for each in node.args]
    operands = [_source(each) if rank > 1 else each for each, rank in zip(node.args, ranks, strict=True)]
    if any(each is None for each in operands) or node.kwargs or 2 not in ranks:
        return None
    for at in (at for at, rank in enumerate(ranks) if rank == 1):
        operands[at] = emit(_aten.unsqueeze.default, operands[at], -1)
    return _turned(emit, emit(node.target, *operands))


def _reduced(node: Node, emit: Emitter) -> Node | None:
    given = arguments(node)
    source, dims = _source(given["self"]), given.get("dim")
    dim = dims[0] if isinstance(dims, list | tuple) and len(dims) == 1 else dims
    if source is None or not isinstance(dim, int) or given.get("dtype") is not None:
        return None
    other = [1 - dim % 2] if isinstance(dims, list | tuple) else 1 - dim % 2
    if given.get("keepdim"):
        return _turned(emit, emit(node.target, source, other, True))
    return emit(node.target, source, other)


def _softmax(node: Node, emit: Emitter) -> Node | None:
    given = arguments(node)
    source = _source(given["self"])
    if source is None:
        return None
    return _turned(emit, emit(node.target, source, 1 - given["dim"] % 2, given["dtype"]))


def _selected(node: Node, emit: Emitter) -> Node | None:
    given = arguments(node)
    source = _source(given["self"])
    return emit(_aten.select.int, source, 1 - given["dim"] % 2, given["index"]) if source is not None else None


def _scattered(node: Node, emit: Emitter) -> Node | None:
    """A table [E, T], written where ids [K, T] say."""
    given = arguments(node)
    ids, src, fill = _source(given["index"]), given.get("src", given.get("value")), filled_with(given["self"])
    values = _source(src) if isinstance(src, Node) else src
    if ids is None or values is None or fill is None or "reduce" in given or given["dim"] % 2 != 0:
        return None
    if not isinstance((shape_of(node) or (0,))[0], int):
        return None  # of any number of tokens, by which experts chose theirs
    table = emit(_aten.full_like.default, _turned(emit, given["self"]), fill)
    return _turned(emit, emit(node.target, table, 1, ids, values))


def _indexed(node: Node, emit: Emitter) -> Node | None:
    given = arguments(node)
    values, indices = given["self"], given["indices"]
    wide = op_name(values) == "aten::unsqueeze" and arguments(values)["dim"] in (2, -1)
    source = _source(values.args[0] if wide else values)
    if source is None or len(indices) != 2 or not all(isinstance(each, Node) for each in indices):
        return None
    if wide:
        source = emit(_aten.unsqueeze.default, source, 2)
    with emit.graph.inserting_before(node):
        made = emit.graph.call_function(_aten.index.Tensor, (source, [indices[1], indices[0]]))
    made.meta.update(node.meta)  # of places, only values tell how many there are
    return made


RULES: dict[str, Callable[[Node, Emitter], Node | None]] = {
    "aten::eq": _compared,
    "aten::to": _cast,
    "aten::mul": _elementwise,
    "aten::div": _elementwise,
    "aten::add": _elementwise,
    "aten::sigmoid": _elementwise,
    "aten::softmax": _softmax,
    "aten::any": _reduced,
    "aten::sum": _reduced,
    "aten::select": _selected,
    "aten::scatter": _scattered,
    "aten::index": _indexed,
}
