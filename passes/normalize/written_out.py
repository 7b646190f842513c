"""Ops that are several others at once, or say what others say by the contrary, written as these.

addcmul(x, a, b); addcmul_(x, a, b)    =>     x + a * b; x.add_(a * b)
diff(x, prepend=p)                     =>     whole = cat([p, x], -1);  whole[1:] - whole[:-1]
native_layer_norm(x, ...)[0]           =>     layer_norm(x, ...)
flatten(x, -2)  of any B and S         =>     reshape(x, [x.size(0), x.size(1), 96])
mv(x, w)                               =>     linear(x, w[None]).squeeze(-1)
addmm(rows, x, w)                      =>     rows + mm(x, w)         and baddbmm
index_add(x, 0, at, rows, alpha=2)     =>     index_add(x, 0, at, rows * 2)
mm(x, w, out=part)                     =>     part.copy_(mm(x, w))
bucketize(x, bounds)                   =>     searchsorted(bounds, x)

masked_fill(x, ids != e, 0)            =>     where(ids == e, x, 0)
where(ids != e, 0, x)                  =>     where(ids == e, x, 0)
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace, respell
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["spell_contraries", "write_out"]

_aten = torch.ops.aten
WRITTEN_OUT = frozenset({
    "aten::addcmul", "aten::addcmul_", "aten::diff", "aten::flatten", "aten::unflatten", "aten::mv", "aten::matmul",
    "aten::addmm", "aten::baddbmm", "aten::index_add", "aten::index_add_",
})  # fmt: skip


def write_out(graph: Graph) -> None:
    """Write every op that is several as these."""
    for node in list(graph.nodes):
        if op_name(node.args[0] if node.target is operator.getitem else None) == "aten::native_layer_norm":
            norm: Any = node.args[0]
            if node.args[1] == 0 and len(norm.users) == 1:  # of core ATen
                respell(node, _aten.layer_norm.default, norm.args, {})
                erase_dead(graph, [norm])
            continue
        if node.target is _aten.bucketize.Tensor:  # the same with its arguments exchanged
            respell(node, _aten.searchsorted.Tensor, (node.args[1], node.args[0]), dict(node.kwargs))
            continue
        if (op_name(node) or "").endswith(".out"):
            _copy_out(node)
        if op_name(node) not in WRITTEN_OUT:
            continue
        emit, given = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode)), arguments(node)
        if op_name(node) in ("aten::flatten", "aten::unflatten"):
            _reshape(node, given["self"], emit)
            continue
        if op_name(node) in ("aten::mv", "aten::matmul"):
            rows, vector = node.args
            by_vector = len(shape_of(rows) or ()) == 2 and len(shape_of(vector) or ()) == 1
            if by_vector and tensor_of(node).is_floating_point():
                product = emit(_aten.linear.default, rows, emit(_aten.unsqueeze.default, vector, 0))
                respell(node, _aten.squeeze.dim, (product, -1), {})
            continue
        if op_name(node) in ("aten::index_add", "aten::index_add_"):
            floats = tensor_of(given["source"]).is_floating_point()
            if given["alpha"] != 1 and floats:
                scaled = emit(_aten.mul.Scalar, given["source"], given["alpha"])
                respell(node, node.target, (given["self"], given["dim"], given["index"], scaled), {})
            continue
        if op_name(node) in ("aten::addmm", "aten::baddbmm"):
            target = _aten.mm.default if op_name(node) == "aten::addmm" else _aten.bmm.default
            if given["beta"] == given["alpha"] == 1 and same_shape(shape_of(node) or (), shape_of(given["self"]) or ()):
                respell(node, _aten.add.Tensor, (given["self"], emit(target, *node.args[1:])), {})
            continue
        if op_name(node) == "aten::diff":
            if tensor_of(node).dtype is not torch.bool:
                replace(node, _differences(emit, given))
                erase_dead(graph, [node])
            continue
        if len({tensor_of(given[name]).dtype for name in ("self", "tensor1", "tensor2")}) > 1:
            continue  # the factors are multiplied in the sum's dtype
        product = emit(_aten.mul.Tensor, given["tensor1"], given["tensor2"])
        if given["value"] != 1:
            product = emit(_aten.mul.Tensor, product, given["value"])
        add = _aten.add.Tensor if op_name(node) == "aten::addcmul" else _aten.add_.Tensor
        respell(node, add, (given["self"], product), {})


def _copy_out(node: Node) -> None:
    """A result that is written to a tensor of its shape and dtype is computed first, and then copied."""
    wanted = [(arg.name, str(arg.type)) for arg in node.target._schema.arguments if arg.name != "out"]
    packet, out = node.target.overloadpacket, node.kwargs.get("out")
    for name in packet.overloads():
        overload = getattr(packet, name)
        given = [(arg.name, str(arg.type)) for arg in overload._schema.arguments]
        if given != wanted or overload._schema.is_mutable:
            continue
        kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
        result = Emitter(node.graph, node, FakeValues(node.meta["val"].fake_mode))(overload, *node.args, **kwargs)
        mine, theirs = tensor_of(result), tensor_of(out)
        if theirs is None or mine.dtype != theirs.dtype or not same_shape(shape_of(result) or (), shape_of(out) or ()):
            erase_dead(node.graph, [result])
            return
        respell(node, _aten.copy_.default, (out, result), {})
        return


def _reshape(node: Node, source: Node, emit: Emitter) -> None:
    """Dimensions of any size are those of the source; of one that is merged of these, the others tell the size."""
    shape, before = shape_of(node) or (), shape_of(source) or ()
    unfixed = [at for at, size in enumerate(shape) if not isinstance(size, int)]
    empty = any(isinstance(size, int) and size == 0 for size in shape)
    if empty or (len(unfixed) < 2 and op_name(node) == "aten::flatten"):
        return  # which spelling.py writes
    told: dict[int, int] = {}
    for at in unfixed if len(unfixed) > 1 else []:
        same = next((place for place, size in enumerate(before) if known_equal(size, shape[at])), None)
        told |= {} if same is None else {at: same}
    if len(unfixed) - len(told) > 1:
        return
    sizes: list[Any] = [size if isinstance(size, int) else -1 for size in shape]
    for at, place in told.items():
        sizes[at] = emit(_aten.sym_size.int, source, place)
    respell(node, _aten.reshape.default, (source, sizes), {})


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
