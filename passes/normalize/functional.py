"""In-place ops to functional ones, where no alias can see the difference.

`y = x.add_(z)` becomes `y = x + z`, and later readers of `x` read `y`. That is the same program when every value
that shares memory with `x` (its base and the base's other views) is not read later, and the base is made
inside the graph. Where that does not hold the op stays, and what it writes to is remembered: a layer that
reads such memory is left alone.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_fx.matcher import arguments, is_pointwise, op_name
from moe_fx.rewrite import Emitter, FakeValues, respell
from moe_fx.shapes import same_shape, tensor_of

__all__ = ["functionalize", "memory_of"]

#: ops that may return their input itself without saying so in their schema
MAY_RETURN_INPUT = frozenset({"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout"})

#: ops whose result has the dtype of their first operand, whatever the places they write to are given in
INDEXED = frozenset({
    torch.ops.aten.index_put, torch.ops.aten.scatter, torch.ops.aten.index_add, torch.ops.aten.scatter_add,
    torch.ops.aten.index_copy, torch.ops.aten.scatter_reduce,
})  # fmt: skip


def functionalize(graph: Graph) -> set[Node]:
    """Make in-place ops functional; returns the bases of the memory that ops left in place still write."""
    written: set[Node] = set()
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        if (written_part := _written_part(node, order)) is not None:
            base, call, where = written_part
            values = _part_then(node, order)
            respell(node, call, (base, values, *where), {})
            node.meta["val"] = base.meta["val"]
            for user in list(base.users):
                if order[user] > order[node]:
                    user.replace_input_with(base, node)
            continue
        functional = _functional_form(node)
        promoted = _promoted_form(node) if functional is None else None
        target = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if (functional or promoted) is None or target is None or not _harmless(node, target, order):
            written.update(map(memory_of, _written_to(node)))
            continue
        if functional is not None:
            respell(node, functional, node.args, dict(node.kwargs))
        else:
            wide = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode))(promoted, *node.args, **node.kwargs)
            order[wide] = order[node]
            respell(node, torch.ops.aten.to.dtype, (wide, tensor_of(node).dtype), {})
        for user in list(target.users):
            if order[user] > order[node]:
                user.replace_input_with(target, node)
    return written


def _written_to(node: Node) -> list[Node]:
    """The arguments that a call writes; a list of tensors is written as a whole."""
    found: list[Node] = []
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            map_arg(given, found.append)
    return found


#: views of a part of a tensor, and the op that returns the tensor with that part replaced
PARTS = {"aten::slice": torch.ops.aten.slice_scatter.default, "aten::select": torch.ops.aten.select_scatter.default}


def _written_part(node: Node, order: dict[Node, int]) -> tuple[Node, torch._ops.OpOverload, tuple[Any, ...]] | None:
    """``whole[a:b] = part``, or an op in place on ``whole[a:b]``: the whole that is written to, the call that yields it
    as it is then, and the arguments that say which part it is."""
    part, values = (*node.args, None, None)[:2]
    split = _split_of(part)
    if not isinstance(part, Node) or not (split or op_name(part) in PARTS) or node.users:
        return None
    base, mine = _all_of((split or part).args[0]), tensor_of(part)
    if not isinstance(base, Node) or mine is None or memory_of(base) is not base:
        return None
    if op_name(node) == "aten::copy_":
        written = tensor_of(values) if isinstance(values, Node) else None
        if written is None or not same_shape(written.shape, mine.shape):
            return None
        rounded = written.is_floating_point() and mine.is_floating_point()
        if written.dtype != mine.dtype and not rounded:
            return None
    elif _functional_form(node) is None:
        return None
    if not _harmless(node, base, order):
        return None
    if split is not None:
        return base, torch.ops.aten.slice_scatter.default, _bounds(node, part, order)
    return base, PARTS[op_name(part) or ""], tuple(part.args[1:])


def _split_of(part: object) -> Node | None:
    """The split whose part a value is."""
    split = part.args[0] if isinstance(part, Node) and part.target is operator.getitem else None
    return split if isinstance(split, Node) and op_name(split) == "aten::split_with_sizes" else None


def _bounds(node: Node, part: Node, order: dict[Node, int]) -> tuple[Any, ...]:
    """Along which dimension a split's part lies, where it begins, and where it ends."""
    (split, place), emit = part.args, Emitter(node.graph, node, FakeValues(node.meta["val"].fake_mode))
    given = arguments(split)
    bounds: list[Any] = [0]
    for size in given["split_sizes"][: place + 1]:  # type: ignore[operator]
        bounds.append(size if bounds[-1] == 0 else emit(operator.add, bounds[-1], size))
        if isinstance(bounds[-1], Node):
            order.setdefault(bounds[-1], order[node])
    return given["dim"], *bounds[-2:]


def _part_then(node: Node, order: dict[Node, int]) -> Any:
    """What stands in a part after it was written."""
    part, values = (*node.args, None)[:2]
    emit = Emitter(node.graph, node, FakeValues(node.meta["val"].fake_mode))
    if op_name(node) != "aten::copy_":
        values = emit(_functional_form(node), *node.args, **node.kwargs)
    elif tensor_of(values).dtype != tensor_of(part).dtype:
        values = emit(torch.ops.aten.to.dtype, values, tensor_of(part).dtype)
    order.setdefault(values, order[node])
    return values


def _all_of(value: Any) -> Any:
    """What a slice from the first to the last element is all of: ``out[:, 0]`` is cut twice."""
    while (
        op_name(value) == "aten::slice"
        and not value.kwargs
        and value.args[2:] in ((), (0,), (0, sys.maxsize), (None, None))
    ):
        value = value.args[0]
    return value


def _promoted_form(node: Node) -> torch._ops.OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor`` of several float dtypes: computed in the widest, then rounded."""
    functional = _out_of_place(node)
    tensors = [tensor_of(node), *map(tensor_of, node.all_input_nodes)]
    elementwise = functional is not None and is_pointwise(functional)
    return (
        functional if elementwise and all(each is not None and each.is_floating_point() for each in tensors) else None
    )


def _functional_form(node: Node) -> torch._ops.OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``, if it yields the same dtype."""
    functional = _out_of_place(node)
    mine, others = tensor_of(node), [tensor_of(arg) for arg in node.all_input_nodes]
    # x.add_(y) keeps the dtype of x; x + y has the promoted one. The same if all are of one dtype.
    if mine is None or any(o is None or (o.dtype != mine.dtype and o.dtype != torch.bool) for o in others):
        return functional if functional is not None and functional.overloadpacket in INDEXED else None
    return functional


def _out_of_place(node: Node) -> torch._ops.OpOverload | None:
    namespace, name = node.target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = node.target._overloadname
    if not name.endswith("_") or packet is None or overload not in packet.overloads():
        return None
    return getattr(packet, overload)


def _is_view(node: Node) -> bool:
    """Whether a call may return memory of its first argument."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and _is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"
    return op_name(node) in MAY_RETURN_INPUT or any(r.alias_info is not None for r in node.target._schema.returns)


def _source(node: Node) -> Node | None:
    """What a view is a view of (one level), or None."""
    if node.op != "call_function" or not _is_view(node) or not node.args:
        return None
    return node.args[0] if isinstance(node.args[0], Node) else None


def memory_of(node: Node) -> Node:
    """The node in whose memory a value lies."""
    while (source := _source(node)) is not None:
        node = source
    return node


def _harmless(node: Node, target: Node, order: dict[Node, int]) -> bool:
    base = memory_of(target)
    if base.op != "call_function" or not isinstance(base.target, torch._ops.OpOverload | type(operator.getitem)):
        return False
    # Every alias made before the write, other than the written value itself, must not be read after it.
    pending, seen = [base], set()
    while pending:
        alias = pending.pop()
        if alias in seen or alias is node:
            continue
        seen.add(alias)
        for user in alias.users:
            later = order[user] > order[node]
            if later and alias is not target:
                return False
            if not later and (_source(user) is alias or _returns_part(user, alias)):
                pending.append(user)
            elif not later and not isinstance(user.target, torch._ops.OpOverload) and user.op != "output":
                return False
    return True


def _returns_part(user: Node, alias: Node) -> bool:
    return user.target is operator.getitem and user.args[0] is alias
