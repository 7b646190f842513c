"""Rows that a mask chooses, read and written in one way.

masked_select(x, mask[..., None]).view(-1, H)         =>     x[mask]
masked_scatter(out, mask[..., None], rows of these)     =>     index_put(out, [mask], rows)

w[mask][:, k]             w [T, K]                    =>     w[:, k][mask]

w[at]                     w [T, 1]                    =>     w[:, 0][at][:, None]

arange(T)[mask]           mask [T]                    =>     where(mask)[0]

at = where(mask)[0];  rows = f(x[mask])
out[at] = rows                                        =>     out[mask] = rows

at = where(ids.view(-1) == e)[0]                      at is a slot's number, written to
x[at // K]                                            =>     x.repeat_interleave(K, 0)[at]
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.normalize.masks import columns_of
from torch.fx import Graph, Node

from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import Var, aten, either
from moe_fx.rewrite import Emitter, FakeValues, after, erase_dead, replace, respell
from moe_fx.shapes import depends_on_values, known_equal, same_shape, shape_of, tensor_of

__all__ = ["spell_mask_rows", "spell_selected_rows"]

_aten = torch.ops.aten


#: what chooses scores, and what is done to those that were chosen
CHOOSING = frozenset({"aten::topk", "aten::max", "aten::gather", "aten::sort", "aten::amax"})
SCALING = frozenset({
    "aten::to", "aten::sigmoid", "aten::softmax", "aten::mul", "aten::div", "aten::exp", "aten::clone",
})  # fmt: skip
_NUMBERS = aten.index(either(aten.arange(Var("count")), aten.arange(0, Var("count"))), [Var("mask", rank=1)])


def spell_selected_rows(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite what is selected, or put, element by element; ``written`` is memory that ops in place still write."""
    narrow: dict[Node, tuple[Node, Any]] = {}
    for node in list(graph.nodes):
        if op_name(node) not in ("aten::reshape", "aten::masked_scatter") or _is_written(node, written):
            continue
        if op_name(node) == "aten::reshape":
            _select_rows(node, narrow)
        else:
            _put_rows(node, narrow)


def spell_mask_rows(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every other such read and write; ``written`` is memory that ops in place still write."""
    repeated: dict[tuple[Node, int], Node] = {}
    of_columns: dict[tuple[Node, int], Node] = {}
    for node in list(graph.nodes):
        if isinstance(found := match(_NUMBERS, node), Match) and not _is_written(node, written):
            _list(node, found["mask"])
            _write_by(found["mask"], node)
            continue
        if op_name(node) == "aten::index" and not _is_written(node, written):
            _read_one_wide(node, of_columns)
            continue
        columns = columns_of(node)
        if (0 not in columns and op_name(node) != "aten::select") or _is_written(node, written):
            continue
        if op_name(node) == "aten::select":
            _choose_of_column(node, of_columns)
        elif len(shape_of(node.args[0]) or ()) == 1:
            _write_by(node.args[0], columns[0])
            _repeat_rows(columns[0], repeated, written)


def _is_written(node: Node, written: Collection[Node]) -> bool:
    """Whether anything may have been written to that is now read later than it was."""
    read = {node}
    for _ in range(4):  # the elements selected, their mask made wide, and what it was made of
        read |= {each for source in read for each in source.all_input_nodes}
    return any(memory_of(each) in written for each in read)


def _list(node: Node, mask: Node) -> None:
    """The numbers of rows that a mask chooses, as the places where it is true."""
    numbers: Any = node.args[0]
    whole = same_shape(shape_of(numbers) or (), shape_of(mask) or ()) and tensor_of(node).dtype is torch.int64
    if tensor_of(mask).dtype is not torch.bool or not whole:
        return
    with node.graph.inserting_before(node):
        where = node.graph.call_function(_aten.where.default, (mask,))
    where.meta["val"] = [tensor_of(node)]
    respell(node, operator.getitem, (where, 0), {})


def _select_rows(node: Node, narrow: dict[Node, tuple[Node, Any]]) -> None:
    """Elements selected by a mask that holds one for each row, in rows again."""
    selected: Any = node.args[0]
    if op_name(selected) == "aten::masked_select":
        rows, mask = selected.args
    elif op_name(selected) == "aten::index" and len(selected.args[1]) == 1:
        rows, (mask,) = selected.args
    else:
        return
    mask = _of_rows(mask)
    shape, wide, made = shape_of(rows) or (), shape_of(mask) or (), shape_of(node) or ()
    if (
        len(shape) < 2
        or not same_shape(wide, (*shape[:-1], 1))
        or len(made) != 2
        or not known_equal(made[1], shape[-1])
    ):
        return
    if mask not in narrow:
        narrow[mask] = _narrow(mask, Emitter(node.graph, selected, FakeValues(tensor_of(node).fake_mode))), made[0]
    with node.graph.inserting_before(node):
        read = node.graph.call_function(_aten.index.Tensor, (rows, [narrow[mask][0]]))
    read.meta.update(node.meta)
    replace(node, read)
    erase_dead(node.graph, [node])


def _of_rows(mask: Node) -> Node:
    """A mask of rows, which is expanded to their elements."""
    return mask.args[0] if op_name(mask) in ("aten::expand", "aten::expand_as") else mask  # type: ignore[return-value]


def _read_one_wide(node: Node, known: dict[tuple[Node, int], Node]) -> None:
    """What is read of a matrix of one column, as what is read of the column."""
    whole, indices = arguments(node)["self"], arguments(node)["indices"]
    shape, at = shape_of(whole) or (), shape_of(indices[0]) if len(indices) == 1 else None
    if len(shape) != 2 or not known_equal(shape[1], 1) or at is None or len(at) != 1:
        return
    if not _is_chosen(whole):
        return
    values = FakeValues(tensor_of(node).fake_mode)
    if (whole, 0) not in known:
        known[whole, 0] = Emitter(node.graph, after(whole), values)(_aten.select.int, whole, 1, 0)
    with node.graph.inserting_before(node):
        read = node.graph.call_function(_aten.index.Tensor, (known[whole, 0], indices))
    read.meta.update({key: value for key, value in node.meta.items() if key != "val"})
    with values.fake_mode:
        read.meta["val"] = tensor_of(node).new_empty(tensor_of(node).shape[:1])
    replace(node, Emitter(node.graph, node, values)(_aten.unsqueeze.default, read, 1))
    erase_dead(node.graph, [node])


def _is_chosen(value: Any) -> bool:
    """Whether numbers were chosen of a token's scores, as routing weights are: any other is that of all its slots."""
    while op_name(value) in SCALING or getattr(value, "target", None) is operator.getitem:
        value = value.args[0]
    return op_name(value) in CHOOSING


def _choose_of_column(node: Node, known: dict[tuple[Node, int], Node]) -> None:
    """A column of the rows that were chosen of a matrix, as what is chosen of the column."""
    given, rows = arguments(node), node.args[0]
    if op_name(rows) != "aten::index" or given["dim"] not in (1, -1) or not isinstance(given["index"], int):
        return
    whole, indices = arguments(rows)["self"], arguments(rows)["indices"]
    by_mask = len(indices) == 1 and tensor_of(indices[0]) is not None and tensor_of(indices[0]).dtype is torch.bool
    if not by_mask or len(shape_of(whole) or ()) != 2 or len(shape_of(rows) or ()) != 2:
        return
    if (key := (whole, given["index"])) not in known:  # every expert chooses of the same column
        emit = Emitter(node.graph, after(whole), FakeValues(tensor_of(node).fake_mode))
        known[key] = emit(_aten.select.int, whole, 1, given["index"])
    with node.graph.inserting_before(node):
        read = node.graph.call_function(_aten.index.Tensor, (known[key], indices))
    read.meta.update(node.meta)
    replace(node, read)
    erase_dead(node.graph, [node])


def _narrow(mask: Node, emit: Emitter) -> Any:
    """A mask of one column as one of a single dimension."""
    if op_name(mask) == "aten::any" and arguments(mask).get("keepdim"):
        return emit(_aten.any.dim, mask.args[0], mask.args[1])
    wide = op_name(mask) == "aten::unsqueeze" and arguments(mask)["dim"] in (-1, len(shape_of(mask) or ()) - 1)
    return mask.args[0] if wide else emit(_aten.squeeze.dim, mask, -1)


def _put_rows(node: Node, narrow: dict[Node, tuple[Node, Any]]) -> None:
    """As many rows as the mask selects, put where it is true."""
    given = arguments(node)
    out, mask, rows = given["self"], _of_rows(given["mask"]), given["source"]
    shape, values = shape_of(out) or (), shape_of(rows) or ()
    if mask not in narrow or len(shape) < 2 or len(values) != 2 or not known_equal(shape[-1], values[1]):
        return
    chosen, count = narrow[mask]
    if known_equal(count, values[0]) and same_shape(shape[:-1], (shape_of(mask) or ())[:-1]):
        node.target, node.args = _aten.index_put.default, (out, [chosen], rows)


def _write_by(mask: Node, places: Node) -> None:
    """Rows that were read by a mask are written by it, and not at its places: of these there may be as many."""
    read = [user for user in mask.users if op_name(user) == "aten::index" and user.args[1] == [mask]]

    def as_many(rows: Node) -> bool:
        count = (shape_of(rows) or (0,))[0]
        return depends_on_values(count) and any(known_equal((shape_of(each) or (0,))[0], count) for each in read)

    for user in list(places.users):
        given = arguments(user) if op_name(user) == "aten::index_put" else {}
        if given and given["indices"] == [places] and as_many(given["values"]):
            user.update_arg(1, [mask])
        for added in _added_at(user):
            given = arguments(added)
            if as_many(given["src"]) and same_shape((shape_of(given["src"]) or ())[1:], added.meta["val"].shape[1:]):
                respell(added, _aten.index_put.default, (given["self"], [mask], given["src"], True), {})


def _added_at(column: Node) -> list[Node]:
    """The sums of rows whose elements are added at such places, each as wide as a row."""
    if op_name(column) != "aten::unsqueeze" or (shape_of(column) or ())[1:] != (1,):
        return []
    wide = [user for user in column.users if op_name(user) == "aten::expand"]
    sums = [user for index in wide for user in index.users if op_name(user) == "aten::scatter_add"]
    return [
        each
        for each in sums
        if arguments(each)["dim"] in (0, -2)
        and arguments(each)["index"] in wide
        and same_shape(tensor_of(arguments(each)["index"]).shape[1:], each.meta["val"].shape[1:])
    ]


def _repeat_rows(places: Node, repeated: dict[tuple[Node, int], Node], written: Collection[Node]) -> None:
    """Rows of the tokens of slots that are written to are read of rows that are repeated for each slot."""
    if not any(op_name(user) == "aten::index_put" and arguments(user)["indices"] == [places] for user in places.users):
        return
    mask: Any = places.args[0].args[0]
    for tokens in [user for user in places.users if op_name(user) == "aten::floor_divide"]:
        many, slots = tokens.args[1], (shape_of(mask) or (0,))[0]
        for read in [user for user in tokens.users if op_name(user) == "aten::index" and user.args[1] == [tokens]]:
            rows: Any = read.args[0]
            whole = isinstance(many, int) and known_equal((shape_of(rows) or (0,))[0] * many, slots)
            if not whole or memory_of(rows) in written:
                continue
            if (rows, many) not in repeated:
                emit = Emitter(read.graph, after(rows), FakeValues(tensor_of(read).fake_mode))
                repeated[rows, many] = emit(_aten.repeat_interleave.self_int, rows, many, 0)
            read.args = (repeated[rows, many], [places])
