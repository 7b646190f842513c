"""Rows and columns that a division tells of places that are numbered through: what is read there, by these places.

x[p // K, p % K]                          =>     x.reshape(-1)[p]
t = p // K;  x[t[a:b], (p - t * K)[a:b]]  =>     x.reshape(-1)[p][a:b]
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.cut_rows import cut_like, in_range, whole_of
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import As, Var, aten, either
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import known_equal, same_expression, shape_of

__all__ = ["spell_divided_places"]

_aten = torch.ops.aten

places, width = Var("places", rank=1), Var("width")
#: rounded down: of places counted from the end, both are counted from the end
quotient = As("row", either(aten.floor_divide(places, width), aten.div(places, width, rounding_mode="floor")))
remainder = either(aten.remainder(places, width), aten.sub(places, aten.mul(Var("row"), width)))


def spell_divided_places(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such read; ``written`` is memory that ops in place still write."""
    known: dict[tuple[Node, Node], Node] = {}  # what is read of some values at some places, all of them
    flats: dict[Node, Node] = {}
    for node in graph.find_nodes(op="call_function", target=_aten.index.Tensor):
        values, indices = node.args
        if len(indices) != 2 or not all(isinstance(each, Node) for each in indices):
            continue
        rows, columns = indices
        parted = _cut_alike(rows, columns)
        if parted:
            rows, columns = whole_of(rows), whole_of(columns)
        found = match(quotient, rows)
        found = match(remainder, columns, found.bindings) if isinstance(found, Match) else found
        _, count, *features = shape_of(values) or (0, 0, None)
        fixed = all(isinstance(size, int) for size in features)
        if not isinstance(found, Match) or not fixed or not known_equal(found["width"], count):
            continue
        if any(memory_of(each) in written for each in (node, *node.all_input_nodes)):
            continue
        if (key := (values, found["places"])) not in known:
            emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
            if values not in flats:
                flats[values] = emit(_aten.reshape.default, values, [-1, *features])
            if parted and not in_range(found["places"], flats[values]):
                continue
            known[key] = emit(_aten.index.Tensor, flats[values], [found["places"]])
        if parted:
            cut_like(node, known[key], indices[0])
        else:
            replace(node, known[key])
            erase_dead(graph, [node])
    erase_dead(graph, flats.values())


def _cut_alike(one: Node, other: Node) -> bool:
    """Whether two values are cut from others, from the same place to the same place."""
    if whole_of(one) is None or whole_of(other) is None or one.target is not other.target:
        return False
    if op_name(one) == "aten::slice":
        return all(map(_same, one.args[1:], other.args[1:]))
    sizes = [arguments(each.args[0])["split_sizes"] for each in (one, other)]
    return one.args[1] == other.args[1] and len(sizes[0]) == len(sizes[1]) and all(map(_same, *sizes))


def _same(one: Any, other: Any) -> bool:
    """Whether two bounds are equal."""
    numbers = [each.meta["val"] if isinstance(each, Node) else each for each in (one, other)]
    return one is other or (None not in numbers and same_expression(*numbers))
