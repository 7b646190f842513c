"""Disguise: each expert's results are written to the slots that its part of the sorted places names.

perm = ids.reshape(-1).argsort()
for e in range(E):
    at = perm[start : start + counts[e]]
    y[at] = body(x[at // K], weight[e])
out = (y.view(T, K, H) * s[:, :, None]).sum(1)

Written part by part, these are the rows of one sorted whole, as in `parts.py`, brought back to the slots.
"""

from __future__ import annotations

from moe_fx.passes.raising import grouped, slot_major
from moe_fx.passes.raising.axes import SORTED_ROW, Place
from moe_fx.passes.raising.parts import Joined, join
from moe_fx.passes.raising.pieces import SLOT_MAJOR, TOKEN_MAJOR
from moe_fx.passes.raising.walk import Walk
from moe_fx.passes.raising.whole import cut_from
from moe_fx.passes.raising.writer import Value
from torch.fx import Node

from moe_fx.matcher import Match, Miss, chain, match
from moe_fx.pattern import Var, aten

__all__ = ["parts_put"]

STEP = aten.index_put(Var("base"), [Var("at", rank=1)], Var("put"))
ORDERS = ((slot_major.perm, SLOT_MAJOR), (grouped.perm, TOKEN_MAJOR))


def parts_put(walk: Walk, node: Node, place: Place) -> Value | Miss | None:
    """What all experts wrote, as the results of one expert in the body. None for any other op."""
    steps, _ = chain(STEP, node)
    wholes = {cut_from(found["at"]) for _, found in steps}
    if len(steps) < 2 or len(wholes) > 1 or None in wholes:
        return None
    (whole,) = wholes
    for perm, layout in ORDERS:
        order = match(perm, whole, walk.bindings) if place[:1] == walk.layouts[layout] else None
        if isinstance(order, Match):
            walk.bind(order)
            parts = [Joined(found["put"], at=found["at"]) for _, found in steps]
            # Of what stood there before nothing is left: every slot is some expert's.
            return join(walk, node, ((SORTED_ROW,), *place[1:]), parts, {step for step, _ in steps})
    return None
