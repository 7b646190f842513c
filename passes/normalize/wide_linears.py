"""The experts' units side by side in one linear, which are weighted expert by expert.

h [T, E*I]    table [T, E]    w [H, E*I]

h * table.repeat_interleave(I, -1)                =>   (h.view(T, E, I) * table[..., None]).view(T, E*I)
linear((h3 * table[..., None]).flatten(-2), w, b)     =>   linear(..., w.view(H, E, I).view(H, E*I)) + b

The last product is then seen to sum over the experts and their units (`unmerge_products.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.normalize.merged_dims import seen_through
from torch.fx import Graph, Node

from moe_fx.matcher import Match, match, op_name
from moe_fx.pattern import ANY, Last, Var, aten, either, optional
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace, respell
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["spell_wide_linears"]

_aten = torch.ops.aten
PRODUCTS = frozenset({"aten::linear", "aten::matmul", "aten::mm"})
#: ops by which what is chosen comes to differ from the rest, and how many calls back they are looked for
SETTING_APART = frozenset(
    {"aten::scatter", "aten::one_hot", "aten::eq", "aten::masked_fill", "aten::index_put", "aten::where"}
)
NEAR = 60
table = Var("table")
each_unit = aten.expand(aten.unsqueeze(table, Last(-1)), ANY)
WIDE = either(aten.repeat_interleave(table, ANY, Last(-1)), aten.reshape(optional(aten.clone, each_unit), ANY))


def spell_wide_linears(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such product; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        if any(memory_of(each) in written for each in node.all_input_nodes):
            continue
        if op_name(node) == "aten::mul":
            for hidden, wide in (node.args, node.args[::-1]):
                if _weigh(node, hidden, wide, written):
                    break
        elif op_name(node) in PRODUCTS:
            _cut(node)


def _weigh(node: Node, hidden: Any, wide: Any, written: Collection[Node]) -> bool:
    """Multiply hidden units with the number of their expert."""
    found = match(WIDE, wide)
    if not isinstance(found, Match) or memory_of(found["table"]) in written:
        return False
    shape, numbers = shape_of(hidden) or (), shape_of(found["table"]) or ()
    if len(numbers) != len(shape) or len(shape) < 2 or not same_shape(shape, shape_of(wide) or ()):
        return False
    units, experts = shape[-1], numbers[-1]
    if not isinstance(units, int) or not isinstance(experts, int) or not 1 < experts < units or units % experts:
        return False
    emit = Emitter(node.graph, node, FakeValues(node.meta["val"].fake_mode))
    rows = [size if isinstance(size, int) else emit(_aten.sym_size.int, hidden, at) for at, size in enumerate(shape)]
    apart = emit(_aten.reshape.default, hidden, [*rows[:-1], experts, units // experts])
    weighted = emit(_aten.mul.Tensor, apart, emit(_aten.unsqueeze.default, found["table"], -1))
    replace(node, emit(_aten.reshape.default, weighted, rows))
    erase_dead(node.graph, [node])
    return True


def _cut(node: Node) -> None:
    """Show the experts in a weight whose inputs have them."""
    merged, weight, *bias = node.args
    by_row = op_name(node) == "aten::linear"  # w [H, E*I]; a matrix that is multiplied has [E*I, H]
    if not isinstance(merged, Node) or not isinstance(weight, Node) or not _is_parameter(weight):
        return
    view: Any = merged.args[0] if op_name(merged) == "aten::to" else merged  # autocast rounds what is weighted
    seen, sizes = seen_through(view), shape_of(weight) or ()
    if op_name(seen.source) != "aten::mul" or len(seen.groups[-1]) != 2 or len(sizes) != 2:
        return
    rank = len(shape_of(seen.source) or ())
    if not any(_is_number(each, rank) and _sets_apart(each) for each in seen.source.all_input_nodes):
        return
    (place, experts), (last, units) = seen.groups[-1]
    if (place, last) != (rank - 2, rank - 1) or not isinstance(experts, int) or not isinstance(units, int):
        return
    if not known_equal(sizes[by_row], experts * units):
        return
    values = FakeValues(tensor_of(node).fake_mode)
    if view is not merged and view.args[0] is not seen.source:
        return
    emit = Emitter(node.graph, node, values)
    apart = [sizes[0], experts, units] if by_row else [experts, units, sizes[1]]
    whole = emit(_aten.reshape.default, weight.args[0] if op_name(weight) == "aten::to" else weight, apart)
    if op_name(weight) == "aten::to":
        whole = emit(_aten.to.dtype, whole, tensor_of(weight).dtype)
    if view is not merged:
        rounded = emit(_aten.to.dtype, seen.source, tensor_of(merged).dtype)
        merged = emit(_aten.reshape.default, rounded, view.args[1])
    before = node.args[:2]
    respell(node, node.target, (merged, emit(_aten.reshape.default, whole, sizes)), {})
    erase_dead(node.graph, before)
    if bias and bias[0] is not None:
        end = _in_rows(node)  # which stays next to the product
        replace(end, Emitter(node.graph, end.next, values)(_aten.add.Tensor, end, bias[0]))


def _is_number(value: Node, rank: int) -> bool:
    """Whether a value has one number for each expert, beside its units."""
    shape = shape_of(value) or ()
    return len(shape) == rank and known_equal(shape[-1], 1)


def _sets_apart(numbers: Node) -> bool:
    """Whether some experts' numbers were set apart from the others', as heads' are not that are weighted alike."""
    seen, pending = set[Node](), [numbers]
    while pending and len(seen) < NEAR:
        node = pending.pop()
        if op_name(node) in SETTING_APART:
            return True
        if node not in seen and op_name(node) not in PRODUCTS:
            pending += node.all_input_nodes
        seen.add(node)
    return False


def _is_parameter(weight: Any) -> bool:
    """Whether a value is a parameter, in its own dtype or another."""
    source = weight.args[0] if op_name(weight) == "aten::to" else weight
    return source.op in ("placeholder", "get_attr")


def _in_rows(product: Node) -> Node:
    """What reads a product alone to cut its rows, as into batch and sequence; the product itself if nothing does."""
    for user in product.users:
        same = op_name(user) == "aten::reshape" and known_equal((shape_of(user) or (0,))[-1], shape_of(product)[-1])
        return user if same and len(product.users) == 1 else product
    return product
