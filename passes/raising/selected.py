"""Disguise: every expert in turn on every token, of which a token takes the results of the one that it was routed to.

y = torch.zeros_like(x)
for e in range(E):
    y = torch.where((ids == e)[:, None], body(x, weight[e]), y)

A token's id is one, so that at most one step takes its row. For slots in turn, such a chain is one slot's.
"""

from __future__ import annotations

import dataclasses

from moe_fx.passes.raising.added_terms import each_expert_on
from moe_fx.passes.raising.axes import Place, aligned
from moe_fx.passes.raising.walk import Walk
from moe_fx.passes.raising.where_chains import is_where_chain, starts_with_zeros, where_chain
from moe_fx.passes.raising.writer import Value
from torch.fx import Node

from moe_fx.matcher import Miss
from moe_fx.shapes import shape_of

__all__ = ["ids_selected", "selected"]


def ids_selected(node: Node) -> Node | None:
    """The ids by which rows are selected, if a value is the last of such a chain."""
    return where_chain(node)[0][0].ids if is_where_chain(node) else None


def selected(walk: Walk, node: Node, place: Place) -> Value | Miss | None:
    """What all experts computed, as the results of one expert in the body. None for any other op."""
    if not walk.single or not is_where_chain(node):
        return None
    steps, base = where_chain(node)
    for step in steps:
        whole = aligned(place, shape_of(step.mask) or (), walk.sizes)
        ids = walk.ids_of(*_compared(step.mask, whole, walk)) if whole is not None else None
        if ids is None or walk.bindings.setdefault("ids", ids) is not ids:
            return walk.miss("rows selected by the layer's own ids", step.ids)
    numbered = [(step.expert, step.value) for step in steps]
    missing = set(range(len(steps) + 1)) - {step.expert for step in steps}
    if len(missing) == 1 and not starts_with_zeros(base):
        numbered.append((min(missing), base))  # what no other expert takes is this one's
    # What no step takes stays as it was: nothing, if that is zero.
    walk.bindings["rows_skipped" if starts_with_zeros(base) else "counts_beyond"] = node
    chain = {step.step for step in steps}
    ends = {*walk.ending, *chain, walk.root}
    merged = each_expert_on(node, numbered, shared=ends)
    if isinstance(merged, Miss) and missing == {len(steps)} and len(numbered) > len(steps):
        merged = each_expert_on(node, numbered[:-1], shared=ends)  # the experts are all there: this is none of theirs
    if isinstance(merged, Miss):
        return walk.note(dataclasses.replace(merged, bindings=dict(walk.bindings)))
    merged = dataclasses.replace(merged, interior=merged.interior | chain, form="selected_rows")
    return walk.inlined(merged, node, place)


def _compared(mask: Node, place: Place, walk: Walk) -> tuple[Node, Place]:
    """The ids that a mask compares, and how they stand."""
    choice, own = walk.unviewed(mask, place)
    ids = choice.args[0]
    assert isinstance(ids, Node)
    return ids, own
