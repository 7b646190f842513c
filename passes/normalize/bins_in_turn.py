"""Dispatch added up choice by choice, where the second choices stand behind the first ones in an expert's bin:

rank1 = ((cumsum(hot1, s) - 1) * hot1).sum(-1)
rank2 = ((cumsum(hot2, s) - 1 + hot1.sum(s, keepdim=True)) * hot2).sum(-1)
combine = w1 * hot1 * one_hot(rank1) + w2 * hot2 * one_hot(rank2)
=>
hot = one_hot(stack([ids1, ids2]))                                  # [K, S, E]
counts = cumsum(hot.flatten(0, 1), 0).view_as(hot)                  # what is added to hot2's are the rows of hot1
combine = (stack([w1, w2]) * hot * one_hot(((counts - 1) * hot).sum(-1))).sum(0)

What is stacked holds the very values that stood apart. Whether the ranks are those of a layer is for raising to say.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moe_fx.passes.normalize.alike import Alike, Call, wider, within, write
from moe_fx.passes.normalize.functional import memory_of
from moe_fx.passes.normalize.spelling import spell
from torch.fx import Graph, Node

from moe_fx.constants import filled_with
from moe_fx.matcher import op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import known_equal, same_shape, shape_of, tensor_of

__all__ = ["Choices", "spell_bins_in_turn", "terms_of"]

aten = torch.ops.aten


def spell_bins_in_turn(graph: Graph, written: Collection[Node]) -> bool:
    """Rewrite every such sum, and say if there was one; ``written`` is memory that ops in place still write."""
    if len([node for node in graph.nodes if op_name(node) == "aten::cumsum"]) < 2:
        return False
    values: dict[Any, FakeValues] = {}
    for node in list(graph.nodes):
        whole = _stacked_sum(node, written)
        if whole is None:
            continue
        mode = node.meta["val"].fake_mode
        emit = Emitter(graph, node, values.setdefault(mode, FakeValues(mode)))
        replace(node, write(emit, whole, {}))
        erase_dead(graph, [node])
    if values:
        spell(graph)  # a permutation that swaps two dimensions has a name of its own
    return bool(values)


def _stacked_sum(node: Node, written: Collection[Node]) -> Call | None:
    """A sum of choices as one sum over them; None for any other value."""
    value = tensor_of(node)
    if not _is_sum(node) or value is None or value.dim() < 3 or not value.is_floating_point():
        return None
    terms = terms_of(node)
    if len(terms) < 2 or any(map(_is_sum, node.users)):
        return None
    for order in (terms, terms[::-1]):
        whole = Choices(value.dim() - 2).of(order)
        calls, read = within(whole)
        counted = any(call.target is aten.cumsum.default for call in calls)
        if counted and not any(memory_of(each) in written for each in read):
            return Call(aten.sum.dim_IntList, (whole, [0]))
    return None


def _is_sum(node: object) -> bool:
    return isinstance(node, Node) and op_name(node) == "aten::add" and len(node.args) == 2 and not node.kwargs


def terms_of(node: Node) -> tuple[Any, ...]:
    """What is added up, in order, without the 0 that a sum begins with."""
    found, waiting = list[Any](), list[Any]([node])
    while waiting:
        each = waiting.pop()
        if isinstance(each, Node) and _is_sum(each):
            waiting += reversed(each.args)
        elif isinstance(each, Node) or each != 0:
            found.append(each)
    return tuple(found)


class Choices(Alike):
    """Values of each choice of tokens ``[S]``, or ``[G, S]``."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def read(self, values: Sequence[Node]) -> Call | None:
        value: Any = tensor_of(values[0])
        single = value.dim() == self.tokens + 1 and known_equal(value.shape[-1], 1)
        by_token = value.dim() == self.tokens or single
        # A number for each token is a routing weight, however it was computed.
        weights = by_token and value.is_floating_point()
        found = None if weights else self._counts(values) or self.same_calls(values)
        return self._numbers(values, single) if found is None and by_token else found

    def _numbers(self, values: Sequence[Node], single: bool) -> Call:
        """Ids, or weights, as a router has them: the choices behind the tokens."""
        last: Any = _columns(values, self.tokens)
        if last is None:
            last = Call(aten.stack.default, ([self._narrow(each) if single else each for each in values], -1))
        front = Call(aten.permute.default, (last, [self.tokens, *range(self.tokens)]))
        return Call(aten.unsqueeze.default, (front, -1)) if single else front

    def _narrow(self, number: Node) -> Any:
        """A number for each token, without a dimension of its own."""
        unsqueezed = number.target is aten.unsqueeze.default and number.args[1] in (-1, self.tokens)
        return number.args[0] if unsqueezed else Call(aten.squeeze.dim, (number, -1))

    def _counts(self, values: Sequence[Node]) -> Call | None:
        """Running counts of one-hot rows, each behind all rows of the choices before."""
        counts = [found for each in values if (found := _count(each)) is not None]
        hots = [each.hot for each in counts]
        if len(hots) < len(values) or len(set(hots)) < len(hots):
            return None
        first = counts[0]
        for number, each in enumerate(counts):
            before = len(each.before) == number and set(each.before) == set(hots[:number])
            if not before or (each.dim, each.plus, len(each.rest)) != (first.dim, first.plus, len(first.rest)):
                return None
        hot, rank, dim = self.of(hots), len(shape_of(first.hot) or ()), first.dim
        if hot is None:
            return None
        by_choice = _permuted(hot, [*range(1, dim + 1), 0, *range(dim + 1, rank + 1)])
        total = Call(aten.cumsum.default, (Call(aten.flatten.using_ints, (by_choice, dim, dim + 1)), dim))
        total = Call(aten.view_as.default, (total, by_choice))
        total = _permuted(total, [dim, *range(dim), *range(dim + 1, rank + 1)])
        for others in zip(*(each.rest for each in counts), strict=True):
            target, node = others[0]
            other = self.of([each for _, each in others]) if {each for each, _ in others} == {target} else None
            if other is None:
                return None
            total = Call(target, (total, wider(other, rank - len(shape_of(node) or ()))))
        return Call(aten.add.Tensor, (total, first.plus)) if first.plus else total


@dataclass(frozen=True)
class _Count:
    """``cumsum(hot, dim) + plus``, the sums of ``before`` over ``dim``, and what else is added or subtracted."""

    hot: Node
    dim: int
    plus: int
    before: tuple[Node, ...]
    rest: tuple[tuple[Any, Node], ...]


def _count(node: Node) -> _Count | None:
    """A running count in whole numbers: sums of floats depend on their order. None for any other value."""
    value, rank = tensor_of(node), len(shape_of(node) or ())
    if value is None or value.dtype is not torch.int64:
        return None
    plus, counted, rest = 0, list[Node](), list[tuple[bool, Node]]()
    waiting: list[tuple[Any, bool]] = [(node, False)]
    while waiting:
        each, less = waiting.pop()
        name = op_name(each)
        if name in ("aten::add", "aten::sub") and len(each.args) == 2 and not each.kwargs:
            waiting += [(each.args[1], less != (name == "aten::sub")), (each.args[0], less)]
        elif name == "aten::cumsum" and not less and len(each.args) == 2 and not each.kwargs:
            counted.append(each)
        elif isinstance(each, Node):
            rest += [(less, each)] if filled_with(each) != 0 else []
        elif type(each) is int:
            plus += -each if less else each
        else:
            return None
    if len(counted) != 1 or len(shape_of(counted[0]) or ()) != rank:
        return None
    given: Any = counted[0].args
    at = (given[1] % rank, rank)
    before = tuple(each.args[0] for less, each in rest if not less and _summed(each) == at)
    others = [
        (aten.sub.Tensor if less else aten.add.Tensor, each) for less, each in rest if less or _summed(each) != at
    ]
    return _Count(given[0], at[0], plus, before, tuple(others))


def _summed(node: Node) -> tuple[int, int] | None:
    """The only dimension that is summed over and kept, of how many."""
    if node.target is not aten.sum.dim_IntList or len(node.args) != 3 or node.kwargs or not node.args[2]:
        return None
    rank = len(shape_of(node) or ())
    dims: Any = node.args[1]
    return (dims[0] % rank, rank) if isinstance(dims, list | tuple) and len(dims) == 1 else None


def _permuted(call: Call, dims: list[int]) -> Call:
    return Call(aten.permute.default, (call, dims)) if dims != sorted(dims) else call


def _columns(values: Sequence[Any], tokens: int) -> Node | None:
    """What the values are all columns of, in order: cut by ``x[:, 0]`` or by ``chunk``."""
    source, count = None, len(values)
    for number, each in enumerate(values):
        part = each.args[0] if op_name(each) in ("aten::reshape", "aten::squeeze") else each
        if each.target is aten.select.int:
            whole, dim, index = each.args
        elif (
            isinstance(part, Node)
            and part.target is operator.getitem
            and op_name(part.args[0]) == "aten::split_with_sizes"
        ):
            (whole, sizes, *along), index = part.args[0].args, part.args[1]
            dim = along[0] if along else 0
            if list(sizes) != [1] * count:
                return None
        else:
            return None
        shape, mine = shape_of(whole) or (), (shape_of(each) or ())[:tokens]
        fits = len(shape) == tokens + 1 and dim in (-1, tokens) and same_shape(shape, (*mine, count))
        if not fits or index != number or source not in (None, whole):
            return None
        source = whole
    return source
