"""Rows read and added part by part, in one spelling.

x[places[a:b]]                                       =>     x[places][a:b]
places[a:b] // K                                     =>     (places // K)[a:b]
out.index_add(0, cat([i, j]), cat([y, z]))           =>     out.index_add(0, i, y).index_add(0, j, z)
cat([y, z]) * w[cat([i, j])]                         =>     y * w[i], z * w[j], where they are added so

Parts are those of which only values tell how many rows they have. All places are read only if certainly none of them is
out of range: as those of a sort.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import depends_on_values, known_equal, shape_of, tensor_of

__all__ = ["cut_like", "in_range", "spell_parts", "whole_of"]

aten = torch.ops.aten

#: what makes something of each row by itself
ROW_LOCAL = frozenset({
    "aten::mul", "aten::to", "aten::unsqueeze", "aten::index", "aten::floor_divide", "aten::remainder",
})  # fmt: skip


def spell_parts(graph: Graph) -> None:
    """Rewrite what is read by a part of some places, and what is added at joined places."""
    values: FakeValues | None = None
    for node in list(graph.nodes):
        value: Any = tensor_of(node)
        if value is None or not isinstance(node.target, torch._ops.OpOverload):
            continue
        given: dict[str, Any] = arguments(node)
        places = given["indices"] if op_name(node) == "aten::index" else None
        whole = whole_of(places[0]) if places is not None and len(places) == 1 else None
        if whole is not None and in_range(whole, node.args[0]):
            values = values or FakeValues(value.fake_mode)
            _read_first(node, Emitter(graph, node, values))
        elif (part := _divided(node, given)) is not None:
            values = values or FakeValues(value.fake_mode)
            _divide_first(node, part, Emitter(graph, node, values))
        elif (added := _added(node, given)) is not None:
            values = values or FakeValues(value.fake_mode)
            emit = Emitter(graph, node, values)
            parts = _apart(added[0], emit), _apart(added[1], emit)
            if _alike(*parts):
                out = given["self"]
                for index, source in zip(*parts, strict=True):
                    out = emit(aten.index_add.default, out, 0, index, source)
                replace(node, out)
                erase_dead(graph, [node])
            else:
                erase_dead(graph, [*parts[0], *parts[1]])  # what was written of parts that do not belong together


def _added(node: Node, given: dict[str, Any]) -> tuple[Node, Node] | None:
    """The places at which rows are added, and the rows; None for any other op."""
    if op_name(node) == "aten::index_add" and given["dim"] == 0 and given["alpha"] == 1:
        return given["index"], given["source"]
    if op_name(node) == "aten::index_put" and given["accumulate"] and len(given["indices"]) == 1:
        return given["indices"][0], given["values"]
    return None


def _divided(node: Node, given: dict[str, Any]) -> Node | None:
    """The part of some places whose tokens a division tells; None for any other op."""
    if op_name(node) not in ("aten::floor_divide", "aten::div") or not isinstance(given["other"], int):
        return None
    rounds = op_name(node) == "aten::floor_divide" or given.get("rounding_mode") in ("floor", "trunc")
    part = given["self"]
    return part if rounds and given["other"] > 0 and isinstance(part, Node) and whole_of(part) is not None else None


def whole_of(part: Node) -> Node | None:
    """The places of which a value is a part; None if that is not so."""
    shape = shape_of(part) or ()
    if len(shape) != 1 or not depends_on_values(shape[0]):
        return None
    if op_name(part) == "aten::slice":
        given = arguments(part)
        return given["self"] if given["step"] == 1 else None
    if part.target is operator.getitem and op_name(part.args[0]) == "aten::split_with_sizes":
        source = part.args[0]
        return arguments(source)["self"] if isinstance(source, Node) else None
    return None


def in_range(places: Any, rows: Any) -> bool:
    """Whether places are those of a sort, or their tokens, and there is a row for each."""
    many = 1
    if op_name(places) in ("aten::floor_divide", "aten::div"):
        given = arguments(places)
        rounds = op_name(places) == "aten::floor_divide" or given.get("rounding_mode") in ("floor", "trunc")
        places, many = given["self"], given["other"]
        if not rounds or not isinstance(many, int) or many < 1:
            return False
    sorts = op_name(places) == "aten::argsort" or (
        places.target is operator.getitem and op_name(places.args[0]) == "aten::sort" and places.args[1] == 1
    )
    count, known = (shape_of(places) or (0,))[0], (shape_of(rows) or (0,))[0]
    return sorts and known_equal(known * many, count)


def _read_first(node: Node, emit: Emitter) -> None:
    """All rows are read, then the part is cut from them."""
    indices: Any
    rows, indices = node.args
    (part,), whole = indices, whole_of(indices[0])
    assert whole is not None
    cut_like(node, _earlier(node, whole, (rows, [whole])) or emit(aten.index.Tensor, rows, [whole]), part)


def _divide_first(node: Node, part: Node, emit: Emitter) -> None:
    """All places are divided, then the part is cut from the tokens."""
    whole, target = whole_of(part), node.target
    assert whole is not None
    assert isinstance(target, torch._ops.OpOverload)
    other = node.args[1:]
    cut_like(node, _earlier(node, whole, (whole, *other)) or emit(target, whole, *other, **node.kwargs), part)


def _earlier(node: Node, whole: Node, args: tuple[Any, ...]) -> Node | None:
    """The same op on the whole, where it was written already."""
    found = (u for u in whole.users if u < node and u.target is node.target and u.args == args)
    return next((each for each in found if each.kwargs == node.kwargs), None)


def cut_like(node: Node, every: Node, part: Node) -> None:
    """What a value is, as a part of what its whole comes to."""
    graph, features = node.graph, (shape_of(node) or ())[1:]
    with graph.inserting_before(node):
        if op_name(part) == "aten::slice":
            given = arguments(part)
            cut = graph.call_function(aten.slice.Tensor, (every, 0, given["start"], given["end"]))
        else:
            split: Any = part.args[0]
            parts = graph.call_function(aten.split_with_sizes.default, (every, arguments(split)["split_sizes"], 0))
            parts.meta["val"] = _empty_parts(every, features, split)
            cut = graph.call_function(operator.getitem, (parts, part.args[1]))
    cut.meta.update(node.meta)
    replace(node, cut)
    erase_dead(graph, [node])


def _empty_parts(every: Node, features: Sequence[Any], split: Node) -> list[Any]:
    value = every.meta["val"]
    with value.fake_mode:
        return [value.new_empty((each.shape[0], *features)) for each in split.meta["val"]]


def _joined(node: Node) -> Sequence[Node]:
    while node.target is operator.getitem and op_name(node.args[0]) == "aten::split_with_sizes":
        given = arguments(node.args[0])
        if len(given["split_sizes"]) != 1:
            return ()
        node = given["self"]  # the same rows, whose number is spelled out
    given = arguments(node) if op_name(node) == "aten::cat" else {"dim": 1}
    return given["tensors"] if given["dim"] == 0 else ()


def _apart(node: Node, emit: Emitter) -> Sequence[Node]:
    """The parts of which rows were joined, or of which what is computed of joined rows would be."""
    if parts := _joined(node):
        return parts
    if op_name(node) not in ROW_LOCAL or node.kwargs:
        return ()
    given: Any = node.args
    sources = [each for each in node.all_input_nodes if len(shape_of(each) or ()) > 0]
    if op_name(node) == "aten::index":  # what is read may be the same for all parts
        sources = [each for each in given[1] if isinstance(each, Node)]
        if len(sources) != len(given[1]):
            return ()
    elif len({len(shape_of(each) or ()) for each in sources}) != 1 or (
        op_name(node) == "aten::unsqueeze" and arguments(node)["dim"] == 0
    ):
        return ()
    split = {each: _apart(each, emit) for each in sources}
    lengths = [[(shape_of(part) or (0,))[0] for part in parts] for parts in split.values()]
    same = all(len(each) == len(lengths[0]) > 1 and all(map(known_equal, lengths[0], each)) for each in lengths)
    if not lengths or not same:
        return ()
    written = []
    for place in range(len(lengths[0])):
        own = {each: parts[place] for each, parts in split.items()}
        written.append(emit(node.target, *map_arg(given, lambda each, own=own: own.get(each, each))))  # type: ignore[misc]
    return written


def _alike(index: Sequence[Node], source: Sequence[Node]) -> bool:
    """Whether parts of places and of rows belong together, one by one."""
    sizes = [(shape_of(one) or (0,))[0] for one in index], [(shape_of(other) or (0,))[0] for other in source]
    same = len(index) == len(source) > 1 and all(map(known_equal, *sizes))
    return same and all(depends_on_values(size) for size in sizes[0])
