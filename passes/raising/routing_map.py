"""Disguise: rows are sorted by expert as the places of a routing map are listed expert by expert (Megatron).

map = zeros(T, E, dtype=bool).scatter(1, ids, True)
expert, token = map.t().nonzero(as_tuple=True)       # the tokens of an expert in their order, then those of the next
y = grouped_mm(x[token], weight, map.sum(0).cumsum(0)) * table[token, expert]
out = zeros.index_add(0, token, y)                   # from there to here as in `grouped.py`
"""

from __future__ import annotations

import torch
from moe_fx.passes.raising import grouped
from moe_fx.passes.raising.pieces import SORTED, Column, Dispatch, ExpertRow, Piece

from moe_fx.pattern import As, Last, Pattern, Var, aten, either, item, optional

__all__ = ["MAP_PLACES", "PIECES", "token_of_row"]

# A token that names an expert twice has one place there.
routing_map = As("listed_once", grouped.mapped(torch.bool))
turned = optional(aten.clone, grouped.transposed(routing_map))
listed = aten.where(turned)
MAP_PLACES = either(listed, aten.nonzero(turned))


def place(dim: int) -> Pattern:
    return either(item(listed, dim), aten.select(aten.nonzero(turned), 1, dim))


expert_of_row, token_of_row = place(0), place(1)
table = Var("table", rank=2)


def column(values: Pattern, *places: Pattern) -> Piece:
    return Column(SORTED, aten.index(optional(lambda by: aten.unsqueeze(by, Last(2)), values), [*places]))


PIECES: tuple[Piece, ...] = (
    Dispatch(SORTED, aten.index(Var("tokens", rank=2), [token_of_row])),
    column(table, token_of_row, expert_of_row),
    column(grouped.transposed(table), expert_of_row, token_of_row),
    ExpertRow(SORTED, aten.index(Var("param"), [expert_of_row]), by_id=True),
)
