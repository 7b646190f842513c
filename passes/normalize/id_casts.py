"""Ids that scores chose are read as they were chosen, whatever numbers they are cast to on the way.

ids = to(topk(scores)[1], int32)
perm = argsort(reshape(ids, [-1]))                =>    perm = argsort(reshape(topk(scores)[1], [-1]))
table.scatter(1, to(ids, int64), w)               =>    table.scatter(1, topk(scores)[1], w)
to(ids, float32) == 3.0                           =>    topk(scores)[1] == 3

A place among scores is small enough for each of these dtypes. Where the dtype itself is seen, such as in a result, the
cast stays.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["spell_id_casts"]

_aten = torch.ops.aten

WHOLE = (torch.int32, torch.int64)
#: which hold whole numbers up to ``EXACT``
FLOATS = (torch.float32, torch.float64)
EXACT = 2**24
#: ops that choose, and which of their results are places
CHOOSING = {"aten::topk": 1, "aten::sort": 1, "aten::max": 1, "aten::argsort": None, "aten::argmax": None}
#: ops that show the same numbers in another shape
VIEWS = frozenset({
    "aten::reshape", "aten::transpose", "aten::unsqueeze", "aten::squeeze", "aten::select", "aten::slice",
    "aten::clone", "aten::expand", "aten::flatten", "aten::permute",
})  # fmt: skip
#: ops that read the numbers of an argument, whatever integers they are, and where they have it
READING = {
    "aten::argsort": "self", "aten::bincount": "self", "aten::one_hot": "self",
    "aten::scatter": "index", "aten::scatter_add": "index", "aten::gather": "index", "aten::index_add": "index",
    "aten::index_copy": "index",
}  # fmt: skip


def spell_id_casts(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every read of such a cast; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        if op_name(node) == "aten::to" and node.users and _is_narrowed(node) and memory_of(node) not in written:
            _sink(node, node.args[0], FakeValues(node.meta["val"].fake_mode))
            erase_dead(graph, [node])


def _is_narrowed(cast: Node) -> bool:
    """Whether a value is a cast of places among scores to numbers that hold them all."""
    given, value = arguments(cast), tensor_of(cast)
    source: Any = given["self"]
    before = tensor_of(source)
    if value is None or before is None or value.dtype not in (*WHOLE, *FLOATS) or before.dtype not in WHOLE:
        return False
    while op_name(source) in VIEWS:
        source = source.args[0]
    place = None
    if source.target is operator.getitem:
        source, place = source.args
    if CHOOSING.get(op_name(source) or "", "none") != place:
        return False
    sizes = shape_of(source.args[0]) or ()
    last = arguments(source).get("dim", -1) in (-1, len(sizes) - 1)
    return bool(sizes) and last and isinstance(sizes[-1], int) and sizes[-1] <= EXACT


def _sink(cast: Node, value: Node, values: FakeValues) -> None:
    """Let the readers of a cast read what was cast, where they can."""
    for user in list(cast.users):
        name, seen = op_name(user), tensor_of(user)
        if name in VIEWS and user.args[0] is cast:
            emit = Emitter(user.graph, user, values)
            _sink(user, emit(user.target, value, *user.args[1:], **user.kwargs), values)
            erase_dead(user.graph, [user])
        elif name == "aten::sort":
            _sort(user, cast, value, values)
        elif name == "aten::searchsorted" and _searched(user, cast):
            user.args = (value, _numbers(user, tensor_of(value).dtype, values), *user.args[2:])
        elif name == "aten::to" and seen is not None and seen.dtype is tensor_of(value).dtype:
            replace(user, value)
            erase_dead(user.graph, [user])
        elif name == "aten::to" or _reads_numbers(user, cast):
            user.replace_input_with(cast, value)
            if len(user.args) > 1 and isinstance(user.args[1], float):
                user.args = (value, int(user.args[1]), *user.args[2:])
    # What was written for readers that did not take it is not left behind.
    erase_dead(value.graph, [value])


def _reads_numbers(user: Node, cast: Node) -> bool:
    """Whether an op makes the same of other integers of the same numbers."""
    name = op_name(user) or ""
    if name == "aten::index":
        return user.args[0] is not cast
    if name in ("aten::eq", "aten::ne"):
        whole = not isinstance(user.args[1], float) or user.args[1].is_integer()
        return whole and user.all_input_nodes == [cast]  # with a number, of which the dtype does not matter
    return name in READING and arguments(user)[READING[name]] is cast


def _sort(user: Node, cast: Node, value: Node, values: FakeValues) -> None:
    """Sort what was cast; the sorted numbers are cast behind."""
    dtype = tensor_of(cast).dtype
    user.replace_input_with(cast, value)
    user.meta["val"] = values.of(user)
    for item in [each for each in user.users if each.target is operator.getitem and each.args[1] == 0]:
        item.meta["val"] = user.meta["val"][0]
        emit = Emitter(user.graph, item.next, values)
        again = emit(_aten.to.dtype, item, dtype)
        for reader in [each for each in item.users if each is not again]:
            reader.replace_input_with(item, again)
        _sink(again, item, values)
        erase_dead(user.graph, [again])


def _searched(user: Node, cast: Node) -> bool:
    given = arguments(user)
    whole = not tensor_of(cast).is_floating_point()  # among floats it may be halves that are searched for
    return whole and given["sorted_sequence"] is cast and op_name(given["self"]) == "aten::arange"


def _numbers(user: Node, dtype: torch.dtype, values: FakeValues) -> Node:
    """The numbers that are searched for, in another dtype."""
    arange: Any = arguments(user)["self"]
    emit = Emitter(user.graph, user, values)
    return emit(arange.target, *arange.args, **{**arange.kwargs, "dtype": dtype})
