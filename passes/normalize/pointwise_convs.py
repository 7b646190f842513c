"""Convolutions that see one place at a time, where they may be experts': products of channels.

conv1d(rows [1, C, n], w [O, C, 1], b)  of n rows that only values tell
    =>     linear(rows.transpose(1, 2), w.view(O, C), b).transpose(1, 2)
conv1d(x [N, G*C, L], w [G*O, C, 1], b, groups=G)
    =>     (einsum("ngcx,goc->ngox", [x by group, w by group]) + b by group).view(N, G*O, L)
y.sum(1)  of such groups y [N, G, O, L]
    =>     y.transpose(2, 3).sum(1).transpose(1, 2)

The same of images, without a batch, and as core ATen has it. Where no layer is, nothing is gained, and a model beside
its experts may be full of such convolutions. They stay, but for those that

* read rows of which only values tell how many there are, as those of an expert that was hit; or
* have as many groups as there are numbers from which something is chosen in the program: each may be an expert.

What is summed over these groups has its channels put last, where a layer has its features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import depends_on_values, shape_of, tensor_of

__all__ = ["spell_pointwise_convs"]

_aten = torch.ops.aten
CONVOLUTIONS = (_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.convolution.default)
CHOOSING = frozenset({"aten::topk", "aten::sort", "aten::max", "aten::argmax"})
#: how many calls before a sum its groups are looked for
NEAR = 8


def spell_pointwise_convs(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such convolution, and sums over groups; ``written`` is memory that ops in place still write."""
    chosen_from = {_chosen_from(node) for node in graph.nodes if op_name(node) in CHOOSING}
    groups: dict[Node, tuple[int, int]] = {}  # of what groups make: how many they are, and the channels of each
    for node in list(graph.nodes):
        if any(memory_of(each) in written for each in (node, *node.all_input_nodes)):
            continue
        if node.target is _aten.sum.dim_IntList and groups:
            _sum_with_channels_last(node, groups)
        if node.target not in CONVOLUTIONS or not _is_pointwise(given := arguments(node)):
            continue
        emit, count = Emitter(graph, node, FakeValues(node.meta["val"].fake_mode)), given["groups"]
        if count == 1 and any(map(depends_on_values, shape_of(given["input"]) or ())):
            before = node.prev
            try:
                made = _linear(emit, given)
            except RuntimeError:  # torch 2.11 cannot tell such a product's shape: the convolution stays
                while node.prev is not before:
                    graph.erase_node(node.prev)
                continue
        elif count > 1 and count in chosen_from:
            made = _product_of_groups(emit, given)
            groups[made] = count, shape_of(given["weight"])[0] // count
        else:
            continue
        replace(node, made)
        erase_dead(graph, [node])


def _chosen_from(choice: Node) -> int | None:
    """From how many numbers an op chooses, if that is fixed."""
    given, shape = arguments(choice), shape_of(choice.args[0])
    count = shape[given["dim"]] if shape and isinstance(given.get("dim"), int) else None
    return count if isinstance(count, int) else None


def _is_pointwise(given: dict[str, Any]) -> bool:
    """Whether a convolution yields at each place what it makes of the channels there."""
    x, others = tensor_of(given["input"]), [tensor_of(given[name]) for name in ("weight", "bias") if given[name]]
    if x is None or any(each is None or each.dtype != x.dtype for each in others) or given.get("transposed"):
        return False
    sizes = shape_of(given["weight"]) or ()
    fixed = all(isinstance(size, int) and size > 0 for size in (given["groups"], *sizes))
    ones = fixed and all(each == 1 for each in (*sizes[2:], *given["stride"], *given["dilation"]))
    return ones and all(each == 0 for each in given["padding"])


def _linear(emit: Emitter, given: dict[str, Any]) -> Node:
    """A convolution of one group, of which the channels are put last."""
    channels, each, *ones = shape_of(given["weight"]) or (0, 0)
    at = len(shape_of(given["input"]) or ()) - len(ones) - 1  # of the channels: behind the batch, if there is one
    weight = emit(_aten.reshape.default, given["weight"], [channels, each])
    product = emit(_aten.linear.default, _moved(emit, given["input"], at, -1), weight, given["bias"])
    return _moved(emit, product, -1, at)


def _moved(emit: Emitter, value: Node, dim: int, to: int) -> Node:
    order = list(range(len(shape_of(value) or ())))
    order.insert(to % len(order), order.pop(dim))
    return emit(_aten.permute.default, value, order)


def _product_of_groups(emit: Emitter, given: dict[str, Any]) -> Node:
    x, count = given["input"], given["groups"]
    channels, each, *ones = shape_of(given["weight"]) or (0, 0)
    known = enumerate(shape_of(x) or ())
    sizes = [size if isinstance(size, int) else emit(_aten.sym_size.int, x, at) for at, size in known]
    at = len(sizes) - len(ones) - 1
    batch, places = "n" * at, "xyz"[: len(ones)]
    rows = emit(_aten.reshape.default, x, [*sizes[:at], count, each, *sizes[at + 1 :]])
    weight = emit(_aten.reshape.default, given["weight"], [count, channels // count, each])
    product = emit(_aten.einsum.default, f"{batch}gc{places},goc->{batch}go{places}", [rows, weight])
    if given["bias"] is not None:
        bias = emit(_aten.reshape.default, given["bias"], [count, channels // count])
        for _ in ones:
            bias = emit(_aten.unsqueeze.default, bias, -1)
        product = emit(_aten.add.Tensor, product, bias)
    return emit(_aten.reshape.default, product, [*sizes[:at], channels, *sizes[at + 1 :]])


def _sum_with_channels_last(total: Node, groups: Mapping[Node, tuple[int, int]]) -> None:
    given, shape = arguments(total), shape_of(total.args[0]) or ()
    if len(given["dim"] or ()) != 1 or given["keepdim"] or not shape:
        return
    at = given["dim"][0] % len(shape)
    sizes = shape[at : at + 2]
    fixed = all(isinstance(size, int) for size in sizes)
    if at + 2 >= len(shape) or not fixed or sizes not in _before(total, groups):
        return
    emit = Emitter(total.graph, total, FakeValues(tensor_of(total).fake_mode))
    last = emit(total.target, _moved(emit, given["self"], at + 1, -1), [at], dtype=given["dtype"])
    replace(total, _moved(emit, last, -1, at))
    erase_dead(total.graph, [total])


def _before(total: Node, groups: Mapping[Node, tuple[int, int]]) -> list[tuple[int, int]]:
    """The groups of which a sum is made: how many, and the channels of each."""
    seen, reached = set[Node](), {total}
    for _ in range(NEAR):
        reached = {each for node in reached - groups.keys() for each in node.all_input_nodes} - seen
        seen |= reached
    return [groups[node] for node in groups if node in seen]
