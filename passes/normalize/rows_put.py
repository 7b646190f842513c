"""Rows put into zeros and then added are added to their rows.

part = index_put(zeros, [mask], y)
out = out + part * w                       =>     out = index_put(out, [mask], y * w[mask], accumulate)

sum(stack([part, other]), 0)               =>     out = index_put(zeros, [mask], y, accumulate)
                                                  out = index_put(out, [other_mask], z, accumulate)

Of places, the same may stand there twice, and one of the rows is kept: `out[at] = out[at] + y` says so. Zero times a
weight is zero: a weight that is not finite is none.

Only where rows are read by the same mask, as an expert's are: elsewhere nothing is gained.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.normalize.masks import in_one
from moe_fx.passes.normalize.spelling import spell
from torch.fx import Graph, Node

from moe_fx.constants import is_zero
from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import Last, Var, aten, either, item
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import Dim, depends_on_values, known_equal, same_shape, shape_of, tensor_of

__all__ = ["mask_of", "spell_rows_put"]

_aten = torch.ops.aten

mask = Var("mask", rank=1)
listed = aten.nonzero(mask)
#: where a mask is true: each place once
PLACES = either(
    item(aten.where(mask), 0), aten.select(listed, 1, 0), aten.squeeze(listed, Last(1)), aten.reshape(listed, [-1])
)
PUTS = ("aten::index_put", "aten::index_copy", "aten::index_add")


@dataclass(frozen=True)
class Rows:
    """A value that is zero but for the rows ``at``: these are ``values`` after the ``steps``.

    Attributes:
        zeros: what the rows were put into. at: a mask of rows, or their numbers.
        adds: of rows put to one place the sum is there, not one of them.
        wide: the shape of the value, if its rows stand in more than one dimension; they are numbered through.
        steps: calls that keep zeros, and their other operand: a number, a dtype, or a factor with a row for each.
        nodes: the calls that the value was computed by.
    """

    zeros: Node
    at: Node
    values: Node
    adds: bool
    wide: Any = None
    steps: tuple[tuple[Node, Any], ...] = ()
    nodes: tuple[Node, ...] = ()

    def added_to(self, emit: Emitter, base: Node | None, dtype: torch.dtype) -> Node:
        """``base``, or nothing, with the rows added to it."""
        if base is None:
            cast = tensor_of(self.zeros).dtype != dtype
            rows = emit(_aten.to.dtype, self.zeros, dtype) if cast else self.zeros
        else:
            rows = base if self.wide is None else self._flat(emit, base)
        out = self._added(emit, rows)
        return out if self.wide is None else emit(_aten.reshape.default, out, self.wide)

    def _flat(self, emit: Emitter, base: Node) -> Any:
        shape = shape_of(base.args[0]) or () if op_name(base) == "aten::reshape" else ()
        flat = len(shape) == 2 and known_equal(shape[-1], tensor_of(base).shape[-1])
        return base.args[0] if flat else emit(_aten.reshape.default, base, [-1, tensor_of(base).shape[-1]])

    def _added(self, emit: Emitter, base: Node) -> Node:
        values: Any = self.values
        for step, other in self.steps:
            factor = self._factor(emit, other) if isinstance(other, Node) else other
            values = emit(step.target, values, factor)
        if tensor_of(values).dtype != tensor_of(base).dtype:
            values = emit(_aten.to.dtype, values, tensor_of(base).dtype)
        if self.adds or mask_of(self.at) is not None:
            return emit(_aten.index_put.default, base, [self.at], values, True)
        before = emit(_aten.index.Tensor, base, [self.at])
        return emit(_aten.index_put.default, base, [self.at], emit(_aten.add.Tensor, before, values))

    def _factor(self, emit: Emitter, factor: Node) -> Node:
        """The rows of a factor at the places that rows were put."""
        if self.wide is not None and op_name(factor) == "aten::unsqueeze" and known_equal(shape_of(factor)[-1], 1):
            factor = emit(_aten.unsqueeze.default, in_one(factor.args[0], emit), -1)
        elif self.wide is not None:
            factor = emit(_aten.reshape.default, factor, [-1, tensor_of(factor).shape[-1]])
        with emit.graph.inserting_before(emit.before):
            read = emit.graph.call_function(_aten.index.Tensor, (factor, [self.at]))
        # As many as were put: evaluated, a mask would make up a number of its own.
        with emit.values.fake_mode:
            value = tensor_of(factor)
            read.meta["val"] = value.new_empty((tensor_of(self.values).shape[0], *value.shape[1:]))
        return read


def spell_rows_put(graph: Graph, written: Collection[Node]) -> bool:
    """Rewrite every such sum, and tell whether there was one; ``written`` is memory that ops in place still write."""
    made = set[Node]()
    for node in list(graph.nodes):
        found = _sum(node, made) if op_name(node) in ("aten::add", "aten::sum") else None
        if found is None:
            continue
        base, terms = found
        read = [each for term in terms for each in (*term.nodes, term.zeros, term.values, term.at)]
        read += [other for term in terms for _, other in term.steps if isinstance(other, Node)]
        if any(memory_of(each) in written for each in (node, base or node, *read)):
            continue
        emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
        sums = [base]
        for term in terms:
            sums.append(term.added_to(emit, sums[-1], tensor_of(node).dtype))
        made.add(sums[-1])
        replace(node, sums[-1])
        erase_dead(graph, [node, *filter(None, sums)])
    if made:
        spell(graph)  # a single token's rows, in another shape, have spellings of their own
    return bool(made)


def mask_of(at: Any) -> Node | None:
    """The mask of one dimension that rows are chosen by, or where it is true."""
    value = tensor_of(at)
    if value is not None and value.dtype is torch.bool:
        return at if value.dim() == 1 else None
    found = match(PLACES, at)
    told = tensor_of(found["mask"]) if isinstance(found, Match) else None
    return found["mask"] if told is not None and told.dtype is torch.bool else None


def _sum(node: Node, made: Collection[Node]) -> tuple[Node | None, list[Rows]] | None:
    """What rows are added to, None for nothing, and the rows in order; None for any other sum.

    Sums that were ``made`` are added to.
    """
    if op_name(node) == "aten::sum":
        return _sum_of_all(node)
    if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, Node) for arg in node.args):
        return None
    found = [None if arg in made else _rows(arg) for arg in node.args]
    terms = [term for term in found if term is not None]
    base: Any = next((arg for arg, term in zip(node.args, found, strict=True) if term is None), None)
    whole = all(same_shape(shape_of(arg) or (), shape_of(node) or ()) for arg in node.args)
    cast = base is not None and tensor_of(base).dtype != tensor_of(node).dtype
    return (base, terms) if terms and whole and not cast else None


def _sum_of_all(node: Node) -> tuple[Node | None, list[Rows]] | None:
    given, rank = arguments(node), len(shape_of(node) or ()) + 1
    stack, dims = given["self"], given.get("dim")
    if op_name(stack) != "aten::stack" or given.get("keepdim") or given.get("dtype") is not None:
        return None
    if not isinstance(dims, list | tuple) or len(dims) != 1 or dims[0] % rank != arguments(stack)["dim"] % rank:
        return None
    found = [_rows(each) for each in arguments(stack)["tensors"]]
    terms = [term for term in found if term is not None]
    return (None, terms) if len(terms) == len(found) else None


def _rows(value: Any) -> Rows | None:
    """A value as rows put into zeros; None for any other."""
    if op_name(value) in PUTS:
        return _put(value)
    if op_name(value) == "aten::reshape":
        rows = _put(value.args[0]) if op_name(value.args[0]) in PUTS else None
        return _widened(value, rows) if rows is not None else None
    if op_name(value) != "aten::mul" and (op_name(value) != "aten::to" or value.target is not _aten.to.dtype):
        return None
    for operand, other in (value.args[:2], value.args[1::-1]):
        rows = _rows(operand) if isinstance(operand, Node) else None
        # A sum is not rounded, or weighted, as its terms are.
        if rows is not None and _has_rows(value, operand, other) and (not rows.adds or mask_of(rows.at) is not None):
            return replace_fields(rows, steps=(*rows.steps, (value, other)), nodes=(*rows.nodes, value))
    return None


def _has_rows(node: Node, operand: Node, other: Any) -> bool:
    """Whether an operand is a number, or has a row for each of the other operand's."""
    if not isinstance(other, Node):
        return True
    shape, factor = shape_of(node) or (), shape_of(other) or ()
    whole = same_shape(shape_of(operand) or (), shape) and len(factor) == len(shape)
    return whole and same_shape(factor[:-1], shape[:-1])


def _widened(node: Node, rows: Rows) -> Rows | None:
    """Rows that are taken apart into several dimensions."""
    shape, flat = shape_of(node) or (), shape_of(node.args[0]) or ()
    if len(flat) != 2 or len(shape) < 3 or not known_equal(shape[-1], flat[-1]):
        return None
    return replace_fields(rows, wide=node.args[1], nodes=(*rows.nodes, node))


def _put(node: Node) -> Rows | None:
    given, shape = arguments(node), shape_of(node) or ()
    if op_name(node) == "aten::index_put":
        (at, *more), values, adds = given["indices"], given["values"], given["accumulate"]
    else:
        at, more, values, adds = given["index"], [], given["source"], op_name(node) == "aten::index_add"
    zeros, rows = given["self"], shape_of(values) or ()
    fits = len(rows) == len(shape) and same_shape(rows[1:], shape[1:]) and given.get("dim", 0) == 0
    if more or not fits or given.get("alpha", 1) != 1 or not _is_one_each(at, rows[0]) or not is_zero(zeros):
        return None
    reads = any(op_name(user) == "aten::index" and user.args[1] == [at] for user in at.users)
    return Rows(zeros, at, values, adds, nodes=(node,)) if reads else None


def _is_one_each(places: Any, rows: Dim) -> bool:
    """Whether as many places are chosen, of one dimension, as there are rows: a single row may stand for all."""
    value = tensor_of(places)
    if value is None or value.dim() != 1:
        return False
    if value.dtype is torch.bool:
        return depends_on_values(rows)
    return value.dtype in (torch.int64, torch.int32) and known_equal(value.shape[0], rows)
