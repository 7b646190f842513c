"""The disguises known: how each ends, and the pieces it is made of.

To add one: declare its pieces in a file of its own, and name it here.
"""

from __future__ import annotations

import dataclasses

from moe_fx.passes.raising import dense, gathered, grouped, loops
from moe_fx.passes.raising.anchors import anchors_behind
from moe_fx.passes.raising.pieces import COMMON, EXPERTS, HITS, SLOTS
from moe_fx.passes.raising.region import Region, same_step
from moe_fx.passes.raising.walk import find_region
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.matcher import Match, Miss, match, op_name
from moe_fx.pattern import Last, Var, aten

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
        anchors = anchors_behind(found["summed"], chosen=layout == SLOTS)
        if layout != HITS:
            return find_region(root, found, layout, pieces), anchors
        first = match(end, found["base"])
        # The first step of a loop is found again behind its second.
        return (_loop(root, found, first, pieces), {root}) if isinstance(first, Match) else None
    # A step that adds the rows of some expert, whose loop is not over those that were hit.
    return (near, {root}) if near is not None and near.depth > 2 and op_name(root) == "aten::index_add" else None


def _loop(root: Node, second: Match, first: Match, pieces: tuple) -> Region | Miss:
    """A loop, traced as two of its steps: it is a sum over all experts if both do the same to their expert.

    Whatever a loop carries along, in a tensor or in Python, makes its second step differ from its first.
    """
    start, inner = first["base"], second["base"]
    if filled_with(start) != 0:
        return Miss("a sum that starts with zeros", f"{start.name}, which need not be zero", start)
    for node in (start, inner):
        if len(node.users) != 1:
            users = ", ".join(user.name for user in node.users)
            return Miss("a sum that nothing in the loop reads", f"{node.name}, read by {users}", node)
    regions = [find_region(node, found, HITS, pieces) for node, found in ((inner, first), (root, second))]
    for region in regions:
        if isinstance(region, Miss):
            return region
    one, other = regions
    if first["expert"] is second["expert"] or not same_step(one, other):
        return Miss("a loop whose every step does the same to its expert", "two steps that differ", root)
    return dataclasses.replace(one, root=root, interior=one.interior | other.interior | {inner}, step=inner)
