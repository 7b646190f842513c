"""Disguise: each expert has a bin of places for rows; a slot's row is put at its rank, and read back from there.

place = ids.reshape(-1) * capacity + rank                    # ranks.py
bins = zeros(E * capacity, H).index_put([place], rows)       # or zeros(E, capacity, H), [ids, rank]
y = bmm(bins.view(E, capacity, H), weight)
out = y.view(-1, H)[place].view(T, K, H) * s ...

No two slots have one place, so that what is read back is the slot's own row. This is only so if a bin holds every row
that its expert can get; what stands in the places of no slot is never read.
"""

from __future__ import annotations

from typing import Any

from moe_fx.passes.raising.anchors import leads_to_experts
from moe_fx.passes.raising.axes import EXPERT, PLACE, SLOT, SORTED_ROW, Place, axes_of, features, size_of
from moe_fx.passes.raising.outside import Outside
from moe_fx.passes.raising.rank import Rank, slot_places
from moe_fx.passes.raising.ranks import Ranks
from moe_fx.passes.raising.through import is_view, through
from moe_fx.passes.raising.writer import Value
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.matcher import Miss, arguments, op_name
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["READS", "WRITES", "binned"]

#: ops that write rows to places: the argument that names the places, and whether rows are added to what is there
WRITES = {
    "aten::index_put": ("indices", False), "aten::index_copy": ("index", False), "aten::index_add": ("index", True),
    "aten::scatter": ("index", False), "aten::scatter_add": ("index", True),
}  # fmt: skip
READS = {"aten::index": "indices", "aten::gather": "index"}
#: ops by which what was dropped is set to zero
MASKS = frozenset({"aten::mul", "aten::where", "aten::masked_fill"})


def binned(walk: Outside, node: Node, place: Place) -> Value | Miss | None:
    """What is put into bins, or read back from them. None for any other value."""
    axes, name = axes_of(place), op_name(node)
    if walk.dense or node.op != "call_function" or not axes:
        return None
    before = dict(walk.bindings), walk.sizes
    found = None
    if PLACE in axes:
        found = _written(walk, node, place)
    elif (axes <= {*walk.tokens, SLOT} or axes == {SORTED_ROW}) and name in READS:
        found = _read_back(walk, node, place)
    elif axes <= {*walk.tokens, SLOT} and "rank_order" in walk.bindings:
        found = _kept(walk, node, place)
    if found is None:
        walk.bindings, walk.sizes = before
        return None
    source, own = found
    walk.interior.add(node)
    value = walk.value(source, own)
    return value if isinstance(value, Miss) else walk.body.reshaped(value, features(place))


Source = tuple[Node, Place]


def _read_back(walk: Outside, node: Node, place: Place) -> Source | None:
    given = arguments(node)
    where = given[READS[op_name(node) or ""]]
    if given.get("dim", 0) != 0:
        return None
    rank = len(shape_of(where) or ()) if isinstance(where, Node) else len(shape_of(where[0]) or ())
    if op_name(node) == "aten::gather":
        rank = 1
    dims = _place(walk, given["self"], where, place[:rank], len(place) - rank)
    if dims is None and leads_to_experts(given["self"]):
        wanted = "a place in bins: the number of the slot's expert * capacity + rank among the expert's rows"
        walk.note(Miss(wanted, f"the places of {node.name}", node, dict(walk.bindings), 100 * walk.visited + 90))
    return (given["self"], (*dims, *place[rank:])) if dims is not None else None


def _written(walk: Outside, node: Node, place: Place) -> Source | None:
    written = node
    if op_name(node) == "aten::slice":
        given = arguments(node)
        if given["dim"] == 0 and not given["start"] and given["step"] == 1:
            written = given["self"]  # behind all bins there may be a place for rows of none
    if op_name(written) not in WRITES:
        return None
    argument, adds = WRITES[op_name(written) or ""]
    given = arguments(written)
    rows = given.get("values", given.get("source", given.get("src")))
    if given.get("dim", 0) != 0 or not isinstance(rows, Node) or given.get("alpha", 1) != 1:
        return None
    if (adds or given.get("accumulate")) and filled_with(given["self"]) != 0:
        return None
    if "scatter" in (op_name(written) or "") and not same_shape(shape_of(given["index"]) or (), shape_of(rows) or ()):
        return None  # some columns would not be written
    bins = next((rank for rank in (1, 2) if place[:rank] in (((EXPERT, PLACE),), ((EXPERT,), (PLACE,)))), None)
    if bins is None:
        return None
    inner = place[bins:]
    for slots in slot_places(walk):
        # Values of a single token are written without its dimension: Python's assignment strips leading ones.
        fewer = len(slots) + len(inner) - len(shape_of(rows) or ())
        first, rest = slots[: fewer + 1], slots[fewer + 1 :]
        if 0 <= fewer < len(slots) and all(known_equal(size_of(dim, walk.sizes), 1) for dim in first[:fewer]):
            dims = _place(walk, given["self"], given[argument], slots, len(inner))
            if dims == place[:bins]:
                walk.interior.add(written)
                return rows, (tuple(axis for dim in first for axis in dim), *rest, *inner)
    return None


def _place(walk: Outside, bins: Node, where: Any, slots: Place, inner: int) -> Place | None:
    """The dimensions of ``bins`` that are named by places in them, or by experts and ranks."""
    ranks = Ranks(walk)
    if isinstance(where, Node):
        wide = len(shape_of(where) or ()) - len(slots)
        found = ranks.read(where, (*slots, *((),) * wide)) if wide in (0, inner) else None
        if wide and not found:
            return None
    elif len(where) == 2:
        number, rank = (each if isinstance(each, Node) else None for each in where)
        read = ranks.read(rank, slots)
        named = number is not None and ranks.own(number, slots)
        if read != Rank(rank=1) or not named:
            return None
        capacity = (shape_of(bins) or (0, 0))[1]
        return ((EXPERT,), (PLACE,)) if ranks.bins_of(capacity, bins) else None
    else:
        found = ranks.read(where[0], slots) if len(where) == 1 else None
    if found is None or not found.ranked or (isinstance(found.ids, int) and found.ids == 0):
        return None
    return ((EXPERT, PLACE),) if ranks.bins_of(found.ids, bins) else None


def _kept(walk: Outside, value: Node, place: Place) -> Source | None:
    """What a mask of rows that are not dropped is applied to, if it certainly keeps all of them."""
    node: Any = value
    while is_view(node) and all(size == 1 for size in features(place)):
        step = through(node, place, walk.sizes)
        if isinstance(step, str):
            return None
        ((node, place),) = step.operands
    name = op_name(node)
    if name not in MASKS:
        return None
    ranks, args = Ranks(walk), list(node.args)
    if name == "aten::mul":
        pairs = [(args[0], args[1], 1), (args[1], args[0], 1)]
    elif name == "aten::where":
        pairs = [(args[0], args[1], 1)]
    else:
        pairs = [(args[1], args[0], 0)]
    for mask, kept, wanted in pairs:
        own = ranks.beside(kept, place)
        if not isinstance(mask, Node) or own is None or len(own) != len(place) or features(own) != features(place):
            continue
        given, result = tensor_of(kept), tensor_of(node)
        if given is None or result is None or given.dtype != result.dtype:
            continue
        read = ranks.operand(mask, place)
        if read is not None and read.fixed and read.plus == wanted:
            walk.interior.add(node)
            return kept, own
    return None
