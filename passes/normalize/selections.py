"""What a mask of two dimensions selects, of a matrix of the same shape, is read at the places where it is true.

numbers.expand(E, T)[mask]        mask [E, T]        =>     expert, token = where(mask);  token
table.T[mask]                     table [T, E]       =>     table[token, expert]
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import Match, match, op_name
from moe_fx.pattern import ANY, WHOLE, Var, aten, either
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import same_shape, tensor_of

__all__ = ["spell_selections"]

_aten = torch.ops.aten

SELECTED = aten.index(aten.reshape(Var("matrix", rank=2), [-1]), [aten.reshape(Var("mask", rank=2), [-1])])
#: every row holds the numbers of the columns
NUMBERS = aten.expand(aten.unsqueeze(either(aten.arange(ANY, dtype=WHOLE), aten.arange(0, ANY, dtype=WHOLE)), 0), ANY)


def spell_selections(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite the selections by masks that select numbers too; ``written`` is memory that ops in place still write."""
    found: dict[Node, dict[Node, Node]] = {}
    for node in graph.nodes:
        chosen = match(SELECTED, node) if op_name(node) == "aten::index" else None
        if not isinstance(chosen, Match) or not _fits(chosen):
            continue
        read = {*chosen.nodes, *map(_source, (chosen["matrix"], chosen["mask"])), chosen["matrix"], chosen["mask"]}
        if not any(memory_of(each) in written for each in read):
            found.setdefault(_source(chosen["mask"]), {})[node] = chosen["matrix"]
    for mask, selections in found.items():
        if any(_are_numbers(matrix) for matrix in selections.values()):
            _rewrite(mask, selections)


def _fits(chosen: Match) -> bool:
    matrix, mask = tensor_of(chosen["matrix"]), tensor_of(chosen["mask"])
    same = matrix is not None and mask is not None and same_shape(matrix.shape, mask.shape)
    return same and mask.dtype is torch.bool


def _are_numbers(matrix: Node) -> bool:
    return isinstance(match(NUMBERS, matrix), Match) and tensor_of(matrix).dtype is torch.int64


def _source(value: Any) -> Any:
    """What a copy holds."""
    while op_name(value) in ("aten::clone", "aten::contiguous"):
        value = value.args[0]
    return value


def _rewrite(mask: Node, selections: dict[Node, Node]) -> None:
    first = min(selections)
    graph, values = first.graph, FakeValues(first.meta["val"].fake_mode)
    with graph.inserting_before(first):
        where = graph.call_function(_aten.where.default, (mask,))
        row, column = (graph.call_function(operator.getitem, (where, at)) for at in (0, 1))
    with values.fake_mode:
        places = first.meta["val"].new_empty((tensor_of(first).shape[0],), dtype=torch.int64)
    where.meta["val"], row.meta["val"], column.meta["val"] = [places, places], places, places
    for node, matrix in selections.items():
        source = _source(matrix)
        turned = op_name(source) == "aten::transpose"  # of two dimensions
        if _are_numbers(matrix):
            replace(node, column)
        else:
            rows = (source.args[0], [column, row]) if turned else (source, [row, column])
            read = Emitter(graph, node, values)(_aten.index.Tensor, *rows)
            read.meta["val"] = node.meta["val"]  # as long as its readers know it to be
            replace(node, read)
        erase_dead(graph, [node])
