"""Bins that are filled choice by choice, and read choice by choice (Tutel), are filled and read by all choices at once:

bins = zeros.index_add(0, place1, x).index_add(0, place2, x)
out = f(bins)[place1] * g1[:, None] + f(bins)[place2] * g2[:, None]
=>
places = stack([place1, place2])
bins = zeros.index_add(0, places.flatten(), x.repeat(2, 1))
out = (f(bins)[places] * stack([g1, g2])[..., None]).sum(0)

Places are counted choice by choice, as in `bins_in_turn.py`, which tells how they are stacked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from moe_fx.passes.normalize.alike import Call, within, write
from moe_fx.passes.normalize.bins_in_turn import Choices, terms_of
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.normalize.spelling import spell
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["spell_put_in_turn"]

_aten = torch.ops.aten


class _Places(Choices):
    """Also rows that are read at places, of one tensor."""

    def read(self, values: Sequence[Node]) -> Call | None:
        sources = {each.args[0] if op_name(each) == "aten::index" else None for each in values}
        if len(sources) > 1 or None in sources:
            return super().read(values)
        indices: Any = [each.args[1] for each in values]
        if any(len(each) != 1 for each in indices):
            return None
        places = self.of([each[0] for each in indices])
        return Call(_aten.index.Tensor, (*sources, [places])) if places is not None else None


def spell_put_in_turn(graph: Graph, written: Collection[Node]) -> bool:
    """Rewrite what fills such bins and what is read of them, and say if there are any."""
    choices, made = _Places(1), dict[Call, Node]()
    for node in list(graph.nodes):
        whole = _filled(node, choices)
        if whole is None and made:
            whole = _read(node, choices)
        calls, read = within(whole)
        counted = any(call.target is _aten.cumsum.default for call in calls)
        if whole is None or not counted or any(memory_of(each) in written for each in (node, *read)):
            continue
        emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
        replace(node, write(emit, whole, made))
        erase_dead(graph, [node])
    if made:
        spell(graph)  # a permutation that swaps two dimensions has a name of its own
    return bool(made)


def _filled(node: Node, choices: Choices) -> Call | None:
    """The last of several additions of the same rows to places of one tensor, as one."""
    if _added(node) is None or any(_added(user) is not None and user.args[0] is node for user in node.users):
        return None
    places, rows, base = list[Node](), set[Node](), node
    while (added := _added(base)) is not None and (base is node or len(base.users) == 1):
        places.insert(0, added[0])
        rows.add(added[1])
        base = base.args[0]  # type: ignore[assignment]
    if len(places) < 2 or len(rows) > 1 or any(len(shape_of(each) or ()) != 1 for each in places):
        return None
    (source,) = rows
    whole = choices.of(places) if len(shape_of(source) or ()) == 2 else None
    if whole is None:
        return None
    flat = Call(_aten.reshape.default, (whole, [-1]))
    return Call(_aten.index_add.default, (base, 0, flat, Call(_aten.repeat.default, (source, [len(places), 1]))))


def _read(node: Node, choices: Choices) -> Call | None:
    """A sum of rows of each choice, as one over the choices."""
    value = tensor_of(node)
    if op_name(node) != "aten::add" or value is None or value.dim() != 2 or not value.is_floating_point():
        return None
    terms = terms_of(node)
    whole = choices.of(terms) if len(terms) > 1 and all(isinstance(each, Node) for each in terms) else None
    return Call(_aten.sum.dim_IntList, (whole, [0])) if whole is not None else None


def _added(node: Node) -> tuple[Node, Node] | None:
    """The places, and the rows that are added there; None for any other op."""
    name = op_name(node)
    if name not in ("aten::index_add", "aten::index_put"):
        return None
    given = arguments(node)
    if name == "aten::index_put":
        indices = given["indices"]
        return (indices[0], given["values"]) if given["accumulate"] and len(indices) == 1 else None
    plain = given["dim"] == 0 and given.get("alpha", 1) == 1
    return (given["index"], given["source"]) if plain else None
