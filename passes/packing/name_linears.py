"""In each body, a linear that reads an expert parameter is named as one, with the format of its weight.

transpose = aten.transpose(p0, 0, 1)       =>     expert_linear = expert_linear(x, (p0,), none[transposed])
linear = aten.linear(x, transpose)

A weight that is cast first, as within autocast, is cast outside the body, all experts at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_fx.experts import expert_linear
from moe_fx.formats import Unquantized
from moe_fx.matcher import op_name
from moe_fx.pipeline import Layer, Work
from moe_fx.program import CastWeight, Program
from moe_fx.rewrite import Emitter, FakeValues
from moe_fx.shapes import tensor_of

__all__ = ["name_linears"]

aten = torch.ops.aten


def name_linears(work: Work) -> None:
    for layer in work.layers:
        _name(layer, work.program)


def _given(layer: Layer) -> tuple[Node, ...]:
    """The nodes of the program that are the layer's parameters."""
    operands: Any = layer.node.args
    return tuple(operands[3])


def _params(layer: Layer) -> list[Node]:
    """The body's placeholders for its parameters."""
    operands: Any = layer.node.args
    first = 1 + len(operands[2])
    return layer.body.graph.find_nodes(op="placeholder")[first : first + len(_given(layer))]


def _name(layer: Layer, program: Program) -> None:
    graph = layer.body.graph
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        rows, weight = node.args[0], node.args[1]
        steps: list[Node] = []
        while isinstance(weight, Node) and op_name(weight) in ("aten::transpose", "aten::to"):
            steps.append(weight)
            weight = weight.args[0]
        if weight not in _params(layer):
            continue  # a linear that all experts share
        casts = [step.args[1] for step in steps if op_name(step) == "aten::to"]
        transposed = (len(steps) - len(casts)) % 2 == 1
        if casts:
            weight = _cast(layer, program, weight, casts[0])
        node.target, node.args = expert_linear, (rows, (weight,), Unquantized(transposed))
        for step in steps:
            if not step.users:
                graph.erase_node(step)
    for param in [param for param in _params(layer) if not param.users]:
        _drop(layer, param)


def _cast(layer: Layer, program: Program, param: Node, dtype: torch.dtype) -> Node:
    """A parameter that is one of the body's, cast; the body's placeholder for it."""
    params = _params(layer)
    outer = _given(layer)[params.index(param)]
    for made, given in zip(params, _given(layer), strict=True):
        if op_name(given) == "aten::to" and given.args == (outer, dtype):
            return made
    cast = Emitter(program.graph, layer.node, FakeValues(program.fake_mode))(aten.to.dtype, outer, dtype)
    source = program.weights.get(outer)
    if source is not None:
        like = torch.empty(tensor_of(cast).shape, dtype=dtype, device="meta")
        program.weights[cast] = CastWeight(source.fqn, like, source)
    with layer.body.graph.inserting_after(params[-1]):
        made = layer.body.graph.placeholder(f"p{len(params)}")
    _give(layer, (*_given(layer), cast))
    return made


def _drop(layer: Layer, param: Node) -> None:
    at = _params(layer).index(param)
    _give(layer, tuple(outer for place, outer in enumerate(_given(layer)) if place != at))
    layer.body.graph.erase_node(param)


def _give(layer: Layer, params: tuple[Node, ...]) -> None:
    layer.node.args = (*layer.node.args[:3], params, *layer.node.args[4:])
