"""The disguises known: how each ends, and the pieces it is made of.

To add one: declare its pieces in a file of its own, and name it here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from moe_fx.passes.raising import dense, gathered, grouped, loops
from moe_fx.passes.raising.anchors import anchors_behind
from moe_fx.passes.raising.pieces import COMMON, EXPERTS, HITS, SLOTS, Piece
from moe_fx.passes.raising.region import Region, misfit
from moe_fx.passes.raising.steps import merge_steps
from moe_fx.passes.raising.walk import find_region
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.kernels import each_expert
from moe_fx.matcher import Match, Miss, match, op_name
from moe_fx.pattern import Last, Pattern, Var, aten

__all__ = ["region_at"]

#: the last op, which sums over each token's slots, over all experts, or over a loop's; how the rows stand that it
#: sums; and the pieces
DISGUISES = (
    (aten.sum(Var("summed", rank=3), [Last(1)]), SLOTS, (*grouped.PIECES, *gathered.PIECES, *COMMON)),
    (aten.sum(Var("summed", rank=3), [Last(0)]), EXPERTS, dense.PIECES),
    *((step, HITS, pieces) for step, pieces in loops.LOOPS),
)


def region_at(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """The layer that ends in a node, or why it is none; and the multiplications that suggest one.

    None for a node in which no disguise ends.
    """
    near: Miss | None = None
    for end, layout, pieces in DISGUISES:
        found = match(end, root)
        if isinstance(found, Miss):
            near = found if layout == HITS and (near is None or found.depth > near.depth) else near
            continue
        if layout == HITS:
            # The steps of a loop are found from its last one.
            last = not any(isinstance(match(end, user), Match) for user in root.users)
            return (_loop(root, end, pieces), {root}) if last else None
        anchors = anchors_behind(found["summed"], chosen=layout == SLOTS)
        region = find_region(root, found, layout, pieces)
        wrong = misfit(region) if isinstance(region, Region) else None
        return (region if wrong is None else wrong), anchors
    # A step that adds the rows of some expert, whose loop is not over those that were hit.
    each = root.graph.find_nodes(op="call_function", target=torch.ops.moe_fx.each_expert.default)
    steps = op_name(root) in ("aten::index_add", "aten::index_put") and near is not None and near.depth > 2
    return (near, {root}) if near is not None and steps and each else None


def _loop(root: Node, end: Pattern, pieces: Sequence[Piece]) -> Region | Miss:
    """A loop, traced as a few of its steps: it is a sum over all experts if each does the same to its expert.

    Whatever a loop carries along, in a tensor or in Python, makes its second step differ from its first.
    """
    steps: list[tuple[Node, Match]] = []
    node = root
    while isinstance(found := match(end, node), Match):
        steps.insert(0, (node, found))
        node = found["base"]
    if filled_with(node) != 0:
        return Miss("a sum that starts with zeros", f"{node.name}, which need not be zero", node)
    for inner in [node, *(step for step, _ in steps[:-1])]:
        if len(inner.users) != 1:
            users = ", ".join(user.name for user in inner.users)
            return Miss("a sum that nothing in the loop reads", f"{inner.name}, read by {users}", inner)
    regions: list[Region] = []
    for last, found in steps:
        region = find_region(last, found, HITS, pieces)
        if isinstance(region, Miss):
            return region
        regions.append(region)
    experts = [found["expert"] for _, found in steps]
    merged = merge_steps(regions)
    if isinstance(merged, Miss):
        return merged
    wrong = misfit(merged)
    if wrong is not None:
        return wrong
    if len(steps) < 2:
        return Miss("a loop over experts", "a single step", root)
    numbers = [expert for expert in experts if isinstance(expert, int)]
    every = list(range(merged.num_experts))
    if sorted(numbers) != every if numbers else len(set(experts)) < len(experts):
        return Miss(f"every expert of {len(every)} once", f"experts {', '.join(map(str, experts))}", root)
    interior = set().union(*(region.interior for region in regions), (step for step, _ in steps[:-1]))
    step = None if numbers else steps[0][0]
    return dataclasses.replace(merged, root=root, interior=interior, step=step)


assert each_expert is not None  # importing it registers the op
