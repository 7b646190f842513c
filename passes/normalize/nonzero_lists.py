"""All places where a table holds something, sorted by its columns and cut by their counts: column after column.

order = nonzero(table).sort(0)[1][:, 1]               # or nonzero(table)[:, 1].sort()[1]
token = nonzero(table)[order, 0]                      => token_e = where(table[:, e] != 0)[0], for each column e
rows = x[token].split((table > 0).sum(0).tolist())    => rows_e = x[token_e]
out.index_add(0, token, cat(f_e(rows_e)) * weight)    => out.index_add(0, token_e, f_e(rows_e) * table[token_e, e])

Which of a column's places come first, a sort that is not stable leaves open: one order is as good as another.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import ANY, As, Last, OneOfValues, Pattern, Var, aten, call, either, item, optional
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, only_asserted, replace
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["spell_nonzero_lists"]

_aten = torch.ops.aten

table = Var("table", rank=2)
first = OneOfValues(0, -1)
turned = aten.transpose(table, OneOfValues(0, -2), OneOfValues(1, -1))


def listed(whole: Any, dim: int) -> Pattern:
    """Where a table holds something, along one of its dimensions."""
    return either(aten.select(aten.nonzero(whole), 1, dim), item(aten.where(whole), dim))


def in_order(dim: int) -> Pattern:
    """The same, sorted by columns; of a table that is turned around, it is so already."""
    rows = aten.select(aten.index(aten.nonzero(table), [order]), 1, dim)
    return either(aten.index(listed(table, dim), [order]), rows, listed(turned, 1 - dim))


ordered = aten.sort(aten.nonzero(table), 0)
by_column = either(*(aten.sort(listed(table, 1), dim=first, **how) for how in ({}, {"stable": ANY})))
numbers = either(*(aten.argsort(listed(table, 1), dim=first, **how) for how in ({}, {"stable": ANY})))
order = As("order", either(aten.select(item(ordered, 1), 1, 1), item(by_column, 1), numbers))
token = As("token", in_order(0))
column = item(aten.split_with_sizes(item(ordered, 0), [1, 1], Last(1)), 1)
number = As("looked_up", aten.index(table, [token, either(item(by_column, 0), in_order(1))]))
weights = As("weights", either(
    aten.gather(As("looked_up", aten.index(table, [token])), 1, column),
    aten.unsqueeze(number, Last(1)), aten.reshape(number, [-1, 1]),
))  # fmt: skip
weighted = As("weighted", aten.mul(As("joined", aten.cat(ANY, 0)), weights))
added = optional(lambda rows: aten.to(rows, Var("dtype")), weighted)
#: core ATen knows the second only
ADDED = either(aten.index_add(Var("base"), 0, token, added), aten.index_put(Var("base"), [token], added, True))
#: how many places a column has: of a table that holds negative numbers, the two would not be equal, and cut nothing
counts = aten.sum(either(aten.gt(table, 0), aten.ne(table, 0)), [OneOfValues(0, -2)])


def spell_nonzero_lists(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every sum of rows read and added by such a list; ``written`` is memory that ops in place write."""
    for node in list(graph.nodes):
        found = match(ADDED, node) if op_name(node) in ("aten::index_add", "aten::index_put") else None
        if not isinstance(found, Match) or any(memory_of(each) in written for each in (*found.nodes, found["table"])):
            continue
        columns, parts = (shape_of(found["table"]) or (0, 0))[1], arguments(found["joined"])["tensors"]
        splits = _splits(found, node, columns)
        if splits is not None and len(parts) == columns and _fits(found, parts, splits):
            _rewrite(found, node, parts, splits)


def _splits(found: Match, root: Node, columns: Any) -> list[Node] | None:
    """The calls that cut the rows read; None where the list is read in any other way."""
    inner = {root, *_told(found)}
    readers = [user for user in found["token"].users if user not in inner]
    cut = [user for reader in readers for user in reader.users if not only_asserted(user)]
    plain = all(op_name(reader) == "aten::index" and reader.args[1] == [found["token"]] for reader in readers)
    # Nothing else may go by the order that the sort chose.
    outside = {user for node in inner - {root, found["token"]} for user in node.users if not only_asserted(user)}
    alone = outside <= {*found.nodes, root}
    by_counts = all(op_name(split) == "aten::split_with_sizes" and _by_counts(split, found, columns) for split in cut)
    return cut if cut and plain and alone and by_counts else None


def _told(found: Match) -> set[Node]:
    """What goes by the order of the list, up to the weights."""
    told = {found["token"], *([found["order"]] if "order" in found.bindings else [])}
    for node in sorted(found.nodes):
        if node < found["weighted"] and not told.isdisjoint(node.all_input_nodes):
            told.add(node)
    return told


def _by_counts(split: Node, found: Match, columns: Any) -> bool:
    given = arguments(split)
    number = call("aten::item", "aten::_local_scalar_dense", args=(ANY,))
    sizes = given["split_sizes"]
    if given["dim"] != 0 or len(sizes) != columns:
        return False
    for place, size in enumerate(sizes):
        each = either(item(aten.unbind(counts), place), aten.select(counts, 0, place))
        told = match(number, size)
        if not isinstance(told, Match) or not isinstance(match(each, size.args[0], {"table": found["table"]}), Match):
            return False
    return True


def _fits(found: Match, parts: Sequence[Node], splits: Sequence[Node]) -> bool:
    """Whether rows are as wide as what they are added to, and each part has as many of them as its column."""
    rows, base = shape_of(found["joined"]) or (), shape_of(found["base"]) or ()
    columns = zip(parts, zip(*(split.meta["val"] for split in splits), strict=True), strict=True)
    counted = all(any(known_equal(tensor_of(part).shape[0], cut.shape[0]) for cut in cuts) for part, cuts in columns)
    return len(rows) == 2 and same_shape(rows[1:], base[1:]) and counted


def _rewrite(found: Match, root: Node, parts: list[Node], splits: list[Node]) -> None:
    graph, held = root.graph, found["table"]
    values = FakeValues(held.meta["val"].fake_mode)
    emit = Emitter(graph, found["token"], values)
    tokens, ones = [], []
    for place in range(len(parts)):
        one = emit(_aten.select.int, held, 1, place)
        ones.append(one)
        mask = emit(_aten.ne.Scalar, one, 0)
        size = tensor_of(parts[place]).shape[0]
        with graph.inserting_before(found["token"]):
            where = graph.call_function(_aten.where.default, (mask,))
            tokens.append(graph.call_function(operator.getitem, (where, 0)))
        with values.fake_mode:
            tokens[-1].meta["val"] = found["token"].meta["val"].new_empty((size,))
        where.meta["val"] = [tokens[-1].meta["val"]]
    for split in splits:
        rows = split.args[0].args[0]
        for part in [user for user in split.users if user.target is operator.getitem]:
            at: Any = part.args[1]
            with graph.inserting_before(split):
                read = graph.call_function(_aten.index.Tensor, (rows, [tokens[at]]))
            read.meta.update(part.meta)
            replace(part, read)
    emit = Emitter(graph, root, values)
    out = found["base"]
    for one, at, part in zip(ones, tokens, parts, strict=True):
        result = emit(_aten.mul.Tensor, part, emit(_aten.index.Tensor, emit(_aten.unsqueeze.default, one, 1), [at]))
        if "dtype" in found.bindings:
            result = emit(_aten.to.dtype, result, found["dtype"])
        out = emit(_aten.index_add.default, out, 0, at, result)
    replace(root, out)
    erase_dead(graph, [root])
