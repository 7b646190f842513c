"""Disguise: a loop over the experts, each of which takes the rows routed to it and adds its results to the output.

mask = one_hot(ids, E).permute(2, 1, 0)              # [E, K, T]
for e in (mask.sum((-1, -2)) > 0).nonzero():         # as moe_fx.export traces it: a few steps, for symbolic experts
    slot, token = torch.where(mask[e])
    out.index_add_(0, token, body(x[token], weight[e]) * s[token, slot, None])

for e in range(E):                                   # as torch.export traces it: every step, for the experts 0, 1, ...
    token, slot = torch.where(ids == e)
    out.index_add_(0, token, body(x[token], weight[e]) * s[token, slot, None])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from moe_fx.passes.raising.pieces import HITS, Column, Dispatch, Piece, Slot, arange, widened_arange

from moe_fx.pattern import ANY, WHOLE, As, AtLeast, Last, OneOfValues, Pattern, Var, aten, call, either, item, optional


def compared(ids: Pattern) -> Pattern:
    """Each id beside each number: one-hot, in which an id that is no such number is no error."""
    count = Var("num_compared")
    numbers = either(aten.arange(count, dtype=WHOLE), aten.arange(0, count, dtype=WHOLE))
    return aten.eq(aten.unsqueeze(ids, Last(-1)), numbers)


def one_hot_of(ids: Pattern) -> Pattern:
    """True, or 1, where an id names an expert: the experts are the last dimension."""
    # One class more than there are experts stands for tokens that are masked out.
    classes = aten.one_hot(ids, Var("num_classes"))
    return either(optional(lambda mask: aten.to(mask, ANY), compared(ids)), classes)


one_hot = one_hot_of(Var("ids", rank=2))
inner_dims = OneOfValues([-1, -2], [-2, -1], [1, 2], [2, 1])
#: an expert of an unrolled loop: its number
literal = As("expert", AtLeast(0))
zero = either(aten.scalar_tensor(0, dtype=ANY), 0, aten.zeros_like(ANY), aten.full_like(ANY, 0))
slot_value, base, summed = Var("slot", rank=(2, 3)), Var("base"), Var("summed", rank=2)
#: routing weights by token and expert, which say themselves what tokens an expert has
routed = Var("routed", rank=2)
#: a number for each token: a column of what has one for each slot
one_wide = either(Var("slot", rank=1), As("slot", aten.slice(ANY, Last(-1), AtLeast(0), ANY)))


def expert_of(ids: Var, expert: Pattern) -> Pattern:
    """True where an id names the expert."""
    hot = either(aten.to(aten.one_hot(ids, Var("num_classes")), torch.bool), compared(ids))
    by_expert = aten.permute(hot, [2, 0, 1]) if ids.rank == 2 else aten.transpose(hot, 0, 1)
    return either(aten.eq(ids, expert), aten.select(hot, Last(-1), expert), aten.select(by_expert, 0, expert))


@dataclass(frozen=True)
class Loop:
    """How a loop adds up, the pieces of its body, and how it reads a parameter of its own expert.

    ``once``: a row is added once for each token and expert, even if the token was routed there twice.
    """

    step: Pattern
    pieces: tuple[Piece, ...]
    own: Pattern
    once: bool


def adds(token: Pattern) -> Pattern:
    """The rows of ``token`` are added to."""
    return either(
        aten.index_add(base, 0, token, summed),
        aten.index_put(base, [token], summed, True),
    )


def adds_and_assigns(token: Pattern) -> Pattern:
    """``out[token] += rows``: of a token that occurs twice, one row is kept."""
    return aten.index_put(base, [token], aten.add(aten.index(base, [token]), summed))


def places(mask: Pattern, dim: int) -> Pattern:
    """Where a mask is true, along one of its dimensions."""
    return either(item(aten.where(mask), dim), aten.select(aten.nonzero(mask), 1, dim))


def by_slot(expert: Pattern, mask: Pattern, token_dim: int) -> tuple[Loop, ...]:
    """Loops over the slots of an expert; ``mask`` is true at ``[token, slot]``, or the other way round."""
    token, slot = places(mask, token_dim), places(mask, 1 - token_dim)
    weight = aten.index(optional(lambda s: aten.unsqueeze(s, Last(2)), slot_value), [token, slot])
    # By a mask [K, T], weights [T, K] would be chosen in another order than the rows.
    chosen = chosen_weights(expert, mask) if token_dim == 0 else ()
    pieces = (Slot(HITS, weight), *columns(expert, token, mask), *chosen, *dispatch(token))
    own = aten.select(Var("param"), 0, expert)
    return Loop(adds(token), pieces, own, once=False), Loop(adds_and_assigns(token), pieces, own, once=True)


def by_token(expert: Pattern, mask: Pattern, slots: Pattern | None) -> tuple[Loop, ...]:
    """Loops over the tokens of an expert; ``mask`` is true at ``[token]``, and ``slots`` at ``[token, slot]``."""
    found = []
    for token in (mask, *all_places(mask)):
        by_row: tuple[Piece, ...] = ()
        if slots is not None:
            by_row = (
                *sums_of_rows(expert, token, slots),
                *chosen_weights(expert, slots),
                *found_slot(expert, token, slots),
            )
        # A column of a table of all experts, or of the weights of all slots: the steps together tell which it is.
        for weights in (columns(expert, token, slots), (of_token(token, one_wide),)):
            pieces = (*weights, *by_row, *dispatch(token))
            for step in (adds(token), adds_and_assigns(token)):
                found.append(Loop(step, pieces, aten.select(Var("param"), 0, expert), once=True))
    return tuple(found)


def by_flat_slot(expert: Pattern) -> tuple[Loop, ...]:
    """Loops over the slots of an expert, numbered through: slot ``i`` is one of token ``i // top_k``."""
    found = []
    top_k = Var("top_k")
    numbers = either(*(aten.repeat_interleave(arange(), top_k, *dim) for dim in ((), (ANY,))), widened_arange())
    mask = aten.eq(aten.reshape(Var("ids", rank=2), ANY), expert)
    for slot in (mask, *all_places(mask)):
        token: Pattern = aten.index(numbers, [slot])
        token = token if slot is mask else either(aten.floor_divide(slot, top_k), token)
        weight = aten.reshape(slot_value, ANY)
        pieces = (
            Slot(HITS, aten.index(optional(lambda s: aten.unsqueeze(s, Last(1)), weight), [slot])),
            Slot(HITS, aten.unsqueeze(aten.index(weight, [slot]), Last(1))),
            Dispatch(HITS, aten.index(aten.repeat_interleave(Var("tokens", rank=2), top_k, 0), [slot])),
            *dispatch(token),
        )
        found.append(Loop(adds(token), pieces, aten.select(Var("param"), 0, expert), once=False))
    return tuple(found)


def by_table(expert: Pattern) -> tuple[Loop, ...]:
    """Loops over the tokens for which a table of routing weights holds something."""
    found = []
    column = aten.select(routed, Last(-1), expert)
    tests: list[Pattern] = [
        aten.ne(column, 0),
        aten.to(column, torch.bool),
        As("positive", aten.gt(column, 0)),
        aten.select(
            either(aten.ne(routed, 0), aten.to(routed, torch.bool), As("positive", aten.gt(routed, 0))),
            Last(-1),
            expert,
        ),
    ]
    for token in (either(*tests, As("flag", column)), *all_places(either(*tests, column))):
        pieces = (*columns(expert, token, None), *dispatch(token))
        for step in (adds(token), adds_and_assigns(token)):
            found.append(Loop(step, pieces, aten.select(Var("param"), 0, expert), once=True))
    return tuple(found)


def all_places(mask: Pattern) -> tuple[Pattern, Pattern]:
    """Where a mask over rows is true."""
    listed = aten.nonzero(mask)
    return places(mask, 0), either(aten.squeeze(listed, Last(1)), aten.reshape(listed, ANY))


def of_token(token: Pattern, slot: Pattern, summed: bool = False) -> Slot:
    """A number for each token, at the tokens of an expert."""
    return Slot(HITS, aten.index(optional(lambda s: aten.unsqueeze(s, Last(1)), slot), [token]), summed)


def dispatch(token: Pattern) -> tuple[Piece, ...]:
    tokens = Var("tokens", rank=2)
    return (
        Dispatch(HITS, aten.index(tokens, [token])),
        Dispatch(HITS, aten.reshape(aten.index(aten.unsqueeze(tokens, 0), [None, token]), ANY)),
    )


def columns(expert: Pattern, token: Pattern, slots: Pattern | None) -> tuple[Piece, ...]:
    """The routing weight as what an expert's column of a table holds for a token, or what its slots add up to."""
    whole = Var("table", rank=2)
    table, apart = aten.select(whole, Last(1), expert), aten.unsqueeze(whole, Last(2))
    pieces: list[Piece] = [
        Column(HITS, aten.index(table, [token])),
        Column(HITS, aten.index(aten.unsqueeze(table, Last(1)), [token])),
        Column(HITS, aten.index(aten.slice(whole, Last(1), expert, ANY), [token])),
        Column(HITS, aten.index(aten.select(apart, 1, expert), [token])),
        Column(HITS, aten.select(aten.index(whole, [token]), Last(1), expert)),
    ]
    if slots is not None:
        narrow, wide = sums(slots), sums(slots, keepdim=True)
        for slot in (narrow, wide, aten.reshape(narrow, [-1]), aten.reshape(wide, [-1, 1])):
            pieces.append(of_token(token, slot, summed=True))
    return tuple(pieces)


def sums(slots: Pattern, keepdim: bool = False, weights: Pattern | None = None) -> Pattern:
    """A token's routing weights where ``slots`` is true, added up."""
    cast: Any = optional(lambda mask: aten.to(mask, ANY), slots)
    weights = slot_value if weights is None else weights
    others = either(aten.bitwise_not(slots), aten.logical_not(slots))
    kept = either(aten.mul(weights, cast), aten.where(slots, weights, zero), aten.masked_fill(weights, others, 0))
    return aten.sum(kept, [Last(-1)], keepdim)


def sums_of_rows(expert: Pattern, token: Pattern, slots: Pattern) -> tuple[Piece, ...]:
    """The same at the tokens of an expert: of the ids, or the mask of all slots, and routing weights in their rows."""
    mine, pieces = mine_of(expert, token, slots), list[Piece]()
    for whole in (slot_value, aten.reshape(slot_value, [-1, Var("top_k")])):
        weights = aten.index(whole, [token])
        narrow = sums(mine, weights=weights)
        for slot in (sums(mine, True, weights), narrow, aten.unsqueeze(narrow, Last(1))):
            pieces.append(Slot(HITS, slot, summed=True))
    return tuple(pieces)


def mine_of(expert: Pattern, token: Pattern, slots: Pattern) -> Pattern:
    """Which slots of an expert's tokens name it."""
    slots = optional(lambda mask: aten.reshape(mask, [-1, Var("top_k")]), slots)
    return either(aten.index(slots, [token]), aten.eq(aten.index(Var("ids", rank=2), [token]), expert))


def found_slot(expert: Pattern, token: Pattern, slots: Pattern) -> tuple[Piece, ...]:
    """The routing weight of the slot in which a token's ids name the expert: the only one, if they are distinct."""
    mine = mine_of(expert, token, slots)
    # Every row of these tokens has such a slot, and the largest of noughts and ones is there.
    mine = optional(lambda mask: aten.to(mask, ANY), mine)
    number = either(aten.argmax(mine, Last(-1)), aten.argmax(mine, Last(-1), False))
    slot = either(aten.argmax(mine, Last(-1), True), aten.unsqueeze(number, Last(1)))
    narrow = aten.gather(aten.index(slot_value, [token]), Last(-1), slot)
    single = either(aten.squeeze(narrow, Last(1)), aten.reshape(narrow, [-1]), aten.index(slot_value, [token, number]))
    return Slot(HITS, narrow), Slot(HITS, single), Slot(HITS, aten.unsqueeze(single, Last(1)))


def chosen_weights(expert: Pattern, slots: Pattern) -> tuple[Piece, ...]:
    """The routing weights where ``slots [T, K]`` is true, in the order of its rows."""
    flat_mask = either(aten.reshape(slots, [-1]), aten.eq(aten.reshape(Var("ids", rank=(2, 3)), [-1]), expert))
    flat = aten.index(aten.reshape(slot_value, [-1]), [flat_mask])
    return Slot(HITS, flat), Slot(HITS, aten.unsqueeze(flat, Last(1)))


def masked(by_expert: Pattern, token_dim: int) -> tuple[Loop, ...]:
    """Loops whose mask is ``by_expert [E, ., .]``, in which a row's token is along ``token_dim``."""
    mask = As("mask", by_expert)
    # Every expert that any token was routed to: what the others would have added is nothing.
    hit_experts = call("aten::greater", "aten::gt", "aten::ne", args=(aten.sum(Var("mask"), inner_dims), 0))
    each = As("expert", call("moe_fx::each_expert", args=(hit_experts, ANY, Var("num_experts"))))
    expert = either(each, literal)
    return by_slot(expert, aten.select(mask, 0, expert), token_dim)


slots_of = expert_of(Var("ids", rank=2), literal)
one_slot_of = expert_of(Var("ids", rank=1), literal)
#: batch and sequence may stand apart in the ids
any_slots_of = expert_of(Var("ids", rank=(2, 3)), literal)
any_slot_of = aten.any(any_slots_of, Last(-1))
token_of = either(aten.reshape(any_slot_of, [-1]), any_slot_of, one_slot_of)

LOOPS = (
    *masked(aten.transpose(one_hot, 0, 2), token_dim=1),  # [E, K, T]
    *masked(aten.permute(one_hot, [2, 0, 1]), token_dim=0),  # [E, T, K]
    *by_slot(literal, slots_of, token_dim=0),
    *by_slot(literal, aten.transpose(slots_of, 0, 1), token_dim=1),
    *by_token(literal, token_of, any_slots_of),
    *by_flat_slot(literal),
    *by_table(literal),
)
