"""Views, casts and comparisons that are written twice, of the same value with the same arguments, become one.

a = aten.select(ids, 1, 0)       =>     a = aten.select(ids, 1, 0)
b = aten.select(ids, 1, 0)
a == 3, b == 3                          m = a == 3, read twice

So does what is computed element by element from the model's own tensors: a scale that a norm shifts or casts in each of
its calls is one scale, and no expert's own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.matcher import is_pointwise, op_name
from moe_fx.rewrite import replace
from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["merge_equal_values"]

#: ops that compute nothing, or next to nothing
CHEAP = frozenset({
    "aten::to", "aten::select", "aten::slice", "aten::unsqueeze", "aten::squeeze", "aten::reshape",
    "aten::transpose", "aten::permute", "aten::expand", "aten::eq", "aten::ne", "aten::lt", "aten::ge",
    "aten::floor_divide", "aten::repeat_interleave", "aten::repeat",
})  # fmt: skip


def merge_equal_values(graph: Graph, written: set[Node], weights: Collection[Node]) -> None:
    """Let the first of equal calls stand for all; ``written`` is memory that ops in place still write.

    ``weights`` are the model's own tensors.
    """
    known: dict[Any, Node] = {}
    own = set(weights)
    for node in list(graph.nodes):
        if node.kwargs or any(memory_of(each) in written for each in (node, *node.all_input_nodes)):
            continue
        cheap, operands = op_name(node) in CHEAP or _joins_ids(node), node.all_input_nodes
        if operands and own.issuperset(operands) and (cheap or _is_elementwise(node)):
            own.add(node)
        elif not cheap:
            continue
        if any(user.op == "output" for user in node.users):
            continue  # two outputs stay two
        first = known.setdefault((node.target, _key(node.args)), node)
        # Of rows chosen by data, two calls may count their own.
        if first is not node and same_shape(shape_of(first) or (), shape_of(node) or ()):
            replace(node, first)
            graph.erase_node(node)


def _joins_ids(node: Node) -> bool:
    """Whether a call puts the ids of several choices side by side."""
    value = tensor_of(node) if op_name(node) == "aten::stack" else None
    return value is not None and not value.is_floating_point()


def _is_elementwise(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    random = torch.Tag.nondeterministic_seeded in tags
    return op_name(node) == "aten::to" or (is_pointwise(node.target) and not random)


def _key(arg: Any) -> Any:
    if isinstance(arg, tuple | list):
        return tuple(_key(each) for each in arg)
    # 1, 1.0 and True are equal, and mean different dtypes; so are 0.0 and -0.0, and have different signs.
    return (type(arg), repr(arg) if isinstance(arg, float | complex) else arg)
