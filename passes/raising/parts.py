"""Disguise: rows sorted by expert are cut into parts, each expert takes its own, and the results are joined.

counts = histc(ids, E).tolist()
rows = x[perm // K].split(counts)                    # or rows[start : start + counts[e]], one after the other
y = torch.cat([body(rows[e], weight[e]) for e in range(E)])
out = (y[inverse of perm]).view(T, K, H) * s ...     # from there on, as with grouped_mm
"""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from moe_fx.passes.raising.axes import HIT, ONE, SORTED_ROW, Place, features
from moe_fx.passes.raising.counts import Counts, Total
from moe_fx.passes.raising.each_expert import OWN, specific
from moe_fx.passes.raising.region import Region
from moe_fx.passes.raising.steps import merge_steps
from moe_fx.passes.raising.walk import Walk
from moe_fx.passes.raising.whole import cut_from
from moe_fx.passes.raising.writer import Value
from torch.fx import Node

from moe_fx.matcher import Miss, arguments, op_name
from moe_fx.shapes import known_equal, same_shape, shape_of

__all__ = ["FAR", "Cut", "Joined", "cut", "join", "joined", "part_of_one"]

#: a mismatch within an expert's part says more than any outside
FAR = 10**5


@dataclasses.dataclass(frozen=True)
class Joined:
    """One expert's results among others: from ``start`` to ``end`` if that is said, or at a part of some places."""

    value: Node
    start: Any = None
    end: Any = None
    at: Node | None = None


def joined(walk: Walk, node: Node, place: Place) -> Value | Miss | None:
    """Every expert's results joined, written into the body as those of one expert. None for any other op."""
    whole, node = node, _with_number(node)
    parts = _parts(node)
    if parts is None or place[0] != (SORTED_ROW,):
        return None
    return join(walk, node, place, parts, {*_chain(node), node, whole, *whole.all_input_nodes})


def join(walk: Walk, node: Node, place: Place, parts: Sequence[Joined], chain: set[Node]) -> Value | Miss | None:
    """Parts of every expert, as the results of one; ``chain`` are the calls that join them."""
    # The rows of an expert that has none may be joined as they are.
    left = [part.value for part in parts if cut_from(part.value) is not None]
    if len(left) < len(parts):
        parts = [part for part in parts if part.value not in left]
        cut_by = {each.args[0] for each in left if isinstance(each.args[0], Node) and op_name(each) is None}
        chain = {*chain, *left, *cut_by}
    values = [part.value for part in parts]
    if not all(same_shape((shape_of(value) or ())[1:], features(place)) for value in values):
        return None
    counts = Counts(walk.bindings)
    own, regions = specific(values), []
    bounds: list[tuple[int, Any, Any]] = []
    cuts: dict[Node, Cut] = {}
    for part, nodes in zip(parts, own, strict=True):
        value, read = part.value, {*nodes, *([part.at] if part.at is not None else [])}
        mine = {each: found for each in read if (found := cut(each, counts)) is not None}
        cuts |= mine
        experts = {found.expert for found in mine.values()}
        if len(experts) != 1:
            return walk.miss("rows of one expert, between sums of how many rows the experts have", value)
        (expert,) = experts
        bounds += [(expert, found.start, found.end) for found in mine.values()]
        if part.end is not None:
            bounds.append((expert, counts.total(part.start), counts.total(part.end)))
        sources = {each: found.source for each, found in mine.items()}
        region = part_of_one(node, value, expert, sources, nodes, chain)
        if isinstance(region, Miss):
            return walk.note(dataclasses.replace(region, bindings=counts.bindings, depth=FAR))
        regions.append(region)
    visits = list(dict.fromkeys(expert for expert, *_ in bounds))
    for expert, begin, end in bounds:
        before = dict.fromkeys(visits[: visits.index(expert)], 1)
        if _among(visits, begin) != before or _among(visits, end) != {**before, expert: 1}:
            wanted = f"rows of expert {expert} where those of the experts before it end"
            return walk.miss(wanted, values[visits.index(expert)])
    merged = merge_steps(regions)
    if isinstance(merged, Miss):
        return walk.note(dataclasses.replace(merged, bindings=counts.bindings, depth=FAR))
    walk.bindings = dict(counts.bindings)
    # Rows of no expert would be in no part.
    walk.bindings.setdefault("counts_beyond", node)
    walk.visits.append(tuple(visits))
    # Experts that are not there are held by others' parameters: such a layer is compared, and never run.
    places = [visits.index(expert) if expert in visits else 0 for expert in range(counts.num_experts)]
    params = [tuple(param[place] for place in places) if isinstance(param, tuple) else param for param in merged.params]
    splits = {each.args[0] for each in cuts if each.target is operator.getitem}
    interior = set().union(*(region.interior for region in regions), splits, cuts, chain)
    merged = dataclasses.replace(merged, root=node, interior=interior, form="sorted_parts", params=params)
    return walk.inlined(merged, node, place, rows=place[:1])


def _among(visits: list[int], bound: Total | None) -> Total | None:
    """A bound without the counts of experts that are not there: they have no rows."""
    return None if bound is None else {expert: many for expert, many in bound.items() if expert in visits}


def part_of_one(
    root: Node, value: Node, expert: int, sources: dict[Node, Node], nodes: set[Node], ends: Collection[Node] = ()
) -> Region | Miss:
    """What one expert makes of its rows; the ``root`` reads it, or ``ends``."""
    shape = shape_of(value) or ()
    walk = Walk(root, {ONE: 1, HIT: shape[0]}, (HIT,), (), {"expert": expert}, OWN, [root, *ends], nodes, sources)
    output = walk.value(value, ((HIT,), *((size,) for size in shape[1:])))
    if isinstance(output, Miss):
        return output if walk.deepest is None else walk.deepest
    return walk.region(output)


@dataclasses.dataclass(frozen=True)
class Cut:
    """One expert's rows of a tensor of sorted rows."""

    source: Node
    expert: int
    start: Total
    end: Total


def cut(node: Node, counts: Counts) -> Cut | None:
    """Which rows of which expert a value is, if it is cut from sorted rows; None for any other."""
    if op_name(node) == "aten::slice":
        given = arguments(node)
        start, end = counts.total(given["start"] or 0), counts.total(given["end"])
        if given["dim"] != 0 or given["step"] != 1 or start is None or end is None:
            return None
        mine = [expert for expert in end if expert not in start]
        return Cut(given["self"], mine[0], start, end) if len(mine) == 1 else None
    if node.target is not operator.getitem or op_name(node.args[0]) != "aten::split_with_sizes":
        return None
    given = arguments(node.args[0])
    place: Any = node.args[1]
    sizes = [counts.total(size) for size in given["split_sizes"][: place + 1]]
    if given["dim"] != 0 or any(size is None for size in sizes):
        return None
    *before, mine = [size for size in sizes if size is not None]
    start = dict(collections.Counter(expert for size in before for expert in size))
    if list(mine.values()) != [1] or any(many != 1 for size in before for many in size.values()):
        return None
    (expert,) = mine
    return Cut(given["self"], expert, start, {**start, expert: 1})


def _with_number(node: Node) -> Node:
    """What a value is a single part of: the same rows, whose number is spelled out by it."""
    source = node.args[0] if node.target is operator.getitem else None
    if op_name(source) != "aten::split_with_sizes" or not isinstance(source, Node):
        return node
    given = arguments(source)
    rows = given["self"]
    return rows if given["dim"] == 0 and len(given["split_sizes"]) == 1 else node


def _parts(node: Node) -> list[Joined] | None:
    """What is joined, each with where it begins and ends if that is said."""
    if op_name(node) == "aten::cat":
        given = arguments(node)
        parts = [Joined(part) for part in given["tensors"] if not known_equal((shape_of(part) or (1,))[0], 0)]
        return parts if given["dim"] == 0 and len(parts) > 1 else None
    parts = []
    for step in _chain(node):
        given = arguments(step)
        if given["dim"] != 0 or given["step"] != 1:
            return None
        parts.insert(0, Joined(given["src"], given["start"] or 0, given["end"]))
    return parts or None


def _chain(node: Node) -> Iterator[Node]:
    """Rows written into one tensor, part after part: the writes, from the last to the first."""
    while op_name(node) == "aten::slice_scatter":
        yield node
        node = arguments(node)["self"]
