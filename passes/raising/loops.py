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

from moe_fx.passes.raising.pieces import HITS, Dispatch, Piece, Slot

from moe_fx.pattern import ANY, As, AtLeast, Last, OneOfValues, Pattern, Var, aten, call, either, item, optional

# One class more than there are experts stands for tokens that are masked out.
one_hot = aten.one_hot(Var("ids", rank=2), Var("num_classes"))
inner_dims = OneOfValues([-1, -2], [-2, -1], [1, 2], [2, 1])
#: an expert of an unrolled loop: its number
literal = As("expert", AtLeast(0))


@dataclass(frozen=True)
class Loop:
    """How a loop adds up, the pieces of its body, and how it reads a parameter of its own expert."""

    step: Pattern
    pieces: tuple[Piece, ...]
    own: Pattern


def masked(by_expert: Pattern, token_place: int) -> Loop:
    """A loop whose mask is ``by_expert [E, ., .]``, and in which ``where`` gives a row's token at ``token_place``."""
    mask = As("mask", by_expert)
    # Every expert that any token was routed to: what the others would have added is nothing.
    hit_experts = call("aten::greater", "aten::gt", "aten::ne", args=(aten.sum(mask, inner_dims), 0))
    each = As("expert", call("moe_fx::each_expert", args=(hit_experts, ANY, Var("num_experts"))))
    expert = either(each, literal)
    return loop(expert, aten.where(aten.select(mask, 0, expert)), token_place)


def loop(expert: Pattern, hits: Pattern, token_place: int) -> Loop:
    """How a loop adds up, and the pieces of its body; ``hits`` are the places of an expert's rows."""
    token, slot = item(hits, token_place), item(hits, 1 - token_place)

    tokens = Var("tokens", rank=2)
    slot_value, base, summed = Var("slot", rank=2), Var("base"), Var("summed", rank=2)
    step = either(aten.index_add(base, 0, token, summed), aten.index_put(base, [token], summed, True))
    pieces = (
        Dispatch(HITS, aten.index(tokens, [token])),
        Dispatch(HITS, aten.reshape(aten.index(aten.unsqueeze(tokens, 0), [None, token]), ANY)),
        Slot(HITS, aten.index(optional(lambda s: aten.unsqueeze(s, Last(2)), slot_value), [token, slot])),
    )
    return Loop(step, pieces, own=aten.select(Var("param"), 0, expert))


LOOPS = (
    masked(aten.transpose(one_hot, 0, 2), token_place=1),  # [E, K, T]
    masked(aten.permute(one_hot, [2, 0, 1]), token_place=0),  # [E, T, K]
    loop(literal, aten.where(aten.eq(Var("ids", rank=2), literal)), token_place=0),
)
