"""A linear with a part of a parameter is a part of the linear with all of it.

gate, up = split(p0, [I, I], -2)                          gate_up = linear(x, p0)
silu(linear(x, gate)) * linear(x, up)              =>     gate, up = split(gate_up) ...

The parameter stays as the model holds it, so that it is quantized as one. Where the parts are not those of outputs, or
have different rows, they are cut outside of the body, as slices of all experts at once (`parameters.py`).

Parameters are given with the number of dimensions that one expert's has.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import erase_dead, replace

__all__ = ["join_cut_linears", "slice_cuts"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """From ``start`` to ``end`` of a parameter's dimension ``dim``, counted from the end."""

    param: Node
    dim: int
    start: int
    end: int


def slice_cuts(graph: Graph, params: Mapping[Node, int]) -> None:
    """Parts that a split makes of a parameter, as slices."""
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.target is operator.getitem else None
        given = arguments(source) if op_name(source) == "aten::split_with_sizes" else {}
        if given.get("self") not in params:
            continue
        start = sum(given["split_sizes"][: node.args[1]])
        cut = (given["self"], given["dim"], start, start + given["split_sizes"][node.args[1]])
        with graph.inserting_before(node):
            part = graph.call_function(aten.slice.Tensor, cut)
        part.meta.update(node.meta)
        replace(node, part)
        erase_dead(graph, [node])


def join_cut_linears(graph: Graph, params: Mapping[Node, int]) -> None:
    """Linears of the same rows with several parts of a parameter's outputs are cut from one with all of it."""
    found: dict[tuple[Node, Node], list[tuple[Node, Cut]]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        rows, weight, *bias = node.args
        turned = op_name(weight) == "aten::transpose"
        cut = _cut_of(weight.args[0] if turned else weight, params)
        if cut is not None and cut.dim == (-1 if turned else -2) and not any(bias):
            found.setdefault((rows, cut.param), []).append((node, cut))
    for (rows, param), linears in found.items():
        if len(linears) < 2:
            continue
        first, cut = linears[0]
        with graph.inserting_before(first):
            weight = graph.call_function(aten.transpose.int, (param, -2, -1)) if cut.dim == -1 else param
            whole = graph.call_function(aten.linear.default, (rows, weight))
        for node, cut in linears:
            with graph.inserting_before(node):
                part = graph.call_function(aten.slice.Tensor, (whole, -1, cut.start, cut.end))
            part.meta.update(node.meta)
            replace(node, part)
        erase_dead(graph, [node for node, _ in reversed(linears)])


def _cut_of(value: Any, params: Mapping[Node, int]) -> Cut | None:
    """Which part of a parameter a value is."""
    given = arguments(value) if op_name(value) == "aten::slice" else {}
    if given.get("self") not in params or given["step"] != 1:
        return None
    rank = params[given["self"]]
    bounds = (given["start"] or 0, given["end"])
    fixed = all(isinstance(each, int) for each in bounds)
    return Cut(given["self"], given["dim"] % rank - rank, *bounds) if fixed else None
