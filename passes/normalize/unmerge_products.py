"""Products of matrices whose dimensions are several ones merged, as einsums over these: what `einsum` is decomposed to.

a = aten.reshape(aten.permute(x, ...), [1, B*S, H])
b = aten.reshape(aten.permute(w, ...), [1, H, E*I])         =>      y = einsum("bsh,eih->bsei", [x, w])
y = aten.reshape(aten.bmm(a, b), [B, S, E, I])

Each dimension of `bmm` is the product of dimensions that stand next to each other in an operand, in their order: those
of batch and sum must be the same for both operands, and the result must be cut into exactly those of both. What no
layer came of is written back (:func:`merge_products`): nothing is gained there.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import PROVENANCE, Emitter, FakeValues, erase_dead, respell
from moe_fx.shapes import Dim, known_equal, same_shape, shape_of

__all__ = ["merge_products", "unmerge_products"]

aten = torch.ops.aten

#: in a node's meta: the calls that it stands for
MERGED = "moe_fx_merged_product"

#: ops that show the elements of a value in another shape or order
VIEWS = frozenset({
    "aten::reshape", "aten::permute", "aten::transpose", "aten::unsqueeze", "aten::squeeze", "aten::clone",
})  # fmt: skip

#: a dimension of what a view is of, with its size; those merged in one dimension of the view
Group = tuple[tuple[int, Dim], ...]


@dataclass(frozen=True)
class Seen:
    """A value as it is seen through ``views``, the last one first: ``groups`` for each of its dimensions."""

    source: Node
    groups: tuple[Group, ...]
    views: tuple[Node, ...]

    def sizes(self, dim: int) -> list[Dim]:
        return [size for _, size in self.groups[dim]]


@dataclass(frozen=True)
class Call:
    """A call as the program has it: ``node`` may be erased."""

    node: Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str

    @staticmethod
    def of(node: Node) -> Call:
        return Call(node, node.target, node.args, dict(node.kwargs), node.name)


@dataclass(frozen=True)
class Merged:
    """The calls that an einsum stands for, the last of which yields ``end``; what they are made of, and the number of
    dimensions of size 1 that are taken away from it."""

    calls: tuple[Call, ...]
    sources: tuple[tuple[Node, int], tuple[Node, int]]
    end: Node


def unmerge_products(graph: Graph, written: Collection[Node]) -> None:
    """Rewrite every such product; ``written`` is memory that ops in place still write."""
    for node in list(graph.nodes):
        # Another overload has a result of another dtype.
        one, other = (*node.args, None, None)[:2] if node.target is aten.bmm.default else (None, None)
        if not isinstance(one, Node) or not isinstance(other, Node):
            continue
        left, right = _seen(one), _seen(other)
        merges = any(len(group) > 1 for seen in (left, right) for group in seen.groups)
        if not merges and not any(map(_moves_ones, (*left.views, *right.views))):
            continue
        if not same_shape(left.sizes(0), right.sizes(0)) or not same_shape(left.sizes(2), right.sizes(1)):
            continue
        sizes = [*left.sizes(0), *left.sizes(1), *right.sizes(2)]
        outcome = _outcome(node, sizes) if len(sizes) + len(left.sizes(2)) <= len(string.ascii_letters) else None
        if outcome is None or (not merges and len(shape_of(outcome[0][-1]) or ()) != len(sizes)):
            continue  # of what is a single one, such as a single token, the dimension stays
        # A copy on the way is one, of what is written later.
        read = (left.source, right.source, *left.views, *right.views, *outcome[0])
        if not any(memory_of(each) in written for each in read):
            _rewrite(node, left, right, *outcome)


def _moves_ones(view: Node) -> bool:
    """Whether a dimension of size 1 is moved among others, as `einsum` writes an operand that lacks a letter."""
    moves = op_name(view) in ("aten::permute", "aten::transpose")
    return moves and any(known_equal(size, 1) for size in shape_of(view) or ())


def _seen(value: Node) -> Seen:
    """A value seen through as many views as only order, merge, or add dimensions of size 1."""
    views: list[Node] = []
    source, steps = value, list[Callable[[tuple[Group, ...]], tuple[Group, ...] | None]]()
    while (step := _step(source)) is not None and MERGED not in source.args[0].meta:
        steps.append(step)
        views.append(source)
        source = source.args[0]  # type: ignore[assignment]
    # From the source on: a view further in may cut what one further out merges.
    while True:
        groups: tuple[Group, ...] | None = tuple(
            () if known_equal(size, 1) else ((dim, size),) for dim, size in enumerate(shape_of(source) or ())
        )
        for step in reversed(steps):
            groups = step(groups) if groups is not None else None
        if groups is not None:
            return Seen(source, groups, tuple(views))
        steps.pop()
        source = views.pop()


def _step(view: Node) -> Callable[[tuple[Group, ...]], tuple[Group, ...] | None] | None:
    """What a view makes of the dimensions of its source; None for any other op."""
    name, source, shape = op_name(view), shape_of(view.args[0]) if view.args else None, shape_of(view)
    if name not in VIEWS or source is None or shape is None:
        return None
    given = arguments(view)
    if name == "aten::clone":
        return lambda groups: groups
    if name in ("aten::permute", "aten::transpose"):
        order = _order(view, len(shape))
        return lambda groups: tuple(groups[dim] for dim in order)
    if name == "aten::squeeze" and not isinstance(given.get("dim"), int):
        return None
    return lambda groups: _regrouped([each for group in groups for each in group], shape)


def _order(view: Node, rank: int) -> list[int]:
    given = arguments(view)
    if op_name(view) == "aten::permute":
        return [dim % rank for dim in given["dims"]]
    order, one, other = list(range(rank)), given["dim0"] % rank, given["dim1"] % rank
    order[one], order[other] = other, one
    return order


def _regrouped(dims: list[tuple[int, Dim]], shape: Sequence[Dim]) -> tuple[Group, ...] | None:
    """Dimensions, none of size 1, as those of the same elements in another shape; None where that cuts one of them."""
    groups: list[Group] = []
    rest = list(dims)
    for size in shape:
        group: list[tuple[int, Dim]] = []
        count: Dim = 1
        while not known_equal(count, size):
            if not rest:
                return None
            group.append(rest.pop(0))
            count = count * group[-1][1]
        groups.append(tuple(group))
    return tuple(groups) if not rest else None


def _outcome(product: Node, sizes: Sequence[Dim]) -> tuple[list[Node], list[int]] | None:
    """The calls up to where a product is seen in dimensions of these sizes, one by one, and their order there.

    The first place at which it has no dimension of size 1; if there is none, the first where a reshape cuts it.
    """
    groups: tuple[Group, ...] | None = _regrouped(list(enumerate(sizes)), shape_of(product) or ())
    path: list[Node] = []
    first: tuple[list[Node], list[int]] | None = None
    node: Node | None = product
    while node is not None and groups is not None:
        path.append(node)
        order = [dim for group in groups for dim, _ in group]
        if all(len(group) == 1 for group in groups):
            return path, order
        cut = all(len(group) < 2 for group in groups)
        if first is not None and not cut:
            break
        if first is None and cut and op_name(node) == "aten::reshape":
            first = list(path), order
        # Another reader of what the path passes would go on to read it: the product would be computed twice.
        node = next(iter(node.users)) if len(node.users) == 1 else None
        step = _step(node) if node is not None else None
        groups = step(groups) if step is not None else None
    return first


def _rewrite(product: Node, left: Seen, right: Seen, path: list[Node], order: list[int]) -> None:
    graph, names = product.graph, iter(string.ascii_letters)
    batch, rows, summed = ([next(names) for _ in group] for group in left.groups)
    columns = [next(names) for _ in right.groups[2]]
    emit = Emitter(graph, product, FakeValues(product.meta["val"].fake_mode))
    one, first = _operand(left, [*batch, *rows, *summed], emit)
    other, second = _operand(right, [*batch, *summed, *columns], emit)
    out = [*batch, *rows, *columns]
    call = f"{first},{second}->{''.join(out[dim] for dim in order)}", [one, other]
    end = path[-1]
    # Before any is changed, in the order of the graph.
    calls = [Call.of(node) for node in sorted({*left.views, *right.views, *path})]
    if len(shape_of(end) or ()) == len(order):
        respell(end, aten.einsum.default, call, {})
        whole = end
    else:
        with graph.inserting_before(end):
            whole = graph.call_function(aten.einsum.default, call)
        whole.meta.update({key: end.meta[key] for key in PROVENANCE if key in end.meta})
        with end.meta["val"].fake_mode:
            wide = [size for size in shape_of(end) or () if not known_equal(size, 1)]
            whole.meta["val"] = end.meta["val"].new_empty(wide)
        end.args = (whole, *end.args[1:])
    ranks = [(each.source, len(shape_of(each.source) or ()) - len(shape_of(used) or ()))
             for each, used in ((left, one), (right, other))]  # fmt: skip
    whole.meta[MERGED] = Merged(tuple(calls), (ranks[0], ranks[1]), end)
    for node in [*reversed(path[:-1]), *left.views, *right.views]:
        if not node.users and not node._erased:
            graph.erase_node(node)


def _operand(seen: Seen, names: Sequence[str], emit: Emitter) -> tuple[Node, str]:
    """The source of a value without dimensions of size 1, and the letters of those that are left."""
    named = dict(zip((dim for group in seen.groups for dim, _ in group), names, strict=True))
    operand = seen.source
    for dim in reversed(range(len(shape_of(operand) or ()))):
        operand = operand if dim in named else emit(aten.squeeze.dim, operand, dim)
    return operand, "".join(named[dim] for dim in sorted(named))


def merge_products(graph: Graph) -> None:
    """Write back what no layer came of, as the program had it."""
    known: dict[Node, Node] = {}  # what stands for the nodes of the program: products share some
    for node in list(graph.nodes):
        merged: Merged | None = node.meta.pop(MERGED, None)
        if merged is None:
            continue
        operands: Any = node.args[1]
        for (source, squeezed), operand in zip(merged.sources, operands, strict=True):
            known[source] = operand
            for _ in range(squeezed):
                known[source] = known[source].args[0]  # type: ignore[assignment]
        made = {call.node for call in merged.calls}
        given = {each for call in merged.calls for each in _nodes(call)} - made - known.keys()
        apart = node is not merged.end
        # An einsum says the same: what cannot be written back may stay.
        if any(each._erased or each.graph is not graph for each in given) or (apart and [*node.users] != [merged.end]):
            continue
        *before, last = merged.calls
        for call in before:
            if call.node in known or not call.node._erased:
                continue
            with graph.inserting_before(node):
                known[call.node] = graph.create_node("call_function", call.target, *_given(call, known))
            known[call.node].name = call.name
            known[call.node].meta.update(call.node.meta)
        respell(merged.end, last.target, *_given(last, known))
        if apart:
            graph.erase_node(node)
        erase_dead(graph, [each for each in operands if not each.users])


def _given(call: Call, known: Mapping[Node, Node]) -> tuple[Any, Any]:
    """What a call is given, of what stands now for the nodes it was given."""
    args, kwargs = map_arg((call.args, call.kwargs), lambda each: known.get(each, each))
    return args, kwargs


def _nodes(call: Call) -> list[Node]:
    found: list[Node] = []
    map_arg((call.args, call.kwargs), found.append)
    return found
