"""Ops that are several others at once, or say what others say by the contrary, written as these.

addcmul(x, a, b); addcmul_(x, a, b)    =>     x + a * b; x.add_(a * b)
diff(x, prepend=p)                     =>     whole = cat([p, x], -1);  whole[1:] - whole[:-1]

masked_fill(x, ids != e, 0)            =>     where(ids == e, x, 0)
where(ids != e, 0, x)                  =>     where(ids == e, x, 0)
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace, respell
from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["spell_contraries", "write_out"]

_aten = torch.ops.aten


def write_out(graph: Graph) -> None:
    """Write every op that is several as these."""
    for node in list(graph.nodes):
        if op_name(node) not in ("aten::addcmul", "aten::addcmul_", "aten::diff"):
            continue
        emit, given = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode)), arguments(node)
        if op_name(node) == "aten::diff":
            if tensor_of(node).dtype is not torch.bool:
                replace(node, _differences(emit, given))
                erase_dead(graph, [node])
            continue
        product = emit(_aten.mul.Tensor, given["tensor1"], given["tensor2"])
        if given["value"] != 1:
            product = emit(_aten.mul.Tensor, product, given["value"])
        add = _aten.add.Tensor if op_name(node) == "aten::addcmul" else _aten.add_.Tensor
        respell(node, add, (given["self"], product), {})


def _differences(emit: Emitter, given: dict[str, Any]) -> Node:
    dim, parts = given["dim"], [given["prepend"], given["self"], given["append"]]
    values: Any = given["self"]
    if len(parts := [part for part in parts if part is not None]) > 1:
        values = emit(_aten.cat.default, parts, dim)
    for _ in range(given["n"]):
        later = emit(_aten.slice.Tensor, values, dim, 1, sys.maxsize)
        values = emit(_aten.sub.Tensor, later, emit(_aten.slice.Tensor, values, dim, 0, -1))
    return values


def spell_contraries(graph: Graph, written: Collection[Node]) -> None:
    """Write what is left where numbers do not differ as what is there where they are equal.

    ``written`` is memory that ops in place still write.
    """
    for node in list(graph.nodes):
        given = arguments(node) if op_name(node) in ("aten::masked_fill", "aten::where") else {}
        if op_name(node) == "aten::masked_fill":
            mask, value, kept = given["mask"], given["value"], given["self"]
        elif node.target is _aten.where.ScalarSelf:
            mask, value, kept = given["condition"], given["self"], given["other"]
        else:
            continue
        if any(memory_of(each) in written for each in (node, *node.all_input_nodes, *mask.all_input_nodes)):
            continue
        same = tensor_of(kept).dtype == tensor_of(node).dtype
        if op_name(mask) != "aten::ne" or isinstance(mask.args[1], Node) or isinstance(value, Node) or value != 0:
            continue
        if same and same_shape(shape_of(kept) or (), shape_of(node) or ()):
            emit = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))
            replace(node, emit(_aten.where.ScalarOther, emit(_aten.eq.Scalar, *mask.args), kept, 0))
            erase_dead(graph, [node])
