"""What graphs compute, compared: an outline of numbers that equal calls share, and whether two graphs are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.constants import is_zero, moved
from moe_fx.experts import experts
from moe_fx.matcher import op_name
from moe_fx.rewrite import ASSERTS, is_pure
from moe_fx.shapes import same_shape, shape_of

__all__ = ["WITHOUT_PARAMETERS", "Outline", "outline", "same_graph"]

#: marks what an expert without parameters adds to a layer's result, with its number
WITHOUT_PARAMETERS = "moe_fx_without_parameters"


@dataclass(frozen=True)
class Outline:
    """What a graph computes, as numbers that equal graphs share: what it yields and writes, asserts, and each node."""

    yielded: list[int]
    asserted: set[int]
    numbers: dict[Node, int]


def outline(
    graph: Graph,
    constants: Mapping[Node, torch.Tensor],
    weights: Collection[int] | None = None,
    idle: Callable[[int], bool] = lambda expert: False,
) -> Outline:
    """What a graph computes, to be compared with others.

    The layers raised count as zeros.

    Args:
        graph: without dead code. constants: the values of those placeholders that are constants.
        weights: where a layer is compared with what is left of one without rows, the numbers of its routing weights:
            zeros times these, times plain numbers, and sums of them, are zeros, and what zeros are added to is itself.
        idle: which of the experts without parameters have no rows, and add nothing.
    """
    zeros: set[Node] = set()
    numbers: dict[Node, int] = {}
    yielded: list[int] = []
    asserted: set[int] = set()
    same: dict[Node, Node] = {}
    for node in graph.nodes:
        value, alone = node.meta.get("val"), node.meta.get(WITHOUT_PARAMETERS)
        if alone is not None and idle(alone):
            numbers[node] = numbers[node.args[0]]
            zeros |= {node} if node.args[0] in zeros else set()
            continue
        base = _added_zeros(node, zeros) if weights is not None else None
        if base is None and weights is not None and op_name(node) == "aten::reshape":
            # In its own shape again, what was reshaped for a layer is what it was.
            same[node] = same.get(node.args[0], node.args[0])
            base = same[node] if same_shape(shape_of(same[node]) or (), shape_of(node) or ("",)) else None
        if base is not None:
            numbers[node], same[node] = numbers[base], same.get(base, base)
            zeros |= {node} if base in zeros else set()
            continue
        if _is_left_of_layer(node, zeros, numbers, weights):
            zeros.add(node)
        if node in zeros or moved(node) in zeros:
            assert isinstance(value, torch.Tensor)
            key: Any = ("zeros", value.dtype, value.dim())
        elif node in constants:
            key = ("constant", constants[node].dtype, str(constants[node].tolist()))
        elif node.op in ("placeholder", "get_attr"):
            key = (node.op, node.target, _code(node))
        else:
            # What an assertion says to a reader names a node.
            args = node.args[:1] if op_name(node) in ASSERTS else (node.args, node.kwargs)
            key = (node.target, str(map_arg(args, lambda n: f"%{numbers[n]}")))
        numbers[node] = _NUMBERS.setdefault(key, len(_NUMBERS))
        if op_name(node) in ASSERTS:
            asserted.add(numbers[node])
        elif node.op == "output" or (node.op == "call_function" and not is_pure(node)):
            yielded.append(numbers[node])
    return Outline(yielded, asserted, numbers)


def _code(node: Node) -> str:
    """What a graph that another one calls does, such as a branch of ``torch.cond``; empty for anything else."""
    owner = node.graph.owning_module
    module = getattr(owner, str(node.target), None) if owner is not None and node.op == "get_attr" else None
    if not isinstance(module, GraphModule):
        return ""
    inner = module.graph.find_nodes(op="get_attr")
    return "\n".join([str(module.code), *map(_code, inner)])


def _added_zeros(node: Node, zeros: Collection[Node]) -> Node | None:
    """What a layer that counts as zeros is added to, such as the residual; None for any other value."""
    value = node.meta.get("val")
    if op_name(node) != "aten::add" or node.kwargs or len(node.args) != 2:
        return None
    for added, base in (node.args, node.args[::-1]):
        if isinstance(added, Node) and isinstance(base, Node) and moved(added) in zeros:
            before = base.meta.get("val")
            alike = isinstance(before, torch.Tensor) and isinstance(value, torch.Tensor) and before.dtype == value.dtype
            if alike and same_shape(before.shape, value.shape):
                return base
    return None


def _is_left_of_layer(
    node: Node, zeros: Collection[Node], numbers: Mapping[Node, int], weights: Collection[int] | None
) -> bool:
    if node.target is experts or (isinstance(node.meta.get("val"), torch.Tensor) and is_zero(node)):
        return True
    if weights is None:
        return False
    if op_name(node) in ("aten::empty", "aten::empty_like", "aten::new_empty"):
        return True  # nobody knows what stands where no row was written
    if op_name(node) in ("aten::stack", "aten::gather", "aten::index", "aten::take_along_dim"):
        source = node.args[0]  # the places that are read of zeros are no matter
        return all(each in zeros for each in (source if isinstance(source, list | tuple) else [source]))
    if op_name(node) == "aten::linear" and len(node.args) == 2:
        # One of the model's own, such as that behind a latent layer: with some experts idle, it is compared.
        return (
            node.args[0] in zeros and isinstance(node.args[1], Node) and node.args[1].op in ("placeholder", "get_attr")
        )
    if op_name(node) not in ("aten::mul", "aten::sum", "aten::einsum", "aten::bmm", "aten::matmul"):
        return False
    if any(isinstance(factor, float) and not math.isfinite(factor) for factor in node.args):
        return False
    factors = [moved(factor) for factor in node.all_input_nodes]
    others = [factor for factor in factors if factor not in zeros]
    return len(others) < len(factors) and all(_is_weight(factor, numbers, weights) for factor in others)


def _is_weight(factor: Node, numbers: Mapping[Node, int], weights: Collection[int]) -> bool:
    """Whether a factor is a routing weight, some of these, or a table that holds some of them and zeros."""
    while numbers[factor] not in weights:
        if op_name(factor) in ("aten::select", "aten::slice"):
            source = factor.args[0]
        elif op_name(factor) == "aten::scatter" and is_zero(factor.args[0]):
            source = factor.args[3]
        else:
            return False
        if not isinstance(source, Node):
            return False
        factor = moved(source)
    return True


#: numbers given to what a node computes, for the time of a process
_NUMBERS: dict[Any, int] = {}


def same_graph(one: Graph, other: Graph) -> bool:
    """Whether two graphs make the same calls in the same order on the same values."""
    twin: dict[Node, Node] = {}
    if len(one.nodes) != len(other.nodes):
        return False
    for mine, theirs in zip(one.nodes, other.nodes, strict=True):
        twin[mine] = theirs
        expected = map_arg((mine.args, mine.kwargs), twin.__getitem__)
        if (mine.op, mine.target, expected) != (theirs.op, theirs.target, (theirs.args, theirs.kwargs)):
            return False
        if _code(mine) != _code(theirs):
            return False
    return True
