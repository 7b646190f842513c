"""In each body, a linear that reads an expert parameter is named as one, with the format of its weight.

transpose = aten.transpose(p0, 0, 1)       =>     expert_linear = expert_linear(x, (p0,), none[transposed])
linear = aten.linear(x, transpose)
"""

from __future__ import annotations

import torch
from moe_fx.passes.packing.parameters import parameters, settle_parameters
from torch.fx import Node

from moe_fx.experts import expert_linear
from moe_fx.formats import Unquantized
from moe_fx.matcher import op_name
from moe_fx.pipeline import Layer, Work

__all__ = ["name_linears"]


def name_linears(work: Work) -> None:
    for layer in work.layers:
        settle_parameters(layer, work.program)
        _name(layer)


def _name(layer: Layer) -> None:
    graph, params = layer.body.graph, parameters(layer)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        rows, weight = node.args[:2]
        transposed = op_name(weight) == "aten::transpose"
        param = weight.args[0] if transposed and isinstance(weight, Node) else weight
        if param not in params:
            continue  # a linear that all experts share
        node.target, node.args = expert_linear, (rows, (param,), Unquantized(transposed))
        if isinstance(weight, Node) and weight is not param and not weight.users:
            graph.erase_node(weight)
