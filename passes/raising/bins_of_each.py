"""Disguise: bins [E, C, H] are taken apart, each expert takes its own, and the results are put together again.

parts = bins.chunk(E, dim=0)                         # or bins[e], bins.unbind(0)
y = torch.cat([expert(part) for expert, part in zip(experts, parts)])        # or stack([expert(bins[e]) ...])

An expert sees every place of its own bin, and nothing else of it: it is the body of the bins as a whole.
"""

from __future__ import annotations

import dataclasses
import operator

from moe_fx.passes.raising.axes import EXPERT, ONE, PLACE, Place, axes_of, is_row_dim
from moe_fx.passes.raising.each_expert import OWN, specific
from moe_fx.passes.raising.region import Region
from moe_fx.passes.raising.steps import merge_steps
from moe_fx.passes.raising.walk import Walk
from moe_fx.passes.raising.writer import Value
from torch.fx import Node

from moe_fx.matcher import Miss, arguments, op_name
from moe_fx.shapes import known_equal, same_shape, shape_of

__all__ = ["bins_of_each"]


def bins_of_each(walk: Walk, node: Node, place: Place) -> Value | Miss | None:
    """The results of every bin, written into the body as those of one. None for anything else."""
    given = arguments(node) if op_name(node) in ("aten::stack", "aten::cat") else {}
    if place[:1] == ((),):  # of size 1, such as that of the groups of experts
        place = ((ONE,), *place[1:])
    rows = next((at for at, dim in enumerate(place) if not is_row_dim(dim)), len(place))
    if not given or PLACE not in axes_of(place) or EXPERT not in axes_of(place[:rows]) or axes_of(place[rows:]):
        return None
    at, values = given["dim"] % len(place), given["tensors"]
    if place[at] != (EXPERT,) or not known_equal(walk.sizes.get(EXPERT, len(values)), len(values)):
        return None
    own = (ONE,) if op_name(node) == "aten::cat" else None
    apart = tuple(dim for dim in (*place[:at], own, *place[at + 1 :]) if dim is not None)
    axes = tuple(axis for dim in apart for axis in dim if isinstance(axis, str) and axis != ONE)
    regions: list[Region] = []
    bins, interior = set[Node](), set[Node]()
    for expert, (value, nodes) in enumerate(zip(values, specific(values), strict=True)):
        cuts = {each: whole for each in nodes if (whole := _bin_of(each, expert, at)) is not None}
        bins |= set(cuts.values())
        interior |= {*cuts, *(each.args[0] for each in cuts if each.target is operator.getitem)}
        sizes = {ONE: 1, **{axis: walk.sizes[axis] for axis in axes}}
        step = Walk(node, sizes, axes, (), {"expert": expert}, OWN, [node], nodes, cuts)
        output = step.value(value, apart)
        region = step.region(output) if isinstance(output, Value) else output
        if isinstance(region, Miss):
            return walk.note(dataclasses.replace(region, bindings=dict(walk.bindings)))
        regions.append(region)
    if not _are_alike(bins, node, rows):
        return walk.miss("one tensor of all experts' bins", node)
    merged = merge_steps(regions)
    if isinstance(merged, Miss):
        return walk.note(dataclasses.replace(merged, bindings=dict(walk.bindings)))
    walk.count(EXPERT, len(values))
    walk.visits.append(tuple(range(len(values))))
    interior = interior.union(*(region.interior for region in regions))
    merged = dataclasses.replace(merged, root=node, interior=interior, form="binned_experts")
    return walk.inlined(merged, node, place, rows=place[:rows])


def _are_alike(bins: set[Node], node: Node, rows: int) -> bool:
    shape = (shape_of(node) or ())[:rows]
    return len(bins) == 1 and all(same_shape((shape_of(each) or ())[:rows], shape) for each in bins)


def _bin_of(node: Node, expert: int, dim: int) -> Node | None:
    """The tensor of which a value is the bin of an expert, if it is."""
    if op_name(node) in ("aten::select", "aten::slice"):
        given = arguments(node)
        end = given.get("end", given.get("index", 0) + 1 if isinstance(given.get("index"), int) else None)
        start = given.get("index", given.get("start"))
        one = (start or 0) == expert and end == expert + 1 and given.get("step", 1) == 1
        whole: Node = given["self"]
        return whole if one and given["dim"] % len(shape_of(whole) or ()) == dim else None
    split = node.args[0] if node.target is operator.getitem else None
    if op_name(split) not in ("aten::split_with_sizes", "aten::unbind") or node.args[1] != expert:
        return None
    given = arguments(split)
    whole = given["self"]
    one = all(size == 1 for size in given.get("split_sizes", [1]))
    return whole if one and given["dim"] % len(shape_of(whole) or ()) == dim else None
