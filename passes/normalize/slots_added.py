"""Rows that stand in the order of the slots, added to their tokens, are summed over the slots.

token = arange(T).repeat_interleave(K)
out = zeros.index_add(0, token, rows)      =>      out = rows.view(T, K, H).sum(1)
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.constants import is_zero
from moe_fx.matcher import Match, match, op_name
from moe_fx.pattern import ANY, WHOLE, As, Last, OneOfValues, Pattern, Var, aten, either, optional
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import Dim, known_equal, shape_of, tensor_of

__all__ = ["spell_slots_added"]

_aten = torch.ops.aten

count, top_k = Var("count"), Var("top_k")


def numbers(size: Pattern) -> Pattern:
    return either(aten.arange(size, dtype=WHOLE), aten.arange(0, size, dtype=WHOLE))


#: the number of each slot's token: 0, 0, 1, 1, ...
column = either(aten.unsqueeze(numbers(count), Last(1)), aten.reshape(numbers(count), [-1, 1]))
spread = As("spread", either(aten.expand(column, ANY), aten.repeat(column, ANY)))
TOKEN = either(
    aten.repeat_interleave(numbers(count), top_k),
    aten.repeat_interleave(numbers(count), top_k, 0),
    aten.reshape(optional(aten.clone, spread), ANY),
    aten.floor_divide(numbers(ANY), top_k),
    aten.div(numbers(ANY), top_k, rounding_mode=OneOfValues("floor", "trunc")),
)
base, rows = Var("base", rank=2), Var("rows", rank=2)
ADDED = either(aten.index_add(base, 0, Var("token"), rows), aten.index_put(base, [Var("token")], rows, True))
ADDS = frozenset({"aten::index_add", "aten::index_put"})


def spell_slots_added(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such addition; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        found = match(ADDED, node) if op_name(node) in ADDS else None
        if not isinstance(found, Match) or any(memory_of(each) in written for each in (node, *node.all_input_nodes)):
            continue
        token = match(TOKEN, found["token"])
        shape, many = shape_of(found["base"]) or (), shape_of(found["rows"]) or ()
        slots = _per_token(token, shape[0], many[0]) if isinstance(token, Match) else None
        if (
            slots is None
            or not isinstance(shape[-1], int)
            or tensor_of(found["base"]).dtype != tensor_of(found["rows"]).dtype
        ):
            continue
        emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
        apart = emit(_aten.reshape.default, found["rows"], [-1, slots, shape[-1]])
        total = emit(_aten.sum.dim_IntList, apart, [1])
        replace(node, total if is_zero(found["base"]) else emit(_aten.add.Tensor, found["base"], total))
        erase_dead(graph, [node])


def _per_token(token: Match, tokens: Dim, rows: Dim) -> int | None:
    """How many slots each token has, if there is a row for each of them."""
    spread, slots = token.get("spread"), token.get("top_k")
    if spread is not None:
        each = shape_of(spread) or ()
        slots = each[-1]
        if len(each) != 2 or not known_equal(each[0], tokens):
            return None
    # Numbers up to that of the last row, divided, or up to that of the last token, repeated.
    whole = isinstance(slots, int) and slots > 0 and known_equal(rows, tokens * slots)
    return slots if whole else None
