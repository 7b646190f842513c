"""Regions under ``torch.no_grad`` or ``torch.autocast``, on or off, written into the graph around them.

torch.export keeps such a region as a module of its own, which an op runs in that mode. In a program for inference no
gradient is computed anyway; what autocast would cast is cast by ops of its own.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.matcher import arguments, is_pointwise, op_name
from moe_fx.program import without_guards
from moe_fx.shapes import tensor_of

__all__ = ["inline_regions"]

aten = torch.ops.aten
NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast

#: ops that say themselves which dtype they yield
CASTS = frozenset({"aten::to", "aten::_to_copy", "aten::type_as", "aten::copy"})
#: ops whose operands must be of one dtype, which fake tensors do not check, and which yield that dtype
PRODUCTS = frozenset({
    "aten::linear", "aten::matmul", "aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::einsum",
    "aten::scaled_dot_product_attention", "aten::_grouped_mm", "aten::conv1d", "aten::conv2d", "aten::conv3d",
    "aten::convolution",
})  # fmt: skip
#: ops within which autocast casts what is multiplied, and whose results need not tell
PRODUCTS_WITHIN = frozenset({
    "aten::bilinear", "aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu", "aten::lstm_cell",
    "aten::gru_cell", "aten::rnn_tanh_cell", "aten::rnn_relu_cell",
})  # fmt: skip


def inline_regions(module: GraphModule) -> None:
    """Write the nodes of every region in place of the call that runs it; regions within regions too."""
    for call in [node for node in module.graph.nodes if node.target in (NO_GRAD, AUTOCAST)]:
        _inline(module, module.graph, call, under_autocast=False)
    for read in module.graph.find_nodes(op="get_attr"):
        if not read.users:
            module.graph.erase_node(read)


def _inline(owner: GraphModule, graph: Graph, call: Node, under_autocast: bool) -> None:
    found = _region(owner, call)
    if found is None:
        return
    region, operands, casts = found
    casts = casts or (under_autocast and call.target is NO_GRAD)
    written: dict[Node, Any] = {}
    placeholders = region.graph.find_nodes(op="placeholder")
    written.update(zip(placeholders, operands, strict=True))
    known: dict[tuple[Node, torch.dtype], Node] = {}
    with graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                results = map_arg(node.args[0], written.__getitem__)
                break
            written[node] = copied = graph.node_copy(node, written.__getitem__)
            if node.op == "get_attr" and not hasattr(owner, str(node.target)):
                setattr(owner, str(node.target), getattr(region, str(node.target)))
            elif node.op == "get_attr":
                copied.target = _adopted(owner, region, str(node.target))
            if casts:
                _cast_operands(graph, copied, known)
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(call)
    for inner in [node for node in written.values() if isinstance(node, Node) and node.target in (NO_GRAD, AUTOCAST)]:
        _inline(owner, graph, inner, under_autocast=casts)


def _adopted(owner: GraphModule, region: GraphModule, name: str) -> str:
    """A module of a region as one of the graph around it; its name there."""
    number = 0
    while hasattr(owner, f"{name}_{number}"):
        number += 1
    setattr(owner, f"{name}_{number}", getattr(region, name))
    return f"{name}_{number}"


def _region(owner: GraphModule, call: Node) -> tuple[GraphModule, tuple[Any, ...], bool] | None:
    """The module that a call runs, what it is given, and whether it is under autocast; None if it has to stay."""
    first = 1 if call.target is NO_GRAD else 4
    name, *operands = call.args[first:]
    casts = call.target is AUTOCAST and bool(call.args[2])
    region = getattr(owner, str(name.target)) if isinstance(name, Node) and name.op == "get_attr" else None
    only_parts = all(user.target is operator.getitem for user in call.users)
    if not isinstance(region, GraphModule) or not only_parts:
        return None
    within = casts and any(op_name(node) in PRODUCTS_WITHIN for node in region.graph.nodes)
    return (region, tuple(operands), casts) if not within else None


def _cast_operands(graph: Graph, node: Node, known: dict[tuple[Node, torch.dtype], Node]) -> None:
    """Cast the operands of a call as autocast does, where without it another dtype would come out than in the trace."""
    operands = [each for each in node.all_input_nodes if (t := tensor_of(each)) is not None and t.is_floating_point()]
    yielded = _float_dtypes(node.meta.get("val"))
    if not isinstance(node.target, torch._ops.OpOverload) or not operands or not yielded or _says_dtype(node):
        return
    given = {tensor_of(each).dtype for each in operands}
    # What is computed element by element of several dtypes is what autocast computes; what else is, need not be.
    alike = len(given) == 1 or is_pointwise(node.target) or node.target._schema.is_mutable
    if given == set(yielded) if op_name(node) in PRODUCTS else alike and _yields(node) == yielded:
        return
    for operand in operands:
        if tensor_of(operand).dtype is yielded[0]:
            continue
        if (operand, yielded[0]) not in known:
            with graph.inserting_before(node):
                known[operand, yielded[0]] = cast = graph.call_function(aten.to.dtype, (operand, yielded[0]))
            fake = tensor_of(operand)
            with fake.fake_mode:
                cast.meta["val"] = fake.to(yielded[0])
        node.replace_input_with(operand, known[operand, yielded[0]])


def _says_dtype(node: Node) -> bool:
    return op_name(node) in CASTS or arguments(node).get("dtype") is not None


def _float_dtypes(value: Any) -> list[torch.dtype]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each.dtype for each in values if isinstance(each, torch.Tensor) and each.is_floating_point()]


def _yields(node: Node) -> list[torch.dtype] | None:
    """The dtypes that a call yields without autocast; None if it is an error."""
    target: Any = node.target
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda each: each.meta.get("val"))
    mode: Any = next(
        value.fake_mode for each in node.all_input_nodes  # type: ignore[attr-defined]
        if (value := tensor_of(each)) is not None
    )  # fmt: skip
    try:
        with mode, torch.no_grad(), without_guards(mode):
            return _float_dtypes(target(*args, **kwargs))
    except RuntimeError:  # operands of several dtypes, most likely
        return None
