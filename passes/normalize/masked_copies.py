"""Rows read from copies that are masked, and written over them: each expert has a copy of all rows, which is zero where
a token is not its own.

copies = einsum("th,te->eth", x, mask)
copies[e][mask[:, e]]                          =>     x[mask[:, e]]
index_put(copies[e], [mask[:, e]], y)          =>     index_put(zeros_like(x), [mask[:, e]], y)

A row that is not finite is not zero times zero; as everywhere, that is no value a layer is made for.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.normalize.rows_put import mask_of
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead
from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["spell_masked_copies"]

aten = torch.ops.aten


#: what only moves dimensions, or has one more of size 1
VIEWS = ("aten::unsqueeze", "aten::permute", "aten::transpose")


class Operand(NamedTuple):
    """An operand of an elementwise product, and at which dimension of the product each of its own stands."""

    value: Node
    dims: tuple[int, ...]


def spell_masked_copies(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite what is read of such copies, or written over; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        given = arguments(node) if op_name(node) in ("aten::index", "aten::index_put") else None
        if given is None or len(given["indices"]) != 1 or given.get("accumulate"):
            continue
        found = _copied(given["self"], given["indices"][0])
        if found is None or any(memory_of(each) in written for each in found):
            continue
        rows, *_ = found
        if op_name(node) == "aten::index":
            node.update_arg(0, rows)
        else:
            emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
            node.update_arg(0, emit(aten.zeros_like.default, rows))
        erase_dead(graph, [given["self"]])


def _copied(copy: Node, at: Any) -> tuple[Node, ...] | None:
    """The rows that a copy is made of, if ``at`` are just those that its mask leaves, and all that is read."""
    place = mask_of(at)
    if op_name(copy) != "aten::select" or place is None or op_name(place) != "aten::select":
        return None
    given, chosen = arguments(copy), arguments(place)
    copies, shape = given["self"], shape_of(given["self"]) or ()
    product = copies.args[0] if op_name(copies) == "aten::clone" else copies  # some are read, others written over
    dim, expert = given["dim"] % len(shape), given["index"]
    operands = _operands(product)
    rows = next((each for each in operands if dim not in each.dims), None)
    mask = next((each for each in operands if dim in each.dims), None)
    if rows is None or mask is None or not isinstance(expert, int) or not isinstance(shape[dim], int):
        return None
    left = tuple(each for each in range(len(shape)) if each != dim)  # which the copy of one expert has
    by_expert = mask.dims.index(dim)
    truth = _truth(mask.value)
    same = truth is not None and truth is _truth(chosen["self"]) and chosen["dim"] % 2 == by_expert
    mine = isinstance(chosen["index"], int) and chosen["index"] % shape[dim] == expert % shape[dim]
    fits = rows.dims == left and len(mask.dims) == 2 and mask.dims[1 - by_expert] == left[0]
    one, other = tensor_of(rows.value), tensor_of(copy)
    alike = one.dtype == other.dtype and same_shape(one.shape, other.shape)
    return (rows.value, mask.value, product, copies, copy, at) if same and mine and fits and alike else None


def _truth(mask: Any) -> Node | None:
    """What a mask of noughts and ones says; None for other numbers."""
    while tensor_of(mask).dtype is not torch.bool:
        if op_name(mask) != "aten::to":
            return None
        mask = mask.args[0]
    return mask


def _operands(product: Any) -> tuple[Operand, ...]:
    """Of an elementwise product of two: what is multiplied, behind views; nothing for any other value."""
    if op_name(product) == "aten::einsum":
        letters, _, out = str(product.args[0]).replace(" ", "").partition("->")
        parts = letters.split(",")
        if len(parts) != 2 or any(len(set(each)) != len(each) or not set(each) <= set(out) for each in parts):
            return ()
        return tuple(
            Operand(value, tuple(map(out.index, part))) for value, part in zip(product.args[1], parts, strict=True)
        )
    if op_name(product) != "aten::mul" or not all(isinstance(each, Node) for each in product.args):
        return ()
    rank = len(shape_of(product) or ())
    return tuple(_behind_views(each, rank) for each in product.args)


def _behind_views(value: Node, rank: int) -> Operand:
    """What an operand is a view of that only moves its dimensions, or has more of size 1."""
    own = len(shape_of(value) or ())
    dims = tuple(range(rank - own, rank))
    while True:
        given: dict[str, Any] = arguments(value) if op_name(value) in VIEWS else {}
        if op_name(value) == "aten::unsqueeze":
            at = given["dim"] % own
            dims, own = dims[:at] + dims[at + 1 :], own - 1
        elif op_name(value) == "aten::permute":
            order = [each % own for each in given["dims"]]
            dims = tuple(dims[order.index(each)] for each in range(own))
        elif op_name(value) == "aten::transpose":
            moved = list(dims)
            one, other = given["dim0"] % own, given["dim1"] % own
            moved[one], moved[other] = moved[other], moved[one]
            dims = tuple(moved)
        else:
            return Operand(value, dims)
        value = given["self"]
