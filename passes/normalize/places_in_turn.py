"""A tensor whose every place along a dimension is written, one after the other, is a stack of what was written; so are
zeros of which several places are.

out = select_scatter(base, y, 1, 0)      # out[:, 0] = y
out = select_scatter(out, z, 1, 1)       # out[:, 1] = z        =>     out = stack([y, z], 1)

What is read of such a place in between is what was written there, or what was there before.

Core ATen asks for each place whether it is the one: `where(arange(2).view(1, 2, 1) == 1, z.unsqueeze(1), out)`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.constants import is_zero
from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import ANY, WHOLE, As, AtLeast, Var, aten, either
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["spell_places_in_turn"]

_aten = torch.ops.aten
count = Var("count")
numbers = either(aten.arange(count, dtype=WHOLE), aten.arange(0, count, dtype=WHOLE))
rows = As("rows", aten.unsqueeze(Var("source"), ANY))
WHERE = aten.where(
    aten.eq(As("beside", aten.reshape(numbers, ANY)), As("place", AtLeast(0))), aten.expand(rows, ANY), Var("before")
)


#: what a write is, and which argument it leaves as it was but for one place
WRITES = {"aten::select_scatter": 0, "aten::where": 2}


#: how many places are looked at where some are left
MOST = 512


class Write(NamedTuple):
    """``before``, in which ``source`` stands at a ``place`` along ``dim``."""

    before: Node
    source: Node
    dim: int
    place: int


def spell_places_in_turn(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every tensor of which nothing is left as it was; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        if (earlier := _read_earlier(node)) is not None and not {memory_of(node), memory_of(earlier[0])} & {*written}:
            _read_there(node, *earlier)
            continue
        last = op_name(node) in WRITES and not any(_goes_on(user, node) for user in node.users)
        writes = _writes(node) if last else None
        # What was written is read later than it was, and nothing else may write in between.
        read = [each for write in writes or () for each in (write.before, write.source)]
        if writes is None or any(memory_of(each) in written for each in (node, *read)):
            continue
        sources = {write.place: write.source for write in reversed(writes)}  # the last write to a place counts
        emit, dim = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode)), writes[0].dim
        zeros = writes[-1].before
        places = range((shape_of(node) or ())[dim])
        parts = [sources[at] if at in sources else emit(_aten.select.int, zeros, dim, at) for at in places]
        replace(node, emit(_aten.stack.default, parts, dim))
        erase_dead(graph, [node])


def _read_earlier(node: Node) -> tuple[Node, bool] | None:
    """What a place is read from that others were written beside: what was written there, or (True) all there was before
    the writes; None for what is read of any other value."""
    given = arguments(node) if op_name(node) == "aten::select" else None
    if given is None or any(user.op == "output" for user in node.users):
        return None
    whole, rank = given["self"], len(shape_of(given["self"]) or ())
    while (write := _write(whole)) is not None and write.dim == given["dim"] % rank:
        size = (shape_of(whole) or ())[write.dim]
        if not isinstance(given["index"], int) or not isinstance(size, int):
            break
        if write.place == given["index"] % size:
            return write.source, False
        whole = write.before
    return (whole, True) if whole is not given["self"] else None


def _read_there(node: Node, value: Node, whole: bool) -> None:
    if whole:
        node.update_arg(0, value)
        return
    replace(node, value)
    erase_dead(node.graph, [node])


def _goes_on(user: Node, node: Node) -> bool:
    """Whether the next write is to what a write left."""
    at = WRITES.get(op_name(user) or "")
    return at is not None and user.args[at : at + 1] == (node,)


def _writes(node: Node) -> list[Write] | None:
    """The writes by which every place along a dimension is written, the last first; None if one is not.

    Of zeros a few places may be left: those of experts without rows are.
    """
    found, places, write = list[Write](), set[int](), _write(node)
    while write is not None and (not found or write.dim == found[0].dim):
        found.append(write)
        places.add(write.place)
        if 1 < len(places) == (shape_of(node) or ())[write.dim]:
            return found
        write = _write(write.before)
    few = len(places) > 1 and (shape_of(node) or ())[found[0].dim] <= MOST
    return found if few and is_zero(found[-1].before) else None


def _write(node: Node) -> Write | None:
    shape: tuple[Any, ...] = shape_of(node) or ()
    if op_name(node) == "aten::select_scatter":
        given = arguments(node)
        dim, place = given["dim"] % len(shape), given["index"]
        before, source = given["self"], given["src"]
    else:
        found = match(WHERE, node) if op_name(node) == "aten::where" else None
        if not isinstance(found, Match):
            return None
        dim, place = arguments(found["rows"])["dim"] % len(shape), found["place"]
        before, source, beside = found["before"], found["source"], shape_of(found["beside"]) or ()
        along = [shape[dim] if at == dim else 1 for at in range(len(shape))]
        whole = tensor_of(found["beside"]).dtype in (torch.int64, torch.int32)
        if not whole or not same_shape(beside, along) or not same_shape(shape_of(before) or (), shape):
            return None
    if not isinstance(place, int) or not isinstance(shape[dim], int) or not -shape[dim] <= place < shape[dim]:
        return None
    kinds = {(each.dtype, each.device) for each in map(tensor_of, (before, source, node)) if each is not None}
    fits = same_shape(shape_of(source) or (), shape[:dim] + shape[dim + 1 :])
    return Write(before, source, dim, place % shape[dim]) if len(kinds) == 1 and fits else None
