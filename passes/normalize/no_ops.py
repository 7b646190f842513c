"""Calls that return what they were given, or what the call before them was given, are dropped.

| written | becomes |
|---|---|
| a cast to the dtype that a value has, a shape that it has, a slice of all of it | the value |
| `squeeze` of what was just unsqueezed there; `reshape` to the shape before another one | the value before both |
| one of the copies that `expand` makes of what was unsqueezed | what it makes them of |
| a mask as numbers, and as a mask again | the mask |
| `x + 0`, as Python's `sum` begins | `x` |
| a copy of a sum between two of its additions; what is copied over all of a part (`copies.py`) | what was copied |
"""

from __future__ import annotations

import sys

import torch
from moe_fx.passes.normalize.copies import copied
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node

from moe_fx.constants import filled_with
from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import erase_dead, replace
from moe_fx.shapes import depends_on_values, same_shape, shape_of, tensor_of

__all__ = ["drop_no_ops", "is_no_op"]

ADDITIONS = frozenset({"aten::add", "aten::index_add", "aten::index_put", "aten::scatter_add"})


def drop_no_ops(graph: Graph, written: set[Node]) -> None:
    """Drop casts to the dtype a value has, changes to the shape it has, and asserts about metadata.

    ``written`` is memory that ops in place still write: a copy of a value is then more than the value.
    """
    for node in [node for node in graph.nodes if op_name(node) == "aten::_assert_tensor_metadata"]:
        graph.erase_node(node)
    for node in list(graph.nodes):
        if (undone := _undone(node, written)) is not None:
            replace(node, undone)
            erase_dead(graph, [node])
        elif memory_of(node) not in written and is_no_op(node):
            source = node.args[0]
            replace(node, source)
            erase_dead(graph, [node])


def _undone(node: Node, written: set[Node]) -> Node | None:
    """What a call returns that takes back another one: an ``unsqueeze``, a ``reshape``, a mask cast to numbers."""
    if op_name(node) == "aten::to":
        return _mask_again(node, written)
    if op_name(node) == "aten::clone":
        return _sum_so_far(node, written)
    if op_name(node) in ("aten::copy", "aten::slice_scatter"):
        return copied(node, written)
    if op_name(node) == "aten::add":
        return _added_to_nothing(node, written)
    if op_name(node) == "aten::mul":
        return _added_to_nothing(node, written, nothing=1)
    if op_name(node) == "aten::select":
        return _one_of_copies(node) if memory_of(node) not in written else None
    if op_name(node) == "aten::reshape":
        return _reshaped_back(node) if memory_of(node) not in written else None
    source = node.args[0] if op_name(node) == "aten::squeeze" else None
    if not isinstance(source, Node) or op_name(source) != "aten::unsqueeze" or memory_of(node) in written:
        return None
    value = tensor_of(source)
    dims = [arguments(each).get("dim") for each in (node, source)]
    squeezed, added = dims
    if value is None or not isinstance(squeezed, int) or not isinstance(added, int):
        return None
    if (squeezed - added) % value.dim():
        return None
    undone = source.args[0]
    return undone if isinstance(undone, Node) and all(user.op != "output" for user in node.users) else None


def _sum_so_far(copy: Node, written: set[Node]) -> Node | None:
    """What is copied between two additions of a loop, which writes to neither."""
    source = copy.args[0]
    if not isinstance(source, Node) or memory_of(copy) in written or memory_of(source) in written:
        return None
    sums = [user for user in copy.users if op_name(user) != "aten::index"]  # rows may be read before they are written
    sums += [source] if filled_with(source) != 0 else []
    added = any(user in sums for user in copy.users) and all(op_name(each) in ADDITIONS for each in sums)
    return source if added and all(user.args[0] is copy for user in copy.users) else None


def _reshaped_back(node: Node) -> Node | None:
    source = node.args[0]
    whole = source.args[0] if isinstance(source, Node) and op_name(source) == "aten::reshape" else None
    if not isinstance(whole, Node) or any(user.op == "output" for user in node.users):
        return None
    return whole if same_shape(shape_of(node) or (), shape_of(whole) or ()) else None


def _one_of_copies(node: Node) -> Node | None:
    """What a dimension was given to, along which it was expanded, and of which one place is read."""
    copies = node.args[0]
    single = copies.args[0] if isinstance(copies, Node) and op_name(copies) == "aten::expand" else None
    if not isinstance(single, Node) or op_name(single) != "aten::unsqueeze":
        return None
    shape, source = shape_of(copies) or (), single.args[0]
    dims = [arguments(each)["dim"] % len(shape) for each in (node, single)]
    same = len(shape_of(single) or ()) == len(shape) and dims[0] == dims[1]
    return source if same and isinstance(source, Node) and _is_like(node, source) else None


def _is_like(node: Node, source: Node) -> bool:
    kept = any(user.op == "output" for user in node.users)
    return not kept and same_shape(shape_of(node) or (), shape_of(source) or ())


def _mask_again(node: Node, written: set[Node]) -> Node | None:
    """A mask that was cast to numbers, where these are cast to a mask: zero is false in every dtype, and one true."""
    numbers, value = node.args[0], tensor_of(node)
    mask = numbers.args[0] if isinstance(numbers, Node) and op_name(numbers) == "aten::to" else None
    source = tensor_of(mask)
    if not isinstance(mask, Node) or source is None or value is None or any(user.op == "output" for user in node.users):
        return None
    masks = source.dtype is value.dtype is torch.bool and source.device == value.device
    # The casts made a copy.
    return mask if masks and memory_of(mask) not in written and memory_of(node) not in written else None


_MAYBE_NOTHING = frozenset({
    "aten::to", "aten::reshape", "aten::expand", "aten::detach", "aten::alias", "aten::slice", "aten::squeeze",
})  # fmt: skip


def _takes_all(node: Node) -> bool:
    """Whether a slice goes from the first to the last element, however many there are."""
    given = arguments(node)
    end = given["end"]
    whole = end is None or (isinstance(end, int) and end >= sys.maxsize)
    return given["start"] in (None, 0) and whole and given["step"] == 1


def _added_to_nothing(node: Node, written: set[Node], nothing: int = 0) -> Node | None:
    """What zero is added to, as Python's ``sum`` begins with it; or what is multiplied with one."""
    source, other = node.args[:2]
    if not isinstance(source, Node) or isinstance(other, Node) or other != nothing:
        return None
    if memory_of(node) in written or memory_of(source) in written:
        return None  # the sum has memory of its own
    kinds = [(value.dtype, value.device) for value in map(tensor_of, (source, node)) if value is not None]
    kept = any(user.op == "output" for user in node.users)
    return source if len(kinds) == 2 and kinds[0] == kinds[1] and not kept else None


def is_no_op(node: Node) -> bool:
    """Whether a call returns its first argument, value for value, with nothing else to it."""
    name = op_name(node)
    if name not in _MAYBE_NOTHING:
        return False
    source, result = tensor_of(node.args[0]), tensor_of(node)
    if source is None or result is None or any(user.op == "output" for user in node.users):
        return False
    # That one row is all rows, torch only asserts where rows chosen by data are broadcast: it need not be so.
    if name == "aten::slice" and any(map(depends_on_values, source.shape)) and not _takes_all(node):
        return False
    same = source.dtype == result.dtype and source.device == result.device
    return same and not arguments(node).get("copy", False) and same_shape(source.shape, result.shape)
