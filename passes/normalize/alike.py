"""Values that are computed alike, as one value that is computed once: they are stacked along a new first dimension.

a * one_hot(i, 4).sum(0)        c = stack([a, b]); k = stack([i, j])
b * one_hot(j, 4).sum(0)   =>   c * one_hot(k, 4).sum(1)

They are the same calls on operands that are stacked themselves, or that all share. Calls are written once all is known.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from moe_fx.matcher import is_pointwise, op_name
from moe_fx.rewrite import Emitter
from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["Alike", "Call", "wider", "within", "write"]

aten = torch.ops.aten

#: how many values are stacked at most, and so how deep: a layer has fewer than forty
MOST = 100
#: elementwise without the tag
ELEMENTWISE = (aten.to.dtype, aten.masked_fill.Scalar, aten.masked_fill.Tensor)
PRODUCTS = (aten.bmm.default, aten.matmul.default)
REDUCTIONS = (aten.sum.dim_IntList, aten.amax.default)
#: calls along dimensions, which all count one further in what is stacked
MOVED = (
    *REDUCTIONS, aten.unsqueeze.default, aten.squeeze.dim, aten.transpose.int, aten.permute.default,
    aten.gather.default, aten.reshape.default, aten.expand.default, aten.one_hot.default, aten.clone.default,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Call:
    """A call that is still to be written, as some of its arguments are."""

    target: Any
    args: tuple[Any, ...]


def within(call: Call | None) -> tuple[set[Call], set[Node]]:
    """The calls that a call is made of, and what they read that was there before."""
    calls, read, waiting = set[Call](), set[Node](), list[Any]([call])
    while waiting:
        each = waiting.pop()
        if isinstance(each, Call) and each not in calls:
            calls.add(each)
            waiting += each.args
        elif isinstance(each, list | tuple):
            waiting += each
        elif isinstance(each, Node):
            read.add(each)
    return calls, read


def write(emit: Emitter, call: Any, made: dict[Call, Node]) -> Any:
    """The node of a call, and of all that it is made of, once each."""
    if isinstance(call, list | tuple):
        return [write(emit, each, made) for each in call]
    if not isinstance(call, Call):
        return call
    if call not in made:
        made[call] = emit(call.target, *(write(emit, arg, made) for arg in call.args))
    return made[call]


class Alike:
    """Stacks values; what a kind of value is otherwise than by the same calls, ``read`` of a subclass knows."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Call | None] = {}

    def of(self, values: Sequence[Any]) -> Call | None:
        """All of ``values``, which are not one value; None if they are not computed alike."""
        key = tuple(values)
        if key not in self.known and len(self.known) < MOST and _may_be_stacked(key):
            self.known[key] = None  # what is on its way counts too
            self.known[key] = self.read(key)
        return self.known.get(key)

    def read(self, values: Sequence[Node]) -> Call | None:
        return self.same_calls(values)

    def same_calls(self, values: Sequence[Node]) -> Call | None:
        """The same call on values that are stacked, or shared."""
        node = values[0]
        target: Any = node.target
        if any(each.target != target or each.kwargs or len(each.args) != len(node.args) for each in values):
            return None
        if target is aten.einsum.default:
            return self._einsum(values)
        known = isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded not in target.tags
        elementwise = known and (is_pointwise(target) or target in ELEMENTWISE)
        if not (elementwise or target in (*PRODUCTS, *MOVED)) or target._schema.is_mutable:
            return None
        args = list(zip(*(each.args for each in values), strict=True))
        shared = [_same(arg) for arg in args]
        stacked = [arg[0] if same else self.of(arg) for arg, same in zip(args, shared, strict=True)]
        if any(arg is None and not same for arg, same in zip(stacked, shared, strict=True)):
            return None
        if target in MOVED:
            return _moved(node, stacked, shared, len(values))
        rank, ranks = len(shape_of(node) or ()), [len(shape_of(arg) or ()) for arg in node.args]
        # The new dimension stands before all that are broadcast.
        parts = zip(stacked, ranks, shared, strict=True)
        wide = tuple(arg if same else wider(arg, rank - own) for arg, own, same in parts)
        if elementwise:
            return Call(target, wide)
        return Call(aten.matmul.default, wide) if min(ranks) > 1 else None

    def _einsum(self, values: Sequence[Any]) -> Call | None:
        equation = values[0].args[0]
        letters, _, out = str(equation).replace(" ", "").partition("->")
        new = next((letter for letter in string.ascii_letters if letter not in letters), None)
        if any(each.args[0] != equation or len(each.args) > 2 for each in values) or not out or "." in letters:
            return None
        operands, parts = list[Any](), letters.split(",")
        for number, each in enumerate(zip(*(value.args[1] for value in values), strict=True)):
            shared = _same(each)
            operands.append(each[0] if shared else self.of(each))
            parts[number] = parts[number] if shared else f"{new}{parts[number]}"
        if None in operands or new is None or new not in "".join(parts):
            return None
        return Call(aten.einsum.default, (f"{','.join(parts)}->{new}{out}", operands))


def wider(call: Any, dims: int) -> Any:
    """What is stacked, with dimensions of size 1 behind the new one."""
    return wider(Call(aten.unsqueeze.default, (call, 1)), dims - 1) if dims else call


def _may_be_stacked(values: Sequence[Any]) -> bool:
    """Whether values are several tensors of one kind. A number in a tensor is none: beside others its dtype yields."""
    first = tensor_of(values[0])
    if first is None or first.dim() == 0 or len(set(values)) == 1:
        return False
    return all(
        other is not None
        and (other.dtype, other.device) == (first.dtype, first.device)
        and same_shape(other.shape, first.shape)
        for other in map(tensor_of, values)
    )


def _same(values: Sequence[Any]) -> bool:
    """Whether all are one value, or the same numbers 0, 1, 2, ..."""
    first, *others = values
    if not isinstance(first, Node):
        return all(not isinstance(each, Node) and type(each) is type(first) and each == first for each in others)
    numbers = op_name(first) == "aten::arange"
    return all(
        each is first
        or (numbers and each.target == first.target and (each.args, each.kwargs) == (first.args, first.kwargs))
        for each in others
    )


def _moved(node: Node, stacked: Sequence[Any], shared: Sequence[bool], count: int) -> Call | None:
    """A call along dimensions, of which there is one more in front."""
    target: Any = node.target
    inner, *rest = stacked
    own, rank = len(shape_of(node.args[0]) or ()), len(shape_of(node) or ())
    if target is aten.gather.default:
        return Call(target, (inner, rest[0] % own + 1, rest[1])) if list(shared) == [False, True, False] else None
    if shared[0] or not all(shared[1:]):
        return None
    if target is aten.clone.default:
        return Call(target, (inner,))
    if target is aten.one_hot.default:
        return Call(target, (inner, *rest)) if rest and (isinstance(rest[0], Node) or rest[0] > 0) else None
    if target in (aten.reshape.default, aten.expand.default):
        return Call(target, (inner, [count, *rest[0]])) if target is aten.reshape.default or own == rank else None
    if target in REDUCTIONS:  # over all there are, if none are named
        return Call(target, (inner, [dim % own + 1 for dim in rest[0]], *rest[1:])) if rest and rest[0] else None
    if target is aten.permute.default:
        return Call(target, (inner, [0, *(dim % own + 1 for dim in rest[0])]))
    counted = rank if target is aten.unsqueeze.default else own
    return Call(target, (inner, *(dim % counted + 1 for dim in rest)))
