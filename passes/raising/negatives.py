"""Whether ids may be negative: an index counts from the end there, where `experts` has no expert.

Proven by what the ids are computed with. What a caller or a table of the model's gives is taken for ids, unless the
table's values are known and are not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import is_number, tensor_of

__all__ = ["may_be_negative"]

#: ops whose results are places, or how many there are
PLACES = frozenset({
    "aten::argmax", "aten::argmin", "aten::argsort", "aten::searchsorted", "aten::bucketize", "aten::nonzero",
    "aten::bincount", "aten::histc", "aten::one_hot", "aten::abs", "aten::sigmoid", "aten::softmax",
})  # fmt: skip
#: ops with values and places, in this order
BOTH = frozenset({"aten::topk", "aten::sort", "aten::max", "aten::min", "aten::mode", "aten::kthvalue"})
#: ops whose results are elements of their first argument
MOVES = frozenset({
    "aten::reshape", "aten::slice", "aten::to", "aten::clone", "aten::unsqueeze", "aten::squeeze", "aten::select",
    "aten::contiguous", "aten::transpose", "aten::permute", "aten::unflatten", "aten::expand", "aten::narrow",
    "aten::roll", "aten::flip", "aten::repeat", "aten::repeat_interleave", "aten::gather", "aten::index",
    "aten::take_along_dim", "aten::index_select", "aten::unbind", "aten::split_with_sizes", "aten::amax", "aten::amin",
    "aten::flatten",
})  # fmt: skip
#: ops that make nothing negative of what is not
KEEPING = frozenset({
    "aten::cat", "aten::stack", "aten::add", "aten::mul", "aten::floor_divide", "aten::maximum", "aten::minimum",
    "aten::where", "aten::masked_fill", "aten::scatter", "aten::fmod", "aten::sum", "aten::cumsum", "aten::floor",
    "aten::round", "aten::trunc", "aten::arange", "aten::full", "aten::zeros", "aten::full_like", "aten::zeros_like",
    "aten::scalar_tensor",
})  # fmt: skip
#: arguments that say where, or how much of something is done
NO_VALUES = frozenset({
    "dim", "index", "indices", "condition", "mask", "dtype", "size", "layout", "device", "pin_memory", "decimals",
    "memory_format",
})  # fmt: skip


def may_be_negative(ids: Node, values_of: Callable[[Node], torch.Tensor | None]) -> Node | None:
    """What may make an id negative; None if nothing does. ``values_of`` are the values of the model's own tensors."""
    pending, seen = [ids], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op in ("placeholder", "get_attr"):
            wrong = _given(node, values_of)
        else:
            wrong = _computed(node, pending)
        if wrong:
            return node
    return None


def _given(node: Node, values_of: Callable[[Node], torch.Tensor | None]) -> bool:
    value, known = tensor_of(node), values_of(node)
    if known is not None and not known.is_complex():
        return bool((known < 0).any())
    return not is_number(node) and (value is None or value.is_floating_point())


def _computed(node: Node, pending: list[Node]) -> bool:
    """Whether an op may make something negative of what is not; what it reads is asked next."""
    value, name = tensor_of(node), op_name(node)
    if (value is not None and value.dtype in (torch.bool, torch.uint8)) or name in PLACES or is_number(node):
        return False
    if node.target is operator.getitem:
        source, place = node.args
        if op_name(source) in BOTH and place == 1:
            return False
        if op_name(source) == "aten::where" or not isinstance(source, Node):
            return not isinstance(source, Node)
        if op_name(source) not in BOTH | MOVES:
            return True
        pending.append(source.args[0])
        return False
    given = arguments(node) if name is not None else {}
    if name == "aten::remainder" and isinstance(given["other"], int):
        return bool(given["other"] <= 0)  # of the sign of what it is divided by
    if name == "aten::clamp":
        if given["min"] is None:
            pending.append(given["self"])
        bounds = [given[bound] for bound in ("min", "max") if given[bound] is not None]
        return not all(isinstance(bound, int | float) and bound >= 0 for bound in bounds)
    if name == "aten::to" and _cuts_off(node):
        return True
    if name in MOVES:
        pending.append(given["self"])
        return False
    if name not in KEEPING:
        return True
    operands = list(_flat(value for key, value in given.items() if key not in NO_VALUES))
    pending.extend(operand for operand in operands if isinstance(operand, Node))
    return any(isinstance(operand, int | float) and operand < 0 for operand in operands)


def _cuts_off(cast: Node) -> bool:
    """Whether a cast may turn a large number into a negative one."""
    source, result = tensor_of(cast.args[0]), tensor_of(cast)
    return (
        source is None or result is None or (result.dtype in (torch.int8, torch.int16) and source.dtype != result.dtype)
    )


def _flat(given: Any) -> Iterator[Any]:
    for each in given:
        if isinstance(each, list | tuple):
            yield from _flat(each)
        else:
            yield each
