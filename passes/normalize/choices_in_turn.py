"""A table of routing weights added up choice by choice, as fairseq and DeepSpeed write the two best:

table = g1[:, None] * one_hot(best) + g2[:, None] * one_hot(second)
=>
table = (one_hot(stack([best, second], -1)) * stack([g1, g2], -1)[..., None]).sum(-2)

So is a mask, `one_hot(best) + one_hot(second)`, of ones.

A mask `one_hot(best) * kept`, of choices that are kept, has the weights `g1 * kept[t, best[t]]`: a choice that is not
kept counts zero.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import Match, match, op_name
from moe_fx.pattern import ANY, WHOLE, As, Last, Pattern, Var, aten, either, optional
from moe_fx.rewrite import Emitter, FakeValues, after, erase_dead, replace
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["spell_choices_in_turn"]

_aten = torch.ops.aten


def cast(pattern: Pattern) -> Pattern:
    return optional(lambda value: aten.to(value, ANY), pattern)


numbers = either(aten.arange(ANY, dtype=WHOLE), aten.arange(0, ANY, dtype=WHOLE))
hot = either(aten.one_hot(Var("ids"), ANY), As("compared", aten.eq(aten.unsqueeze(Var("ids"), Last(-1)), numbers)))
HOT = cast(cast(hot))


@dataclass(frozen=True)
class Term:
    """What one choice adds to the table: ``weights [..., 1]`` (None: one) times ``mask [..., E]``, one-hot rows of
    ``ids`` times whole numbers ``kept``. ``compared``: an id that is no class is no error. ``nodes``: all calls on the
    way."""

    ids: Node
    weights: Node | None
    mask: Node
    compared: bool
    kept: tuple[Node, ...]
    nodes: frozenset[Node]


def spell_choices_in_turn(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such sum; ``written`` is memory that ops in place still write."""
    stacks: dict[tuple[Node, ...], Node] = {}
    for node in list(graph.nodes):
        if op_name(node) != "aten::add" or any(op_name(user) == "aten::add" and _terms(user) for user in node.users):
            continue
        found = _terms(node)
        read = {node}.union(*(term.nodes for term in found or ()))
        if found is not None and len(found) > 1 and not any(memory_of(each) in written for each in read):
            _rewrite(node, found, stacks)
            erase_dead(graph, [node])


def _terms(node: object) -> list[Term] | None:
    """The choices that a table is the sum of, in order; None for any other value."""
    if not isinstance(node, Node) or len(node.args) != 2 or node.kwargs:
        return None
    if op_name(node) == "aten::add":
        before, after = _terms(node.args[0]), _terms(node.args[1])
        return before + after if before is not None and after is not None else None
    found = _term(node) if op_name(node) == "aten::mul" else _counted(node)
    return [found] if found is not None else None


def _counted(mask: Node) -> Term | None:
    """One-hot rows of whole numbers, each of which counts one."""
    rows, value = match(HOT, mask), tensor_of(mask)
    if not isinstance(rows, Match) or value is None or value.is_floating_point() or value.dtype is torch.bool:
        return None
    return Term(rows["ids"], None, mask, "compared" in rows.bindings, (), frozenset({mask, rows["ids"], *rows.nodes}))


def _term(node: Node) -> Term | None:
    for weights, mask in (node.args, node.args[::-1]):
        known = _mask(mask) if isinstance(weights, Node) and isinstance(mask, Node) else None
        if known is None:
            continue
        rows, kept, nodes = known
        ids, each, table = (tensor_of(value) for value in (rows["ids"], weights, mask))
        if ids is None or each is None or table is None or ids.is_floating_point():
            continue
        # Of whole numbers, or truth values, the product has the dtype of the weights.
        same = not table.is_floating_point() or each.dtype == table.dtype
        if same and each.is_floating_point() and same_shape((*ids.shape, 1), each.shape):
            around = frozenset({node, weights, rows["ids"], *nodes})
            return Term(rows["ids"], weights, mask, "compared" in rows.bindings, kept, around)
    return None


def _mask(mask: Node) -> tuple[Match, tuple[Node, ...], set[Node]] | None:
    """The one-hot rows of a mask, what they are multiplied by, and all calls on the way."""
    found = match(HOT, mask)
    if isinstance(found, Match):
        return found, (), {*found.nodes}
    shape, value = shape_of(mask) or (), tensor_of(mask)
    if op_name(mask) != "aten::mul" or len(mask.args) != 2 or value is None or value.is_floating_point():
        return None  # anything but a whole number may turn zero into no number
    for rows, kept in (mask.args, mask.args[::-1]):
        inner = _mask(rows) if isinstance(rows, Node) and isinstance(kept, Node) else None
        sizes = shape_of(kept) or ()
        wide = len(sizes) == len(shape) and any(same_shape(sizes, each) for each in (shape, (*shape[:-1], 1)))
        if inner is not None and wide and same_shape(shape_of(rows) or (), shape):
            return inner[0], (*inner[1], kept), {*inner[2], mask, kept}
    return None


def _rewrite(node: Node, terms: list[Term], stacks: dict[tuple[Node, ...], Node]) -> None:
    experts = (shape_of(node) or ())[-1]
    first, table = terms[0], tensor_of(node)
    alike = all(
        same_shape(shape_of(one) or (), shape_of(other) or ()) and tensor_of(one).dtype == tensor_of(other).dtype
        for term in terms
        for one, other in ((term.ids, first.ids), (term.weights, first.weights), (term.mask, first.mask))
        if one is not None and other is not None
    )
    if len({term.weights is None for term in terms}) > 1:
        return
    # One column is that of every expert where it is added to a table.
    whole = table is not None and same_shape(shape_of(first.mask) or (), shape_of(node) or ())
    if not isinstance(experts, int) or not alike or not whole:
        return
    emit = Emitter(node.graph, node, FakeValues(node.meta["val"].fake_mode))
    parts = tuple(term.ids for term in terms)
    if parts not in stacks:  # a mask and a table of the same choices have the same ids
        early = Emitter(node.graph, after(max(parts)), FakeValues(node.meta["val"].fake_mode))
        stacks[parts] = early(_aten.stack.default, [*parts], -1)
    ids = stacks[parts]
    if any(term.compared for term in terms):
        classes = emit(_aten.arange.default, experts, device=table.device)
        hot_rows = emit(_aten.eq.Tensor, emit(_aten.unsqueeze.default, ids, -1), classes)
    else:
        hot_rows = emit(_aten.one_hot.default, ids, experts)
    mask = emit(_aten.to.dtype, hot_rows, table.dtype)
    weights = [_weights(emit, term.weights, term, experts) for term in terms if term.weights is not None]
    if weights:
        wide = emit(_aten.unsqueeze.default, emit(_aten.stack.default, weights, -1), -1)
        mask = emit(_aten.mul.Tensor, mask, wide)
    else:
        for user in list(node.users):
            if op_name(user) == "aten::to" and tensor_of(user).dtype is torch.bool:
                replace(user, Emitter(node.graph, user, emit.values)(_aten.any.dim, hot_rows, -2))
                erase_dead(node.graph, [user])
    if node.users:
        replace(node, emit(_aten.sum.dim_IntList, mask, [-2]))


def _weights(emit: Emitter, weights: Node, term: Term, experts: int) -> Node:
    """The weight of a choice, times what its mask holds for it."""
    weights = _narrow(emit, weights)
    if not term.kept:
        return weights
    # Of an id that is no class there is no place to look at, and what is weighted is zero.
    ids = emit(_aten.clamp.default, term.ids, 0, experts - 1) if term.compared else term.ids
    held: Node | None = None
    for kept in term.kept:
        if known_equal((shape_of(kept) or ())[-1], experts):
            kept = emit(_aten.gather.default, kept, -1, emit(_aten.unsqueeze.default, ids, -1))
        kept = emit(_aten.squeeze.dim, kept, -1)
        held = kept if held is None else emit(_aten.mul.Tensor, held, kept)
    return emit(_aten.mul.Tensor, weights, held)


def _narrow(emit: Emitter, weights: Node) -> Node:
    """Without the dimension in which one weight stands beside the experts."""
    wide = match(aten.unsqueeze(Var("narrow"), Last(-1)), weights)
    return wide["narrow"] if isinstance(wide, Match) else emit(_aten.squeeze.dim, weights, -1)
