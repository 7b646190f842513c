"""How many rows there are where every expert's are joined: as many as ids, which no symbol says.

counts = bincount(ids, E)
rows = cat([body(x[start : start + counts[e]]) for e in range(E)])      # as many as counts add up to: T * K
slots = rows.view(T, K, -1)                                             # as long as a row
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from moe_fx.passes.raising.counts import Counts, Total
from moe_fx.passes.raising.parts import Cut, cut
from moe_fx.passes.raising.routing import selection_of
from moe_fx.passes.raising.routing_map import MAP_PLACES
from torch.fx import Graph, Node

from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.shapes import Dim, depends_on_values, known_equal, same_expression, shape_of

__all__ = ["joined_lengths", "settle_features"]


def joined_lengths(graph: Graph) -> Iterator[tuple[torch.SymInt, Dim]]:
    """Sizes that are sums of the numbers of all experts' rows, each with the number of ids that it comes to."""
    told: list[Any] = []
    for node in graph.nodes:
        adds_up = JOINING.get(op_name(node) or "")
        value = node.meta["val"][0] if op_name(node) == "aten::where" and len(node.args) == 1 else node.meta.get("val")
        length: Any = value.shape[0] if adds_up is not None and value.dim() else 0
        if adds_up is None or not depends_on_values(length) or any(same_expression(length, each) for each in told):
            continue
        counts = Counts({})
        if not adds_up(node, counts) or "ids" not in counts.bindings:
            continue
        ids = counts.bindings["ids"]
        selection = selection_of(ids, counts.num_experts)
        # An id that is no expert's would be counted nowhere, and one that is there twice perhaps once.
        if selection.in_range and (selection.distinct or "counted_once" not in counts.bindings):
            told.append(length)
            yield length, math.prod(shape_of(ids) or ())


def settle_features(graph: Graph) -> None:
    """Where rows are parted into slots by ``view(T, K, -1)``, let what is left be the rows' own length, a number."""
    settled: list[tuple[Any, int]] = []
    for node in graph.nodes:
        shape = shape_of(node) or ()
        if op_name(node) == "aten::reshape" and shape and depends_on_values(shape[-1]):
            rows, *own = shape_of(arguments(node)["self"]) or (0,)
            if len(own) == 1 and isinstance(own[0], int) and known_equal(rows, math.prod(shape[:-1])):
                settled.append((shape[-1], own[0]))
        known = [next((own for size, own in settled if same_expression(size, each)), each) for each in shape]
        if any(each is not size for each, size in zip(known, shape, strict=True)):
            node.meta["val"] = node.meta["val"].new_empty(known)


def _parts_add_up(joined: Node, counts: Counts) -> bool:
    """Whether the parts are the rows of every expert, one after the other."""
    given = arguments(joined)
    cuts = [_cut_behind(part, counts) for part in given["tensors"]] if given["dim"] == 0 else []
    ends = [_all(expert) for expert in range(counts.num_experts + 1)]
    bounds = [(each.start, each.end) if each is not None else None for each in cuts]
    return bounds == [*itertools.pairwise(ends)]


def _first_rows_add_up(rows: Node, counts: Counts) -> bool:
    """Whether as many rows are taken as all experts have, of no fewer."""
    given = arguments(rows)
    whole = given["dim"] == 0 and given["step"] == 1 and given["start"] in (None, 0)
    total = counts.total(given["end"]) if whole else None
    ids, have = shape_of(counts.bindings.get("ids")) or (), (shape_of(given["self"]) or (0,))[0]
    return total == _all(counts.num_experts) and known_equal(math.prod(ids), have)


def _repeats_add_up(rows: Node, counts: Counts) -> bool:
    """Whether what each expert has is there once for each of its rows."""
    given = arguments(rows)
    vector = counts.read(given.get("repeats")) if given.get("dim") in (None, 0) else None
    return isinstance(vector, list) and vector == [{expert: 1} for expert in range(counts.num_experts)]


def _chosen_add_up(places: Node, counts: Counts) -> bool:
    """Whether the places of a routing map are listed, or read at: as many as are chosen."""
    read = arguments(places)["indices"][0] if op_name(places) == "aten::index" else places
    listed = read.args[0] if isinstance(read, Node) and read.target is operator.getitem else read
    found = match(MAP_PLACES, listed)
    if not isinstance(found, Match):
        return False
    counts.bindings = {"ids": found["ids"], "counted_once": True}
    counts.num_experts = (shape_of(found["listed_once"]) or (0,))[-1]
    return isinstance(counts.num_experts, int)


def _all(experts: int) -> Total:
    """How many rows so many experts have, from the first on."""
    return dict.fromkeys(range(experts), 1)


JOINING: dict[str, Callable[[Node, Counts], bool]] = {
    "aten::cat": _parts_add_up,
    "aten::index": _chosen_add_up,
    "aten::where": _chosen_add_up,
    "aten::nonzero": _chosen_add_up,
    "aten::slice": _first_rows_add_up,
    "aten::repeat_interleave": _repeats_add_up,
}


def _cut_behind(value: Node, counts: Counts) -> Cut | None:
    """The rows of one expert that a value was computed from, row by row, by its number of rows."""
    pending, seen = [value], set[Node]()
    while pending:
        node = pending.pop()
        shape, wanted = shape_of(node), (shape_of(value) or (0,))[0]
        if node in seen or not shape or not same_expression(shape[0], wanted):
            continue
        seen.add(node)
        if (found := cut(node, counts)) is not None:
            return found
        pending.extend(node.all_input_nodes)
    return None
