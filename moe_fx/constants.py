"""Tensors that hold one value throughout: what it is, whatever they were shaped after."""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_fx.matcher import arguments, op_name

__all__ = ["filled_with", "is_zero", "moved", "reads_shapes"]

#: ops that make such tensors: the value, or the argument that holds it
_FILLS: dict[str, float | str] = {
    "aten::zeros": 0.0, "aten::zeros_like": 0.0, "aten::new_zeros": 0.0, "aten::ones": 1.0, "aten::ones_like": 1.0,
    "aten::new_ones": 1.0, "aten::full": "fill_value", "aten::full_like": "fill_value", "aten::new_full": "fill_value",
}  # fmt: skip


#: ops whose results hold nothing of the values of what they are given
_SHAPES = frozenset({
    *_FILLS, "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_permuted", "aten::sym_size",
    "aten::sym_numel", "aten::sym_storage_offset",
})  # fmt: skip


def reads_shapes(node: Node) -> bool:
    """Whether a call depends on the shapes of its operands only, or computes with sizes."""
    return op_name(node) in _SHAPES or isinstance(node.meta.get("val"), torch.SymInt | int)


def filled_with(node: Node) -> float | None:
    """The one value of a tensor, or None if it is not known to have one."""
    if op_name(node) == "aten::to" and isinstance(node.args[0], Node):
        before = filled_with(node.args[0])
        return before if before in (0, 1) else None  # which are themselves in every dtype
    value = _FILLS.get(op_name(node) or "")
    if isinstance(value, str):
        value = arguments(node)[value]
    return value if isinstance(value, int | float) else None


#: ops that move values
MOVES = frozenset({
    "aten::reshape", "aten::transpose", "aten::permute", "aten::expand", "aten::unsqueeze", "aten::squeeze",
    "aten::to", "aten::clone", "aten::contiguous",
})  # fmt: skip


#: ops that read a part
PARTS = frozenset({"aten::select", "aten::slice"})


def moved(node: Node) -> Node:
    """What a value is made of by moving its elements about."""
    while op_name(node) in MOVES and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def is_zero(node: Node) -> bool:
    """Whether a tensor is certainly zero throughout; a part of zeros is."""
    while op_name(moved(node)) in PARTS:
        (node,) = moved(node).args[:1]  # type: ignore[assignment]
    return filled_with(moved(node)) == 0
