"""Disguise: each slot in turn, in a loop of its own or around one over the experts.

for k in range(K):
    out = out + body(x, weight[ids[:, k]]) * s[:, k, None]

Every slot is read as a layer with one slot per token. They are one layer if all do the same to the same tokens, and
what they take of ids and routing weights are the columns of the same tensors:

    (x, ids[:, 0], s[:, 0]), (x, ids[:, 1], s[:, 1])    =>    (x, ids, s)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from moe_fx.passes.raising.region import Region, told_of_ids
from torch.fx import Node

from moe_fx.matcher import Match, Miss, match, op_name
from moe_fx.outline import same_graph
from moe_fx.pattern import ANY, As, AtLeast, Last, Var, aten, either
from moe_fx.shapes import known_equal, shape_of, tensor_of

__all__ = ["COLUMN", "merge_slots", "slot_number"]

number = As("number", AtLeast(0))
COLUMN = either(aten.select(Var("whole"), Last(-1), number), aten.slice(Var("whole"), Last(-1), number, ANY))
#: of choices one after another, nothing tells the walk which of them are the slots of one layer
ALONE = "as the {} of each slot stand alone: stack them, torch.stack([first, second], -1), and read its columns"
#: how far back from a term its slot's number is looked for
NEAR = 80


def _column(node: Node) -> tuple[Node, int] | None:
    """What a value is a single column of, and which."""
    found = match(COLUMN, node)
    if not isinstance(found, Match):
        return None
    whole: Any = found["whole"]
    rank = len(shape_of(whole) or ())
    if op_name(whole) == "aten::nonzero":
        return None  # places, and no ids
    one_wide = len(shape_of(node) or ()) < rank or known_equal((shape_of(node) or (0,))[-1], 1)
    return (whole, found["number"]) if one_wide and rank > 1 else None


def slot_number(term: Node) -> tuple[int, Node] | None:
    """Which column of ids a term is computed with, and the ids; None if there is none, or several."""
    seen: set[Node] = set()
    pending, found = [term], set()
    while pending and len(seen) < NEAR:
        node = pending.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        column, value = _column(node), tensor_of(node)
        if column is not None and value is not None and not value.is_floating_point():
            found.add((column[1], column[0]))
        else:
            pending.extend(node.all_input_nodes)
    return found.pop() if len(found) == 1 else None


def merge_slots(regions: Sequence[Region], root: Node, in_order: bool = False) -> Region | Miss:
    """One region for layers of one slot each; ``in_order`` where what follows tells the slots apart."""
    first = regions[0]
    for region in regions[1:]:
        same = (first.tokens, first.params, first.shared) == (region.tokens, region.params, region.shared)
        if not same or len(first.slots) != len(region.slots) or not same_graph(first.body.graph, region.body.graph):
            return Miss("the same for each of a token's slots", "slots that differ", region.root)
        if _of_ids(first) != _of_ids(region):
            return Miss("the same for each slot's ids", "ids that are changed, or skipped, for some slots", region.root)
    columns = [[_column(each) for each in (region.ids, *region.slots)] for region in regions]
    wholes: list[Node] = []
    for place, given in enumerate(zip(*columns, strict=True)):
        source = (first.ids, *first.slots)[place]
        whole = given[0][0] if given[0] is not None else source
        wholes.append(whole)
        if any(each is None or each[0] is not whole for each in given):
            alone = all(each is None for each in given)
            text = f"{source.name}, {ALONE.format('routing weights' if place else 'ids')}" if alone else source.name
            return Miss("a column of one tensor for each slot", text, source)
        if [each[1] for each in given if each] != [each[0][1] for each in columns if each[0]]:
            return Miss("routing weights of the slot whose ids are used", "those of another", source)
    numbers = [each[0][1] for each in columns if each[0]]
    numbers = numbers if in_order else sorted(numbers)
    ids, *slots = wholes
    count = (shape_of(ids) or (0,))[-1]
    if numbers != list(range(len(numbers))) or not known_equal(count, len(numbers)):
        order = ", in order" if in_order else ""
        return Miss(f"each of {count} slots once{order}", f"slots {', '.join(map(str, numbers))}", root)
    if any(not known_equal((shape_of(slot) or (0,))[-1], count) for slot in slots):
        return Miss(f"routing weights for {count} slots", f"shape {list(shape_of(slots[0]) or ())}", slots[0])
    columns_of = dict(zip((first.ids, *first.slots), wholes, strict=True))
    features = {columns_of.get(node, node): sizes for node, sizes in first.features.items()}
    interior = set().union(*(region.interior for region in regions))
    bindings = {name: bound for name, bound in first.bindings.items() if name not in ("ids", "top_k", "perm")}
    if first.sorts_away:
        bindings["rows_skipped"] = first.bindings["perm"]
    return dataclasses.replace(
        first, root=root, ids=ids, slots=slots, interior=interior, size=(first.size[0], len(numbers)),
        features=features, distinct=any(region.distinct for region in regions),
        visits=[visited for region in regions for visited in region.visits],
        bindings=bindings,
    )  # fmt: skip


def _of_ids(region: Region) -> dict[str, Any]:
    """What becomes of ids that name no expert; the nodes that say so are each slot's own."""
    told = told_of_ids(region.bindings) | {name: True for name in ("perm",) if name in region.bindings}
    return {name: None if isinstance(value, Node) else value for name, value in told.items()}
