"""Routing weights as a table ``[T, E]``: read back as ids and values per slot, and proven to be zero elsewhere.

table = sigmoid(full(-inf).scatter(1, ids, values))      =>     ids, values, [sigmoid]

An elementwise op after the scatter is applied to the values instead, in the body. What stands in the table
for all other experts goes through the same ops, and must come out as exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from moe_fx.passes.raising.pieces import arange
from torch.fx import Graph, Node

from moe_fx.constants import filled_with
from moe_fx.matcher import Match, Miss, match, op_name
from moe_fx.pattern import ANY, Last, Pattern, Var, aten, either, optional
from moe_fx.shapes import tensor_of

__all__ = ["Slots", "counts_zero", "read_table"]


def cast(pattern: Pattern) -> Pattern:
    return optional(lambda value: aten.to(value, ANY), pattern)


SCATTERED = aten.scatter(Var("base"), Last(-1), Var("ids"), Var("values"))
ids, column = Var("ids"), aten.unsqueeze(Var("values"), Last(-1))
#: one_hot(ids) * values, added up over the slots
chosen = either(aten.one_hot(ids, ANY), aten.eq(aten.unsqueeze(ids, Last(-1)), arange()))
ADDED = aten.sum(aten.mul(cast(cast(chosen)), column), [Last(-2)])


@dataclass(frozen=True)
class Slots:
    """What a table says: ``values [T, K]`` of the experts ``ids [T, K]``, after the ops of ``steps``.

    It says so only if a token's ids differ: of a repeated one the table has a single entry.
    """

    ids: Node
    values: Node
    steps: tuple[Node, ...]

    def write(self, graph: Graph, value: Node) -> Node:
        """The steps applied to ``value``, in a body."""
        for step in reversed(self.steps):
            args = (value, *step.args[1:])
            value = graph.call_function(step.target, args, dict(step.kwargs))
        return value


def read_table(table: Node) -> Slots | Miss:
    """Read a table back; a Miss where something but zero may stand for experts that were not chosen."""
    steps: list[Node] = []
    node = table
    while True:
        found = match(SCATTERED, node)
        if isinstance(found, Match):
            filled = filled_with(found["base"])
            if filled is None:
                return Miss("a tensor of one value to scatter into", _describe(found["base"]), found["base"])
            rest = _after(steps, filled, tensor_of(found["base"]).dtype)
            if rest != 0:
                return Miss("a table that is zero for experts not chosen", f"{rest} there", table)
            return Slots(found["ids"], found["values"], tuple(steps))
        added = match(ADDED, node)
        if isinstance(added, Match) and _after(steps, 0.0, tensor_of(node).dtype) == 0:
            return Slots(added["ids"], added["values"], tuple(steps))
        if not _is_step(node):
            return found if op_name(node) == "aten::scatter" else Miss("aten::scatter", _describe(node), node)
        steps.append(node)
        (node,) = node.all_input_nodes


def _describe(node: Node) -> str:
    return f"{node.name} ({op_name(node) or node.op})"


def _is_step(node: Node) -> bool:
    """An elementwise op of one tensor."""
    if not isinstance(node.target, torch._ops.OpOverload) or len(node.all_input_nodes) != 1:
        return False
    pointwise = torch.Tag.pointwise in node.target.tags or op_name(node) in ("aten::to", "aten::clone")
    return pointwise and isinstance(node.args[0], Node) and not node.target._schema.is_mutable


def _after(steps: Iterable[Node], value: float, dtype: torch.dtype) -> float:
    """A number through the ops, in the dtypes of the graph."""
    number = torch.tensor([value], dtype=dtype)
    for step in reversed(list(steps)):
        kwargs = {name: given for name, given in step.kwargs.items() if name not in ("device", "pin_memory")}
        number = step.target(number, *step.args[1:], **kwargs)  # type: ignore[operator]
    return float(number)


#: ops that yield zeros of zeros, however they move them
MOVES = frozenset({
    "aten::reshape", "aten::expand", "aten::transpose", "aten::permute", "aten::slice", "aten::select", "aten::squeeze",
    "aten::unsqueeze", "aten::split_with_sizes", "aten::sum", "aten::mean", "aten::clone", "aten::to",
    "aten::contiguous", "aten::flip", "aten::unbind", "aten::narrow", "aten::cumsum",
})  # fmt: skip


def counts_zero(output: Node, zeros: Iterable[Node]) -> bool:
    """Whether a body's output is certainly zero where ``zeros`` are (and everything else is finite)."""
    zero = set(zeros)
    for node in output.graph.nodes:
        if node not in zero and node.op == "call_function" and _is_zero(node, zero):
            zero.add(node)
    return output in zero


def _is_zero(node: Node, zero: set[Node]) -> bool:
    name, first = op_name(node), node.args[0] if node.args else None
    if name is None:
        return getattr(node.target, "__name__", "") == "getitem" and first in zero
    if name == "aten::mul":
        return any(arg in zero for arg in node.args[:2])
    if name in MOVES:
        return first in zero
    if name == "aten::linear":
        return first in zero and (len(node.args) < 3 or node.args[2] is None)
    operands = node.all_input_nodes
    if torch.Tag.pointwise not in node.target.tags or not operands or not all(arg in zero for arg in operands):
        return False
    # An elementwise op of zeros and literals: what it makes of them is the same everywhere.
    given: Any = torch.fx.node.map_arg(node.args, lambda _: torch.zeros(1, dtype=torch.float64))
    kwargs: Any = torch.fx.node.map_arg(dict(node.kwargs), lambda _: torch.zeros(1, dtype=torch.float64))
    target: Any = node.target
    return float(target(*given, **kwargs)) == 0
