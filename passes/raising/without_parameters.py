"""Experts without parameters, behind a layer: each returns its rows, weighted, and is a sum over slots of its own.

token, slot = where(ids == e)                                      =>    own = x * s[:, k, None], for each slot k
y = y.index_add(0, token, x[token] * s[token, slot, None])               y = y + where(ids[:, k, None] == e, own, 0)

So no number of rows is left that depends on the routing, and nothing is assumed of how many there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import torch
from moe_fx.passes.raising.memory import written_in_place
from moe_fx.passes.raising.region import Region
from torch.fx import Node
from torch.fx.node import map_arg

from moe_fx.matcher import op_name
from moe_fx.outline import WITHOUT_PARAMETERS
from moe_fx.program import Program
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import same_shape, shape_of

__all__ = ["write_terms"]

aten = torch.ops.aten

#: what such an expert does to its rows
WEIGHING = frozenset({"aten::mul", "aten::reshape", "aten::to", "aten::clone", "aten::unsqueeze"})


def write_terms(
    program: Program, region: Region, flatten: Callable[[Program, Region], None], written: Collection[Node]
) -> None:
    """Write the steps that follow a layer as sums over its slots, as far as they only weigh rows.

    ``written`` is memory that ops in place still write.
    """
    for expert, alone in region.alone:
        calls = [node for node in alone.body.graph.nodes if node.op == "call_function"]
        base, step = alone.root.args[0], alone.root
        if not isinstance(base, Node) or any(op_name(node) not in WEIGHING for node in calls) or alone.tables:
            continue
        if written_in_place(dataclasses.replace(alone, base=base), written) is not None:
            continue
        flatten(program, alone)
        emit = Emitter(program.graph, step, FakeValues(program.fake_mode))
        if not same_shape(shape_of(alone.tokens) or (), shape_of(step) or ()):
            continue
        total = None
        for slot in range(alone.top_k):
            rows = _rows(alone, slot, emit)
            named = emit(aten.eq.Scalar, emit(aten.select.int, alone.ids, 1, slot), expert)
            other = emit(aten.zeros_like.default, rows)
            own = emit(aten.where.self, emit(aten.unsqueeze.default, named, -1), rows, other)
            total = own if total is None else emit(aten.add.Tensor, total, own)
        result = emit(aten.add.Tensor, base, total)
        result.meta[WITHOUT_PARAMETERS] = expert
        replace(step, result)
        erase_dead(program.graph, [step])


def _rows(alone: Region, slot: int, emit: Emitter) -> Node:
    """What the expert would make of the rows of all tokens, as one of their slots."""
    weights = [emit(aten.select.int, each, 1, slot) for each in alone.slots]
    holders = alone.body.graph.find_nodes(op="placeholder")
    known = dict(zip(holders, [alone.tokens, *weights], strict=True))
    for node in alone.body.graph.nodes:
        if node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = emit(node.target, *args, **kwargs)
    (output,) = alone.body.graph.find_nodes(op="output")
    return known[output.args[0]]
