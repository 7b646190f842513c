"""What is read of the results of all experts in one dimension, by numbers of rows, is read by expert and token.

results.view(E * T, H)[ids * T + arange(T)[:, None]]        results [E, T, H], ids [T, K]
    =>     results[ids, arange(T)[:, None]]

Numbers `token * E + id` are left alone: an id that is no expert's is then read of another token.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import Match, match, op_name
from moe_fx.pattern import ANY, WHOLE, Last, Var, aten, either
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import Dim, known_equal, same_shape, shape_of

__all__ = ["spell_numbered_rows"]

_aten = torch.ops.aten

numbers = either(aten.arange(ANY, dtype=WHOLE), aten.arange(0, ANY, dtype=WHOLE))
ids, token = Var("ids", rank=2), Var("token", rank=2)
NUMBER = either(aten.add(aten.mul(ids, Var("tokens")), token), aten.add(token, aten.mul(ids, Var("tokens"))))
TOKEN = aten.unsqueeze(numbers, Last(1))


def spell_numbered_rows(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such read; ``written`` is memory that ops in place still write."""
    for node in graph.find_nodes(op="call_function", target=_aten.index.Tensor):
        rows, indices = node.args
        if len(indices) != 1 or op_name(rows) != "aten::reshape" or len(shape_of(rows) or ()) != 2:
            continue
        (place,) = indices
        flat = op_name(place) == "aten::reshape" and len(shape_of(place) or ()) == 1
        found = match(NUMBER, place.args[0] if flat else place)
        results: Any = rows.args[0]
        shape = shape_of(results) or ()
        if not isinstance(found, Match) or len(shape) != 3 or not _by_row(found, shape, shape_of(rows) or ()):
            continue
        if any(memory_of(each) in written for each in (node, rows, results, found["ids"])):
            continue
        emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
        read = emit(_aten.index.Tensor, results, [found["ids"], found["token"]])
        replace(node, emit(_aten.reshape.default, read, [-1, shape[2]]) if flat else read)
        erase_dead(graph, [node])


def _by_row(found: Match, results: tuple[Dim, ...], rows: tuple[Dim, ...]) -> bool:
    """Whether numbers are those of rows ``[E * T, H]`` of results ``[E, T, H]``."""
    experts, tokens, features = results
    many = found["tokens"].meta["val"] if isinstance(found["tokens"], Node) else found["tokens"]
    if not isinstance(many, int | torch.SymInt) or not known_equal(many, tokens) or not isinstance(features, int):
        return False
    numbered = isinstance(match(TOKEN, found["token"]), Match)
    return (
        numbered
        and same_shape(rows, (experts * tokens, features))
        and same_shape(shape_of(found["token"]) or (), (tokens, 1))
    )
