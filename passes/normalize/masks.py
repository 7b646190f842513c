"""A mask over several dimensions selects rows as the same mask over one dimension does.

x[mask]          x [B, S, H], mask [B, S]        =>     x.reshape(-1, H)[mask.reshape(-1)]
x[mask] = y                                      =>     the same, in the shape of x again

Masks, and columns, that a loop takes one after the other are those that it would select:

mask.unbind(0)[e]         mask [E, T, K]         =>     mask.select(0, e)
ids.t().unbind(0)[k]      ids [T, K]             =>     ids.select(1, k)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["flatten_masks", "select_masks"]

aten = torch.ops.aten


def flatten_masks(graph: Graph) -> None:
    """Rewrite every selection, and every write, by a single mask of more than one dimension."""
    values: FakeValues | None = None
    for node in list(graph.nodes):
        mask = _mask(node)
        if mask is None:
            continue
        values = values or FakeValues(tensor_of(mask).fake_mode)
        _flatten(node, mask, Emitter(graph, node, values))


def select_masks(graph: Graph) -> None:
    """Rewrite every mask of a list of masks, and every column of a matrix that was turned around."""
    for node in list(graph.nodes):
        source = node.args[0] if node.target is operator.getitem else None
        if op_name(source) != "aten::unbind" or not isinstance(source, Node):
            continue
        given = arguments(source)
        whole, dim = given["self"], given["dim"]
        value = tensor_of(whole)
        if value is None:
            continue
        if op_name(whole) == "aten::transpose" and value.dim() == 2:
            whole, dim = whole.args[0], 1 - dim % 2
        elif value.dtype is not torch.bool:
            continue
        emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
        replace(node, emit(aten.select.int, whole, dim, node.args[1]))
        erase_dead(graph, [node])


def _mask(node: Node) -> Node | None:
    if op_name(node) not in ("aten::index", "aten::index_put"):
        return None
    given = arguments(node)
    if len(given["indices"]) != 1:
        return None
    (mask,) = given["indices"]
    value, shape = tensor_of(mask), shape_of(given["self"]) or ()
    if value is None or value.dtype is not torch.bool or value.dim() < 2:
        return None
    return mask if all(isinstance(size, int) for size in shape[value.dim() :]) else None


def _flatten(node: Node, mask: Node, emit: Emitter) -> None:
    given = arguments(node)
    source, rank = given["self"], len(shape_of(mask) or ())
    shape: tuple[Any, ...] = shape_of(source) or ()
    rows = emit(aten.reshape.default, source, [-1, *shape[rank:]]) if shape[rank:] else _in_one(source, emit)
    if op_name(mask) == "aten::eq" and not isinstance(mask.args[1], Node):
        # The mask of one number is that of the same in one dimension.
        flat = emit(mask.target, _in_one(mask.args[0], emit), mask.args[1])
    else:
        flat = emit(aten.reshape.default, mask, [-1])
    with emit.graph.inserting_before(node):
        made = emit.graph.call_function(node.target, (rows, [flat], *node.args[2:]), dict(node.kwargs))
    made.meta.update(node.meta)
    if op_name(node) == "aten::index_put":
        made.meta["val"] = rows.meta["val"]
        sizes = [size if isinstance(size, int) else emit(aten.sym_size.int, mask, at) for at, size in enumerate(shape)]
        made = emit(aten.reshape.default, made, sizes)
    replace(node, made)
    erase_dead(emit.graph, [node])


def _in_one(value: Node, emit: Emitter) -> Node:
    """A value in one dimension; a column of it stays a column."""
    if op_name(value) == "aten::select":
        given, shape = arguments(value), shape_of(value.args[0]) or ()
        if given["dim"] in (-1, len(shape) - 1) and isinstance(shape[-1], int) and isinstance(given["index"], int):
            return emit(aten.select.int, emit(aten.reshape.default, given["self"], [-1, shape[-1]]), 1, given["index"])
    return emit(aten.reshape.default, value, [-1])
