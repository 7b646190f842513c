"""How the places of an op's operands follow from that of its result, and how the op is written within one expert.

Within an expert there are no row axes but the rows themselves, in front: `[T, K, 8]`, `[E, T, 8]` and `[8, T*K]` are
all `[R, 8]` there. An op that touches features only is written with its dimensions counted from the end; one that only
moves rows about vanishes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from moe_fx.passes.raising.anchors import reads_chosen_stack
from moe_fx.passes.raising.axes import Place, aligned, axes_of, feature_dim, features, is_row_dim, regrouped
from moe_fx.passes.raising.whole import whole_of
from torch.fx import Node

from moe_fx.matcher import arguments, is_pointwise, op_name
from moe_fx.shapes import Dim, is_number, known_equal, shape_of

__all__ = ["Through", "is_elementwise", "is_view", "through"]

aten = torch.ops.aten

#: elementwise without the tag
ELEMENTWISE = frozenset({"aten::to", "aten::masked_fill", "aten::dropout"})
VIEWS = frozenset({
    "aten::reshape", "aten::transpose", "aten::permute", "aten::unsqueeze", "aten::squeeze", "aten::expand",
    "aten::repeat", "aten::repeat_interleave", "aten::contiguous", "aten::clone", "aten::view_as", "aten::reshape_as",
    "aten::flatten",
})  # fmt: skip
#: ops along one or more dimensions, and the arguments that name them
ALONG = {
    "slice": "dim", "select": "dim", "narrow": "dim", "cat": "dim", "stack": "dim", "softmax": "dim",
    "log_softmax": "dim", "sum": "dim", "mean": "dim", "amax": "dim", "amin": "dim", "cumsum": "dim", "glu": "dim",
    "flip": "dims", "logsumexp": "dim", "linalg_vector_norm": "dim", "split_with_sizes": "dim", "unbind": "dim",
}  # fmt: skip
#: of these, the ones whose result lacks the dimension
DROPS = frozenset({"select", "unbind"})
#: ops that normalize over the last dimensions
NORMS = frozenset({"aten::layer_norm", "aten::rms_norm"})


@dataclass(frozen=True)
class Through:
    """An op between a value and its operands.

    Attributes:
        operands: the tensors it reads, and their places.
        args, kwargs: of the call within an expert; None if it moves rows only, and its operand stands for it.
        shared: operands that are the same for every row.
        shape: features that the operand is reshaped to, instead of the op's own call.
    """

    operands: tuple[tuple[Node, Place], ...]
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] | None = None
    shared: tuple[Node, ...] = ()
    shape: tuple[int, ...] | None = None


def is_elementwise(node: Node) -> bool:
    return op_name(node) in ELEMENTWISE or is_pointwise(node.target)


def is_view(node: Node) -> bool:
    return op_name(node) in VIEWS


def through(node: Node, place: Place, sizes: Mapping[str, Dim]) -> Through | str:
    """What the operands of ``node`` are if its result is in ``place``; a string says what was wanted instead."""
    name = op_name(node)
    if (whole := whole_of(node)) is not None:
        return Through(((whole, place),))
    if node.target is operator.getitem:
        return _part(node, place)
    if name is None or not name.startswith("aten::"):
        return "a call of an ATen op"
    if node.target._schema.is_mutable:
        return "a functional op (this one writes in place, and another value shares its memory)"
    given = arguments(node)
    rule = _RULES.get(name)
    if is_elementwise(node) and rule is not _same:
        return _elementwise(node, place, sizes)
    if rule is not None:
        return rule(node, given, place, sizes)
    short = name.removeprefix("aten::")
    if short in ALONG:
        return _along(node, given, ALONG[short], place)
    if name in NORMS:
        return _norm(node, given, place)
    return "an elementwise op" if len(axes_of(place)) > 1 else "a row-local op"


def _elementwise(node: Node, place: Place, sizes: Mapping[str, Dim]) -> Through | str:
    operands = []
    # Rows first: what else is chosen by their ids, such as a bias, is told from token rows once the ids are known.
    for operand in sorted(node.all_input_nodes, key=reads_chosen_stack):
        shape = shape_of(operand)
        if is_number(operand):
            operands.append((operand, ()))
            continue
        own = aligned(place, shape, sizes) if shape is not None else None
        if own is None:
            return "an operand that is a tensor or a number"
        operands.append((operand, own))
    return Through(tuple(operands), node.args, dict(node.kwargs))


def _has_rows(dim: tuple[Any, ...]) -> bool:
    """Whether a dimension stands for rows, or for rows and features of theirs."""
    return any(isinstance(axis, str) for axis in dim)


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _reshape(node: Node, given: dict[str, Any], place: Place, sizes: Mapping[str, Dim]) -> Through | str:
    shape = shape_of(_source(node))
    before = regrouped(place, shape, sizes) if shape is not None else None
    if before is None:
        return "a reshape that keeps rows whole"
    return Through(((_source(node), before),), shape=tuple(features(place)))


def _transpose(node: Node, given: dict[str, Any], place: Place, sizes: Mapping[str, Dim]) -> Through | str:
    order = list(range(len(place)))
    if "dims" in given:
        order = [dim % len(place) for dim in given["dims"]]
    else:
        one, other = given["dim0"] % len(place), given["dim1"] % len(place)
        order[one], order[other] = order[other], order[one]
    before: list[Any] = [()] * len(place)
    for result, source in enumerate(order):
        before[source] = place[result]
    own = tuple(before)
    kept = [source for source in range(len(own)) if not is_row_dim(own[source])]
    wide = [source for source in kept if _product(own[source]) > 1]
    moved = [wide.index(source) for source in order if source in wide]
    if moved == sorted(moved):
        return Through(((_source(node), own),), shape=tuple(features(place)))
    if len(moved) == 2:
        return Through(((_source(node), own),), (_source(node), -2, -1), {}, shape=tuple(features(place)))
    return "a permutation that swaps two dimensions of a row"


def _unsqueeze(node: Node, given: dict[str, Any], place: Place, sizes: Mapping[str, Dim]) -> Through | str:
    dim = given["dim"] % len(place)
    if any(isinstance(axis, int) for axis in place[dim]):
        return "a dimension of size 1"
    own = place[:dim] + place[dim + 1 :]
    return Through(((_source(node), own),), shape=tuple(features(place)))


def _squeeze(node: Node, given: dict[str, Any], place: Place, sizes: Mapping[str, Dim]) -> Through | str:
    shape = shape_of(_source(node)) or ()
    dims = given.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    if dims is None or not all(known_equal(shape[dim], 1) for dim in dims):
        return "a squeeze of a dimension of size 1"
    own = list(place)
    for dim in sorted(dim % len(shape) for dim in dims):
        own.insert(dim, ())
    return Through(((_source(node), tuple(own)),), shape=tuple(features(place)))


def _expand(node: Node, given: dict[str, Any], place: Place, sizes: Mapping[str, Dim]) -> Through | str:
    own = aligned(place, shape_of(_source(node)) or (), sizes)
    if own is None:
        return "an expansion"
    padded = (((),) * (len(place) - len(own))) + own
    widened = [not is_row_dim(dim) and _product(dim) != _product(new) for dim, new in zip(padded, place, strict=True)]
    if not any(widened):
        return Through(((_source(node), own),), shape=tuple(features(place)))
    wide = [size if many else -1 for size, many, dim in zip(_sizes(place), widened, place, strict=True)
            if not is_row_dim(dim)]  # fmt: skip
    return Through(((_source(node), own),), (_source(node), ["rows", *wide]), {})


def _product(dim: tuple[Any, ...]) -> int:
    return features((dim,))[0] if not is_row_dim(dim) else 1


def _sizes(place: Place) -> list[int]:
    return [_product(dim) for dim in place]


def _repeat(node: Node, given: dict[str, Any], place: Place, sizes: Mapping[str, Dim]) -> Through | str:
    shape = shape_of(_source(node)) or ()
    repeats = given["repeats"]
    own: list[tuple[Any, ...]] = []
    padding = len(repeats) - len(shape)
    for number, (many, dim) in enumerate(zip(repeats, place, strict=True)):
        if isinstance(many, int) and many == 1:
            kept = dim
        elif dim and isinstance(dim[0], str) and isinstance(many, int) and known_equal(sizes[dim[0]], many):
            kept = dim[1:] or ("1",)  # the outer axis counts the copies
        else:
            return "a repetition over whole rows"
        if number >= padding:
            own.append(kept)
    return Through(((_source(node), tuple(own)),), shape=tuple(features(place)))


def _repeat_interleave(node: Node, given: dict[str, Any], place: Place, sizes: Mapping[str, Dim]) -> Through | str:
    many, dim = given.get("repeats"), given.get("dim")
    if not isinstance(many, int) or not isinstance(dim, int):
        return "a repetition over whole rows"
    dim %= len(place)
    last = place[dim][-1] if place[dim] else None
    if not isinstance(last, str) or not known_equal(sizes[last], many):
        return "a repetition over whole rows"
    own = (*place[:dim], place[dim][:-1] or ("1",), *place[dim + 1 :])
    return Through(((_source(node), own),), shape=tuple(features(place)))


def _same(node: Node, given: dict[str, Any], place: Place, sizes: Mapping[str, Dim]) -> Through | str:
    return Through(((_source(node), place),))


def _named(dims: Any, rank: int) -> list[int] | None:
    listed = list(dims) if isinstance(dims, list | tuple) else [dims]
    if not listed or not all(isinstance(dim, int) for dim in listed):
        return None
    return [dim % rank for dim in listed]


def _along(node: Node, given: dict[str, Any], argument: str, place: Place) -> Through | str:
    short = (op_name(node) or "").removeprefix("aten::")
    many = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]  # cat and stack take lists
    shape = shape_of(many[0])
    wrong = "an op along other dimensions than the rows"
    if shape is None:
        return "a tensor operand"
    rank = len(place) if short == "stack" else len(shape)
    dims = _named(given.get(argument), rank)
    if dims is None:
        return wrong
    drops = short in DROPS or (short in ("sum", "mean", "amax", "amin", "logsumexp", "linalg_vector_norm")
                               and not given.get("keepdim"))  # fmt: skip
    operands = []
    for operand in many:
        own_shape = shape_of(operand) or ()
        if short == "stack":
            if is_row_dim(place[dims[0]]):
                return wrong
            operands.append((operand, place[: dims[0]] + place[dims[0] + 1 :]))
            continue
        own: list[tuple[Any, ...]] = [] if drops else list(place)
        rest = list(place)
        for dim in range(len(own_shape)):
            size = own_shape[dim]
            if dim in dims:
                if not isinstance(size, int) or (not drops and _has_rows(place[dim])):
                    return wrong
                feature: tuple[Any, ...] = (size,) if size > 1 else ()
                if drops:
                    own.append(feature)
                else:
                    own[dim] = feature
            elif drops:
                own.append(rest.pop(0))
        operands.append((operand, tuple(own)))
    base = place if short == "stack" else operands[0][1]
    moved = [feature_dim(base, dim) for dim in dims]
    if any(dim is None for dim in moved):
        return wrong
    value: Any = moved if isinstance(given[argument], list | tuple) else moved[0]
    return Through(tuple(operands), *_call(node, given, {argument: value}))


def _call(node: Node, given: dict[str, Any], changed: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    schema = [arg.name for arg in node.target._schema.arguments]
    full = {**dict(zip(schema, node.args, strict=False)), **node.kwargs, **changed}
    positional = [arg.name for arg in node.target._schema.arguments if not arg.kwarg_only]
    last = max(place for place, name in enumerate(positional) if name in full)
    args = tuple(full.get(name, given.get(name)) for name in positional[: last + 1])
    return args, {name: value for name, value in full.items() if name not in positional}


def _norm(node: Node, given: dict[str, Any], place: Place) -> Through | str:
    over = len(given["normalized_shape"])
    if any(map(_has_rows, place[-over:])):
        return "a norm over less than all"
    shared = tuple(arg for arg in node.args[2:] if isinstance(arg, Node))
    return Through(((_source(node), place),), node.args, dict(node.kwargs), shared)


def _part(node: Node, place: Place) -> Through | str:
    """One of the results of an op: of a split, an unbind, or a norm that returns several."""
    source = node.args[0]
    name = op_name(source)
    if name == "aten::native_layer_norm" and node.args[1] == 0 and isinstance(source, Node):
        return _norm(source, arguments(source), place)
    if name not in ("aten::split_with_sizes", "aten::unbind") or not isinstance(source, Node):
        return "a part of a split"
    shape, dim = shape_of(source.args[0]) or (), arguments(source)["dim"]
    dim %= len(shape)
    if not isinstance(shape[dim], int):
        return "a split along a dimension of fixed size"
    if name == "aten::unbind":
        own = (*place[:dim], (shape[dim],), *place[dim:])
    else:
        if _has_rows(place[dim]):
            return "an op along other dimensions than the rows"
        own = (*place[:dim], (shape[dim],), *place[dim + 1 :])
    moved = feature_dim(own, dim)
    args, kwargs = _call(source, arguments(source), {"dim": moved})
    return Through(((source.args[0], own),), args, kwargs)


Rule = Callable[[Node, dict[str, Any], Place, Mapping[str, Dim]], Through | str]
_RULES: dict[str, Rule] = {
    "aten::reshape": _reshape,
    "aten::view_as": _reshape,
    "aten::reshape_as": _reshape,
    "aten::flatten": _reshape,
    "aten::transpose": _transpose,
    "aten::permute": _transpose,
    "aten::unsqueeze": _unsqueeze,
    "aten::squeeze": _squeeze,
    "aten::expand": _expand,
    "aten::repeat": _repeat,
    "aten::repeat_interleave": _repeat_interleave,
    "aten::clone": _same,
    "aten::contiguous": _same,
}
