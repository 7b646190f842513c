"""Parameters whose experts stand elsewhere than first, or in one dimension with features, as a linear of them all has.

w1 [H, I, E]    =>    w1.permute(2, 0, 1) [E, I, H]
up [E * I, H]   =>    up.reshape(E, I, H)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from moe_fx.passes.raising.axes import EXPERT, Place, size_of
from torch.fx import Graph, Node

from moe_fx.rewrite import EXPERTS_FIRST, Emitter, FakeValues, erase_dead
from moe_fx.shapes import Dim

__all__ = ["drop_unread", "experts_first"]

aten = torch.ops.aten


def experts_first(param: Node, place: Place, sizes: Mapping[str, Dim]) -> Node:
    """``param [E, ...]``, written where every layer may read it."""
    apart = [axis for dim in place for axis in (dim or (1,))]
    whole = [size_of((axis,), sizes) for axis in apart]
    at = apart.index(EXPERT)
    moved = param
    if len(apart) != len(place):
        moved = _written(moved, aten.reshape.default, whole)
    if at:
        moved = _written(moved, aten.permute.default, [at, *(dim for dim in range(len(apart)) if dim != at)])
    return moved


def _written(source: Node, target: Callable[..., Any], argument: list[Dim]) -> Node:
    for user in source.users:
        if user.target is target and EXPERTS_FIRST in user.meta and user.args == (source, argument):
            return user
    first = next(node for node in source.graph.nodes if node.op == "call_function")
    after = source.next if source.op == "call_function" else first
    made = Emitter(source.graph, after, FakeValues(source.meta["val"].fake_mode))(target, source, argument)
    made.meta[EXPERTS_FIRST] = True
    return made


def drop_unread(graph: Graph) -> None:
    """Drop what no layer came of."""
    erase_dead(graph, [node for node in graph.nodes if EXPERTS_FIRST in node.meta and not node.users])
