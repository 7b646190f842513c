"""A mask of one expert, of ids of one slot: the ids are reduced first, and then compared.

(ids == e).squeeze(-1)    (ids == e)[..., 0]    (ids == e).any(-1)    ids [..., 1]    =>     ids.squeeze(-1) == e
one_hot(ids, E)[..., e].bool()                                                        =>     ids == e
one_hot(ids, E)[..., e]      ids [..., K]                                             =>     (ids == e).to(int64)
no.scatter(-1, ids, True)[..., e]    no [..., E], false throughout                    =>     (ids == e).any(-1)
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.constants import is_zero
from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import ANY, WHOLE, As, Last, OneOfValues, Var, aten, either, optional
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["spell_one_slot_masks"]

_aten = torch.ops.aten
numbers = either(aten.arange(ANY, dtype=WHOLE), aten.arange(0, ANY, dtype=WHOLE))
compared = aten.eq(aten.unsqueeze(Var("ids"), Last(-1)), numbers)
hot_rows = optional(lambda rows: aten.to(rows, ANY), either(aten.one_hot(Var("ids"), ANY), compared))
hot = As("hot", hot_rows)
#: of rows that are scattered to, each is true where one of its ids is
SCATTERED = aten.select(aten.scatter(Var("no"), Last(-1), Var("ids"), OneOfValues(True, 1)), Last(-1), Var("place"))
COLUMN = aten.select(hot, Last(-1), Var("place"))


def spell_one_slot_masks(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such mask; ``written`` is memory that ops in place still write."""
    dead: list[Node] = []
    for node in list(graph.nodes):
        if (chosen := _chosen(node)) is not None and not any(memory_of(each) in written for each in (node, chosen[0])):
            emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
            replace(node, emit(_aten.any.dim, emit(_aten.eq.Scalar, *chosen), -1))
            erase_dead(graph, [node])
            continue
        if (column := _column(node)) is not None and not any(memory_of(each) in written for each in (node, column[0])):
            dead.append(node)
            _compare(node, *column)
            continue
        found = _reduced(node) or _named(node)
        if found is None or any(memory_of(each) in written for each in (node, found[0])):
            continue
        ids, expert, dim = found
        emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
        ids = ids if dim is None else emit(_aten.squeeze.dim, ids, dim)
        replace(node, emit(_aten.eq.Scalar, ids, expert))
        erase_dead(graph, [node])
    erase_dead(graph, [*dead, *(user for node in dead for user in node.users)])


def _reduced(node: Node) -> tuple[Node, int, int | None] | None:
    """Ids, the number they are compared with, and the dimension of one slot that the mask is then read without."""
    if op_name(node) not in ("aten::squeeze", "aten::select", "aten::any"):
        return None
    given = arguments(node)
    mask, dim = given["self"], given.get("dim")
    if op_name(mask) != "aten::eq" or not isinstance(dim, int) or given.get("keepdim"):
        return None
    if given.get("index", 0) not in (0, -1):
        return None
    ids, expert = mask.args
    whole = isinstance(ids, Node) and not tensor_of(ids).dtype.is_floating_point and type(expert) is int
    one = known_equal((shape_of(mask) or (0,))[dim], 1) and len(shape_of(mask) or ()) > 1
    return (ids, expert, dim) if whole and one and same_shape(shape_of(ids) or (), shape_of(mask) or ()) else None


def _column(node: Node) -> tuple[Node, int] | None:
    """Ids, and the number of the expert, whose column of noughts and ones a value is."""
    found = match(COLUMN, node)
    if not isinstance(found, Match) or tensor_of(node).dtype is not torch.int64:
        return None
    experts, place = (shape_of(found["hot"]) or ("",))[-1], found["place"]
    several = isinstance(experts, int) and isinstance(place, int) and len(shape_of(found["ids"]) or ()) > 1
    return (found["ids"], place % experts) if several else None


def _chosen(node: Node) -> tuple[Node, int] | None:
    """The same of a mask of the experts that a token's ids name."""
    found = match(SCATTERED, node)
    if not isinstance(found, Match) or tensor_of(node).dtype is not torch.bool or not is_zero(found["no"]):
        return None
    experts, place = (shape_of(found["no"]) or ("",))[-1], found["place"]
    fixed = isinstance(experts, int) and isinstance(place, int)
    whole = same_shape((shape_of(found["no"]) or ())[:-1], (shape_of(found["ids"]) or ())[:-1])
    return (found["ids"], place % experts) if fixed and whole else None


def _compare(node: Node, ids: Node, expert: int) -> None:
    """Compare ids instead; places are those of a mask."""
    emit = Emitter(node.graph, node, FakeValues(node.meta["val"].fake_mode))
    mask = emit(_aten.eq.Scalar, ids, expert)
    for user in list(node.users):
        if user.target is _aten.to.dtype and tensor_of(user).dtype is torch.bool:
            replace(user, mask)
        elif op_name(user) == "aten::nonzero" or (op_name(user) == "aten::where" and len(user.args) == 1):
            user.replace_input_with(node, mask)
    if any(user.users or user.op == "output" for user in node.users):
        replace(node, emit(_aten.to.dtype, mask, torch.int64))


def _named(node: Node) -> tuple[Node, int, int | None] | None:
    """The same of a column of one-hot rows."""
    column = node.args[0] if node.target is _aten.to.dtype and tensor_of(node).dtype is torch.bool else node
    found = match(COLUMN, column)
    if not isinstance(found, Match) or tensor_of(node).dtype is not torch.bool:
        return None
    experts, place = (shape_of(found["hot"]) or ("",))[-1], found["place"]
    fixed = isinstance(experts, int) and isinstance(place, int)
    return (found["ids"], place % experts, None) if fixed else None
