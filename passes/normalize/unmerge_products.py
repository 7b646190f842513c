"""Products of matrices whose dimensions are several ones merged, as einsums over these: what `einsum` is decomposed to.

a = aten.reshape(aten.permute(x, ...), [1, B*S, H])
b = aten.reshape(aten.permute(w, ...), [1, H, E*I])         =>      y = einsum("bsh,eih->bsei", [x, w])
y = aten.reshape(aten.bmm(a, b), [B, S, E, I])

The same of `mm`, `matmul` and `linear`, where what is summed is merged. Each dimension is the product of dimensions
that stand next to each other in an operand, in their order: those of batch and sum must be the same for both operands,
and the result must be cut into exactly those of both. What no layer came of is written back (:func:`merge_products`):
nothing is gained there.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product as product_of
from typing import Any

import torch
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.normalize.merged_dims import MERGED, Group, Seen, is_end, regrouped, sights, step_of
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_fx.matcher import op_name
from moe_fx.rewrite import PROVENANCE, Emitter, FakeValues, erase_dead, respell
from moe_fx.shapes import Dim, known_equal, same_shape, shape_of

__all__ = ["merge_products", "unmerge_products"]

aten = torch.ops.aten


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
        # What is one dimension of the other operand, or of the result, must not be seen as several that are merged.
        for left, right in _operands(node):
            outcome = _rewritable(node, left, right)
            # A copy on the way is one, of what is written later.
            read = (left.source, right.source, *left.views, *right.views, *outcome[0]) if outcome else ()
            if outcome is not None and not any(memory_of(each) in written for each in read):
                _rewrite(node, left, right, *outcome)
                break


def _rewritable(node: Node, left: Seen, right: Seen) -> tuple[list[Node], list[int]] | None:
    """The outcome of a product of operands seen so, if an einsum of their dimensions says more."""
    merges = any(len(group) > 1 for seen in (left, right) for group in seen.groups)
    if not merges and not any(map(_moves_ones, (*left.views, *right.views))):
        return None
    if not same_shape(left.sizes(0), right.sizes(0)) or not same_shape(left.sizes(2), right.sizes(1)):
        return None
    if node.target is not aten.bmm.default and len(left.groups[2]) < 2 and not _sums_first(left):
        return None  # of a linear, rows are merged all the time
    sizes = [*left.sizes(0), *left.sizes(1), *right.sizes(2)]
    outcome = _outcome(node, sizes) if len(sizes) + len(left.sizes(2)) <= len(string.ascii_letters) else None
    if outcome is None:
        return None
    ones = len(shape_of(outcome[0][-1]) or ()) != len(sizes)
    # Of what is a single one, such as a single token, the dimension stays.
    return None if ones and (not merges or any(map(_has_ones, (left, right)))) else outcome


def _sums_first(left: Seen) -> bool:
    """Whether what is summed stands before the rows: a table by token, turned around."""
    rows, summed = ([dim for dim, _ in group] for group in left.groups[1:])
    return len(rows) > 1 and max(summed, default=-1) in range(min(rows))


def _operands(product: Node) -> Iterator[tuple[Seen, Seen]]:
    """Both operands of a product of matrices: dimensions of batch, rows and sum, and of batch, sum and columns."""
    # Other overloads have a result of another dtype.
    if product.target not in (aten.bmm.default, aten.mm.default, aten.matmul.default, aten.linear.default):
        return
    one, other, *bias = product.args
    if not isinstance(one, Node) or not isinstance(other, Node) or any(each is not None for each in bias):
        return
    for left, right in product_of(sights(one), sights(other)):
        if product.target is aten.bmm.default:
            yield left, right
        elif len(right.groups) == 2 and len(left.groups) > 1:
            rows = tuple(each for group in left.groups[:-1] for each in group)
            summed, columns = right.groups[:: -1 if product.target is aten.linear.default else 1]
            yield replace(left, groups=((), rows, left.groups[-1])), replace(right, groups=((), summed, columns))


def _has_ones(seen: Seen) -> bool:
    """Whether an operand has dimensions of size 1, other than those that were given to an einsum's result."""
    given = op_name(seen.source) == "aten::reshape" and is_end(seen.source)
    return not given and len(shape_of(seen.source) or ()) != sum(map(len, seen.groups))


def _moves_ones(view: Node) -> bool:
    """Whether a dimension of size 1 is moved among others, as `einsum` writes an operand that lacks a letter."""
    moves = op_name(view) in ("aten::permute", "aten::transpose")
    return moves and any(known_equal(size, 1) for size in shape_of(view) or ())


def _outcome(product: Node, sizes: Sequence[Dim]) -> tuple[list[Node], list[int]] | None:
    """The calls up to where a product is seen in dimensions of these sizes, one by one, and their order there.

    The first place at which it has no dimension of size 1; if there is none, the first where a reshape cuts it.
    """
    groups: tuple[Group, ...] | None = regrouped(list(enumerate(sizes)), shape_of(product) or ())
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
        step = step_of(node) if node is not None else None
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
    for node in dict.fromkeys([*reversed(path[:-1]), *left.views, *right.views]):
        if not node.users:
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
        apart, there = node is not merged.end, set(graph.nodes)
        # An einsum says the same: what cannot be written back may stay.
        if not given <= there or (apart and [*node.users] != [merged.end]):
            continue
        *before, last = merged.calls
        for call in before:
            if call.node in known or call.node in there:
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
