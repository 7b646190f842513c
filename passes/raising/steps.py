"""The steps of a loop as one layer: each walked apart, they must do the same to their experts.

What differs from step to step and is a tensor of its own per expert is that expert's part of a stacked parameter:

    body 0: linear(x, h0), h0 = w_0     body 1: linear(x, h0), h0 = w_1    =>    body: linear(x, p0), p0 = (w_0, w_1)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from moe_fx.passes.raising.region import Region
from torch.fx import Graph, GraphModule, Interpreter, Node

from moe_fx.experts import per_row
from moe_fx.matcher import Miss, is_pointwise, op_name
from moe_fx.outline import same_graph
from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["in_order", "merge_steps"]

aten = torch.ops.aten
Shapes = dict[Node, tuple[int, ...]]


def in_order(regions: Sequence[Region], experts: Sequence[int]) -> list[Region]:
    """Steps in the order of their experts, whose parameters are stacked in it, however a loop goes through them."""
    return [region for _, region in sorted(zip(experts, regions, strict=True), key=lambda step: step[0])]


def merge_steps(regions: Sequence[Region]) -> Region | Miss:
    """One region for all steps: equal bodies on the same operands, but for the parameters that each has of its own."""
    first = regions[0]
    for region in regions[1:]:
        same = (first.tokens, first.ids, first.slots, first.params) == (
            region.tokens, region.ids, region.slots, region.params,
        ) and len(first.shared) == len(region.shared)  # fmt: skip
        if not same or not same_graph(first.body.graph, region.body.graph):
            return Miss("a loop whose every step does the same to its expert", "steps that differ", region.root)
    columns = list(zip(*(region.shared for region in regions), strict=True))
    own = [place for place, column in enumerate(columns) if any(node is not column[0] for node in column)]
    for place in own:
        wrong = _not_alike(columns[place])
        if wrong is not None:
            return wrong
    if not own:
        return first
    made = _with_parameters(first, own)
    if isinstance(made, Miss):
        return made
    body, flipped = made
    stacks = [tuple(_source(node) if place in flipped else node for node in columns[place]) for place in own]
    shared = [node for place, node in enumerate(first.shared) if place not in own]
    return dataclasses.replace(first, params=[*first.params, *stacks], shared=shared, body=body)


def _not_alike(column: Sequence[Node]) -> Miss | None:
    """Why tensors cannot be stacked, one per expert."""
    first = tensor_of(column[0])
    for node in column:
        value = tensor_of(node)
        if value is None or first is None or value.dtype != first.dtype or not same_shape(value.shape, first.shape):
            return Miss(f"a tensor like {column[0].name} for each expert", node.name, node)
    shape = shape_of(column[0])
    if shape is None or not all(isinstance(size, int) for size in shape):
        return Miss("parameters of fixed sizes", column[0].name, column[0])
    return None


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _with_parameters(region: Region, own: Sequence[int]) -> tuple[GraphModule, set[int]] | Miss:
    """The body with some of its shared operands as parameters; and which of these are now read transposed."""
    graph, copied = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(region.body.graph, copied))
    shapes = {copied[node]: shape for node, shape in _shapes(region).items() if node in copied}
    holders = graph.find_nodes(op="placeholder")
    rows, before = holders[0], holders[: 1 + len(region.slots) + len(region.params)]
    shared = holders[len(before) :]
    last, flipped = before[-1], set()
    for place in own:
        holder, outer = shared[place], region.shared[place]
        last.append(holder)
        last = holder
        matrix = holder
        if op_name(outer) == "aten::transpose" and len(shape_of(outer) or ()) == 2:
            # The parameter itself is stacked, and the body turns it around.
            flipped.add(place)
            with graph.inserting_after(shared[-1] if shared[-1] > holder else holder):
                matrix = graph.call_function(aten.transpose.int, (holder, 0, 1))
            holder.replace_all_uses_with(matrix, delete_user_cb=lambda user, new=matrix: user is not new)
        for user in list(matrix.users):
            if not _read(graph, user, matrix, rows, shapes):
                return Miss("a parameter that multiplies rows, or meets them element by element", user.name, outer)
    for number, holder in enumerate([*before[1 + len(region.slots) :], *(shared[place] for place in own)]):
        holder.target = holder.name = f"p{number}"
    for number, holder in enumerate(node for place, node in enumerate(shared) if place not in own):
        holder.target = holder.name = f"h{number}"
    return GraphModule({}, graph), flipped


def _shapes(region: Region) -> Shapes:
    """The shapes of the values of a body, of a few rows; of none, if they cannot be found out."""
    given: list[Any] = []
    for kind, start in (("rows", 0), ("params", 1), ("shared", 0)):
        for node in [region.tokens, *region.slots] if kind == "rows" else getattr(region, kind):
            value = tensor_of(node[0] if isinstance(node, tuple) else node)
            if value is None:
                return {}
            shape = (3, *region.features[node]) if kind == "rows" else tuple(value.shape)
            shape = shape[1:] if start and not isinstance(node, tuple) else shape
            if not all(isinstance(size, int) for size in shape):
                return {}
            given.append(torch.empty(shape, dtype=value.dtype, device="meta"))
    known: Shapes = {}

    class Counting(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            known[n] = tuple(result.shape) if isinstance(result, torch.Tensor) else ()
            return result

    try:
        Counting(region.body).run(*given)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return {}
    return known


def _read(graph: Graph, user: Node, matrix: Node, rows: Node, shapes: Shapes) -> bool:
    """A call of the body that read the same tensor for every row now reads its expert's; False if it cannot."""
    name, args = op_name(user), list(user.args)
    if name == "aten::linear" and matrix is args[1] and len(args) < 3:
        return True
    if name == "aten::transpose" and matrix.op != "placeholder":
        user.replace_all_uses_with(matrix.args[0])  # turned around twice is as it was
        return True
    if name == "aten::transpose":
        return all(_read(graph, reader, user, rows, shapes) for reader in list(user.users))
    with graph.inserting_before(user):
        if name in ("aten::matmul", "aten::mm") and matrix is args[1]:
            turned = matrix.args[0] if matrix.op != "placeholder" else None  # turned around twice is as it was
            turned = turned or graph.call_function(aten.transpose.int, (matrix, 0, 1))
            user.target, user.args = aten.linear.default, (args[0], turned)
            return True
        if name == "aten::linear" and matrix in args[1:]:
            product = graph.call_function(aten.linear.default, (args[0], args[1]))
            bias = _beside_rows(graph, args[2], rows, shapes, user) if matrix is args[2] else args[2]
            user.target, user.args = aten.add.Tensor, (product, bias)
            return True
        if name in ("aten::rms_norm", "aten::layer_norm") and matrix in args[2:]:
            _norm(graph, user, matrix, rows, shapes)
            return True
        if matrix.op != "placeholder" or not is_pointwise(user.target):
            return False
        lifted = _beside_rows(graph, matrix, rows, shapes, user)
    user.replace_input_with(matrix, lifted)
    return True


def _beside_rows(graph: Graph, own: Any, rows: Node, shapes: Shapes, user: Node) -> Node:
    """An expert's parameter for each row, as an operand of a call: what a row has more dimensions stands between."""
    lifted = graph.call_function(per_row, (own, rows))
    missing = len(shapes.get(user, ())) - 1 - len(shapes.get(own, ()))
    if missing <= 0 or own not in shapes:
        return lifted
    return graph.call_function(aten.reshape.default, (lifted, [-1, *[1] * missing, *shapes[own]]))


def _norm(graph: Graph, user: Node, own: Node, rows: Node, shapes: Shapes) -> None:
    """A norm whose scale or shift is the expert's: these follow as ops of their own."""
    args = list(user.args)
    scale, shift = (*args[2:4], None)[:2] if op_name(user) == "aten::layer_norm" else (args[2], None)
    after = [None] * len(args[2:4]) if op_name(user) == "aten::layer_norm" else [None]
    result = graph.call_function(user.target, (*args[:2], *after, *args[2 + len(after) :]))
    for op, param in ((aten.mul.Tensor, scale), (aten.add.Tensor, shift)):
        if isinstance(param, Node):
            lifted = _beside_rows(graph, param, rows, shapes, user) if param is own else param
            result = graph.call_function(op, (result, lifted))
    user.replace_all_uses_with(result)
    graph.erase_node(user)
