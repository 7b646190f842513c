"""Values copied over a part of a tensor that is then replaced by the copy, as writes to a part are decomposed.

slice_scatter(whole, copy(slice(whole, d, a, b), y), d, a, b)    =>     slice_scatter(whole, y, d, a, b)

`copy(old, new)` is `new` in the shape and dtype of `old`: where it has both already, it is `new`. So is what a value is
replaced with as a whole. If only values tell how long a part is, each cut has a number of its own; cuts from `a` to `b`
of equally long tensors are equally long.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import Dim, known_equal, same_expression, shape_of, tensor_of

__all__ = ["copied"]

BOUNDS = ("start", "end", "step")


def copied(node: Node, written: Collection[Node]) -> Node | None:
    """What a copy holds, if it holds it unchanged; ``written`` is memory that ops in place still write."""
    if op_name(node) not in ("aten::copy", "aten::slice_scatter"):
        return None
    given = arguments(node)
    if op_name(node) == "aten::slice_scatter" and not all(map(_same_bound, _cut(node)[1:4], (0, None, 1))):
        return None  # something is left of what was there
    old, new = given["self"], given["src"]
    mine, theirs = tensor_of(node), tensor_of(new)
    if mine is None or theirs is None or mine.dtype != theirs.dtype or mine.device != theirs.device:
        return None
    # A copy lies in memory of its own.
    if memory_of(node) in written or memory_of(new) in written or any(user.op == "output" for user in node.users):
        return None
    shape, wanted = shape_of(new) or (), shape_of(old) or ()
    same = len(shape) == len(wanted) and all(
        known_equal(size, other) or _is_length(size, old, dim)
        for dim, (size, other) in enumerate(zip(shape, wanted, strict=True))
    )
    return new if same else None


def _is_length(size: Dim, part: Node, dim: int) -> bool:
    """Whether a size is that of a cut of another tensor, from where to where ``part`` is cut."""
    if op_name(part) != "aten::slice" or not isinstance(size, torch.SymInt):
        return False
    cut = _cut(part)
    for other in part.graph.find_nodes(op="call_function", target=part.target, sort=False):
        shape = shape_of(other) or ()
        if cut[0] != dim or not any(same_expression(size, each) for each in shape):
            continue
        found = _cut(other)
        if same_expression(size, shape[found[0]]) and all(map(_same_bound, cut[1:], found[1:])):
            return True
    return False


def _cut(part: Node) -> tuple[int, Any, Any, Any, Dim]:
    """Along which dimension a slice is, its bounds and steps, and how long the whole is."""
    given = arguments(part)
    shape: tuple[Dim, ...] = shape_of(given["self"]) or ()
    dim = given["dim"] % len(shape)
    bounds = map(given.get, BOUNDS)
    start, end, step = (bound.meta.get("val", bound) if isinstance(bound, Node) else bound for bound in bounds)
    everything = isinstance(end, int) and end >= sys.maxsize  # as None is
    return dim, 0 if start is None else start, None if everything else end, step, shape[dim]


def _same_bound(one: Dim | None, other: Dim | None) -> bool:
    return one is other if one is None or other is None else known_equal(one, other)
