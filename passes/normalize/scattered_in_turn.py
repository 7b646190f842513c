"""One number scattered to several places in turn is scattered to all of them at once:

mask.scatter(-1, best, True).scatter(-1, second, True)      =>     mask.scatter(-1, cat([best, second], -1), True)

A place that is named twice has the same number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import arguments
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import same_shape, shape_of

__all__ = ["spell_scattered_in_turn"]

_aten = torch.ops.aten


def spell_scattered_in_turn(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such chain; ``written`` is memory that ops in place still write."""
    for node in graph.find_nodes(op="call_function", target=_aten.scatter.value):
        if any(_follows(user, node) for user in node.users):
            continue  # found from the last
        chain = list(_chain(node))
        indices = [arguments(each)["index"] for each in reversed(chain)]
        if len(chain) < 2 or any(memory_of(each) in written for each in (*chain, *indices)):
            continue
        given = arguments(node)
        emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
        places = emit(_aten.cat.default, indices, -1)
        base = arguments(chain[-1])["self"]
        replace(node, emit(_aten.scatter.value, base, given["dim"], places, given["value"]))
        erase_dead(graph, [node])


def _chain(node: Node) -> Iterator[Node]:
    """The scatters, from the last to the first."""
    yield node
    before: Any = node.args[0]
    while _follows(node, before):
        yield before
        node, before = before, before.args[0]


def _follows(node: Node, before: Any) -> bool:
    """Whether a scatter of the same number follows another that nothing else reads."""
    if not isinstance(before, Node) or {node.target, before.target} != {_aten.scatter.value} or len(before.users) != 1:
        return False
    one, other = arguments(before), arguments(node)
    rank = len(shape_of(node) or ())
    rows = [(shape_of(each["index"]) or ())[:-1] for each in (one, other)]
    alike = repr(one["value"]) == repr(other["value"]) and other["self"] is before
    return alike and one["dim"] % rank == other["dim"] % rank == rank - 1 and same_shape(*rows)
