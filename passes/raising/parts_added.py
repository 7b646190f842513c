"""Disguise: rows sorted by expert are cut into parts, and each expert's results are added where its rows came from.

token = perm // K
for e in range(E):
    at = token[start : start + counts[e]]
    out.index_add_(0, at, body(x[at], weight[e]) * s...)

Added part by part, these are the rows of one sorted whole, as in `parts.py`, added to their tokens.
"""

from __future__ import annotations

from moe_fx.passes.raising import grouped, slot_major
from moe_fx.passes.raising.axes import SLOT, SORTED_ROW
from moe_fx.passes.raising.endings import token_axes
from moe_fx.passes.raising.loops import adds
from moe_fx.passes.raising.parts import Joined, join
from moe_fx.passes.raising.region import Region, misfit, read_outside
from moe_fx.passes.raising.registry import known_pieces
from moe_fx.passes.raising.walk import Walk
from moe_fx.passes.raising.whole import cut_from
from torch.fx import Node

from moe_fx.constants import is_zero
from moe_fx.matcher import Match, Miss, chain, match
from moe_fx.pattern import Var, either
from moe_fx.shapes import shape_of

__all__ = ["parts_added"]

STEP = adds(Var("at", rank=1))


def parts_added(root: Node) -> Region | Miss | None:
    """The layer that ends in the last of such additions. None where none does."""
    steps, node = chain(STEP, root)
    wholes = {cut_from(found["at"]) for _, found in steps}
    if (
        len(steps) < 2
        or len(wholes) > 1
        or None in wholes
        or any(isinstance(match(STEP, u), Match) for u in root.users)
    ):
        return None
    (whole,) = wholes
    token, axes = match(either(slot_major.token_of_row, grouped.token_of_row), whole), token_axes(shape_of(root) or ())
    if not isinstance(token, Match) or axes is None or "ids" not in token.bindings:
        return None
    sizes, tokens, place = axes
    sizes |= {SLOT: (shape_of(token["ids"]) or (0,))[-1], SORTED_ROW: (shape_of(whole) or (0,))[0]}
    additions = {step for step, _ in steps}
    ends = {root, *(each for _, found in steps for each in found.nodes)}
    walk = Walk(root, sizes, tokens, known_pieces(), dict(token.bindings), ending=ends)
    parts = [Joined(found["summed"], at=found["at"]) for _, found in steps]
    output = join(walk, root, ((SORTED_ROW,), place[-1]), parts, additions)
    if output is None or isinstance(output, Miss):
        return output
    walk.interior.discard(root)
    region = walk.region(output)
    if isinstance(region, Miss):
        return region
    region.base = None if is_zero(node) else node
    wrong = read_outside(additions - {root}, ends)
    wrong = misfit(region) if wrong is None else wrong
    return region if wrong is None else wrong
