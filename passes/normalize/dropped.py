"""A one-hot mask of which some rows are dropped is the mask of ids that name no expert there.

mask = one_hot(ids, E) * kept       =>    named = where(kept.gather(-1, ids[..., None])[..., 0], ids, E)
token = where(mask[e])                    mask = (named[..., None] == arange(E)).to(int64)

Only a mask whose places are taken: which tokens an expert has no room for is then a matter of the ids, and no expert's.
Ids that are no class are an error of ``one_hot``, so that there is a column to look at.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.normalize.wide_sizes import only_wide
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["spell_dropped_rows"]

aten = torch.ops.aten

#: ops that show the same places in another shape or dtype
VIEWS = frozenset({
    "aten::reshape", "aten::transpose", "aten::permute", "aten::select", "aten::squeeze", "aten::unsqueeze",
    "aten::to",
})  # fmt: skip


def spell_dropped_rows(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such mask; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        found = _masked(node) if op_name(node) == "aten::mul" else None
        if found is None or any(memory_of(each) in written for each in (node, *found, arguments(found[0])["self"])):
            continue
        if any(_takes_places(user, node) for user in node.users):
            _rewrite(node, *found)


def _masked(node: Node) -> tuple[Node, Node] | None:
    """The one-hot rows of a product with a mask of the same shape, and the mask."""
    operands = (node.args[0], node.args[1])
    for hot, kept in (operands, operands[::-1]):
        if not isinstance(hot, Node) or not isinstance(kept, Node) or op_name(hot) != "aten::one_hot":
            continue
        value = tensor_of(kept)
        if value is None or value.dtype is not torch.bool:
            continue
        classes, shape = arguments(hot)["num_classes"], shape_of(node) or ()
        if same_shape(shape_of(kept) or (), shape) and isinstance(classes, int) and known_equal(shape[-1], classes):
            return hot, kept
    return None


def _takes_places(user: Node, mask: Node) -> bool:
    """Whether a call asks where a mask is true, or is a view of it of which that is asked."""
    if op_name(user) in ("aten::where", "aten::nonzero"):
        return len(user.args) == 1
    if op_name(user) in ("aten::index", "aten::index_put"):
        return mask is not user.args[0]
    return op_name(user) in VIEWS and any(_takes_places(reader, user) for reader in user.users)


def _rewrite(node: Node, hot: Node, kept: Node) -> None:
    graph, ids = node.graph, arguments(hot)["self"]
    classes, values = arguments(hot)["num_classes"], FakeValues(tensor_of(ids).fake_mode)
    emit = Emitter(graph, node, values)
    place = emit(aten.gather.default, kept, -1, emit(aten.unsqueeze.default, ids, -1))
    named = emit(aten.where.ScalarOther, emit(aten.squeeze.dim, place, -1), ids, classes)

    def compared(emit: Emitter, ids: Node, dtype: torch.dtype = torch.int64) -> Node:
        numbers = emit(aten.arange.default, classes, device=tensor_of(ids).device)
        same = emit(aten.eq.Tensor, emit(aten.unsqueeze.default, ids, -1), numbers)
        return same if dtype is torch.bool else emit(aten.to.dtype, same, dtype)

    whole, dead = None, [node]
    # Whoever reads the mask for anything else goes on to do so.
    for user in [user for user in node.users if _takes_places(user, node)]:
        shape, value = shape_of(user) or (), tensor_of(user)
        if op_name(user) == "aten::to" and value is not None and value.dtype is torch.bool:
            dead += [*_columns(user, named, values), user]
            if not set(user.users) <= set(dead):
                replace(user, compared(Emitter(graph, user, values), named, torch.bool))
        elif op_name(user) == "aten::reshape" and len(shape) > 1 and known_equal(shape[-1], classes):
            # The mask in another shape is that of the ids in it.
            emit = Emitter(graph, user, values)
            sizes = only_wide(shape[:-1]) or list(user.args[1][:-1])
            replace(user, compared(emit, emit(aten.reshape.default, named, sizes)))
            graph.erase_node(user)
        else:
            whole = whole or compared(Emitter(graph, node, values), named)
            user.replace_input_with(node, whole)
    erase_dead(graph, dead)


def _columns(mask: Node, named: Node, values: FakeValues) -> list[Node]:
    """Where a class is looked at, the ids are compared with it; in one dimension, if the column is.

    Returns the columns that nobody reads any more.
    """
    graph, flat, unread = mask.graph, None, []
    for column in [user for user in mask.users if op_name(user) == "aten::select"]:
        given, rank = arguments(column), len(shape_of(mask) or ())
        if given["dim"] % rank != rank - 1 or not isinstance(given["index"], int) or given["index"] < 0:
            continue
        for user in [user for user in column.users if op_name(user) == "aten::reshape"]:
            if len(shape_of(user) or ()) == 1:
                flat = flat or Emitter(graph, mask, values)(aten.reshape.default, named, [-1])
                replace(user, Emitter(graph, user, values)(aten.eq.Scalar, flat, given["index"]))
                graph.erase_node(user)
        if column.users:
            replace(column, Emitter(graph, column, values)(aten.eq.Scalar, named, given["index"]))
        unread.append(column)
    return unread
