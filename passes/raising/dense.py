"""Disguise: every expert on every token; what a token was not routed to is weighted with zero.

rows = x.repeat(E, 1) * table.T.reshape(-1, 1)       # table [T, E]: zero but for the chosen experts
y = torch.bmm(rows.view(E, T, H), weight)            # weight [E, H, N]
out = body(y).sum(0)
"""

from __future__ import annotations

from moe_fx.passes.raising.pieces import (
    EXPERT_MAJOR,
    EXPERTS,
    Dispatch,
    ExpertLinear,
    ExpertRow,
    Piece,
    Table,
    View,
)  # fmt: skip

from moe_fx.pattern import ANY, Last, Pattern, Var, aten, either, optional

tokens, table, rows = Var("tokens", rank=2), Var("table", rank=2), Var("rows", rank=3)
weight, num_experts = Var("weight", rank=3), Var("num_experts")


def swapped(value: Pattern) -> Pattern:
    """The last two dimensions of a stack of matrices, or both of a table, exchanged."""
    return either(aten.transpose(value, Last(-2), Last(-1)), aten.transpose(value, Last(-1), Last(-2)))


def batched(matrices: Pattern) -> Pattern:
    return either(aten.bmm(rows, matrices), aten.matmul(rows, matrices))


by_expert = swapped(table)

PIECES: tuple[Piece, ...] = (
    View(EXPERTS, aten.reshape(Var("rows", rank=2), ANY), to=EXPERT_MAJOR),
    View(EXPERT_MAJOR, aten.reshape(rows, ANY), to=EXPERTS),
    Dispatch(EXPERT_MAJOR, aten.repeat(tokens, [num_experts, 1])),
    Dispatch(EXPERTS, aten.repeat(tokens, [num_experts, 1, 1])),
    Dispatch(EXPERTS, aten.repeat(aten.unsqueeze(tokens, Last(0)), [num_experts, 1, 1])),
    Dispatch(EXPERTS, aten.expand(aten.unsqueeze(tokens, 0), ANY)),
    Dispatch(EXPERTS, aten.expand(tokens, ANY)),
    Table(EXPERT_MAJOR, aten.reshape(optional(aten.clone, by_expert), ANY)),
    Table(EXPERTS, aten.unsqueeze(by_expert, Last(2))),
    Table(EXPERTS, aten.reshape(optional(aten.clone, by_expert), ANY)),
    ExpertLinear(EXPERTS, batched(swapped(weight)), "dense_bmm"),
    ExpertLinear(EXPERTS, batched(weight), "dense_bmm", transposed=True),
    ExpertRow(EXPERTS, either(aten.unsqueeze(Var("param", rank=2), 1), aten.unsqueeze(Var("param", rank=2), -2))),
)
