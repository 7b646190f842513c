"""Single classes of one-hot rows that were cast, or cut, before they were read by class.

one_hot(ids, E).permute(2, 0, 1).bool()[e]         ids [T, K]    =>     ids == e
one_hot(ids, E).permute(2, 1, 0).bool()[e]                       =>     (ids == e).t()
one_hot(ids, E + 1)[..., :E].permute(2, 0, 1)[e]                 =>     (ids == e).to(int64)

The class that is cut away is that of ids that name no expert.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import ANY, WHOLE, Last, Var, aten, either
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["spell_hot_classes"]

_aten = torch.ops.aten
numbers = either(aten.arange(ANY, dtype=WHOLE), aten.arange(0, ANY, dtype=WHOLE))
HOT = either(aten.one_hot(Var("ids"), ANY), aten.eq(aten.unsqueeze(Var("ids"), Last(-1)), numbers))


def spell_hot_classes(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such class; ``written`` is memory that ops in place still write."""
    for hot in list(graph.nodes):
        found = match(HOT, hot)
        if not isinstance(found, Match) or any(memory_of(each) in written for each in (hot, found["ids"])):
            continue
        rank = len(shape_of(hot) or ())
        for node, order, plain in list(_selected(hot, list(range(rank)), True)):
            if plain or memory_of(node) in written:
                continue
            emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
            mask = emit(_aten.eq.Scalar, found["ids"], arguments(node)["index"])
            if order != sorted(order):
                mask = emit(_aten.transpose.int, mask, 0, 1)
            if tensor_of(node).dtype is not torch.bool:
                mask = emit(_aten.to.dtype, mask, tensor_of(node).dtype)
            replace(node, mask)
            erase_dead(graph, [node])


def _selected(node: Node, order: list[int], plain: bool) -> Iterator[tuple[Node, list[int], bool]]:
    """Single classes that are read, the order of the other dimensions, and whether nothing but that was changed.

    ``order`` are the dimensions of the one-hot rows; the last are the classes.
    """
    classes = len(order) - 1
    for user in list(node.users):
        name = op_name(user)
        given = arguments(user) if name is not None else {}
        if given.get("self") is not node:
            continue
        if name == "aten::select" and order[given["dim"]] == classes and isinstance(given["index"], int):
            if given["index"] >= 0 and len(order) < 4:
                yield user, [dim for dim in order if dim != classes], plain
        elif name == "aten::to" and user.target is _aten.to.dtype:
            yield from _selected(user, order, plain and order == sorted(order))
        elif name == "aten::slice" and order[given["dim"]] == classes and given["start"] in (0, None):
            if given["step"] == 1:
                yield from _selected(user, order, False)
        elif name == "aten::permute":
            yield from _selected(user, [order[dim] for dim in given["dims"]], plain)
        elif name == "aten::transpose":
            turned = list(order)
            turned[given["dim0"]], turned[given["dim1"]] = turned[given["dim1"]], turned[given["dim0"]]
            yield from _selected(user, turned, plain)
