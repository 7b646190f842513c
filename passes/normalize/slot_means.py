"""A mean over a token's slots is a sum over them, of as many parts.

y [T, K, H],  ids [T, K]
y.mean(1)      =>      (y / K).sum(1)

Other means stay: a dimension counts as that of the slots if whole numbers in the program, as ids are, have one of its
size last. Divided first, the sum is no larger than the mean's operands.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import arguments
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["spell_slot_means"]

_aten = torch.ops.aten


def spell_slot_means(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such mean; ``written`` is memory that ops in place still write."""
    numbers = [value for node in graph.nodes if (value := tensor_of(node)) is not None and value.dtype is torch.int64]
    slots = {value.shape[-1] for value in numbers if value.dim() > 1 and isinstance(value.shape[-1], int)}
    for node in graph.find_nodes(op="call_function", target=_aten.mean.dim):
        given, shape = arguments(node), shape_of(node.args[0]) or ()
        dims = [dim % len(shape) for dim in given["dim"] or ()] if shape else []
        if len(shape) < 3 or len(dims) != 1 or dims[0] == len(shape) - 1 or given["dtype"] is not None:
            continue
        count = shape[dims[0]]
        if (
            not isinstance(count, int)
            or count not in slots
            or any(memory_of(each) in written for each in (node, *node.all_input_nodes))
        ):
            continue
        emit = Emitter(graph, node, FakeValues(tensor_of(node).fake_mode))
        part = emit(_aten.div.Tensor, given["self"], count)
        replace(node, emit(_aten.sum.dim_IntList, part, dims, given["keepdim"]))
        erase_dead(graph, [node])
