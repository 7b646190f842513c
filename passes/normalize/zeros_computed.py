"""What is computed of zeros and is zero itself adds nothing.

out = out + down(relu(up(zeros)))          =>     out

Authors let an expert without rows take a row of zeros, so that every parameter is used. Zero times a weight is zero:
a weight that is not finite is none.
"""

from __future__ import annotations

from collections.abc import Collection

from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.constants import is_zero, moved
from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import erase_dead, replace
from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["drop_computed_zeros"]

#: elementwise ops that map zero to zero, whatever their other arguments are by default
KEEPING = frozenset({
    "aten::relu", "aten::silu", "aten::gelu", "aten::tanh", "aten::square", "aten::abs", "aten::neg", "aten::elu",
    "aten::leaky_relu", "aten::hardswish", "aten::mish", "aten::dropout",
})  # fmt: skip
MATRIX_PRODUCTS = frozenset({"aten::mm", "aten::matmul", "aten::bmm", "aten::linear"})
PRODUCTS = MATRIX_PRODUCTS | {"aten::mul"}


def drop_computed_zeros(graph: Graph, written: Collection[Node]) -> None:
    """Drop what is added so; ``written`` is memory that ops in place still write."""
    zeros: set[Node] = set()
    multiplied: set[Node] = set()  # those that went through a matrix, as rows go through an expert
    for node in list(graph.nodes):
        value = tensor_of(node)
        if value is None or any(memory_of(each) in written for each in (node, *node.all_input_nodes)):
            continue
        if _is_zero(node, zeros):
            zeros.add(node)
            if op_name(node) in MATRIX_PRODUCTS or not multiplied.isdisjoint(map(moved, node.all_input_nodes)):
                multiplied.add(node)
        elif op_name(node) == "aten::add" and len(node.args) == 2 and not node.kwargs:
            for base, added in (node.args, node.args[::-1]):
                dead = isinstance(added, Node) and moved(added) in multiplied
                if not dead or not isinstance(base, Node) or tensor_of(base) is None:
                    continue
                if tensor_of(base).dtype == value.dtype and same_shape(shape_of(base) or (), value.shape):
                    replace(node, base)
                    erase_dead(graph, [node])
                    break


def _is_zero(node: Node, zeros: Collection[Node]) -> bool:
    if is_zero(node):
        return True
    operands = [each for each in node.all_input_nodes if moved(each) in zeros]
    if not operands:
        return False
    name = op_name(node)
    if name in KEEPING:
        return True
    if name == "aten::pow":
        exponent = node.args[1]
        return isinstance(exponent, int | float) and exponent > 0
    return name in PRODUCTS and arguments(node).get("bias") is None
