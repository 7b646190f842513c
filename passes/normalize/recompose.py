"""What several ops say together, and one op alone: decomposition tables write the first, authors both.

| written | becomes |
|---|---|
| `squeeze(slice(x, d, i, i + 1), d)` | `select(x, d, i)` |
| `select(ids, -1, 0)` of ids with one slot | `squeeze(ids, -1)` |
| `cat([a.unsqueeze(d), b.unsqueeze(d)], d)` | `stack([a, b], d)` |
| `reshape(cat([a, b], d), [..., 2, n, ...])` | `stack([a, b], d)` |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["RULES", "Spelling"]

aten = torch.ops.aten
Spelling = tuple[Callable[..., Any], tuple[Any, ...]]


def _select(node: Node, given: dict[str, Any]) -> Spelling | None:
    """One place along a dimension, cut out and then squeezed."""
    cut = given["self"]
    if op_name(cut) != "aten::slice" or not isinstance(given.get("dim"), int):
        return None
    part = arguments(cut)
    shape = shape_of(cut) or ()
    dim, start = part["dim"] % len(shape), part["start"] or 0
    if given["dim"] % len(shape) != dim or not known_equal(shape[dim], 1):
        return None
    # Counted from the end, a place before the first one is the first to slice, and none to select.
    return (aten.select.int, (part["self"], dim, start)) if isinstance(start, int) and start >= 0 else None


def _only_slot(node: Node, given: dict[str, Any]) -> Spelling | None:
    """The only column of whole numbers; of a list of places, it is one of as many as a mask has dimensions."""
    value, dim = tensor_of(given["self"]), given["dim"]
    numbers = value is not None and value.dim() == 2 and value.dtype in (torch.int64, torch.int32)
    if not numbers or op_name(given["self"]) == "aten::nonzero" or given["index"] not in (0, -1):
        return None
    only = dim in (1, -1) and isinstance(value.shape[1], int) and value.shape[1] == 1
    return (aten.squeeze.dim, (given["self"], -1)) if only else None


def _stack_of_wide(node: Node, given: dict[str, Any]) -> Spelling | None:
    """Tensors to each of which the dimension was given along which they are joined."""
    tensors, rank = given["tensors"], len(shape_of(node) or ())
    dim = given["dim"] % rank if rank else 0
    sources = []
    for each in tensors:
        if op_name(each) != "aten::unsqueeze" or arguments(each)["dim"] % rank != dim:
            return None
        sources.append(arguments(each)["self"])
    return (aten.stack.default, (sources, dim)) if _alike(sources) else None


def _stack_of_joined(node: Node, given: dict[str, Any]) -> Spelling | None:
    """Tensors joined along a dimension, which is then cut in as many."""
    whole = given["self"]
    # Another reader might write to the joined tensor, and the reshape lie in the same memory.
    if op_name(whole) != "aten::cat" or len(whole.users) != 1:
        return None
    tensors, shape = arguments(whole)["tensors"], shape_of(node) or ()
    first = shape_of(tensors[0]) or ()
    if len(tensors) < 2 or len(shape) != len(first) + 1 or not _alike(tensors):
        return None
    dim = arguments(whole)["dim"] % len(first)
    stacked = (*first[:dim], len(tensors), *first[dim:])
    return (aten.stack.default, (list(tensors), dim)) if same_shape(shape, stacked) else None


def _alike(tensors: list[Any]) -> bool:
    """Whether tensors may be stacked: `cat` promotes dtypes, skips empty tensors, and takes any sizes along its own."""
    first = tensor_of(tensors[0])
    return first is not None and all(
        (each := tensor_of(other)) is not None and each.dtype == first.dtype and same_shape(each.shape, first.shape)
        for other in tensors
    )


RULES: dict[str, Callable[[Node, dict[str, Any]], Spelling | None]] = {
    "aten::squeeze": _select,
    "aten::select": _only_slot,
    "aten::cat": _stack_of_wide,
    "aten::reshape": _stack_of_joined,
}
