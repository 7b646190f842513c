"""A chain of additions as one layer: a term is what one expert makes of every token, or one slot of each token.

out = out + table[:, e, None] * body(x, weight[e])                   each_expert.py
out = out + s[:, k, None] * body(x, weight[ids[:, k]])               slot_by_slot.py
out = out + torch.where(ids[:, k] == e, s[:, k], 0)[:, None] * body(x, weight[e])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from moe_fx.passes.raising import each_expert as each_expert_loop
from moe_fx.passes.raising.axes import EXPERT, SLOT, SORTED_ROW, Place, axes_of, features, size_of
from moe_fx.passes.raising.each_expert import terms
from moe_fx.passes.raising.endings import token_axes
from moe_fx.passes.raising.pieces import Piece
from moe_fx.passes.raising.region import Region, misfit, read_beside
from moe_fx.passes.raising.registry import known_pieces
from moe_fx.passes.raising.slot_by_slot import merge_slots, slot_number
from moe_fx.passes.raising.steps import merge_steps
from moe_fx.passes.raising.walk import NO_EXPERT, Walk
from moe_fx.passes.raising.writer import Value
from torch.fx import Node

from moe_fx.constants import is_zero
from moe_fx.matcher import Miss, arguments, op_name
from moe_fx.shapes import depends_on_values, shape_of, tensor_of

__all__ = ["stacked", "sum_of_terms"]

aten = torch.ops.aten


def sum_of_terms(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """A chain of additions, each of what one expert makes of every token; or of one slot of each token."""
    if op_name(root) != "aten::add" or any(depends_on_values(size) for size in shape_of(root) or ()):
        return None  # rows chosen by data are not every token's
    near: Miss | None = None
    for key_of, merge in ((each_expert_loop.expert_number, _experts_added), (slot_number, _slots_added)):
        if any(_adds_terms(user, key_of) for user in root.users):
            continue  # the terms are found from the last addition
        found = terms(root, key_of)
        if found is None or len({number for (number, _), _ in found[0]}) < 2:
            continue  # one expert, or slot, of which others were not found
        numbered, base, chain = found
        merged = merge(root, numbered)
        if isinstance(merged, Miss) and merged.wanted == NO_EXPERT:
            continue  # such as what experts without parameters leave of a token
        if isinstance(merged, Miss):
            near = merged if near is None or merged.depth > near.depth else near
            continue
        for inner in chain - {root}:
            if any(user not in chain for user in inner.users):
                users = ", ".join(user.name for user in inner.users)
                return Miss("a sum that nothing else reads", f"{inner.name}, read by {users}", inner), {root}
        merged = dataclasses.replace(merged, interior=merged.interior | (chain - {root}), base=base)
        used = read_beside(merged, chain)
        wrong = misfit(merged) if used is None else used
        return (merged if wrong is None else wrong), {root}
    return (near, {root}) if near is not None else None


def _adds_terms(node: Node, key_of: Callable[[Node], Any]) -> bool:
    found = terms(node, key_of) if op_name(node) == "aten::add" else None
    return found is not None and bool(found[0])


def _experts_added(root: Node, numbered: Sequence[tuple[tuple[int, Node | None], Node]]) -> Region | Miss:
    """Terms of one expert each; where they look at one slot only, of one expert and slot."""
    slots: dict[Node | None, list[tuple[int, Node]]] = {}
    for (expert, ids), term in numbered:
        slots.setdefault(ids, []).append((expert, term))
    # What an expert makes of a token may be computed once for all slots.
    behind = set().union(*each_expert_loop.computed_by([term for _, term in numbered]), {root})
    regions = []
    for of_slot in slots.values():
        merged = each_expert_on(root, of_slot, shared=behind if len(slots) > 1 else set())
        if isinstance(merged, Miss):
            return merged
        regions.append(dataclasses.replace(merged, distinct=len(slots) == 1 and not merged.adds_up))
    return regions[0] if len(regions) == 1 else merge_slots(regions, root)


def _slots_added(root: Node, numbered: Sequence[tuple[tuple[int, Node], Node]]) -> Region | Miss:
    """Terms of one slot each, which gather their experts' weights, or take their results."""
    terms_added = [term for _, term in numbered]
    ends = set().union(*(_between(root, term) for term in terms_added))
    return _each_slot(root, terms_added, ends)


def _each_slot(root: Node, values: Sequence[Node], ends: Collection[Node]) -> Region | Miss:
    """Values of one slot each, as one layer; ``ends`` read them."""
    # What an expert makes of a token may be computed once for all slots.
    behind = set().union(*each_expert_loop.computed_by(values))
    regions = []
    for value in values:
        axes = token_axes(shape_of(value) or ())
        if axes is None:
            return Miss("rows of fixed size for each token", value.name, value)
        sizes, tokens, place = axes
        sizes |= {SLOT: 1, SORTED_ROW: size_of(tokens, sizes)}
        walk = Walk(root, sizes, tokens, known_pieces(), {}, ending={*ends, *behind})
        output = walk.value(value, place)
        region = walk.region(output) if isinstance(output, Value) else output
        if isinstance(region, Miss):
            return region
        regions.append(region)
    return merge_slots(regions, root, in_order=op_name(root) == "aten::stack")


def stacked(walk: Walk, node: Node, place: Place) -> Value | Miss | None:
    """``stack`` of every expert's results, or every slot's, written into the body as those of one. None for others."""
    given = arguments(node) if op_name(node) == "aten::stack" else {}
    if not given or set(walk.tokens) - axes_of(place) or max(features(place), default=1) == 1:
        return None  # numbers are routing weights
    axis, values = place[given["dim"] % len(place)], given["tensors"]
    if axis == (EXPERT,):
        # Nothing comes of an expert that has zeros, such as one that has no rows: it is none of the layer's.
        numbered = [(number, value) for number, value in enumerate(values) if not is_zero(value)]
        merged = each_expert_on(node, numbered, every=len(numbered) == len(values))
        if len(numbered) < len(values):
            walk.bindings["rows_skipped"] = node
    elif axis == (SLOT,):
        merged = _each_slot(node, values, {node})
        if isinstance(merged, Region) and walk.bindings.setdefault("ids", merged.ids) is not merged.ids:
            return walk.miss("the layer's own ids", merged.ids)
    else:
        return None
    if isinstance(merged, Miss):
        return walk.note(merged)
    # By a mask of other ids, a result that is read may be one of a row that its expert was not given.
    masked_by = merged.bindings.get("ids") if axis == (EXPERT,) else None
    if masked_by is not None and walk.bindings.setdefault("ids", masked_by) is not masked_by:
        return walk.miss("the layer's own ids", masked_by)
    made = walk.inlined(merged, node, place, tables=merged.tables)
    if walk.dense and masked_by is not None and isinstance(made, Value):
        walk.zeros.append(made.node)  # as was found of each expert by itself
    return made


def each_expert_on(
    root: Node, numbered: Sequence[tuple[int, Node]], shared: Collection[Node] = (), every: bool = True
) -> Region | Miss:
    """The steps that compute one expert's result each, for every token, as one layer.

    ``shared`` are nodes that may read what is inside: the caller looks after them. Not ``every``: there are others.
    """
    numbers = [number for number, _ in numbered]
    if not numbers or (every and sorted(numbers) != list(range(len(numbers)))):
        return Miss(f"every expert of {len(numbers)} once", f"experts {', '.join(map(str, numbers))}", root)
    by_slot = _steps(root, numbered, shared, each_expert_loop.PIECES)
    if not isinstance(by_slot, Miss):
        return by_slot
    by_table = _steps(root, numbered, shared, each_expert_loop.BY_TABLE)
    return by_slot if isinstance(by_table, Miss) else by_table


def _steps(
    root: Node, numbered: Sequence[tuple[int, Node]], shared: Collection[Node], pieces: tuple[Piece, ...]
) -> Region | Miss:
    regions = []
    own = each_expert_loop.specific([value for _, value in numbered])
    for (number, value), nodes in sorted(zip(numbered, own, strict=True), key=lambda each: each[0][0]):
        axes = token_axes(shape_of(value) or ())
        if axes is None:
            return Miss("rows of fixed size for each token", value.name, value)
        sizes, tokens, place = axes
        bindings = {"expert": number}
        walk = Walk(root, sizes, tokens, pieces, bindings, each_expert_loop.OWN, root.users, nodes)
        output = walk.value(value, place)
        if isinstance(output, Miss):
            return output if walk.deepest is None else walk.deepest
        summed, mine = tensor_of(root), tensor_of(value)
        if summed is not None and mine is not None and summed.dtype != mine.dtype:
            # The sum is of a wider dtype than its terms.
            widened = walk.body.write(aten.to.dtype, output.node, summed.dtype)
            output = Value(widened, output.kind, output.shape)
        walk.ending = {*_between(root, value), *shared}
        region = walk.region(output)
        if isinstance(region, Miss):
            return region
        regions.append(region)
    merged = merge_steps(regions)
    if isinstance(merged, Miss):
        return merged
    interior = set().union(*(region.interior for region in regions))
    # Experts of one stack may be fewer than the stack holds: whether these are all, is asked when all else is known.
    return dataclasses.replace(
        merged, root=root, interior=interior, visits=[tuple(sorted(number for number, _ in numbered))]
    )


def _between(root: Node, value: Node) -> set[Node]:
    """The additions by which a root reads a term."""
    return {root, *(user for user in value.users if op_name(user) == "aten::add")}
