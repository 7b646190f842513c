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
)  # fmt: skip

from moe_fx.pattern import ANY, As, Last, OneOfValues, Pattern, Var, aten, call, either, item, optional

flat_ids = aten.reshape(Var("ids", rank=2), ANY)
only_dim = OneOfValues(0, -1)


def sort(values: Any) -> Pattern:
    return either(aten.sort(values, dim=only_dim), aten.sort(values, stable=ANY, dim=only_dim))


def argsort(values: Any) -> Pattern:
    return either(
        item(sort(values), 1),
        aten.argsort(values, dim=only_dim),
        aten.argsort(values, stable=ANY, dim=only_dim),
    )


perm = As("perm", argsort(flat_ids))
sorted_ids = either(item(sort(flat_ids), 0), aten.index(flat_ids, [perm]))
inverse = either(argsort(perm), aten.index_put(ANY, [perm], arange()), aten.scatter(ANY, 0, perm, arange()))

# histc counts in the dtype it is given: one that holds every expert number exactly.
exact = OneOfValues(torch.float32, torch.float64, torch.int32, torch.int64)
num_experts, last_expert, top_k = Var("num_experts"), Var("last_expert"), Var("top_k")
counts = aten.histc(
    optional(lambda ids: aten.to(ids, exact), either(sorted_ids, flat_ids)), num_experts, 0, last_expert
)
offsets = either(
    aten.cumsum(counts, only_dim, dtype=torch.int32),
    aten.to(aten.cumsum(counts, only_dim), torch.int32),
    aten.searchsorted(sorted_ids, aten.arange(num_experts, dtype=ANY), out_int32=True, right=True),
)

rows, weight = Var("rows", rank=2), Var("weight", rank=3)
transposed = either(aten.transpose(weight, Last(-2), Last(-1)), aten.transpose(weight, Last(-1), Last(-2)))


def grouped_mm(matrices: Pattern) -> Pattern:
    names = ("aten::_grouped_mm", "transformers::grouped_mm_fallback", "moe_fx::grouped_mm")
    return call(*names, args=(rows, matrices, offsets))


no_expert, some_expert = aten.ge(sorted_ids, num_experts), aten.lt(sorted_ids, num_experts)


def clamped(ids: Pattern) -> Pattern:
    return aten.clamp(ids, OneOfValues(None, 0), last_expert)


PIECES: tuple[Piece, ...] = (
    View(TOKEN_MAJOR, aten.index(rows, [inverse]), to=SORTED),
    Dispatch(SORTED, aten.index(Var("tokens"), [aten.floor_divide(perm, top_k)])),
    Slot(SORTED, aten.index(aten.reshape(Var("slot", rank=2), ANY), [perm])),
    ExpertLinear(SORTED, grouped_mm(transposed), "sort_grouped_mm"),
    ExpertLinear(SORTED, grouped_mm(weight), "sort_grouped_mm", transposed=True),
    ExpertRow(
        SORTED,
        aten.index(Var("param"), [optional(clamped, sorted_ids)]),
    ),
    Mask(SORTED, aten.masked_fill(rows, aten.unsqueeze(no_expert, Last(-1)), 0)),
    Mask(SORTED, aten.where(aten.unsqueeze(some_expert, Last(-1)), rows, aten.scalar_tensor(0, dtype=ANY))),
)
