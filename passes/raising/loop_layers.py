"""The steps of a loop over experts, found from its last one, as one layer; `loops.py` declares what a step is."""

from __future__ import annotations

import dataclasses
import math

import torch
from moe_fx.passes.raising import loops
from moe_fx.passes.raising.axes import HIT, ONE, SLOT, TOKEN
from moe_fx.passes.raising.not_negative import is_not_negative
from moe_fx.passes.raising.pieces_taken import writes_whole_rows
from moe_fx.passes.raising.region import Region, misfit
from moe_fx.passes.raising.slot_by_slot import merge_slots
from moe_fx.passes.raising.steps import in_order, merge_steps
from moe_fx.passes.raising.tables import Slots, counts_zero, ids_of_mask, read_table
from moe_fx.passes.raising.walk import Walk
from torch.fx import Node

from moe_fx.constants import is_zero
from moe_fx.matcher import Match, Miss, chain
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["loop_of_steps"]


def loop_of_steps(root: Node, loop: loops.Loop) -> Region | Miss:
    """A loop, traced as a few of its steps: it is a sum over all experts if each does the same to its expert.

    Whatever a loop carries along, in a tensor or in Python, makes its second step differ from its first.
    """
    steps, node = chain(loop.step, root)
    if (told := _told_by_table(steps)) is not None:
        return told
    # What a loop of all steps adds to is added to the layer; a few steps that stand for all must add to zeros.
    base = None if is_zero(node) else node
    if base is not None and not all(isinstance(found["expert"], int) for _, found in steps):
        return Miss("a sum that starts with zeros", f"{node.name}, which need not be zero", node)
    reads = {root, *(step for step, _ in steps), *(each for _, found in steps for each in found.nodes)}
    for place, inner in reversed([*([(-1, node)] if base is None else []), *enumerate(each for each, _ in steps[:-1])]):
        if any(user not in reads for user in inner.users):
            users = ", ".join(user.name for user in inner.users)
            read = Miss("a sum that nothing in the loop reads", f"{inner.name}, read by {users}", inner)
            # It may be the result of a layer before, to which this one's is added. Of a few steps that stand for all
            # experts, none can be left out.
            numbered = place >= 0 and all(isinstance(found["expert"], int) for _, found in steps)
            behind = _layer(root, loop, inner, steps[place + 1 :]) if numbered else read
            return behind if isinstance(behind, Region) else read
    return _layer(root, loop, base, steps)


def _layer(root: Node, loop: loops.Loop, base: Node | None, steps: list[tuple[Node, Match]]) -> Region | Miss:
    """The layer whose steps these are, each of which adds to the one before."""
    regions: list[Region] = []
    for last, found in steps:
        region = _step(last, found, loop)
        if isinstance(region, Miss):
            return region
        regions.append(region)
    # Experts without parameters, which return the token or zeros, are none of the layer's: their steps follow it.
    alone: list[tuple[int, Region]] = []
    while len(steps) > 1 and not regions[-1].params and not regions[-1].shared:
        region, (_, found) = regions.pop(), steps.pop()
        if isinstance(found["expert"], int) and not loop.once and "routed" not in found.bindings:
            alone.append((found["expert"], region))
        root = steps[-1][0]
    if len(steps) < 2:
        return Miss("a loop over experts", "a single step", root)
    # Where another loop goes over the slots, the steps of one slot look at the same column of ids.
    slots: dict[Node, list[int]] = {}
    for number, (_, found) in enumerate(steps):
        slots.setdefault(found["ids"], []).append(number)
    of_slots: list[Region] = []
    for own in slots.values():
        merged = _all_experts([regions[place] for place in own], [steps[place][1]["expert"] for place in own], root)
        if isinstance(merged, Miss):
            return merged
        # A token is routed to an expert by one slot only, or its row is there once, with the sum of the weights.
        distinct = merged.distinct or (not merged.adds_up if loop.once else merged.summed)
        of_slots.append(dataclasses.replace(merged, distinct=len(slots) == 1 and distinct))
    whole = of_slots[0] if len(of_slots) == 1 else merge_slots(of_slots, root)
    if isinstance(whole, Miss):
        return whole
    interior = set().union(*(region.interior for region in regions), (step for step, _ in steps[:-1]))
    step = None if isinstance(steps[0][1]["expert"], int) else steps[0][0]
    # They are held to the same sizes, but for parameters.
    fits = [misfit(dataclasses.replace(each, params=whole.params, visits=whole.visits)) is None for _, each in alone]
    behind = [each for each, fitting in zip(alone, fits, strict=True) if fitting]
    return dataclasses.replace(whole, root=root, interior=interior, step=step, base=base, alone=behind)


def _told_by_table(steps: list[tuple[Node, Match]]) -> Miss | None:
    """Where a table of routing weights tells an expert's tokens, its ids are those of the layer. Why not, if not."""
    known: dict[Node, Node | Miss] = {}
    for place, (step, found) in enumerate(steps):
        if "routed" not in found.bindings:
            continue
        table, bindings = found["routed"], dict(found.bindings)
        if table not in known:
            told = ids_of_mask(table) or read_table(table)
            known[table] = told.ids if isinstance(told, Slots) else told
        ids, value = known[table], tensor_of(table)
        if isinstance(ids, Miss):
            return ids
        if 1 < len(shape_of(ids) or ()) < len(shape_of(table) or ()):
            return Miss("a table by token and expert", table.name, table)  # by slot: its rows are no tokens
        if "flag" in bindings and (value is None or value.dtype is not torch.bool):
            return Miss("a mask of tokens, or places", table.name, table)
        if ids_of_mask(table) is not None:
            del bindings["routed"]
        elif "positive" in bindings and not is_not_negative(table):
            wanted = "routing weights that are certainly not negative, as those above zero are taken"
            return Miss(wanted, table.name, table)
        steps[place] = step, Match({**bindings, "ids": ids}, found.nodes)
    return None


def _all_experts(regions: list[Region], experts: list[int | Node], root: Node) -> Region | Miss:
    """The steps of a loop, one expert each, as one layer."""
    numbers = [expert for expert in experts if isinstance(expert, int)]
    merged = merge_steps(in_order(regions, numbers) if len(numbers) == len(experts) else regions)
    if isinstance(merged, Miss):
        return merged
    merged = dataclasses.replace(merged, visits=[tuple(sorted(numbers))] if numbers else [])
    wrong = misfit(merged)
    if wrong is not None:
        return wrong
    every = list(range(merged.num_experts))
    if len(set(experts)) < len(experts) or (not numbers and len(experts) < 2):
        return Miss(f"every expert of {len(every)} once", f"experts {', '.join(map(str, experts))}", root)
    return merged  # whether these are all, is asked when all else is known


def _step(root: Node, found: Match, loop: loops.Loop) -> Region | Miss:
    """One step of a loop, as a layer of one expert."""
    summed = found["summed"]
    if not writes_whole_rows(root, summed):
        return Miss("whole rows added", root.name, root)
    shape = shape_of(summed) or ()
    rows = shape_of(found["ids"]) or ()
    *tokens, slots = rows if len(rows) > 1 else (*rows, 1)  # one slot needs no dimension
    sizes = {ONE: 1, HIT: shape[0], TOKEN: math.prod(tokens), SLOT: slots}
    bindings = {name: bound for name, bound in found.bindings.items() if name not in ("summed", "base")}
    walk = Walk(root, sizes, (TOKEN,), loop.pieces, bindings, loop.own, ending=found.nodes)
    output = walk.value(summed, ((HIT,), (shape[1],)))
    if isinstance(output, Miss):
        return output if walk.deepest is None else walk.deepest
    region, table = walk.region(output), found.bindings.get("routed")
    if table is None or isinstance(region, Miss):
        return region
    # Tokens whose weight is zero are left out, although their ids name the expert.
    weight = walk.body.captured["s"].get(table)
    if weight is None or not counts_zero(output.node, [weight]):
        return Miss("an expert's output that is zero wherever its routing weight is", "one that need not be", root)
    return dataclasses.replace(region, not_negative={table} if "positive" in found.bindings else set())
