"""Whether a value is certainly nowhere below zero, as a softmax and what it is chosen, scaled and normed to."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import tensor_of

__all__ = ["is_not_negative"]

#: ops whose result is nowhere below zero
ALWAYS = frozenset({
    "aten::softmax", "aten::sigmoid", "aten::relu", "aten::exp", "aten::softplus", "aten::abs", "aten::square",
    "aten::one_hot", "aten::hardsigmoid",
})  # fmt: skip
#: ops that make no negative numbers of others, in the arguments named
KEEPS = {
    "aten::to": ("self",), "aten::reshape": ("self",), "aten::unsqueeze": ("self",), "aten::squeeze": ("self",),
    "aten::expand": ("self",), "aten::transpose": ("self",), "aten::permute": ("self",), "aten::clone": ("self",),
    "aten::select": ("self",), "aten::slice": ("self",), "aten::gather": ("self",), "aten::index": ("self",),
    "aten::sum": ("self",), "aten::amax": ("self",), "aten::sqrt": ("self",), "aten::topk": ("self",),
    "aten::sort": ("self",), "aten::max": ("self",), "aten::add": ("self", "other"), "aten::mul": ("self", "other"),
    "aten::div": ("self", "other"), "aten::scatter": ("self", "src"), "aten::scatter_add": ("self", "src"),
    "aten::masked_fill": ("self", "value"), "aten::index_put": ("self", "values"), "aten::dropout": ("input",),
}  # fmt: skip
#: how many calls there are at most between
DEEPEST = 30


def is_not_negative(value: Any, depth: int = 0) -> bool:
    """Whether a value is certainly zero or more everywhere, or not a number."""
    if not isinstance(value, Node):
        return isinstance(value, int | float) and bool(value >= 0)
    filled: float | None = filled_with(value)
    if filled is not None:
        return bool(filled >= 0)
    result = tensor_of(value)
    if result is not None and result.dtype is torch.bool:
        return True  # a mask: false is zero, and true is one
    if value.op != "call_function" or depth > DEEPEST:
        return False
    if value.target is operator.getitem:
        source, place = value.args
        return bool(place == 0) and is_not_negative(source, depth + 1)  # the values, before the places
    name = op_name(value) or ""
    if name in ALWAYS:
        return True
    given = arguments(value) if name in {*KEEPS, "aten::clamp", "aten::stack", "aten::cat"} else {}
    if name == "aten::clamp" and isinstance(given["min"], int | float) and given["min"] >= 0:
        return True
    if name in ("aten::stack", "aten::cat"):
        return all(is_not_negative(each, depth + 1) for each in given["tensors"])
    if name not in KEEPS:
        return False
    kept = [given.get(argument, given.get("value")) for argument in KEEPS[name]]
    return all(map(functools.partial(is_not_negative, depth=depth + 1), kept))
