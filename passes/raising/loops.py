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

from moe_fx.passes.raising.pieces import HITS, Dispatch, ExpertLinear, ExpertRow, Piece, Slot

from moe_fx.pattern import ANY, As, AtLeast, Last, OneOfValues, Pattern, Var, aten, call, either, item, optional

# One class more than there are experts stands for tokens that are masked out.
one_hot = aten.one_hot(Var("ids", rank=2), Var("num_classes"))
inner_dims = OneOfValues([-1, -2], [-2, -1], [1, 2], [2, 1])
#: an expert of an unrolled loop: its number
literal = As("expert", AtLeast(0))

#: how a loop adds up, and the pieces of its body
Loop = tuple[Pattern, tuple[Piece, ...]]

rows, weight, bias = Var("rows", rank=2), Var("weight", rank=3), Var("bias", rank=2)


def swapped(matrix: Pattern) -> Pattern:
    return either(aten.transpose(matrix, Last(-2), Last(-1)), aten.transpose(matrix, Last(-1), Last(-2)))


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

    def mine(param: Pattern) -> Pattern:
        return aten.select(param, 0, expert)

    def linear(matrix: Pattern) -> Pattern:
        return either(aten.linear(rows, matrix), aten.linear(rows, matrix, mine(bias)))

    def product(matrix: Pattern) -> Pattern:
        return call("aten::matmul", "aten::mm", args=(rows, matrix))

    tokens = Var("tokens", rank=2)
    slot_value, base, summed = Var("slot", rank=2), Var("base"), Var("summed", rank=2)
    step = either(aten.index_add(base, 0, token, summed), aten.index_put(base, [token], summed, True))
    return step, (
        Dispatch(HITS, aten.index(tokens, [token])),
        Dispatch(HITS, aten.reshape(aten.index(aten.unsqueeze(tokens, 0), [None, token]), ANY)),
        Slot(HITS, aten.index(optional(lambda s: aten.unsqueeze(s, Last(2)), slot_value), [token, slot])),
        ExpertLinear(HITS, linear(mine(weight)), "expert_loop"),
        ExpertLinear(HITS, linear(swapped(mine(weight))), "expert_loop", transposed=True),
        ExpertLinear(HITS, product(mine(weight)), "expert_loop", transposed=True),
        ExpertLinear(HITS, product(swapped(mine(weight))), "expert_loop"),
        ExpertRow(HITS, mine(Var("param", rank=2))),
    )


LOOPS = (
    masked(aten.transpose(one_hot, 0, 2), token_place=1),  # [E, K, T]
    masked(aten.permute(one_hot, [2, 0, 1]), token_place=0),  # [E, T, K]
    loop(literal, aten.where(aten.eq(Var("ids", rank=2), literal)), token_place=0),
)
