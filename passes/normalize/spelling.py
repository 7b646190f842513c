"""One spelling per meaning: what decomposition tables and authors write in several ways is written in one.

| written | becomes |
|---|---|
| `view`, `_unsafe_view`, `flatten` to sizes of which at most one is not fixed | `reshape` |
| `_softmax(x, d, False)` | `softmax.int` |
| `_to_copy(x, dtype=d)`, `type_as` | `to.dtype` |
| `div(x, y, rounding_mode="floor")` | `floor_divide` |
| `permute` that swaps two dimensions, `t`, `mT` | `transpose.int` |
| `permute` or `transpose` that moves nothing | `alias` |
| `squeeze.dims` of one dimension | `squeeze.dim` |
| `chunk`, `split.Tensor`, `tensor_split` | `split_with_sizes` |
| `where(mask, scalar, x)`; `where(mask, ids, scalar)` | `masked_fill.Scalar`; `where.ScalarOther` |
| `nonzero(mask, as_tuple=True)` | `where(mask)` |
| `index_select(x, 1, places)`; `embedding(x, places)` | `index(x, [None, places])`; `index(x, [places])` |
| `mm(x, w.T)`, `addmm(b, x, w.T)` | `linear` |

Other names of an op are in `synonyms.py`; what several ops say together is brought to one by `recompose.py`, what
says where a mask is true by `places.py`, and what says nothing is dropped by `no_ops.py`.

`reshape` rather than `view`: it is legal for every stride, so an operand may be replaced by an equal one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from moe_fx.passes.normalize import equations, places, recompose, synonyms, wide_sizes
from moe_fx.passes.normalize.recompose import Spelling
from torch.fx import Graph, Node

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import ASSERTS, respell
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["spell"]

aten = torch.ops.aten


def spell(graph: Graph) -> None:
    """Bring every call to its one spelling."""
    for node in graph.nodes:
        # One spelling may lead to the next: a view is a reshape, and the reshape makes a stack.
        while (spelled := canonical(node)) is not None:
            target, args = spelled
            respell(node, target, args, {})


def canonical(node: Node) -> Spelling | None:
    """The one spelling of a call, or the next on the way to it; None where it has it already."""
    for rules in (synonyms.RULES, _RULES, recompose.RULES, places.RULES, wide_sizes.RULES, equations.RULES):
        rule = rules.get(op_name(node) or "")
        spelled = rule(node, arguments(node)) if rule is not None else None
        if spelled is not None:
            return spelled
    return None


def _view(node: Node, given: dict[str, Any]) -> Spelling | None:
    # view.dtype reinterprets bits: another meaning.
    return (aten.reshape.default, (given["self"], given["size"])) if "size" in given else None


def _flatten(node: Node, given: dict[str, Any]) -> Spelling | None:
    shape = shape_of(node)
    sizes = [size if isinstance(size, int) else -1 for size in shape or ()]
    if shape is None or sizes.count(-1) > 1 or (0 in sizes and -1 in sizes):
        return None
    return aten.reshape.default, (given["self"], [-1] if len(shape) == 1 else sizes)


def _softmax(node: Node, given: dict[str, Any]) -> Spelling | None:
    return None if given["half_to_float"] else (aten.softmax.int, (given["self"], given["dim"]))


def _to_copy(node: Node, given: dict[str, Any]) -> Spelling | None:
    source, result = tensor_of(given["self"]), tensor_of(node)
    if given["memory_format"] is not None or source is None or result is None or source.device != result.device:
        return None
    return aten.to.dtype, (given["self"], result.dtype)


def _type_as(node: Node, given: dict[str, Any]) -> Spelling | None:
    source, result = tensor_of(given["self"]), tensor_of(node)
    if source is None or result is None or source.device != result.device:
        return None
    return aten.to.dtype, (given["self"], result.dtype)


def _floor_divide(node: Node, given: dict[str, Any]) -> Spelling | None:
    return (
        (aten.floor_divide.default, (given["self"], given["other"])) if given.get("rounding_mode") == "floor" else None
    )


def _permute(node: Node, given: dict[str, Any]) -> Spelling | None:
    dims = [dim % len(given["dims"]) for dim in given["dims"]]
    moved = [place for place, dim in enumerate(dims) if place != dim]
    if not moved:
        return aten.alias.default, (given["self"],)
    return (aten.transpose.int, (given["self"], moved[0], moved[1])) if len(moved) == 2 else None


def _transpose(node: Node, given: dict[str, Any]) -> Spelling | None:
    rank = len(shape_of(node) or ()) or 1
    return (aten.alias.default, (given["self"],)) if given["dim0"] % rank == given["dim1"] % rank else None


def _transpose_last(node: Node, given: dict[str, Any]) -> Spelling | None:
    shape = shape_of(node)
    return (aten.transpose.int, (given["self"], -2, -1)) if shape is not None and len(shape) >= 2 else None


def _squeeze_dims(node: Node, given: dict[str, Any]) -> Spelling | None:
    dims = given.get("dim")
    return (aten.squeeze.dim, (given["self"], dims[0])) if isinstance(dims, list | tuple) and len(dims) == 1 else None


def _split(node: Node, given: dict[str, Any]) -> Spelling | None:
    parts = node.meta.get("val")
    if not isinstance(parts, list | tuple):
        return None
    sizes = [part.shape[given["dim"]] for part in parts]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return aten.split_with_sizes.default, (given["self"], sizes, given["dim"])


def _index_select(node: Node, given: dict[str, Any]) -> Spelling | None:
    source, places = shape_of(given["self"]), shape_of(given["index"])
    if not source or len(places or ()) != 1:
        return None
    return aten.index.Tensor, (given["self"], [*[None] * (given["dim"] % len(source)), given["index"]])


def _index_copy(node: Node, given: dict[str, Any]) -> Spelling | None:
    whole = given["dim"] in (0, -len(shape_of(node) or ())) and len(shape_of(given["index"]) or ()) == 1
    return (aten.index_put.default, (given["self"], [given["index"]], given["source"])) if whole else None


def _embedding(node: Node, given: dict[str, Any]) -> Spelling | None:
    return aten.index.Tensor, (given["weight"], [given["indices"]])


def _nonzero(node: Node, given: dict[str, Any]) -> Spelling | None:
    return aten.where.default, (given["self"],)


def _where(node: Node, given: dict[str, Any]) -> Spelling | None:
    scalar, kept = given.get("self"), given.get("other")
    # Of whole numbers, such as ids some of which give way to one, authors write the number.
    number = op_name(kept) == "aten::scalar_tensor" and not tensor_of(kept).dtype.is_floating_point
    if number:
        scalar, kept = kept, scalar
    if op_name(scalar) != "aten::scalar_tensor" or not isinstance(kept, Node):
        return None
    mine, theirs = tensor_of(node), tensor_of(kept)
    if mine is None or theirs is None or mine.dtype != theirs.dtype or not same_shape(mine.shape, theirs.shape):
        return None
    value = arguments(scalar)["s"]
    if number:
        return (aten.where.ScalarOther, (given["condition"], kept, value)) if type(value) is int else None
    return aten.masked_fill.Scalar, (kept, given["condition"], value)


def _transposed_matrix(node: Any) -> Node | None:
    given = arguments(node) if op_name(node) in ("aten::transpose", "aten::permute", "aten::t") else {}
    if not given or len(shape_of(given["self"]) or ()) != 2:
        return None
    if "dims" in given:
        swaps = given["dims"][0] % 2 == 1
    else:
        swaps = given.get("dim0", 0) % 2 != given.get("dim1", 1) % 2
    source: Node = given["self"]
    return source if swaps else None


def _mm(node: Node, given: dict[str, Any]) -> Spelling | None:
    weight = _transposed_matrix(given["mat2"])
    return None if weight is None else (aten.linear.default, (given["self"], weight))


def _addmm(node: Node, given: dict[str, Any]) -> Spelling | None:
    weight, bias = _transposed_matrix(given["mat2"]), shape_of(given["self"])
    if weight is None or bias is None or len(bias) != 1 or given["beta"] != 1 or given["alpha"] != 1:
        return None
    if not known_equal(bias[0], (shape_of(weight) or (0,))[0]):
        return None  # one number for all features
    return aten.linear.default, (given["mat1"], weight, given["self"])


_RULES: dict[str, Callable[[Node, dict[str, Any]], Spelling | None]] = {
    "aten::view": _view,
    "aten::_unsafe_view": _view,
    "aten::flatten": _flatten,
    "aten::_softmax": _softmax,
    "aten::_to_copy": _to_copy,
    "aten::type_as": _type_as,
    "aten::div": _floor_divide,
    "aten::permute": _permute,
    "aten::transpose": _transpose,
    "aten::t": _transpose_last,
    "aten::numpy_T": _transpose_last,
    "aten::mT": _transpose_last,
    "aten::squeeze": _squeeze_dims,
    "aten::chunk": _split,
    "aten::tensor_split": _split,
    "aten::split": _split,
    "aten::where": _where,
    "aten::nonzero_numpy": _nonzero,
    "aten::index_select": _index_select,
    "aten::embedding": _embedding,
    "aten::index_copy": _index_copy,
    "aten::mm": _mm,
    "aten::addmm": _addmm,
}


def leftover(node: Node) -> str | None:
    """What NORMAL does not allow at this node, or None: the stage's verifier."""
    if op_name(node) in ASSERTS and op_name(node) == "aten::_assert_tensor_metadata":
        return "an assertion about metadata"
    return "a call with another canonical spelling" if canonical(node) is not None else None
