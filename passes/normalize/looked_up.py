"""Parameters that ids look up, and that are then seen in another shape, are looked up in that shape.

p[ids].view(T, N, K)      p [E, N*K]    ids [T]        =>       p.view(E, N, K)[ids]

So have layers that keep an expert's matrix as a row of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, after, erase_dead, respell
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["spell_looked_up"]

_aten = torch.ops.aten


def spell_looked_up(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such view; ``written`` is memory that ops in place still write."""
    views: dict[Any, Node] = {}
    for node in list(graph.nodes):
        read: Any = node.args[0] if op_name(node) == "aten::reshape" else None
        if op_name(read) != "aten::index":
            continue
        parameter, indices = arguments(read)["self"], arguments(read)["indices"]
        ids = tensor_of(indices[0]) if len(indices) == 1 else None
        if parameter.op not in ("placeholder", "get_attr") or ids is None or ids.dtype is torch.bool:
            continue
        sizes, shape = shape_of(parameter) or (), shape_of(node) or ()
        lead, inner = shape[: ids.dim()], shape[ids.dim() :]
        if len(sizes) != 2 or len(inner) < 2 or not all(isinstance(size, int) for size in (sizes[0], *inner)):
            continue
        if not same_shape(lead, ids.shape) or not known_equal(math.prod(inner), sizes[1]):
            continue
        if any(memory_of(each) in written for each in (parameter, indices[0])):
            continue
        if (parameter, inner) not in views:
            emit = Emitter(graph, after(parameter), FakeValues(tensor_of(node).fake_mode))
            views[parameter, inner] = emit(_aten.reshape.default, parameter, [sizes[0], *inner])
        respell(node, _aten.index.Tensor, (views[parameter, inner], indices), {})
        erase_dead(graph, [read])
