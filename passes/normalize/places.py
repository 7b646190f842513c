"""Where a mask is true: its places, and the rows written there, in one spelling.

| written | becomes |
|---|---|
| `nonzero(mask).unbind(1)`, `nonzero(mask).T.unbind(0)` | `where(mask)` |
| `nonzero(mask).T[0]` | `nonzero(mask)[:, 0]` |
| `masked_scatter(out, mask[:, None], rows)`, as many rows as the mask says | `index_put(out, [mask], rows)` |
| `scatter_reduce(x, d, places, rows, "sum")` | `scatter_add(x, d, places, rows)` |
| `index_put(out, [places], rows.reshape([]))` of one place and one row | `index_put(out, [places], rows)` |
| `sum(mask, d) > 0`, `sum(mask, d) != 0`, `sum(mask, d)` as a mask; `amax(mask, d)` | `any(mask, d)` |
| `div(places, k, rounding_mode="trunc")`, as none is negative | `floor_divide(places, k)` |
| `div(places, k).floor().to(int64)` | `floor_divide(places, k)` |
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.normalize.recompose import Spelling
from torch._ops import OpOverload
from torch.fx import Node

from moe_fx.constants import reads_shapes
from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import only_asserted
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["RULES"]

aten = torch.ops.aten


def _columns(node: Node, given: dict[str, Any]) -> Spelling | None:
    """The columns of ``nonzero``, each by itself."""
    listed, turned = given["self"], _turned_list(given["self"])
    at, whole = (1, listed) if turned is None else (0, turned)
    if op_name(whole) != "aten::nonzero" or given["dim"] % 2 != at:
        return None
    # The columns lie in one memory with the list; those of `where` have their own.
    return (aten.where.default, (whole.args[0],)) if _read_once(listed) and _read_once(whole) else None


def _column(node: Node, given: dict[str, Any]) -> Spelling | None:
    """One column of ``nonzero``, read as a row of its transpose."""
    listed = _turned_list(given["self"])
    return (aten.select.int, (listed, 1, given["index"])) if listed is not None and given["dim"] % 2 == 0 else None


def _turned_list(node: Node) -> Node | None:
    """The list of places of which a value is the transpose."""
    if op_name(node) != "aten::transpose":
        return None
    given = arguments(node)
    listed: Node = given["self"]
    turned = op_name(listed) == "aten::nonzero" and given["dim0"] % 2 != given["dim1"] % 2
    return listed if turned else None


def _read_once(node: Node) -> bool:
    """Whether a value has one reader, but for those that only look at its shape."""
    return sum(not reads_shapes(user) and not only_asserted(user) for user in node.users) == 1


def _rows_put(node: Node, given: dict[str, Any]) -> Spelling | None:
    """Rows written where a mask over rows is true: it takes the next element wherever the mask, made wide, is true."""
    out, mask, rows = given["self"], given["mask"], given["source"]
    shape = shape_of(out) or ()
    mask = mask.args[0] if op_name(mask) in ("aten::expand", "aten::expand_as") else mask
    if len(shape_of(mask) or ()) != len(shape):
        return None
    while op_name(mask) == "aten::unsqueeze" and arguments(mask)["dim"] in (-1, len(shape_of(mask) or ()) - 1):
        mask = mask.args[0]
    by, written = shape_of(mask) or (), shape_of(rows) or ()
    if not by or len(by) == len(shape) or not same_shape(by, shape[: len(by)]):
        return None
    # More rows than the mask has true elements would be no error, and the rest of them left out.
    many = (shape_of(user) for user in mask.users if op_name(user) == "aten::index" and user.args[1] == [mask])
    counted = any(known_equal(count[0], written[0]) for count in many if count and written)
    changes = any(isinstance(user.target, OpOverload) and user.target._schema.is_mutable for user in mask.users)
    if changes or not counted or not same_shape(written[1:], shape[len(by) :]):
        return None
    return aten.index_put.default, (out, [mask], rows)


def _scatter_add(node: Node, given: dict[str, Any]) -> Spelling | None:
    if given["reduce"] != "sum" or not given["include_self"]:
        return None
    return aten.scatter_add.default, (given["self"], given["dim"], given["index"], given["src"])


def _one_put(node: Node, given: dict[str, Any]) -> Spelling | None:
    """A single number written to a single place: of ``out[places] = rows``, torch drops dimensions of size 1."""
    values, places = given["values"], given["indices"]
    if len(places) != 1 or op_name(values) != "aten::reshape" or shape_of(values) != ():
        return None
    rows = values.args[0]
    one = all(len(shape_of(each) or ()) == 1 and known_equal(shape_of(each)[0], 1) for each in (rows, *places))
    if not one or len(shape_of(given["self"]) or ()) != 1:
        return None
    return aten.index_put.default, (given["self"], places, rows, given["accumulate"])


def _some(node: Node, given: dict[str, Any]) -> Spelling | None:
    """Whether a mask is true anywhere along a dimension, asked of how often it is."""
    if op_name(node) == "aten::to":
        if tensor_of(node) is None or tensor_of(node).dtype is not torch.bool:
            return None
    elif given["other"] != 0 or isinstance(given["other"], Node):
        return None
    total = given["self"]
    return _any_of(total, arguments(total)) if op_name(total) == "aten::sum" else None


def _any_of(node: Node, given: dict[str, Any]) -> Spelling | None:
    """What is true along one dimension of a mask, which a sum or a maximum tells."""
    mask, dims = given["self"], given.get("dim")
    while op_name(mask) == "aten::to" and isinstance(mask.args[0], Node):
        mask = mask.args[0]
    value = tensor_of(mask)
    dims = dims if isinstance(dims, list | tuple) else [dims]
    if value is None or value.dtype is not torch.bool or len(dims) != 1 or not isinstance(dims[0], int):
        return None
    # The mask is read later than it was.
    return (aten.any.dim, (mask, dims[0], bool(given["keepdim"]))) if not _changes(mask) else None


def _changes(value: Node) -> bool:
    """Whether an op in place writes to a value, or to a view of it or of what it views."""
    waiting, seen = [memory_of(value)], set[Node]()
    while waiting:
        each = waiting.pop()
        if each in seen:
            continue
        seen.add(each)
        for user in each.users:
            if isinstance(user.target, OpOverload) and user.target._schema.is_mutable:
                return True
            if memory_of(user) is not user:
                waiting.append(user)
    return False


def _largest(node: Node, given: dict[str, Any]) -> Spelling | None:
    value = tensor_of(node)
    return _any_of(node, given) if value is not None and value.dtype is torch.bool else None


def _tokens(node: Node, given: dict[str, Any]) -> Spelling | None:
    places, many = given["self"], given["other"]
    if given.get("rounding_mode") != "trunc" or not isinstance(many, int) or many < 1 or not _are_places(places):
        return None
    return aten.floor_divide.default, (places, many)


def _to(node: Node, given: dict[str, Any]) -> Spelling | None:
    """Also a quotient rounded down: exact up to 2^24 rows, as a count in float32 is."""
    value, floor = tensor_of(node), given["self"]
    quotient = floor.args[0] if op_name(floor) in ("aten::floor", "aten::trunc") else None
    if value is None or value.dtype is not torch.int64 or op_name(quotient) != "aten::div":
        return _some(node, given)
    rows = arguments(quotient)
    if rows.get("rounding_mode") is not None or tensor_of(quotient).dtype not in (torch.float32, torch.float64):
        return None
    return _tokens(quotient, {**rows, "rounding_mode": "trunc"})


def _are_places(node: Node) -> bool:
    """Whether numbers are those of rows, of which none is negative."""
    if op_name(node) == "aten::slice":
        return isinstance(node.args[0], Node) and _are_places(node.args[0])
    source: Any = node.args[0] if node.target is operator.getitem or op_name(node) == "aten::select" else None
    if op_name(source) == "aten::split_with_sizes":
        return _are_places(source.args[0])
    listed = op_name(source) == "aten::nonzero" or (op_name(source) == "aten::where" and len(source.args) == 1)
    sorts = op_name(source) == "aten::sort" and bool(node.args[1] == 1)
    return listed or sorts or op_name(node) == "aten::argsort"


RULES: dict[str, Callable[[Node, dict[str, Any]], Spelling | None]] = {
    "aten::unbind": _columns,
    "aten::select": _column,
    "aten::masked_scatter": _rows_put,
    "aten::scatter_reduce": _scatter_add,
    "aten::index_put": _one_put,
    "aten::to": _to,
    "aten::ne": _some,
    "aten::gt": _some,
    "aten::amax": _largest,
    "aten::div": _tokens,
}
