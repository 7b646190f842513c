"""All places of a mask, expert by expert: what is read there, cut by their counts, joined and added is a loop.

expert, token = where(mask.T)
parts = x[token].split(mask.sum(0).tolist())
y = cat([f_e(part_e), ...]) * table[token, expert, None]
out.index_add(0, token, y)
=>
token_e = where(mask[:, e])[0]                               # for each expert e
out.index_add(0, token_e, f_e(x[token_e]) * table[token_e, e, None])

Megatron's permutation selects numbers and the table by the mask (`selections.py`); others slice by sums of counts.
"""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.normalize.masks import columns_of
from torch.fx import Graph, Node

from moe_fx.constants import reads_shapes
from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import ANY, As, OneOfValues, Var, aten, either, optional
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, only_asserted, replace
from moe_fx.shapes import known_equal, same_expression, tensor_of

__all__ = ["spell_column_lists"]

_aten = torch.ops.aten

token = Var("token")
source = As("source", ANY)
ADDED = either(aten.index_add(Var("base"), 0, token, source), aten.index_put(Var("base"), [token], source, True))
joined = As("joined", aten.cat(ANY, 0))
RESULTS = optional(lambda rows: aten.to(rows, Var("dtype")), either(aten.mul(joined, Var("weights")), joined))
#: how many places each column has, and one of these as a number of Python
NUMBERS = ("aten::item", "aten::_local_scalar_dense")
COUNTS = aten.sum(optional(lambda mask: aten.to(mask, ANY), Var("mask", rank=2)), [OneOfValues(0, -2)])


@dataclass
class Listed:
    """The places of ``mask [T, E]``: ``token`` and ``expert`` hold their numbers, column by column.

    Attributes:
        counts: how many places each column has. parts: a column, what is read at all places, and what is cut of it.
        root: adds the results to the tokens, as ``ending`` says. results: one for each column.
        weights: a number for each place, or None. dtype: what the results are cast to, or None.
    """

    mask: Node
    token: Node
    expert: Node | None
    counts: list[Any]
    root: Node
    ending: Match
    results: list[Node]
    weights: Node | None
    dtype: Any
    parts: list[tuple[int, Node, Node]] = field(default_factory=list)


def spell_column_lists(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such list; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        columns = columns_of(node)
        found = _listed(node, columns) if 1 in columns else None
        if found is None or not _all_cut(found):
            continue
        read = [found.mask, *(value.args[0] for _, value, _ in found.parts), *found.ending.nodes, *found.results]
        weights = _weights_read(found) if found.weights is not None else None
        read += weights.all_input_nodes if weights is not None else []
        if not any(isinstance(each, Node) and memory_of(each) in written for each in read):
            _rewrite(found, node)


def _listed(where: Node, columns: dict[Any, Node]) -> Listed | None:
    turned = where.args[0]
    while op_name(turned) in ("aten::clone", "aten::contiguous"):
        turned = turned.args[0]
    if op_name(turned) != "aten::transpose":
        return None
    mask: Any = turned.args[0]
    value = tensor_of(mask)
    if value is None or value.dtype is not torch.bool or value.dim() != 2 or not isinstance(value.shape[1], int):
        return None
    places, counts = columns[1], _counts(mask)
    for root in places.users if counts else ():
        ending = match(ADDED, root, {"token": places})
        results = match(RESULTS, ending["source"]) if isinstance(ending, Match) else None
        if not isinstance(ending, Match) or not isinstance(results, Match):
            continue
        joins, weights = arguments(results["joined"])["tensors"], results.get("weights")
        if len(joins) == len(counts):
            return Listed(mask, places, columns.get(0), counts, root, ending, joins, weights, results.get("dtype"))
    return None


def _counts(mask: Node) -> list[Any]:
    """How many places each column of a mask has, as numbers of Python; nothing where that was not asked."""
    casts = [mask, *(user for user in mask.users if op_name(user) == "aten::to")]
    totals = [user for each in casts for user in each.users if isinstance(match(COUNTS, user), Match)]
    known: dict[Any, Any] = {}
    for total in totals:
        for read in total.users:
            if op_name(read) == "aten::unbind":
                parts = [(part.args[1], part) for part in read.users if part.target is operator.getitem]
            else:
                parts = [(arguments(read)["index"], read)] if op_name(read) == "aten::select" else []
            for column, part in parts:
                known.update((column, user.meta["val"]) for user in part.users if op_name(user) in NUMBERS)
    columns = range(tensor_of(mask).shape[1])
    return [known[column] for column in columns] if all(column in known for column in columns) else []


def _all_cut(found: Listed) -> bool:
    """Whether what is read at the places is cut by the columns' counts, and nothing else is made of it."""
    ending, weights = found.ending.nodes, found.weights
    for value in {*found.token.users, *(found.expert.users if found.expert is not None else ())}:
        if value in ending or reads_shapes(value) or only_asserted(value):
            continue
        if value.op != "call_function" or not _reads_places(value, found):
            return False
        for user in value.users:
            if user is weights or (value is weights) or reads_shapes(user) or only_asserted(user):
                continue
            parts = _parts(user, found.counts)
            if parts is None:
                return False
            found.parts += [(column, value, part) for column, part in parts]
    rows = {column: tensor_of(part).shape[0] for column, _, part in found.parts}
    fits = all(
        column in rows and known_equal(tensor_of(result).shape[0], rows[column])
        for column, result in enumerate(found.results)
    )
    return fits and (weights is None or _weights_read(found) is not None)


def _reads_places(node: Node, found: Listed) -> bool:
    indices = node.args[1] if op_name(node) == "aten::index" else None
    return indices in ([found.token], [found.token, found.expert])


def _weights_read(found: Listed) -> Node | None:
    """The call that reads a number for each place, perhaps with a dimension of size 1 behind it."""
    read: Any = found.weights
    if op_name(read) == "aten::unsqueeze":
        read = read.args[0]
    return read if _reads_places(read, found) and read.args[1] == [found.token, found.expert] else None


def _parts(cut: Node, counts: list[Any]) -> list[tuple[int, Node]] | None:
    """The columns that a call cuts, and their parts; None for any other call."""
    given = arguments(cut) if op_name(cut) in ("aten::split_with_sizes", "aten::slice") else {"dim": None}
    if given["dim"] != 0:
        return None
    if op_name(cut) == "aten::split_with_sizes":
        sizes = list(map(_number, given["split_sizes"]))
        if len(sizes) != len(counts) or not all(map(known_equal, sizes, counts)):
            return None
        return [(int(user.args[1]), user) for user in cut.users if user.target is operator.getitem]
    start, end = _number(given["start"] or 0), _number(given["end"])
    ends = [0, *itertools.accumulate(counts)]
    column = next((column for column in range(len(counts)) if same_expression(start, ends[column])), None)
    if column is None or given["step"] != 1:
        return None
    rest = column == len(counts) - 1 and (end is None or (isinstance(end, int) and end == sys.maxsize))
    return [(column, cut)] if rest or (end is not None and known_equal(end, ends[column + 1])) else None


def _number(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, Node) else value


def _rewrite(found: Listed, where: Node) -> None:
    graph, values = where.graph, FakeValues(found.mask.meta["val"].fake_mode)
    emit = Emitter(graph, where, values)
    sizes = {column: tensor_of(part).shape[0] for column, _, part in found.parts}
    tokens = [_places(emit, found, column, sizes[column]) for column in range(len(found.results))]
    for column, value, part in found.parts:
        read = _read(Emitter(graph, part, values), value, found, column, tokens[column])
        replace(part, read)
    emit = Emitter(graph, found.root, values)
    out, weights = found.ending["base"], _weights_read(found) if found.weights is not None else None
    for column, (result, places) in enumerate(zip(found.results, tokens, strict=True)):
        rows: Any = result
        if weights is not None:
            each = _read(emit, weights, found, column, places)
            rows = emit(
                _aten.mul.Tensor, rows, each if weights is found.weights else emit(_aten.unsqueeze.default, each, -1)
            )
        if found.dtype is not None:
            rows = emit(_aten.to.dtype, rows, found.dtype)
        out = emit(_aten.index_add.default, out, 0, places, rows)
    replace(found.root, out)
    erase_dead(graph, [found.root, *(part for _, _, part in found.parts)])


def _places(emit: Emitter, found: Listed, column: int, size: Any) -> Node:
    """The places of one column."""
    mask = emit(_aten.select.int, found.mask, 1, column)
    with emit.graph.inserting_before(emit.before):
        where = emit.graph.call_function(_aten.where.default, (mask,))
        places = emit.graph.call_function(operator.getitem, (where, 0))
    with emit.values.fake_mode:
        places.meta["val"] = found.token.meta["val"].new_empty((size,))
    where.meta["val"] = [places.meta["val"]]
    return places


def _read(emit: Emitter, value: Node, found: Listed, column: int, places: Node) -> Node:
    """What ``value`` reads, at the places of one column."""
    source: Any = value.args[0]
    if len(value.args[1]) == 2:
        source = emit(_aten.select.int, source, 1, column)
    with emit.graph.inserting_before(emit.before):
        read = emit.graph.call_function(_aten.index.Tensor, (source, [places]))
    with emit.values.fake_mode:
        whole = source.meta["val"]
        read.meta["val"] = whole.new_empty((tensor_of(places).shape[0], *whole.shape[1:]))
    return read
