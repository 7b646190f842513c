"""Rows that are moved element by element, in places repeated for each of their elements, moved as rows.

| written (`wide` is `places[:, None].expand(-1, H)`, and `x`, `out` and `rows` have H features) | becomes |
|---|---|
| `gather(x, 0, wide)` | `index(x, [places])` |
| `scatter(out, 0, wide, rows)` | `index_put(out, [places], rows)` |
| `scatter_add(out, 0, wide, rows)` | `index_put(out, [places], rows, accumulate=True)` |

Places that are fewer than the rows, or repeated less often than a row has elements, move a part of the rows only: these
are left as they are, and no rule behind reads them as rows.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import ANY, As, Last, Var, aten, either, optional
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["spell_whole_rows"]

_aten = torch.ops.aten
places = Var("places")
column = As("column", either(aten.unsqueeze(Var("places", rank=1), Last(1)), aten.reshape(places, ANY)))
WIDE = optional(aten.clone, either(aten.expand(column, ANY), aten.expand_as(column, ANY), aten.repeat(column, ANY)))
MOVES = frozenset({"aten::gather", "aten::scatter", "aten::scatter_add"})


def spell_whole_rows(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such move; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        if op_name(node) not in MOVES or any(memory_of(each) in written for each in (node, *node.all_input_nodes)):
            continue
        given = arguments(node)
        moved, wide = given["self"], given["index"]
        rows = wide if op_name(node) == "aten::gather" else given.get("src")  # none, where a number is written
        found = match(WIDE, wide) if isinstance(wide, Node) else None
        if not isinstance(found, Match) or given["dim"] not in (0, -2):
            continue
        at = found["places"]
        if not isinstance(rows, Node) or not _are_whole(moved, wide, rows, found["column"]):
            continue
        emit = Emitter(graph, node, FakeValues(tensor_of(node).fake_mode))
        at = at if tensor_of(at).dim() == 1 else emit(_aten.reshape.default, at, [-1])
        if op_name(node) == "aten::gather":
            new = emit(_aten.index.Tensor, moved, [at])
        else:
            new = emit(_aten.index_put.default, moved, [at], rows, op_name(node) == "aten::scatter_add")
        replace(node, new)
        erase_dead(graph, [node])


def _are_whole(moved: Node, wide: Node, rows: Node, column: Node) -> bool:
    """Whether every element of a row is named, and every row."""
    index, once, into = (shape_of(each) or () for each in (wide, column, moved))
    if (len(index), len(once), len(into)) != (2, 2, 2) or not known_equal(once[1], 1):
        return False
    by_row = known_equal(index[0], once[0]) and known_equal(index[1], into[1])
    return by_row and same_shape(index, shape_of(rows) or ())
