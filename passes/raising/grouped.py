"""Disguise: rows are sorted by expert and multiplied group by group.

perm = ids.reshape(-1).argsort()                     # row i is slot perm[i]
offs = histc(ids, E).cumsum(0)                       # where each expert's rows end
y = grouped_mm(x[perm // K], weight.transpose(-2, -1), offs)
out = (body(y) * s.reshape(-1)[perm])[inverse of perm].view(T, K, H).sum(1)
"""

from __future__ import annotations

from typing import Any

import torch
from moe_fx.passes.raising.pieces import (
    SORTED,
    TOKEN_MAJOR,
    Dispatch,
    ExpertLinear,
    ExpertRow,
    Mask,
    Piece,
    Slot,
    View,
    arange,
    widened_arange,
)  # fmt: skip

from moe_fx.pattern import ANY, WHOLE, As, Last, OneOfValues, Pattern, Var, aten, call, either, item, optional

only_dim = OneOfValues(0, -1)


def transposed(value: Pattern) -> Pattern:
    return either(aten.transpose(value, Last(-2), Last(-1)), aten.transpose(value, Last(-1), Last(-2)))


def in_a_row(ids: Pattern) -> Pattern:
    """``ids [T, K]``, or turned around, as one row."""
    row = aten.reshape(ids, ANY)
    return either(row, aten.to(row, OneOfValues(torch.int32, torch.int64)))


#: one expert per token needs no second dimension
by_token = either(in_a_row(Var("ids", rank=(2, 3))), Var("ids", rank=1))
#: the first slot of every token, then the second, ... (`slot_major.py`)
_turned = transposed(Var("ids", rank=2))
by_slot = in_a_row(either(_turned, aten.clone(_turned), aten.contiguous(_turned)))
flat_ids = either(by_slot, by_token)


def sort(values: Any) -> Pattern:
    return either(aten.sort(values, dim=only_dim), aten.sort(values, stable=ANY, dim=only_dim))


def argsort(values: Any) -> Pattern:
    return either(
        item(sort(values), 1),
        aten.argsort(values, dim=only_dim),
        aten.argsort(values, stable=ANY, dim=only_dim),
    )


def places_of(ids: Pattern) -> Pattern:
    return As("perm", argsort(ids))


perm = places_of(by_token)
sorted_ids = either(
    item(sort(flat_ids), 0), *(aten.index(flat, [places_of(flat)]) for flat in (by_slot, by_token))
)  # fmt: skip


def inverse_of(perm: Pattern) -> Pattern:
    return either(argsort(perm), aten.index_put(ANY, [perm], arange()), aten.scatter(ANY, 0, perm, arange()))


inverse = inverse_of(perm)

# histc counts in the dtype it is given: one that holds every expert number exactly.
exact = OneOfValues(torch.float32, torch.float64, torch.int32, torch.int64)
exact_or_mask = OneOfValues(*exact.values, torch.bool)
num_experts, last_expert, top_k = Var("num_experts"), Var("last_expert"), Var("top_k")
any_ids = either(sorted_ids, flat_ids)
all_ids = either(any_ids, Var("ids", rank=2))
counted = either(
    optional(lambda ids: aten.to(ids, exact), all_ids), aten.reshape(aten.to(Var("ids", rank=2), exact), ANY)
)
numbers = either(aten.arange(num_experts, dtype=WHOLE), aten.arange(0, num_experts, dtype=WHOLE))
one_hot = either(aten.one_hot(any_ids, num_experts), aten.eq(aten.unsqueeze(any_ids, Last(1)), numbers))
of_slots = Var("ids", rank=2)
one_hot_slots = either(aten.one_hot(of_slots, num_experts), aten.eq(aten.unsqueeze(of_slots, Last(2)), numbers))
one_hot_slots = optional(lambda hot: aten.to(hot, exact), one_hot_slots)


def chosen(dtype: Any) -> Pattern:
    """A mask by token and expert, of the experts that a token's ids name."""
    none = either(
        *(aten.full(ANY, no, dtype=dtype) for no in (0, False)), aten.zeros(ANY, dtype=dtype),
        aten.new_zeros(ANY, ANY, dtype=dtype), aten.new_zeros(optional(lambda ids: aten.to(ids, exact), of_slots), ANY),
        aten.zeros_like(ANY, dtype=dtype), aten.to(aten.zeros_like(ANY, dtype=ANY), dtype),
        *(aten.full_like(ANY, no, dtype=dtype) for no in (0, False)),
        *(aten.to(aten.full_like(ANY, no, dtype=ANY), dtype) for no in (0, False)),
    )  # fmt: skip
    return either(*(aten.scatter(none, Last(-1), of_slots, yes) for yes in (1, True)))


def mapped(dtype: Any) -> Pattern:
    """The same, in a dtype (or as a mask), or as what one-hot rows come to over the slots."""
    summed_up = (aten.to(aten.sum(one_hot_slots, [dim]), dtype) for dim in (1, -2))
    any_slot = (aten.any(one_hot_slots, dim) for dim in (1, -2))
    return either(chosen(dtype), aten.to(chosen(ANY), dtype), *summed_up, *any_slot)


zero_each = either(
    aten.zeros(ANY, dtype=exact), aten.full(ANY, 0, dtype=exact), aten.new_zeros(ANY, ANY, dtype=exact),
    aten.zeros_like(ANY, dtype=exact), aten.full_like(ANY, 0, dtype=exact),
)  # fmt: skip
one_each = either(
    aten.ones(ANY, dtype=ANY), aten.full(ANY, 1, dtype=ANY), aten.new_ones(ANY, ANY, dtype=ANY),
    aten.ones_like(ANY, dtype=ANY), aten.full_like(ANY, 1, dtype=ANY),
)  # fmt: skip
counts = either(
    aten.scatter_add(zero_each, 0, any_ids, one_each),
    aten.index_add(zero_each, 0, any_ids, one_each),
    aten.index_put(zero_each, [any_ids], one_each, True),
    # Bins one wide, up to E: an id E would be counted with the last expert.
    As("counts_beyond", aten.histc(counted, num_experts, 0, num_experts)),
    As("counts_beyond", aten.bincount(any_ids, None, num_experts)),
    aten.histc(counted, num_experts, 0, last_expert),
    aten.sum(optional(lambda hot: aten.to(hot, exact), one_hot), [0]),
    aten.sum(one_hot_slots, [0, 1]),
    # An expert that a token's ids name twice is there once.
    As("counted_once", aten.sum(mapped(exact_or_mask), [0])),
    *(aten.sum(aten.sum(one_hot_slots, dim), [0]) for dim in ([0], [1], [-2])),
)
counts = optional(lambda many: aten.to(many, OneOfValues(torch.int32, torch.int64)), counts)
#: which ids are no larger than each number: as many as rows up to where its expert's end
up_to_each = either(
    aten.le(aten.unsqueeze(any_ids, Last(1)), numbers),
    *(aten.ge(each, aten.unsqueeze(any_ids, Last(1))) for each in (numbers, aten.unsqueeze(numbers, 0))),
    aten.le(aten.unsqueeze(any_ids, Last(1)), aten.unsqueeze(numbers, 0)),
)
offsets = either(
    aten.to(aten.sum(up_to_each, [0]), torch.int32),
    aten.sum(up_to_each, [0], dtype=torch.int32),
    aten.cumsum(counts, only_dim, dtype=torch.int32),
    aten.to(aten.cumsum(counts, only_dim), torch.int32),
    aten.searchsorted(sorted_ids, numbers, out_int32=True, right=True),
    aten.to(aten.searchsorted(sorted_ids, numbers, right=True), torch.int32),
)
token_of_row = either(
    aten.floor_divide(perm, top_k), aten.div(perm, top_k, rounding_mode=OneOfValues("floor", "trunc")),
    aten.index(aten.repeat_interleave(arange(), top_k, ANY), [perm]),
    aten.index(aten.repeat_interleave(arange(), top_k), [perm]), aten.index(widened_arange(), [perm]),
)  # fmt: skip


#: rows added to their tokens, to which the slots need not be brought back
summed, base = Var("summed", rank=2), Var("base", rank=2)


def added_to(token_of_row: Pattern) -> Pattern:
    return either(
        aten.index_add(base, 0, token_of_row, summed),
        aten.index_put(base, [token_of_row], summed, True),
    )


rows, weight = Var("rows", rank=2), Var("weight", rank=3)


def grouped_mm(matrices: Pattern) -> Pattern:
    names = ("aten::_grouped_mm", "transformers::grouped_mm_fallback", "moe_fx::grouped_mm")
    return call(*names, args=(rows, matrices, offsets))


#: the number of each row's expert, or what that expert has, once for each of its rows
owner = either(
    sorted_ids,
    aten.repeat_interleave(numbers, counts, output_size=ANY),
    aten.repeat_interleave(numbers, counts, 0, output_size=ANY),
    aten.repeat_interleave(counts, output_size=ANY),
    # The first expert whose rows end behind this one.
    aten.searchsorted(aten.cumsum(counts, only_dim), arange(), right=True),
)

no_expert, below = aten.ge(sorted_ids, num_experts), aten.lt(sorted_ids, num_experts)
some_expert = either(below, aten.logical_and(below, aten.ge(sorted_ids, 0)))


def clamped(ids: Pattern) -> Pattern:
    return aten.clamp(ids, OneOfValues(None, 0), last_expert)


def put_back(perm: Pattern) -> Pattern:
    """Rows brought back to the slots."""
    any_rows = Var("rows", rank=(2, 3, 4))
    return either(
        aten.index(any_rows, [inverse_of(perm)]),
        # Every row is written once: what stood there before is gone.
        aten.index_put(ANY, [perm], any_rows),
        aten.index_copy(ANY, 0, perm, any_rows),
    )


PIECES: tuple[Piece, ...] = (
    View(TOKEN_MAJOR, put_back(perm), to=SORTED),
    Dispatch(SORTED, aten.index(Var("tokens"), [token_of_row])),
    Slot(SORTED, aten.index(aten.reshape(Var("slot", rank=(2, 3)), ANY), [perm])),
    Slot(SORTED, aten.index(aten.unsqueeze(aten.reshape(Var("slot", rank=2), ANY), Last(1)), [perm])),
    Slot(SORTED, aten.index(Var("slot", rank=1), [perm])),  # one for each token
    View(SORTED, aten.index(rows, [perm]), to=TOKEN_MAJOR),
    ExpertLinear(SORTED, grouped_mm(transposed(weight)), "sort_grouped_mm"),
    ExpertLinear(SORTED, grouped_mm(weight), "sort_grouped_mm", transposed=True),
    ExpertRow(SORTED, aten.index(Var("param"), [clamped(sorted_ids)])),
    ExpertRow(SORTED, aten.index(Var("param"), [owner]), by_id=True),
    ExpertRow(SORTED, aten.repeat_interleave(Var("param", rank=(2, 3)), counts, 0, output_size=ANY), by_id=True),
    Mask(SORTED, aten.masked_fill(rows, aten.unsqueeze(no_expert, Last(-1)), 0)),
    Mask(SORTED, aten.where(aten.unsqueeze(some_expert, Last(-1)), rows, aten.scalar_tensor(0, dtype=ANY))),
)
