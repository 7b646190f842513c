"""Whether some slot of a token names an expert, in one spelling.

nonzero(mask.sum(1))                  =>     nonzero(mask.any(1))
nonzero(one_hot(ids, E)[..., e] > 0)  =>     nonzero(one_hot(ids, E)[..., e])
mask[:, 0] | mask[:, 1]               =>     mask.any(1)
(ids[:, 0] == e) | (ids[:, 1] == e)   =>     (ids == e).any(1)
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.constants import moved
from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace, respell
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["spell_some_slot"]

_aten = torch.ops.aten

ORS = frozenset({"aten::__or__", "aten::bitwise_or", "aten::logical_or"})


def spell_some_slot(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such mask; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        if op_name(node) == "aten::nonzero" or (op_name(node) == "aten::where" and len(node.args) == 1):
            total: Any = node.args[0]
            if (hot := _hot(total)) is not None and memory_of(hot) not in written:
                respell(node, node.target, (hot,), {})
                erase_dead(graph, [total])
                continue
            mask = _summed(total)
            if mask is not None and not any(memory_of(each) in written for each in (total, mask)):
                given = arguments(total)
                emit = Emitter(graph, node, FakeValues(tensor_of(mask).fake_mode))
                respell(node, node.target, (emit(_aten.any.dim, mask, given["dim"][0], given["keepdim"]),), {})
                erase_dead(graph, [total])
        elif op_name(node) in ORS and not any(op_name(user) in ORS for user in node.users):
            terms = _terms(node)
            if any(memory_of(each) in written for term in terms for each in (term, *term.all_input_nodes)):
                continue
            if (whole := _columns_of_one(terms)) is not None:
                source, number = whole
                emit = Emitter(graph, node, FakeValues(tensor_of(node).fake_mode))
                mask = source if number is None else emit(_aten.eq.Scalar, source, number)
                replace(node, emit(_aten.any.dim, mask, -1))
                erase_dead(graph, [node])


def _hot(positive: Node) -> Node | None:
    """The one-hot rows, or their part, of which it is asked where they are above zero."""
    if op_name(positive) not in ("aten::gt", "aten::ne") or positive.args[1] != 0:
        return None
    hot: Any = positive.args[0]
    source: Any = moved(hot)
    while op_name(source) == "aten::select":
        source = moved(source.args[0])
    while op_name(source) == "aten::to" and tensor_of(source).dtype is not torch.bool:
        source = source.args[0]
    while op_name(hot) == "aten::to" and tensor_of(hot).dtype is not torch.bool:
        hot = hot.args[0]
    noughts_and_ones = op_name(source) == "aten::one_hot" or tensor_of(source).dtype is torch.bool
    return hot if noughts_and_ones else None


def _summed(total: Node) -> Node | None:
    """The mask that is added up along one dimension."""
    given = arguments(total) if op_name(total) == "aten::sum" else {}
    dims, mask = given.get("dim"), given.get("self")
    while op_name(mask) == "aten::to" and not tensor_of(mask).dtype.is_floating_point:
        mask = mask.args[0]
    whole = isinstance(dims, list | tuple) and len(dims) == 1 and isinstance(mask, Node)
    return mask if whole and tensor_of(mask).dtype is torch.bool else None


def _terms(node: Node) -> list[Node]:
    """What is true where any of several masks is."""
    if op_name(node) not in ORS:
        return [node]
    return [term for side in node.args[:2] if isinstance(side, Node) for term in _terms(side)]


def _columns_of_one(terms: list[Node]) -> tuple[Node, int | None] | None:
    """Of which tensor masks are the columns, all of them in their order, and the number that they are compared with."""
    numbers = {term.args[1] if op_name(term) == "aten::eq" else None for term in terms}
    columns: list[Any] = [term.args[0] if op_name(term) == "aten::eq" else term for term in terms]
    if len(numbers) != 1 or not all(op_name(column) == "aten::select" for column in columns):
        return None
    (number,) = numbers
    given = [arguments(column) for column in columns]
    source, rank = given[0]["self"], len(shape_of(given[0]["self"]) or ())
    same = all(each["self"] is source and each["dim"] in (-1, rank - 1) for each in given)
    integer = type(number) is int and not tensor_of(source).dtype.is_floating_point
    if not same or not (integer or (number is None and tensor_of(source).dtype is torch.bool)):
        return None
    every = [*range((shape_of(source) or ("",))[-1])] if isinstance((shape_of(source) or ("",))[-1], int) else None
    return (source, number) if [each["index"] for each in given] == every else None  # type: ignore[return-value]
