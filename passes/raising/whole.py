"""What a value is cut from, or joined of, and whether that is all of it: only values tell how many rows it has."""

from __future__ import annotations

import operator

from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import known_equal, same_shape, shape_of

__all__ = ["cut_from", "whole_of"]


def whole_of(node: Node) -> Node | None:
    """The value whose rows these are, all of them: it is cut from it, or joined of it and nothing else."""
    whole = cut_from(node) or _beside_nothing(node)
    return whole if whole is not None and same_shape(shape_of(node) or (), shape_of(whole) or ()) else None


def cut_from(node: Node) -> Node | None:
    """What a value is a part of, cut along one dimension."""
    if op_name(node) == "aten::slice":
        return arguments(node)["self"]
    split = node.args[0] if node.target is operator.getitem else None
    return arguments(split)["self"] if isinstance(split, Node) and op_name(split) == "aten::split_with_sizes" else None


def _beside_nothing(node: Node) -> Node | None:
    """What is joined with nothing but parts that have no rows."""
    parts = arguments(node)["tensors"] if op_name(node) == "aten::cat" else ()
    some = [part for part in parts if not known_equal((shape_of(part) or (1,))[0], 0)]
    return some[0] if len(some) == 1 < len(parts) else None
