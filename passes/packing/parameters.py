"""What a body does to a parameter before it meets rows is done outside, to the parameters of all experts at once.

body: linear(x, reshape(to(p0, bf16), [1, 32]))    =>    body: linear(x, p0)
experts(x, ids, (), (w,), ...)                           experts(x, ids, (), (reshape(to(w, bf16), [E, 1, 32]),), ...)
"""

from __future__ import annotations

from typing import Any

import torch
from moe_fx.passes.packing.cut_parameters import join_cut_linears, slice_cuts
from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.pipeline import Layer
from moe_fx.program import Program
from moe_fx.rewrite import Emitter, FakeValues
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["parameters", "settle_parameters"]

aten = torch.ops.aten
#: what can be done to all experts at once; a transposition alone is left to the linear that reads it
SETTLED = frozenset(
    {"aten::to", "aten::reshape", "aten::unsqueeze", "aten::squeeze", "aten::transpose", "aten::slice", "aten::select"}
)
Call = tuple[Any, tuple[Any, ...]]


def parameters(layer: Layer) -> list[Node]:
    """The body's placeholders for its parameters."""
    operands: Any = layer.node.args
    first = 1 + len(operands[2])
    return layer.body.graph.find_nodes(op="placeholder")[first : first + len(operands[3])]


def settle_parameters(layer: Layer, program: Program) -> None:
    """Move casts, changes of shape, and parts of parameters out of the body."""
    graph = layer.body.graph
    graph.eliminate_dead_code()  # two transpositions that cancelled out would be moved out for nobody
    both = zip(parameters(layer), _given(layer), strict=True)
    ranks = {param: len(shape_of(outer) or ()) - 1 for param, outer in both}
    slice_cuts(graph, ranks)
    join_cut_linears(graph, ranks)
    for node in list(graph.nodes):
        if op_name(node) not in SETTLED or node.args[0] not in parameters(layer):
            continue
        if op_name(node) == "aten::transpose" and not any(op_name(user) in SETTLED for user in node.users):
            continue
        node.replace_all_uses_with(_moved_out(layer, program, node))
        graph.erase_node(node)
    for unread in [param for param in parameters(layer) if not param.users]:
        _drop(layer, unread)


def _moved_out(layer: Layer, program: Program, node: Node) -> Node:
    """The body's placeholder for what ``node`` makes of a parameter."""
    params, given = parameters(layer), _given(layer)
    outer = given[params.index(node.args[0])]
    target, rest = _for_all_experts(node, outer)
    for param, known in zip(params, given, strict=True):
        if known.target is target and known.args == (outer, *rest):
            return param
    made = Emitter(program.graph, layer.node, FakeValues(program.fake_mode))(target, outer, *rest)
    program.derive(made)
    with layer.body.graph.inserting_after(params[-1]):
        placeholder = layer.body.graph.placeholder(f"p{len(params)}")
    _give(layer, (*given, made))
    return placeholder


def _for_all_experts(node: Node, outer: Node) -> Call:
    """The same call on ``[E, ...]``: the op, and its arguments but the first."""
    name, given = op_name(node), arguments(node)
    experts, *inner = tensor_of(outer).shape

    def behind(dim: int, rank: int = len(inner)) -> int:
        return dim % rank + 1

    match name:
        case "aten::to":
            return aten.to.dtype, (given["dtype"],)
        case "aten::reshape":
            return aten.reshape.default, ([experts, *given["shape"]],)
        case "aten::unsqueeze":
            return aten.unsqueeze.default, (behind(given["dim"], len(inner) + 1),)
        case "aten::slice":
            return aten.slice.Tensor, (behind(given["dim"]), given["start"], given["end"], given["step"])
        case "aten::select":
            return aten.select.int, (behind(given["dim"]), given["index"])
        case "aten::squeeze":
            return aten.squeeze.dim, (behind(given["dim"]),)
        case _:
            return aten.transpose.int, (behind(given["dim0"]), behind(given["dim1"]))


def _given(layer: Layer) -> tuple[Node, ...]:
    """The nodes of the program that are the layer's parameters."""
    operands: Any = layer.node.args
    return tuple(operands[3])


def _drop(layer: Layer, param: Node) -> None:
    at = parameters(layer).index(param)
    _give(layer, tuple(outer for place, outer in enumerate(_given(layer)) if place != at))
    layer.body.graph.erase_node(param)


def _give(layer: Layer, params: tuple[Node, ...]) -> None:
    layer.node.args = (*layer.node.args[:3], params, *layer.node.args[4:])
