"""Which ops are row-local: row i of the result depends on row i of the operands only.

A row-local op between the dispatch and the combine belongs to the body, whatever it computes. What is asked
here is only how it treats dimension 0, the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import shape_of

__all__ = ["RowOp", "row_op"]

#: elementwise without the tag
ELEMENTWISE = frozenset({"aten::to", "aten::clone", "aten::contiguous", "aten::masked_fill", "aten::dropout"})

#: ops along one or more dimensions, and the arguments that name them
ALONG = {
    "unsqueeze": ("dim",), "squeeze": ("dim",), "transpose": ("dim0", "dim1"), "slice": ("dim",), "select": ("dim",),
    "split_with_sizes": ("dim",), "cat": ("dim",), "stack": ("dim",), "softmax": ("dim",), "log_softmax": ("dim",),
    "sum": ("dim",), "mean": ("dim",), "amax": ("dim",), "amin": ("dim",), "cumsum": ("dim",), "unbind": ("dim",),
    "glu": ("dim",), "flip": ("dims",), "logsumexp": ("dim",), "linalg_vector_norm": ("dim",), "narrow": ("dim",),
}  # fmt: skip

#: ops that normalize over the last dimensions, and what may follow their first operand
NORMS = frozenset({"aten::layer_norm", "aten::native_layer_norm", "aten::rms_norm"})

#: products of rows with a matrix
LINEARS = frozenset({"aten::linear", "aten::matmul", "aten::mm"})


@dataclass(frozen=True)
class RowOp:
    """How to write an op in a body: its arguments with the row dimension left open."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    elementwise: bool
    #: operands that are the same for every row, such as a norm's weight
    shared: tuple[Node, ...] = ()


def row_op(node: Node, leading: int) -> RowOp | str:
    """How a row-local op reads in a body; for any other op, what is wrong with it.

    Args:
        leading: how many dimensions stand for the rows: 1, or 2 for ``[T, K, ...]``.
    """
    name, shape = op_name(node), shape_of(node)
    if name is None or not name.startswith("aten::"):
        return "a call of an ATen op"
    target = node.target
    if target._schema.is_mutable:
        return "a functional op (this one writes in place, and another value shares its memory)"
    if name in ELEMENTWISE or torch.Tag.pointwise in target.tags:
        return RowOp(node.args, dict(node.kwargs), elementwise=True)
    short = name.removeprefix("aten::")
    given = arguments(node)
    if short in ALONG:
        return _along(node, given, ALONG[short], leading)
    if leading > 1:
        return "an elementwise op"
    if name in NORMS:
        source = shape_of(node.args[0])
        fits = source is not None and len(given["normalized_shape"]) < len(source)
        shared = tuple(arg for arg in node.args[2:] if isinstance(arg, Node))
        return RowOp(node.args, dict(node.kwargs), False, shared) if fits else "a norm over less than all"
    if name in LINEARS and len(shape_of(node.args[1]) or ()) == 2 and len(shape or ()) > 1:
        return RowOp(node.args, dict(node.kwargs), False, tuple(a for a in node.args[1:] if isinstance(a, Node)))
    if name == "aten::permute" and given["dims"][0] == 0:
        return RowOp(node.args, dict(node.kwargs), elementwise=False)
    if name in ("aten::reshape", "aten::expand") and shape is not None:
        return _resized(node, shape)
    return "a row-local op"


def _along(node: Node, given: dict[str, Any], names: tuple[str, ...], leading: int) -> RowOp | str:
    operand = node.args[0][0] if isinstance(node.args[0], list | tuple) else node.args[0]  # cat and stack take lists
    shape = shape_of(operand)
    if shape is None:
        return "a tensor operand"
    grows = op_name(node) in ("aten::unsqueeze", "aten::stack")
    rank = len(shape) + grows
    moved: dict[str, Any] = {}
    for name in names:
        dims = given.get(name)
        listed: list[Any] = list(dims) if isinstance(dims, list | tuple) else [dims]
        if not listed or any(dim is None or dim % rank < leading for dim in listed):
            return "an op along other dimensions than the rows"
        # Counted from the end, a dimension has the same number whether rows are [T, K] or [T*K].
        listed = [dim % rank - rank for dim in listed]
        moved[name] = listed if isinstance(dims, list | tuple) else listed[0]
    schema = [arg.name for arg in node.target._schema.arguments]
    full = {**dict(zip(schema, node.args, strict=False)), **node.kwargs, **moved}
    positional = [arg.name for arg in node.target._schema.arguments if not arg.kwarg_only]
    last = max(place for place, name in enumerate(positional) if name in full)
    args = tuple(full.get(name, given.get(name)) for name in positional[: last + 1])
    kwargs = {name: value for name, value in full.items() if name not in positional}
    return RowOp(args, kwargs, elementwise=False)


def _resized(node: Node, shape: tuple[Any, ...]) -> RowOp | str:
    inner = list(shape[1:])
    if not all(isinstance(size, int) for size in inner):
        return "a shape whose dimensions behind the rows are fixed"
    return RowOp((node.args[0], [-1, *inner]), {}, elementwise=False)
