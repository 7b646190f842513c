"""Disguise: every expert's results are written where its mask is true, into one tensor of rows.

y = torch.zeros(T * K, H)
for e in range(E):
    y[flat_ids == e] = body(rows[flat_ids == e], weight[e])      # also at the places where the mask is true
out = (y.view(T, K, H) * s[:, :, None]).sum(1)                   # with one expert per token, y is all there is

y[place] = body(x[place // K], weight[e])                        # place = where(flat_ids == e)

y = torch.zeros(T, K, H)
for e in range(E):
    token, slot = torch.where(ids == e)
    y[token, slot] = body(x[token], weight[e])

rows, sorted_ids = x[perm // K], flat_ids[perm]                  # rows sorted by expert before: mask and rows alike

A row is one expert's, so it is written once or, if its id names no expert, never.
"""

from __future__ import annotations

import dataclasses

from moe_fx.passes.raising.axes import SORTED_ROW, Place
from moe_fx.passes.raising.each_expert import specific
from moe_fx.passes.raising.grouped import sorted_ids
from moe_fx.passes.raising.loops import all_places, expert_of, literal, places
from moe_fx.passes.raising.parts import FAR, part_of_one
from moe_fx.passes.raising.pieces import arange, widened_arange
from moe_fx.passes.raising.region import Region
from moe_fx.passes.raising.steps import in_order, merge_steps
from moe_fx.passes.raising.walk import Walk
from moe_fx.passes.raising.writer import Value
from torch.fx import Node

from moe_fx.constants import is_zero
from moe_fx.matcher import Match, Miss, chain, match
from moe_fx.pattern import ANY, As, AtLeast, Last, Var, aten, either, optional
from moe_fx.shapes import known_equal, same_shape, shape_of

__all__ = ["ids_written", "written"]

mask = As("mask", expert_of(Var("flat_ids", rank=1), literal))
slots = expert_of(Var("flat_ids", rank=2), literal)
at = either(mask, *all_places(mask))
token, slot = As("at", places(slots, 0)), As("slot_at", places(slots, 1))
STEP = either(
    aten.index_put(Var("base"), [As("at", at)], Var("written")),
    aten.index_put(Var("base"), [token, slot], Var("written")),
)
CUT = aten.index(Var("rows"), [Var("at")])
COLUMN = optional(
    lambda column: aten.unsqueeze(column, Last(1)), aten.select(Var("table", rank=2), Last(1), As("expert", AtLeast(0)))
)
TOKEN = aten.floor_divide(Var("at", rank=1), Var("top_k"))
#: each token's number, once for every slot
counted = As("counted", arange())
token_numbers = either(
    *(aten.repeat_interleave(counted, AtLeast(1), *dim) for dim in ((), (ANY,))), widened_arange(counted)
)
NUMBERED = aten.index(As("numbers", token_numbers), [Var("at")])
CUT_BY_SLOT = aten.index(Var("rows"), [Var("at"), Var("slot_at")])


def ids_written(node: Node) -> Node | None:
    """The ids by whose masks rows are written, if a value is the last of such writes."""
    found = match(STEP, node)
    if not isinstance(found, Match) or any(isinstance(match(STEP, user), Match) for user in node.users):
        return None
    # Of sorted rows nobody knows the token: they are brought back, or added to it.
    return None if isinstance(match(sorted_ids, found["flat_ids"]), Match) else found["flat_ids"]


def written(walk: Walk, node: Node, place: Place) -> Value | Miss | None:
    """What all experts wrote, as the results of one expert in the body. None for any other op."""
    steps, base = chain(STEP, node)
    if not steps:
        return None
    rank = len(shape_of(steps[0][1]["flat_ids"]) or ())
    by_order = match(sorted_ids, steps[0][1]["flat_ids"], walk.bindings) if place[:1] == ((SORTED_ROW,),) else None
    if isinstance(by_order, Match):
        walk.bind(by_order)
    else:
        ids = walk.ids_of(steps[0][1]["flat_ids"], place[:rank])
        if ids is None or walk.bindings.setdefault("ids", ids) is not ids:
            return walk.miss("rows written by the layer's own ids", steps[0][1]["flat_ids"])
    experts = [found["expert"] for _, found in steps]
    if any(found["flat_ids"] is not steps[0][1]["flat_ids"] for _, found in steps):
        return walk.miss("rows written by the same ids at every step", node)
    cuts = [_cuts(found) for _, found in steps]
    by_token = {rows for _, found in steps if "slot_at" in found.bindings for rows in _cuts_at(found["at"]).values()}
    by_token |= {rows for _, found in steps for rows in _cuts_by_division(found).values()}
    values = [found["written"] for _, found in steps]
    regions: list[Region] = []
    for (step, _), expert, value, own, mine in zip(steps, experts, values, specific(values), cuts, strict=True):
        region = part_of_one(step, value, expert, mine, own | set(mine))
        if isinstance(region, Miss):
            return walk.note(dataclasses.replace(region, bindings=dict(walk.bindings), depth=FAR))
        regions.append(region)
    regions, tables = _by_table(regions, experts)
    merged = merge_steps(in_order(regions, experts))
    if isinstance(merged, Miss):
        return walk.note(dataclasses.replace(merged, bindings=dict(walk.bindings), depth=FAR))
    if len(set(experts)) < len(experts):
        return walk.miss("every expert once", node, f"experts {', '.join(map(str, experts))}")
    walk.visits.append(tuple(sorted(experts)))
    # Rows of no expert keep what stood there: nothing, if that is zero.
    walk.bindings["rows_skipped" if is_zero(base) else "counts_beyond"] = node
    writes = {step for step, _ in steps}
    interior = set().union(*(region.interior for region in regions), *map(set, cuts), writes)
    merged = dataclasses.replace(merged, root=node, interior=interior, form="written_rows")
    return walk.inlined(merged, node, place, rows=place[:rank], by_token=by_token, tables=tables)


def _by_table(regions: list[Region], experts: list[int]) -> tuple[list[Region], set[Node]]:
    """Where each expert's rows take its own column of one table, they take what it holds for their id."""
    tables: set[Node] = set()
    for place in range(min(len(region.slots) for region in regions)):
        columns = [match(COLUMN, region.slots[place]) for region in regions]
        told = [(each["table"], each["expert"]) for each in columns if isinstance(each, Match)]
        if len(told) < len(regions) or [at for _, at in told] != experts or len({table for table, _ in told}) > 1:
            continue
        table, changed = told[0][0], []
        tables.add(table)
        for region in regions:
            slots = [*region.slots[:place], table, *region.slots[place + 1 :]]
            features = {**region.features, table: region.features[region.slots[place]]}
            changed.append(dataclasses.replace(region, slots=slots, features=features))
        regions = changed
    return regions, tables


def _cuts(found: Match) -> dict[Node, Node]:
    """What is read at the places where rows are written, and of what."""
    cuts = _cuts_at(found["at"]) | _cuts_by_division(found)
    if "slot_at" in found.bindings:
        both = {"at": found["at"], "slot_at": found["slot_at"]}
        read = {user: match(CUT_BY_SLOT, user, both) for user in found["slot_at"].users}
        cuts |= {user: cut["rows"] for user, cut in read.items() if isinstance(cut, Match)}
    return cuts


def _cuts_at(at: Node) -> dict[Node, Node]:
    found = {user: match(CUT, user, {"at": at}) for user in at.users}
    return {user: cut["rows"] for user, cut in found.items() if isinstance(cut, Match)}


def _cuts_by_division(found: Match) -> dict[Node, Node]:
    """What is read of the tokens that a division tells of the places of slots, which are numbered through."""
    cuts: dict[Node, Node] = {}
    slots = (shape_of(found["flat_ids"]) or (0,))[0]
    for divided in found["at"].users:
        told = match(TOKEN, divided, {"at": found["at"]})
        listed = match(NUMBERED, divided, {"at": found["at"]})
        for user, cut in _cuts_at(divided).items():
            tokens = (shape_of(cut) or (0,))[0]
            if isinstance(told, Match) and isinstance(told["top_k"], int):
                alike = known_equal(tokens * told["top_k"], slots)
            elif isinstance(listed, Match):
                numbers = [(shape_of(listed[name]) or (0,))[0] for name in ("counted", "numbers")]
                alike = same_shape((tokens, slots), numbers)
            else:
                alike = False
            if alike:
                cuts[user] = cut
    return cuts
