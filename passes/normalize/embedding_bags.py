"""Bags of as many rows each, which are weighed and added, written as that.

embedding_bag(rows, places [T*K], arange(0, T*K, K), mode=sum, per_sample_weights=w [T*K])[0]
    =>     (rows[places].view(-1, K, H) * w.view(-1, K)[..., None]).sum(1)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import ANY, Var, aten
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import known_equal, shape_of

__all__ = ["write_out_bags"]

_aten = torch.ops.aten

BAGS = frozenset({"aten::embedding_bag", "aten::_embedding_bag", "aten::_embedding_bag_forward_only"})
SUM = 0
#: where the bags begin
BEGIN = aten.arange(0, ANY, Var("each"), dtype=ANY)


def write_out_bags(graph: Graph) -> None:
    """Rewrite every such bag of which nothing but the sums is read."""
    for node in list(graph.nodes):
        each = _of_each(node)
        if each is None:
            continue
        sums = [user for user in node.users if user.users]
        if len(sums) != 1 or sums[0].target is not operator.getitem or sums[0].args[1] != 0:
            continue
        given, emit = arguments(node), Emitter(graph, node, FakeValues(sums[0].meta["val"].fake_mode))
        _, features = shape_of(given["weight"]) or (0, 0)
        rows = emit(_aten.index.Tensor, given["weight"], [given["indices"]])
        rows = emit(_aten.reshape.default, rows, [-1, each, features])
        if given["per_sample_weights"] is not None:
            weights = emit(_aten.reshape.default, given["per_sample_weights"], [-1, each])
            rows = emit(_aten.mul.Tensor, rows, emit(_aten.unsqueeze.default, weights, -1))
        replace(sums[0], emit(_aten.sum.dim_IntList, rows, [1]))
        erase_dead(graph, [*node.users, node])


def _of_each(node: Node) -> int | None:
    """Of how many rows each bag is a sum, if all are of as many."""
    given: dict[str, Any] = arguments(node) if op_name(node) in BAGS else {"mode": None}
    # -1 stands for no padding where core ATen has it, and for the last row where torch.export does.
    none = None if op_name(node) == "aten::embedding_bag" else -1
    if given["mode"] != SUM or given["include_last_offset"] or given.get("padding_idx", none) != none:
        return None
    begin, places = match(BEGIN, given["offsets"]), shape_of(given["indices"]) or ()
    if not isinstance(begin, Match) or not isinstance(begin["each"], int) or len(places) != 1:
        return None
    fixed = isinstance((shape_of(given["weight"]) or (None,))[-1], int)
    bags = (shape_of(given["offsets"]) or (0,))[0]
    return begin["each"] if fixed and known_equal(bags * begin["each"], places[0]) else None
