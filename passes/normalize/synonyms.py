"""Names that PyTorch keeps beside another: each becomes the other.

| written | becomes |
|---|---|
| `multiply`, `subtract`, `divide`, `absolute`, `negative`, `clip` | `mul`, `sub`, `div`, `abs`, `neg`, `clamp` |
| `greater`, `greater_equal`, `less`, `less_equal`, `not_equal` | `gt`, `ge`, `lt`, `le`, `ne` |
| `concat`, `concatenate`, `hstack`, `vstack`, `row_stack`, `column_stack` | `cat` |
| `swapaxes`, `swapdims`, `adjoint` of real numbers, `movedim` of neighbours | `transpose.int` |
| `view_as`, `reshape_as`, `ravel` | `reshape` |
| `expand_as`; `tile` of all dimensions; `narrow` | `expand`; `repeat`; `slice` |
| `inner` with a matrix; `tensordot` | `linear`; `einsum` |
| `argwhere`; `masked_select` by a mask of the same shape | `nonzero`; `index` |
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from moe_fx.passes.normalize.recompose import Spelling
from torch.fx import Node

from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["RULES"]

aten = torch.ops.aten
Rule = Callable[[Node, dict[str, Any]], Spelling | None]


def _named(packet: Any) -> Rule:
    """The overload of the same name, whose arguments are called the same."""

    def rule(node: Node, given: dict[str, Any]) -> Spelling | None:
        target: Any = node.target
        other = getattr(packet, target._schema.overload_name or "default", None)
        if other is None:
            return None
        wanted = other._schema.arguments
        if any(arg.kwarg_only and given.get(arg.name, arg.default_value) != arg.default_value for arg in wanted):
            return None
        return other, tuple(given[arg.name] for arg in wanted if not arg.kwarg_only)

    return rule


def _divide(node: Node, given: dict[str, Any]) -> Spelling | None:
    operands, mode = (given["self"], given["other"]), given.get("rounding_mode")
    if mode is None:
        return (aten.div.Tensor if isinstance(operands[1], Node) else aten.div.Scalar), operands
    return (aten.floor_divide.default, operands) if mode == "floor" else None


def _joined_along(of_rows: int, of_lines: int | None) -> Rule:
    """``cat`` along one dimension for tensors of two dimensions or more, along another (or not at all) for lines."""

    def rule(node: Node, given: dict[str, Any]) -> Spelling | None:
        ranks = {len(shape_of(each) or ()) for each in given["tensors"]}
        if min(ranks) > 1:
            return aten.cat.default, (given["tensors"], of_rows)
        return (aten.cat.default, (given["tensors"], of_lines)) if ranks == {1} and of_lines is not None else None

    return rule


def _swapped(first: str, second: str) -> Rule:
    return lambda node, given: (aten.transpose.int, (given["self"], given[first], given[second]))


def _adjoint(node: Node, given: dict[str, Any]) -> Spelling | None:
    value = tensor_of(node)
    return None if value is None or value.is_complex() else (aten.transpose.int, (given["self"], -2, -1))


def _moved(node: Node, given: dict[str, Any]) -> Spelling | None:
    rank, one, other = len(shape_of(node) or ()), given["source"], given["destination"]
    if not isinstance(one, int) or not isinstance(other, int):
        return None
    order = [dim for dim in range(rank) if dim != one % rank]
    order.insert(other % rank, one % rank)
    return aten.permute.default, (given["self"], order)


def _as_shape(node: Node, given: dict[str, Any]) -> Spelling | None:
    shape = list(shape_of(node) or ())
    unknown = [place for place, size in enumerate(shape) if not isinstance(size, int)]
    if len(unknown) > 1:
        return None
    return aten.reshape.default, (given["self"], [-1 if place in unknown else size for place, size in enumerate(shape)])


def _expand_as(node: Node, given: dict[str, Any]) -> Spelling | None:
    shape, own = shape_of(node) or (), shape_of(given["self"]) or ()
    sizes: list[Any] = []
    for place, size in enumerate(shape, len(own) - len(shape)):
        kept = place >= 0 and same_shape((size,), (own[place],))
        sizes.append(-1 if kept else size)
    return (aten.expand.default, (given["self"], sizes)) if all(isinstance(size, int) for size in sizes) else None


def _tile(node: Node, given: dict[str, Any]) -> Spelling | None:
    whole = len(given["dims"]) >= len(shape_of(given["self"]) or ())
    return (aten.repeat.default, (given["self"], given["dims"])) if whole else None


def _narrow(node: Node, given: dict[str, Any]) -> Spelling | None:
    start, length = given["start"], given["length"]
    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
        return None
    return aten.slice.Tensor, (given["self"], given["dim"], start, start + length)


def _inner(node: Node, given: dict[str, Any]) -> Spelling | None:
    matrix = len(shape_of(given["other"]) or ()) == 2 and len(shape_of(given["self"]) or ()) > 1
    return (aten.linear.default, (given["self"], given["other"])) if matrix else None


def _tensordot(node: Node, given: dict[str, Any]) -> Spelling | None:
    """The dimensions that are summed have one letter, the others of each operand follow in their order."""
    ranks = [len(shape_of(given[name]) or ()) for name in ("self", "other")]
    if sum(ranks) > len(string.ascii_letters):
        return None
    left, right = list(string.ascii_letters[: ranks[0]]), list(string.ascii_letters[ranks[0] : sum(ranks)])
    for one, other in zip(given["dims_self"], given["dims_other"], strict=True):
        right[other % ranks[1]] = left[one % ranks[0]]
    out = [letter for letter in left if letter not in right] + [letter for letter in right if letter not in left]
    return aten.einsum.default, (f"{''.join(left)},{''.join(right)}->{''.join(out)}", [given["self"], given["other"]])


def _masked_select(node: Node, given: dict[str, Any]) -> Spelling | None:
    shape, mask = shape_of(given["self"]), shape_of(given["mask"])
    same = shape is not None and mask is not None and same_shape(shape, mask)
    return (aten.index.Tensor, (given["self"], [given["mask"]])) if same else None


RULES: dict[str, Rule] = {
    **{
        f"aten::{written}": _named(packet)
        for written, packet in {
            "multiply": aten.mul, "subtract": aten.sub, "absolute": aten.abs, "negative": aten.neg, "clip": aten.clamp,
            "greater": aten.gt, "greater_equal": aten.ge, "less": aten.lt, "less_equal": aten.le, "not_equal": aten.ne,
            "concat": aten.cat, "concatenate": aten.cat, "linalg_matmul": aten.matmul, "special_expit": aten.sigmoid,
            "argwhere": aten.nonzero,
        }.items()
    },
    "aten::divide": _divide,
    "aten::true_divide": _divide,
    "aten::special_softmax": lambda node, given: (aten.softmax.int, (given["self"], given["dim"], given["dtype"])),
    "aten::hstack": _joined_along(1, 0),
    "aten::vstack": _joined_along(0, None),
    "aten::row_stack": _joined_along(0, None),
    "aten::column_stack": _joined_along(1, None),
    "aten::swapaxes": _swapped("axis0", "axis1"),
    "aten::swapdims": _swapped("dim0", "dim1"),
    "aten::adjoint": _adjoint,
    "aten::movedim": _moved,
    "aten::moveaxis": _moved,
    "aten::view_as": _as_shape,
    "aten::reshape_as": _as_shape,
    "aten::ravel": lambda node, given: (aten.reshape.default, (given["self"], [-1])),
    "aten::expand_as": _expand_as,
    "aten::tile": _tile,
    "aten::narrow": _narrow,
    "aten::inner": _inner,
    "aten::tensordot": _tensordot,
    "aten::masked_select": _masked_select,
}  # fmt: skip
