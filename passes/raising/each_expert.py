"""Disguise: every expert in turn on every token, weighted with zero where it was not chosen.

for e in range(E):
    out = out + table[:, e, None] * body(x, weight[e])      # table [T, E], or (weights * (ids == e)).sum(-1)

ys = torch.stack([body(x, weight[e]) for e in range(E)], 1)
out = ys.gather(1, ids[..., None].expand(T, K, H)) ...      # or a sum over E, weighted by a table

What only one expert's result is computed by is its step; what several share comes from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe_fx.passes.raising.loops import (
    all_places,
    any_slots_of,
    by_slot,
    by_token,
    expert_of,
    literal,
    one_slot_of,
    places,
    slots_of,
    sums,
    token_of,
    zero,
)
from moe_fx.passes.raising.pieces import FLAT_TOKENS, TOKENS, Column, Mask, Piece, Put, Slot
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.matcher import Match, match, op_name
from moe_fx.pattern import ANY, As, Last, Pattern, Var, aten, either
from moe_fx.shapes import known_equal, same_shape, shape_of

__all__ = ["BY_TABLE", "OWN", "PIECES", "computed_by", "expert_number", "specific", "terms"]


def cast(pattern: Pattern) -> Pattern:
    return either(aten.to(pattern, ANY), pattern)


OWN: Pattern = aten.select(Var("param"), 0, literal)

table = Var("table")
column = aten.select(table, Last(-1), literal)
total = sums(any_slots_of)
kept_dim = sums(any_slots_of, keepdim=True)

#: of ids that have no dimension for slots, and of ids that keep one of size 1
one_each = As("one_each", expert_of(Var("ids", rank=(1, 2)), literal))
one_wide = As("one_wide", any_slots_of)
#: the weight of the one slot that is looked at, zero where it is another expert's
slot, wide_slot = Var("slot", rank=(1, 2)), Var("slot", rank=(2, 3))
of_one = either(aten.mul(slot, cast(one_each)), aten.where(one_each, slot, zero))
of_one_wide = either(aten.mul(wide_slot, cast(one_wide)), aten.where(one_wide, wide_slot, zero))

#: a column of a table of all experts, or the expert's results, where a token's ids name it
named = either(one_each, aten.any(any_slots_of, Last(-1)))
named_wide = either(aten.any(any_slots_of, Last(-1), True), aten.unsqueeze(cast(named), Last(-1)), one_wide)
not_named, rows = either(aten.bitwise_not(named), aten.logical_not(named)), Var("rows")
not_named_wide = either(aten.bitwise_not(named_wide), aten.logical_not(named_wide), aten.unsqueeze(not_named, Last(-1)))
wide_zero = either(zero, aten.zeros_like(ANY), aten.full_like(ANY, 0))
of_table = either(
    aten.mul(column, cast(named)), aten.where(named, column, wide_zero), aten.masked_fill(column, not_named, 0)
)
masked = either(
    aten.mul(rows, cast(named_wide)), aten.where(named_wide, rows, wide_zero), aten.masked_fill(rows, not_named_wide, 0)
)


def puts(token: Pattern) -> Pattern:
    """Rows at their tokens, and zero at all others."""
    put_into = Var("put_into", rank=2)
    return either(
        aten.index_put(put_into, [token], rows, ANY),
        aten.index_copy(put_into, 0, token, rows),
        aten.index_add(put_into, 0, token, rows),
    )


#: an expert's own rows, as in a loop that adds them; a token is among them once, its ids being distinct
OF_HITS = (*by_token(literal, token_of, any_slots_of), *by_slot(literal, slots_of, token_dim=0))
PIECES: tuple[Piece, ...] = (
    *(Put(FLAT_TOKENS, puts(token)) for token in (token_of, *all_places(token_of), places(slots_of, 0))),
    *(piece for loop in OF_HITS for piece in loop.pieces),
    Slot(TOKENS, of_one),
    Slot(TOKENS, of_one_wide),
    Column(TOKENS, column),
    Column(TOKENS, aten.slice(table, Last(-1), literal, ANY)),
    Slot(TOKENS, total, summed=True),
    Slot(TOKENS, kept_dim, summed=True),
    Mask(TOKENS, masked),
)
#: the same, where what is masked is the column of an expert and not that of a slot
BY_TABLE: tuple[Piece, ...] = (Column(TOKENS, of_table, masked=True), *PIECES)
#: what tells one step from another: where an expert's number is read
NUMBERED = (column, aten.slice(table, Last(-1), literal, ANY), any_slots_of, one_slot_of)
#: how far back from a term its expert's number is looked for
NEAR = 80


Key = Any


def terms(
    root: Node, key_of: Callable[[Node], Key | None]
) -> tuple[list[tuple[Key, Node]], Node | None, set[Node]] | None:
    """A chain of additions as its terms, each with what tells it from others; what it starts from; the additions."""
    found: list[tuple[Key, Node]] = []
    chain: set[Node] = set()
    node: Node | None = root
    while node is not None and op_name(node) == "aten::add" and len(node.args) == 2:
        operands = [each for each in node.args if isinstance(each, Node)]
        keys = [key_of(each) for each in operands]
        known = [place for place, key in enumerate(keys) if key is not None]
        if not known or (len(operands) == 1 and node.args[1] != 0):
            break
        if any(not same_shape(shape_of(operands[place]) or (), shape_of(node) or ()) for place in known):
            break
        chain.add(node)
        if len(operands) == 1:
            found.insert(0, (keys[0], operands[0]))
            return found, None, chain
        starts = [op_name(each) == "aten::add" and _starts(each, key_of) for each in operands]
        if len(known) == 2 and any(starts):
            known = [1 - starts.index(True)]  # the other is the sum so far, of one term
        if len(known) == 2:
            found[:0] = [(key, operand) for key, operand in zip(keys, operands, strict=True)]
            return found, None, chain
        found.insert(0, (keys[known[0]], operands[known[0]]))
        node = operands[1 - known[0]]
        if not same_shape(shape_of(node) or (), shape_of(root) or ()):
            return found, node, chain  # such as a bias, which is no sum of these
    if node is None:
        return None
    return found, None if filled_with(node) == 0 else node, chain


def _starts(node: Node, key_of: Callable[[Node], Key | None]) -> bool:
    """Whether an addition is the first of a chain: to zero, or to what is no expert's."""
    if any(each == 0 if not isinstance(each, Node) else filled_with(each) == 0 for each in node.args[:2]):
        return True
    keys = [key_of(each) for each in node.args[:2] if isinstance(each, Node)]
    return len(keys) == 2 and keys.count(None) == 1


def expert_number(term: Node) -> tuple[int, Node | None] | None:
    """The expert whose number a term is computed with, and the ids of the one slot that it looks at, if it does.

    None if there is no number, or several.
    """
    seen: set[Node] = set()
    pending: list[Node] = [term]
    numbers: set[tuple[int, Node | None]] = set()
    while pending and len(seen) < NEAR:
        node = pending.pop(0)
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        for pattern in NUMBERED:
            found = match(pattern, node)
            if isinstance(found, Match) and isinstance(found["expert"], int) and _is_number(node, term):
                one = pattern is one_slot_of or (pattern is any_slots_of and _is_of_one_slot(found["ids"]))
                numbers.add((found["expert"], found["ids"] if one else None))
                break
        else:
            pending.extend(node.all_input_nodes)
    # What is the column of a table where an expert is looked up is that of a slot where one slot is.
    numbers = {key for key in numbers if key[1] is not None} or numbers
    return numbers.pop() if len(numbers) == 1 else None


def _is_of_one_slot(ids: Node) -> bool:
    """Whether ids by batch and sequence are a column of those of all slots."""
    return isinstance(match(aten.select(Var("whole", rank=3), Last(-1), ANY), ids), Match)


def _is_number(node: Node, term: Node) -> bool:
    """Whether a part of a value is a number for each token: a single column, and not one of hidden units."""
    if op_name(node) == "aten::select" and len(shape_of(node) or ()) >= len(shape_of(term) or ()):
        return False
    return op_name(node) != "aten::slice" or known_equal((shape_of(node) or (0,))[-1], 1)


def specific(values: Sequence[Node]) -> list[set[Node]]:
    """For each of several values, the nodes that only it is computed by."""
    behind = computed_by(values)
    counts: dict[Node, int] = {}
    for nodes in behind:
        for node in nodes:
            counts[node] = counts.get(node, 0) + 1
    return [{node for node in nodes if counts[node] == 1} for nodes in behind]


def computed_by(values: Sequence[Node]) -> list[set[Node]]:
    """The calls by which each of several values is computed."""
    return [_behind(value) for value in values]


def _behind(value: Node) -> set[Node]:
    seen: set[Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node not in seen and node.op == "call_function":
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return seen
