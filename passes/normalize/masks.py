"""A mask over several dimensions selects rows as the same mask over one dimension does.

x[mask]          x [B, S, H], mask [B, S]        =>     x.reshape(-1, H)[mask.reshape(-1)]
x[mask] = y                                      =>     the same, in the shape of x again
t, k = where(mask);  x[mask] = y[t]              =>     x[t, k] = y[t]

b, s, k = where(mask)   mask [B, S, K]           =>     t, k = where(mask.reshape(-1, K))
x[b, s] = w[b, s, k] * y                         =>     the same of x.reshape(-1, H)[t] and w.reshape(-1, K)[t, k]

Masks, and columns, that a loop takes one after the other are those that it would select:

mask.unbind(0)[e]         mask [E, T, K]         =>     mask.select(0, e)
ids.t().unbind(0)[k]      ids [T, K]             =>     ids.select(1, k)
ids.unbind(-1)[k]         ids [T, K]             =>     ids.select(1, k)
table.split(1, -1)[e]     table [T, E]           =>     table.slice(-1, e, e + 1)
w[:, None].unbind(-1)[k]  w [T, K]               =>     w.select(1, k)[:, None]
mask.max(d)[0]                                   =>     mask.any(d)
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.constants import reads_shapes
from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, after, erase_dead, only_asserted, replace, respell
from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["columns_of", "flatten_masks", "flatten_places", "in_one", "select_masks"]

aten = torch.ops.aten


def flatten_masks(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every selection, and every write, by a single mask of more than one dimension.

    ``written`` is memory that ops in place still write.
    """
    values: FakeValues | None = None
    for node in list(graph.nodes):
        mask = _mask(node)
        if mask is None:
            continue
        values = values or FakeValues(tensor_of(mask).fake_mode)
        # Numbers are compared where the mask is read.
        compared = op_name(mask) == "aten::eq" and not isinstance(mask.args[1], Node)
        by_number = compared and memory_of(mask.args[0]) not in written
        emit = Emitter(graph, node, values)
        if memory_of(mask) in written or not _write_at_places(node, mask, emit):
            _flatten(node, mask, by_number, emit)


def flatten_places(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite the places of masks over batch and sequence that are used as such only.

    ``written`` is memory that ops in place still write.
    """
    rows: dict[Node, Any] = {}
    for node in list(graph.nodes):
        columns = columns_of(node)
        if 0 not in columns or 1 not in columns:
            continue
        mask: Any = node.args[0]
        used = {*columns[0].users, *columns[1].users}
        read = {mask, *mask.all_input_nodes, *used, *(each for user in used for each in user.all_input_nodes)}
        if any(memory_of(each) in written for each in read):
            continue
        if used and all(_at_both(user, columns, mask) for user in used):
            _flatten_places(node, columns, used, rows)


def columns_of(places: Node) -> dict[Any, Node]:
    """Where a mask is true, along each dimension; nothing if more is read of the list, and for any other call."""
    found: dict[Any, Node] = {}
    if op_name(places) != "aten::nonzero" and (op_name(places) != "aten::where" or len(places.args) != 1):
        return found
    for user in places.users:
        given = arguments(user) if op_name(user) == "aten::select" else {}
        if user.target is operator.getitem:
            column: Any = user.args[1]
        elif given and given["dim"] in (1, -1):
            column = given["index"] % (shape_of(places) or ())[1]
        elif reads_shapes(user) or only_asserted(user):
            continue
        else:
            return {}
        if column in found:
            return {}
        found[column] = user
    return found


def _at_both(user: Node, columns: dict[Any, Node], mask: Any) -> bool:
    """Whether places are read, or written, of a tensor with the mask's batch and sequence; or only asserted about."""
    if reads_shapes(user) or only_asserted(user):
        return True
    given = arguments(user) if op_name(user) in ("aten::index", "aten::index_put") else {"indices": ()}
    both, rest = given["indices"][:2], given["indices"][2:]
    if both != [columns[0], columns[1]] or columns[0] in rest or columns[1] in rest or None in rest:
        return False
    shape, by = shape_of(given["self"]) or (), shape_of(mask) or ()
    return same_shape(shape[:2], by[:2]) and all(isinstance(size, int) for size in shape[2:])


def _flatten_places(node: Node, columns: dict[Any, Node], used: Collection[Node], flat_rows: dict[Node, Any]) -> None:
    graph, mask, place = node.graph, node.args[0], columns[0]
    values = FakeValues(place.meta["val"].fake_mode)
    emit = Emitter(graph, node, values)
    by: tuple[Any, ...] = shape_of(mask) or ()

    def in_rows(value: Node) -> Any:
        if value not in flat_rows:  # read and written, and by each expert, they are the same rows
            flat_rows[value] = _in_rows(value, Emitter(graph, after(value), values))
        return flat_rows[value]

    by_number = op_name(mask) == "aten::eq" and not isinstance(mask.args[1], Node)
    flat = emit(mask.target, in_rows(mask.args[0]), mask.args[1]) if by_number else in_rows(mask)
    with graph.inserting_before(node):
        where = graph.call_function(aten.where.default, (flat,))
        made = [graph.call_function(operator.getitem, (where, at)) for at in range(len(by) - 1)]
    for each in made:
        each.meta["val"] = place.meta["val"]
    where.meta["val"] = [place.meta["val"] for _ in made]
    for at, column in columns.items():
        if at > 1:
            replace(column, made[at - 1])
    dead = [*columns.values()]
    for user in used:
        if op_name(user) not in ("aten::index", "aten::index_put"):
            continue
        source: Node = arguments(user)["self"]
        shape: tuple[Any, ...] = shape_of(source) or ()
        rows = in_rows(source)
        dead.append(source)
        given = arguments(user)
        user.args = (rows, [made[0], *given["indices"][2:]], *user.args[2:])
        if op_name(user) == "aten::index_put":
            user.meta["val"] = rows.meta["val"]
            emit = Emitter(graph, user.next, values)
            whole = mask.args[0] if by_number else mask
            sizes = [
                size if isinstance(size, int) else emit(aten.sym_size.int, whole, at) for at, size in enumerate(shape)
            ]
            user.replace_all_uses_with(back := emit(aten.reshape.default, user, sizes), lambda each: each is not back)
    erase_dead(graph, dead)


def _in_rows(value: Any, emit: Emitter) -> Any:
    """A value whose batch and sequence are one dimension."""
    shape: tuple[Any, ...] = shape_of(value) or ()
    before = shape_of(value.args[0]) or () if op_name(value) == "aten::reshape" else ()
    if len(before) == len(shape) - 1 and same_shape(before[1:], shape[2:]):
        return value.args[0]
    if op_name(value) == "aten::unsqueeze" and arguments(value)["dim"] in (-1, len(shape) - 1) and len(shape) > 3:
        return emit(aten.unsqueeze.default, _in_rows(value.args[0], emit), -1)
    return emit(aten.reshape.default, value, [-1, *shape[2:]])


def select_masks(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every mask of a list of masks, and every column of a matrix that was turned around.

    ``written`` is memory that ops in place still write.
    """
    for node in list(graph.nodes):
        source = node.args[0] if node.target is operator.getitem else None
        if op_name(source) == "aten::max" and node.args[1] == 0 and tensor_of(node).dtype is torch.bool:
            given = arguments(source)
            if memory_of(given["self"]) in written:
                continue
            respell(node, aten.any.dim, (given["self"], given["dim"], given["keepdim"]), {})
        if isinstance(source, Node) and _cuts_columns(source) and memory_of(source.args[0]) not in written:
            emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
            column: Any = node.args[1]
            replace(node, emit(aten.slice.Tensor, source.args[0], -1, column, column + 1))
            erase_dead(graph, [node])
            continue
        if op_name(node) == "aten::select" and op_name(node.args[0]) == "aten::unsqueeze":
            _select_first(node, written)
        if op_name(source) != "aten::unbind" or not isinstance(source, Node):
            continue
        given = arguments(source)
        whole, dim = given["self"], given["dim"]
        value = tensor_of(whole)
        if value is None:
            continue
        if op_name(whole) == "aten::transpose" and value.dim() == 2:
            whole, dim = whole.args[0], 1 - dim % 2
        elif value.dtype is not torch.bool and not _is_hot(whole) and not _of_slots(whole, dim):
            continue
        emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
        replace(node, _select(emit, whole, dim, node.args[1]))
        erase_dead(graph, [node])


def _select_first(node: Node, written: Collection[Node]) -> None:
    """What is selected behind a dimension that was added gets that dimension afterwards."""
    given = arguments(node)
    if given["dim"] != arguments(given["self"])["dim"] and memory_of(given["self"]) not in written:
        emit = Emitter(node.graph, node, FakeValues(node.meta["val"].fake_mode))
        replace(node, _select(emit, given["self"], given["dim"], given["index"]))
        erase_dead(node.graph, [node])


def _select(emit: Emitter, whole: Node, dim: int, place: Any) -> Node:
    """One of a dimension's values; a dimension of size 1 is added to what is selected, not before."""
    rank = len(shape_of(whole) or ())
    added, dim = arguments(whole)["dim"] % rank if op_name(whole) == "aten::unsqueeze" else None, dim % rank
    if added is None or added == dim:
        return emit(aten.select.int, whole, dim, place)
    selected = emit(aten.select.int, whole.args[0], dim - (added < dim), place)
    return emit(aten.unsqueeze.default, selected, added - (dim < added))


def _cuts_columns(split: Node) -> bool:
    """Whether a computed table is split into its columns."""
    given = arguments(split) if op_name(split) == "aten::split_with_sizes" else {}
    value = tensor_of(given.get("self"))
    if value is None or not value.is_floating_point() or given["self"].op != "call_function":
        return False
    return value.dim() > 1 and given["dim"] in (-1, value.dim() - 1) and set(given["split_sizes"]) == {1}


def _is_hot(value: Any) -> bool:
    """Whether a value holds one-hot rows, in whatever order of dimensions."""
    while op_name(value) in ("aten::permute", "aten::transpose", "aten::to", "aten::slice"):
        value = value.args[0]
    return op_name(value) == "aten::one_hot"


def _of_slots(whole: Node, dim: int) -> bool:
    """Whether the columns of a computed value are taken one by one, as those of ids and weights are."""
    rank = len(shape_of(whole) or ())
    columns = rank > 1 and dim in (rank - 1, -1)
    return columns and whole.op == "call_function" and op_name(whole) != "aten::nonzero"


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


def _write_at_places(node: Node, mask: Node, emit: Emitter) -> bool:
    """Write where a mask is true by token and slot, if the rows are read by its places, too."""
    listed = [user for user in mask.users if op_name(user) in ("aten::nonzero", "aten::where") and user < node]
    listed = [user for user in listed if columns_of(user)]
    if op_name(node) != "aten::index_put" or len(shape_of(mask) or ()) != 2 or not listed:
        return False
    known = columns_of(listed[0])
    column = next(iter(known.values()))
    at: list[Node] = []
    for dim in (0, 1):
        with emit.graph.inserting_before(node):
            if op_name(listed[0]) == "aten::where":
                place = emit.graph.call_function(operator.getitem, (listed[0], dim))
            else:
                place = emit.graph.call_function(aten.select.int, (listed[0], 1, dim))
        place.meta["val"] = column.meta["val"]
        at.append(place)
    respell(node, node.target, (node.args[0], at, *node.args[2:]), dict(node.kwargs))
    return True


def _flatten(node: Node, mask: Node, by_number: bool, emit: Emitter) -> None:
    given = arguments(node)
    source, rank = given["self"], len(shape_of(mask) or ())
    shape: tuple[Any, ...] = shape_of(source) or ()
    rows = emit(aten.reshape.default, source, [-1, *shape[rank:]]) if shape[rank:] else in_one(source, emit)
    if by_number:
        # The mask of one number is that of the same in one dimension.
        flat = emit(mask.target, in_one(mask.args[0], emit), mask.args[1])
    else:
        flat = emit(aten.reshape.default, mask, [-1])
    with emit.graph.inserting_before(node):
        made = emit.graph.call_function(node.target, (rows, [flat], *node.args[2:]), dict(node.kwargs))
    made.meta.update(node.meta)
    if op_name(node) == "aten::index_put":
        made.meta["val"] = rows.meta["val"]
        whole = mask.args[0] if by_number else mask  # the same for every expert
        sizes = [size if isinstance(size, int) else emit(aten.sym_size.int, whole, at) for at, size in enumerate(shape)]
        made = emit(aten.reshape.default, made, sizes)
    replace(node, made)
    erase_dead(emit.graph, [node])


def in_one(value: Node, emit: Emitter) -> Node:
    """A value in one dimension; a column of it stays a column."""
    if op_name(value) == "aten::select":
        given, shape = arguments(value), shape_of(value.args[0]) or ()
        if given["dim"] in (-1, len(shape) - 1) and isinstance(shape[-1], int) and isinstance(given["index"], int):
            return emit(aten.select.int, emit(aten.reshape.default, given["self"], [-1, shape[-1]]), 1, given["index"])
    return emit(aten.reshape.default, value, [-1])
