"""Disguise: rows are put where they stand when sorted by expert, which is counted, not sorted.

row = starts[ids.reshape(-1)] + rank                 # ranks.py: behind the rows of the experts before
sorted = zeros(T * K, H).index_put([row], x.repeat_interleave(K, 0))
y = grouped_mm(sorted, weight, counts.cumsum(0))     # as in `grouped.py`
out = y[row].view(T, K, H) * s ...
"""

from __future__ import annotations

from typing import Any

from moe_fx.passes.raising.axes import SLOT, SORTED_ROW, Place, axes_of
from moe_fx.passes.raising.bins import READS, WRITES
from moe_fx.passes.raising.outside import Outside
from moe_fx.passes.raising.rank import Rank, slot_places
from moe_fx.passes.raising.ranks import Ranks
from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import same_shape, shape_of

__all__ = ["Source", "counted_rows"]

Source = tuple[Node, Place]


def counted_rows(walk: Outside, node: Node, place: Place) -> Source | None:
    """What is put among the sorted rows, or read back from them, and how it stands. None for any other value."""
    name = op_name(node) or ""
    if place[:1] == ((SORTED_ROW,),) and name in WRITES:
        return _put(walk, node, place)
    if axes_of(place) <= {*walk.tokens, SLOT} and name in READS:
        return _read_back(walk, node, place)
    return None


def _put(walk: Outside, node: Node, place: Place) -> Source | None:
    argument, _ = WRITES[op_name(node) or ""]
    given = arguments(node)
    rows = given.get("values", given.get("source", given.get("src")))
    if given.get("dim", 0) != 0 or not isinstance(rows, Node) or given.get("accumulate"):
        return None
    if op_name(node) in ("aten::index_add", "aten::scatter_add"):
        return None
    if "scatter" in (op_name(node) or "") and not same_shape(shape_of(given["index"]) or (), shape_of(rows) or ()):
        return None  # some columns would not be written
    for slots in slot_places(walk):
        if len(slots) + len(place) - 1 == len(shape_of(rows) or ()) and _names_rows(
            walk, given[argument], slots, place
        ):
            return rows, (*slots, *place[1:])
    return None


def _read_back(walk: Outside, node: Node, place: Place) -> Source | None:
    given = arguments(node)
    where = given[READS[op_name(node) or ""]]
    if given.get("dim", 0) != 0:
        return None
    rank = len(shape_of(where if isinstance(where, Node) else where[0]) or ())
    rank = 1 if op_name(node) == "aten::gather" else rank
    after = ((SORTED_ROW,), *place[rank:])
    return (given["self"], after) if _names_rows(walk, where, place[:rank], after) else None


def _names_rows(walk: Outside, where: Any, slots: Place, rows: Place) -> bool:
    """Whether places are those of the slots among the sorted rows; all of a layer are the same ones."""
    if isinstance(where, list | tuple):
        (where, *others) = where
        if others:
            return False
    wide = len(shape_of(where) or ()) - len(slots)
    known = dict(walk.bindings), walk.sizes
    if wide in (0, len(rows) - 1) and Ranks(walk).read(where, (*slots, *((),) * wide)) == Rank(row=1):
        column = where
        while op_name(column) in ("aten::expand", "aten::unsqueeze"):
            column = column.args[0]
        if walk.bindings.setdefault("perm", column) is column:
            return True
    walk.bindings, walk.sizes = known
    return False
