"""Routing weights as a table ``[T, E]``: read back as ids and values per slot, and proven to be zero elsewhere.

table = sigmoid(full(-inf).scatter(1, ids, values))      =>     ids, values, [sigmoid]

An elementwise op after the scatter is applied to the values instead, in the body. What stands in the table
for all other experts goes through the same ops, and must come out as exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moe_fx.passes.raising.contraction import contraction
from moe_fx.passes.raising.pieces import arange
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_fx.constants import filled_with
from moe_fx.matcher import Match, Miss, is_pointwise, match, op_name
from moe_fx.pattern import ANY, As, AtLeast, Last, Pattern, Var, aten, either, optional
from moe_fx.shapes import known_equal, shape_of, tensor_of

__all__ = ["Slots", "counts_zero", "ids_of_mask", "is_multiple", "is_step", "read_table"]


def cast(pattern: Pattern) -> Pattern:
    return optional(lambda value: aten.to(value, ANY), pattern)


widened_numbers = either(aten.unsqueeze(arange(), Last(1)), aten.reshape(arange(), [-1, 1]))
scattered = (Var("base"), Last(-1), Var("ids"), Var("values"))
SCATTERED = either(
    aten.scatter(*scattered),
    aten.scatter_add(*scattered),
    aten.index_put(Var("base", rank=2), [As("each_row", widened_numbers), Var("ids")], Var("values")),
)
ONE_SLOT = aten.scatter(*scattered)
number = As("number", AtLeast(0))
COLUMN = either(
    aten.slice(Var("whole"), Last(-1), number, ANY),
    aten.unsqueeze(aten.select(Var("whole"), Last(-1), number), Last(-1)),
)
ids, column = Var("ids"), aten.unsqueeze(Var("values"), Last(-1))
#: one_hot(ids) * values, added up over the slots
chosen = either(aten.one_hot(ids, ANY), aten.eq(aten.unsqueeze(ids, Last(-1)), arange()))
#: the same of one value for all: a mask
SCATTERED_VALUE = aten.scatter(Var("base"), Last(-1), Var("ids"), ANY)
SCATTERED_NUMBER = aten.scatter(Var("base"), Last(-1), Var("ids"), Var("number"))
COUNTED = aten.sum(cast(cast(chosen)), [Last(-2)])
SOME = either(COUNTED, aten.any(cast(cast(chosen)), Last(-2)), aten.amax(cast(cast(chosen)), [Last(-2)]))
#: of one expert per token
ONE_EACH = chosen
#: what is asked of a table that is not read
EXACT = "a mask of the experts that were chosen by their ids: scattered, or one-hot rows"
KNOWN = "a table of which it is known that experts not chosen have zero: scattered into zeros, or one-hot rows of ids"
ADDED = aten.sum(aten.mul(cast(cast(chosen)), column), [Last(-2)])


@dataclass(frozen=True)
class Slots:
    """What a table says: ``values [T, K]`` of the experts ``ids [T, K]``, after the ops of ``steps``.

    Without ``values``, what the table itself holds for the ids. It says so only if a token's ids differ: of a repeated
    one the table has a single entry.
    """

    ids: Node
    values: Node | None
    steps: tuple[Node, ...] = ()

    def write(self, graph: Graph, value: Node) -> Node:
        """The steps applied to ``value``, in a body."""
        for step in reversed(self.steps):
            args: Any = map_arg(step.args, dict.fromkeys(step.all_input_nodes, value).__getitem__)  # perhaps twice
            value = graph.call_function(step.target, args, dict(step.kwargs))
        return value


def read_table(table: Node, after: Sequence[Node] = ()) -> Slots | Miss:
    """Read a table back; a Miss where something but zero may stand for experts that were not chosen.

    ``after`` are elementwise ops that follow when the table was turned around, the last first.
    """
    steps: list[Node] = [*after]
    node = table
    while is_step(node):
        steps.append(node)
        (node,) = node.all_input_nodes
    found = next((each for each in (_scattered(node), _added(node)) if isinstance(each, Match)), None)
    filled = _elsewhere(table)
    if isinstance(filled, Miss):
        return filled
    ids_of_table, rest = filled
    for step in reversed(after):
        rest = _applied(step, rest)
    if rest != 0:
        return Miss("a table that is zero for experts not chosen", f"{rest} there", table)
    if found is None or not isinstance(found["values"], Node):  # of a mask, one number is scattered for all
        return Slots(ids_of_table, None, tuple(after))
    return Slots(ids_of_table, found["values"], tuple(steps))


def ids_of_mask(table: Node) -> Node | None:
    """The ids of a table that says yes for exactly these, whatever its dtype; None for any other."""
    while op_name(table) in ("aten::to", "aten::clone"):
        (table,) = table.all_input_nodes
    found = match(SCATTERED_NUMBER, table)
    if isinstance(found, Match):
        one = isinstance(found["number"], int | float) and found["number"] == 1  # a cast may make others zero
        return found["ids"] if one and filled_with(found["base"]) == 0 else None
    found = match(SOME, table)
    return found["ids"] if isinstance(found, Match) else None


def _elsewhere(node: Node) -> tuple[Node, float] | Miss:
    """The ids of a table, and what it holds for all other experts."""
    value = tensor_of(node)
    if value is None:
        return Miss("a table of routing weights", _describe(node), node)
    found = _scattered(node)
    if isinstance(found, Match) or isinstance(found := match(SCATTERED_VALUE, node), Match):
        filled = filled_with(found["base"])
        if filled is None:
            return Miss("a tensor of one value to scatter into", _describe(found["base"]), found["base"])
        if op_name(node) == "aten::scatter_add" and filled != 0:
            return Miss("zeros to add to", f"{filled}", found["base"])
        return found["ids"], float(torch.tensor(filled, dtype=value.dtype))
    for added in (_added(node), match(COUNTED, node), match(ONE_EACH, node)):
        if isinstance(added, Match):
            return added["ids"], 0.0
    name = op_name(node)
    if is_step(node):
        return _through(node, node.all_input_nodes[0])
    compared: Miss | None = None
    if name in ("aten::ge", "aten::gt", "aten::le", "aten::lt"):
        return Miss(EXACT, f"{node.name}, which compares scores: of equal ones more than K pass", node)
    if name == "aten::softmax" and node.args[1] in (-1, value.dim() - 1):
        before = _elsewhere(node.args[0])
        if isinstance(before, Miss) or before[1] == -math.inf or _is_lowest(before[1], node.args[0]):
            return before if isinstance(before, Miss) else (before[0], 0.0)
        wanted = "minus infinity for experts not chosen, before a softmax: others need not come out as zero"
        return Miss(wanted, f"{before[1]:g} there", node)
    if name in ("aten::mul", "aten::div"):
        # Zero times a weight, or over their sum, is zero; the weights are finite.
        for factor in node.all_input_nodes[: 2 if name == "aten::mul" else 1]:
            before = _elsewhere(factor)
            if not isinstance(before, Miss) and before[1] == 0:
                return before
            compared = before if isinstance(before, Miss) and before.wanted == EXACT else compared
    if name in ("aten::masked_fill", "aten::where"):
        mask, kept = (node.args[1], node.args[2]) if name == "aten::masked_fill" else (node.args[0], node.args[2])
        filling = kept if not isinstance(kept, Node) else filled_with(kept)
        before = _elsewhere(mask) if isinstance(mask, Node) else Miss("a mask", str(mask), node)
        told = not isinstance(before, Miss) and isinstance(filling, int | float)
        if told and bool(before[1]) is (name == "aten::masked_fill"):
            return before[0], float(filling)
        compared = before if isinstance(before, Miss) and before.wanted == EXACT else None
    if compared is not None:
        return compared
    if name == "aten::scatter" and node.args[1] not in (-1, value.dim() - 1):
        # Whatever is chosen along the tokens: an expert takes as many of them as it is given places for.
        return Miss(KNOWN, f"{node.name}, scattered along another dimension than the experts'", node)
    return found if name == "aten::scatter" else Miss(KNOWN, _describe(node), node)


def _is_lowest(filled: float, scores: Node) -> bool:
    """Whether a fill is the lowest number of its dtype, so far from others that ``exp`` of the difference is zero."""
    value = tensor_of(scores)
    wide = value is not None and value.dtype in (torch.float32, torch.bfloat16, torch.float64)
    return wide and filled == torch.finfo(value.dtype).min


def _scattered(node: Node) -> Match | Miss:
    """Values scattered to their experts, in the row of each token."""
    found = match(SCATTERED, node)
    if isinstance(found, Match) and isinstance(in_turn := _in_turn(node), Match):
        return in_turn
    if isinstance(found, Match) and "each_row" in found.bindings:
        rows = (shape_of(found["each_row"]) or (0,))[0]
        if not known_equal(rows, (shape_of(node) or (1,))[0]):
            return Miss("a row for each token", _describe(found["each_row"]), node)
    return found


def _in_turn(node: Node) -> Match | None:
    """The same, slot after slot: ``table.scatter(1, ids[:, k, None], values[:, k, None])`` for every k.

    Of a token whose ids repeat, one value is left here and there: a table is read only if they are distinct.
    """
    wholes, numbers, nodes = set[tuple[Node, Node]](), list[int](), set[Node]()
    while isinstance(found := match(ONE_SLOT, node), Match):
        ids, values = _column(found["ids"]), _column(found["values"])
        if ids is None or values is None or ids[1] != values[1]:
            break
        wholes.add((ids[0], values[0]))
        numbers.append(ids[1])
        nodes.add(node)
        node = found["base"]
    if len(wholes) != 1 or sorted(numbers) != list(range(len(numbers))):
        return None
    ((all_ids, all_values),) = wholes
    if any(not known_equal((shape_of(whole) or (0,))[-1], len(numbers)) for whole in (all_ids, all_values)):
        return None
    return Match({"base": node, "ids": all_ids, "values": all_values}, frozenset(nodes))


def _column(node: Node) -> tuple[Node, int] | None:
    """What a value ``[..., 1]`` is a column of, and which."""
    if not known_equal((shape_of(node) or (0,))[-1], 1):
        return None
    found = match(COLUMN, node)
    return (found["whole"], found["number"]) if isinstance(found, Match) else None


def _added(node: Node) -> Match | Miss:
    """``one_hot(ids) * values``, added up over the slots: written out, or as a product like einsum('tke,tk->te')."""
    product = contraction(node)
    if product is None or len(product.operands) != 2 or product.bias is not None:
        return match(ADDED, node)
    for hot, values in ((0, 1), (1, 0)):
        found = match(cast(cast(chosen)), product.operands[hot])
        letters, slots = product.letters[hot], product.letters[values]
        if isinstance(found, Match) and slots == letters[:-1] and product.out == letters[:-2] + letters[-1:]:
            return Match({**found.bindings, "values": product.operands[values]}, found.nodes)
    return match(ADDED, node)


def _through(step: Node, source: Node) -> tuple[Node, float] | Miss:
    """What an elementwise op makes of what a table holds elsewhere, in the dtypes of the graph."""
    before = _elsewhere(source)
    if isinstance(before, Miss):
        return before
    return before[0], _applied(step, before[1])


def _applied(step: Node, number: float) -> float:
    source: Any = tensor_of(step.args[0])
    kwargs: Any = {name: given for name, given in step.kwargs.items() if name not in ("device", "pin_memory")}
    args: Any = map_arg(step.args, lambda _: torch.tensor([number], dtype=source.dtype))
    return float(step.target(*args, **kwargs))  # type: ignore[operator]


def _describe(node: Node) -> str:
    return f"{node.name} ({op_name(node) or node.op})"


def is_step(node: Node) -> bool:
    """An elementwise op of one tensor."""
    given = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, Node)]
    if not isinstance(node.target, torch._ops.OpOverload) or len(given) != 1 or len(node.all_input_nodes) != 1:
        return False  # a tensor times itself has two
    pointwise = is_pointwise(node.target) or op_name(node) in ("aten::to", "aten::clone")
    return pointwise and isinstance(node.args[0], Node) and not node.target._schema.is_mutable


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


def is_multiple(output: Node, factor: Node) -> bool:
    """Whether a body's output is certainly ``factor`` times something else, or a sum of such products."""
    depends, multiple = {factor}, {factor}
    for node in output.graph.nodes:
        operands = [each for each in node.all_input_nodes if each in depends]
        if not operands or node.op != "call_function":
            continue
        depends.add(node)
        name, first = op_name(node), node.args[0]
        linear = name == "aten::linear" and (len(node.args) < 3 or node.args[2] is None) and node.args[1] not in depends
        one = name in MOVES or linear or (name == "aten::mul" and node.args[0] is not node.args[1])
        if (one and operands[0] in multiple and len(operands) == 1) or (
            name == "aten::add" and len(node.args) == 2 and all(each in multiple for each in (first, node.args[1]))
        ):
            multiple.add(node)
    return output in multiple


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
    if not is_pointwise(node.target) or not operands or not all(arg in zero for arg in operands):
        return False
    # An elementwise op of zeros and literals: what it makes of them is the same everywhere.
    given: Any = map_arg(node.args, lambda _: torch.zeros(1, dtype=torch.float64))
    kwargs: Any = map_arg(dict(node.kwargs), lambda _: torch.zeros(1, dtype=torch.float64))
    target: Any = node.target
    return float(target(*given, **kwargs)) == 0
