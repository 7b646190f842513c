"""A table of routing weights added up choice by choice, as fairseq and DeepSpeed write the two best:

table = g1[:, None] * one_hot(best) + g2[:, None] * one_hot(second)
=>
table = (one_hot(stack([best, second], -1)) * stack([g1, g2], -1)[..., None]).sum(-2)
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import Match, match, op_name
from moe_fx.pattern import ANY, As, Last, Pattern, Var, aten, either, optional
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["spell_choices_in_turn"]

_aten = torch.ops.aten


def cast(pattern: Pattern) -> Pattern:
    return optional(lambda value: aten.to(value, ANY), pattern)


numbers = either(aten.arange(ANY, dtype=ANY), aten.arange(0, ANY, dtype=ANY))
hot = either(aten.one_hot(Var("ids"), ANY), As("compared", aten.eq(aten.unsqueeze(Var("ids"), Last(-1)), numbers)))
#: what one choice adds to the table
TERM = aten.mul(Var("weights"), As("mask", cast(cast(hot))))


def spell_choices_in_turn(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such sum; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        if op_name(node) != "aten::add" or any(op_name(user) == "aten::add" and _terms(user) for user in node.users):
            continue
        found = _terms(node)
        given = {term[name] for term in found or () for name in ("ids", "weights")}
        read = given.union(_added(node), *(term.nodes for term in found or ()))
        if found is not None and len(found) > 1 and not any(memory_of(each) in written for each in read):
            _rewrite(node, found)
            erase_dead(graph, [node])


def _terms(node: object) -> list[Match] | None:
    """The choices that a table is the sum of, in order; None for any other value."""
    if not isinstance(node, Node):
        return None
    if op_name(node) == "aten::add" and len(node.args) == 2 and not node.kwargs:
        before, after = _terms(node.args[0]), _terms(node.args[1])
        return before + after if before is not None and after is not None else None
    found = match(TERM, node)
    if not isinstance(found, Match):
        return None
    ids, weights, mask = (tensor_of(found[name]) for name in ("ids", "weights", "mask"))
    if ids is None or weights is None or mask is None or ids.is_floating_point():
        return None
    if mask.is_floating_point() and weights.dtype != mask.dtype:
        return None  # of whole numbers, or truth values, the product has the dtype of the weights
    return [found] if same_shape((*ids.shape, 1), weights.shape) and weights.is_floating_point() else None


def _added(node: Node) -> set[Node]:
    """A sum of terms, its parts and the terms."""
    if op_name(node) != "aten::add":
        return {node}
    return {node}.union(*(_added(each) for each in node.all_input_nodes))


def _rewrite(node: Node, terms: list[Match]) -> None:
    experts = (shape_of(node) or ())[-1]
    first, table = terms[0], tensor_of(node)
    if (
        table is None
        or not isinstance(experts, int)
        or any(
            not same_shape(shape_of(term[name]) or (), shape_of(first[name]) or ())
            or tensor_of(term[name]).dtype != tensor_of(first[name]).dtype
            for term in terms
            for name in ("ids", "weights", "mask")
        )
        # One column is that of every expert where it is added to a table.
        or not same_shape(shape_of(first["mask"]) or (), shape_of(node) or ())
    ):
        return
    emit = Emitter(node.graph, node, FakeValues(node.meta["val"].fake_mode))
    ids = emit(_aten.stack.default, [term["ids"] for term in terms], -1)
    weights = emit(_aten.stack.default, [_narrow(emit, term["weights"]) for term in terms], -1)
    if any("compared" in term.bindings for term in terms):  # an id that is no class is no error there
        classes = emit(_aten.arange.default, experts, device=table.device)
        hot_rows = emit(_aten.eq.Tensor, emit(_aten.unsqueeze.default, ids, -1), classes)
    else:
        hot_rows = emit(_aten.one_hot.default, ids, experts)
    mask = emit(_aten.to.dtype, hot_rows, table.dtype)
    each = emit(_aten.mul.Tensor, mask, emit(_aten.unsqueeze.default, weights, -1))
    replace(node, emit(_aten.sum.dim_IntList, each, [-2]))


def _narrow(emit: Emitter, weights: Node) -> Node:
    """Without the dimension in which one weight stands beside the experts."""
    wide = match(aten.unsqueeze(Var("narrow"), Last(-1)), weights)
    return wide["narrow"] if isinstance(wide, Match) else emit(_aten.squeeze.dim, weights, -1)
