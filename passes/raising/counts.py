"""Where one expert's rows begin and end among sorted rows: sums of how many rows each expert has.

counts = histc(ids, E);  end = start + counts[2]          => counts[0] + counts[1] + counts[2]

A number is read back as how often each expert's count is in it: `{0: 1, 1: 1, 2: 1}`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from moe_fx.passes.raising import grouped
from torch.fx import Graph, Node

from moe_fx.constants import filled_with, moved
from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import ANY, As, AtLeast, Last, Var, aten, either, optional
from moe_fx.shapes import same_expression, same_shape, shape_of, tensor_of

__all__ = ["Counts", "Total", "largest_count"]

#: how often each expert's count is in a sum
Total = dict[int, int]

#: a mask by token and expert, added up: an expert that a token was routed to twice counts once
ONCE = aten.sum(
    optional(lambda hot: aten.to(hot, ANY), aten.scatter(As("zeros", ANY), Last(-1), Var("ids", rank=2), 1)), [0]
)
#: a one added for each id, where its expert is counted
one_each = As("ones", ANY)
ADDED = either(
    aten.scatter_add(As("zeros", ANY), 0, grouped.any_ids, one_each),
    aten.index_add(As("zeros", ANY), 0, grouped.any_ids, one_each),
    aten.index_put(As("zeros", ANY), [grouped.any_ids], one_each, True),
)
#: how many ids are a single expert's
one_of_ids = optional(lambda mask: aten.to(mask, ANY), aten.eq(grouped.all_ids, As("counted", AtLeast(0))))
ONE_EXPERT = either(aten.sum(one_of_ids), aten.sum(one_of_ids, []))
#: where each expert's rows end among the sorted ones, and where they begin
ENDS = aten.searchsorted(grouped.sorted_ids, grouped.numbers, right=True)
STARTS = aten.searchsorted(grouped.sorted_ids, grouped.numbers)
#: ops that yield the same numbers
SAME = frozenset({"aten::item", "aten::_local_scalar_dense", "aten::clone", "aten::reshape", "aten::squeeze"})
#: dtypes that hold every number of rows exactly
EXACT = (torch.float32, torch.float64, torch.int32, torch.int64)


class Counts:
    """Reads sums of counts; ``bindings`` are what is known of the layer, and grow by whose ids are counted."""

    def __init__(self, bindings: dict[str, Any]) -> None:
        self.bindings = bindings
        self.num_experts = 0
        self._known: dict[Node, Any] = {}

    def total(self, value: object) -> Total | None:
        """A number as a sum of counts; None for any other."""
        found = self.read(value)
        return found if isinstance(found, dict) else None

    def read(self, value: Any) -> Total | list[Total] | None:
        """A number, or the numbers of a vector."""
        if not isinstance(value, Node):
            return {} if value == 0 and not isinstance(value, bool) else None
        if value not in self._known:
            self._known[value] = (
                self._counted(value) or self._ended(value) or self._of_one_expert(value) or self._computed(value)
            )
        found: Total | list[Total] | None = self._known[value]
        return found

    def _counted(self, node: Node) -> list[Total] | None:
        """The counts themselves, by expert."""
        for pattern in (grouped.counts, ONCE, ADDED):
            found = match(pattern, node, self.bindings)
            shape = shape_of(node) or ()
            if not isinstance(found, Match) or len(shape) != 1 or tensor_of(node).dtype not in EXACT:
                continue
            if pattern is ADDED and filled_with(moved(found["ones"])) != 1:
                continue
            if pattern is not grouped.counts and filled_with(found["zeros"]) != 0:
                continue
            count = shape[0] if isinstance(shape[0], int) else found.bindings.get("num_experts")
            if not isinstance(count, int):
                continue
            self.bindings = {name: bound for name, bound in found.bindings.items() if name not in ("zeros", "ones")}
            if pattern is ONCE:
                self.bindings["counted_once"] = True
            self.num_experts = count
            return [{expert: 1} for expert in range(count)]
        return None

    def _ended(self, node: Node) -> list[Total] | None:
        """Where the rows of each expert end, or begin, as a search among the sorted ids tells."""
        for pattern, own in ((ENDS, 1), (STARTS, 0)):
            found = match(pattern, node, self.bindings)
            if not isinstance(found, Match):
                continue
            self.bindings = dict(found.bindings)
            searched = self.bindings.pop("num_experts")
            # Where rows begin tells where those of the expert before end: there is one number more than experts.
            self.num_experts = max(self.num_experts, searched - 1 + own)
            return [dict.fromkeys(range(place + own), 1) for place in range(searched)]
        return None

    def _of_one_expert(self, node: Node) -> Total | None:
        """How many ids are a single expert's."""
        found = match(ONE_EXPERT, node, self.bindings)
        if not isinstance(found, Match):
            return None
        self.bindings = dict(found.bindings)
        expert = self.bindings.pop("counted")
        self.num_experts = max(self.num_experts, expert + 1)
        return {expert: 1}

    def _computed(self, node: Node) -> Any:
        name = op_name(node)
        if node.target in (operator.add, operator.sub) or name in ("aten::add", "aten::sub"):
            if len(node.args) > 2 or node.kwargs:
                return None
            sign = 1 if node.target is operator.add or name == "aten::add" else -1
            left, right = node.args
            return _combined(self.read(left), self.read(right), sign)
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            source, place = node.args
            vector = self.read(source) if op_name(source) == "aten::unbind" else None
            return vector[place] if isinstance(vector, list) and isinstance(place, int) else None
        if name == "aten::stack":
            numbers = [self.total(part) for part in arguments(node)["tensors"]]
            return numbers if same_shape(shape_of(node) or (), (len(numbers),)) and None not in numbers else None
        if name == "aten::cat":
            parts = [self.read(part) for part in arguments(node)["tensors"]]
            return (
                [total for part in parts for total in part] if all(isinstance(part, list) for part in parts) else None
            )
        if name == "aten::slice_scatter":
            given = arguments(node)
            return _written(self.read(given["self"]), self.read(given["src"]), given)
        if filled_with(node) == 0 and len(shape_of(node) or ()) == 1:
            return [{} for _ in range(shape_of(node)[0])] if isinstance(shape_of(node)[0], int) else None
        if name == "aten::to" and node.args[1] not in EXACT:
            return None
        before = self.read(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        if isinstance(before, list) and len(before) == 1 and shape_of(node) in (None, ()):
            return before[0]  # a vector of one number, as that number
        if before is None or name in SAME or name in ("aten::to", "aten::unbind"):
            return before
        return _of_vector(name, before, arguments(node)) if isinstance(before, list) else None


def largest_count(size: object, graph: Graph, bindings: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of a layer when ``size`` is the number of rows of the expert that has most; None if it is not."""
    if not isinstance(size, torch.SymInt):
        return None
    items = [node for node in graph.nodes if op_name(node) in ("aten::item", "aten::_local_scalar_dense")]
    items = [node for node in items if isinstance(node.meta["val"], torch.SymInt)]
    for item in items:
        if not same_expression(item.meta["val"], size):
            continue
        given = arguments(item.args[0]) if op_name(item.args[0]) in ("aten::max", "aten::amax") else {}
        counts = Counts(bindings)
        vector = counts.read(given.get("self"))
        if given.get("dim") in (None, 0, [], [0]) and isinstance(vector, list) and _are_all(vector, counts):
            return dict(counts.bindings)
    # Of numbers of Python, the largest.
    largest = size.node.expr.args if size.node.expr.func.__name__ == "Max" else ()
    counts = Counts(bindings)
    known = {item.meta["val"].node.expr: counts.total(item) for item in items} if largest else {}
    numbers = [known.get(each) for each in largest]
    every = None not in numbers and _are_all([number for number in numbers if number is not None], counts)
    return dict(counts.bindings) if largest and every else None


def _are_all(numbers: list[Total], counts: Counts) -> bool:
    """Whether these are the numbers of rows of all experts, each once, in whatever order."""
    every: list[Total] = [{expert: 1} for expert in range(counts.num_experts)]
    return len(numbers) == len(every) and all(each in numbers for each in every)


def _of_vector(name: str | None, vector: list[Total], given: dict[str, Any]) -> Any:
    if name == "aten::select":
        place = given["index"]
        return vector[place] if isinstance(place, int) and -len(vector) <= place < len(vector) else None
    if name == "aten::slice":
        bounds = (given["start"], given["end"], given["step"])
        return vector[slice(*bounds)] if all(bound is None or isinstance(bound, int) for bound in bounds) else None
    if name == "aten::cumsum":
        ends: list[Total] = []
        for total in vector:
            ends.append(_sum(ends[-1] if ends else {}, total, 1))
        return ends
    if name in ("aten::constant_pad_nd", "aten::pad") and given.get("mode", "constant") == "constant":
        if given["value"] not in (0, None) or not all(isinstance(many, int) and many >= 0 for many in given["pad"]):
            return None
        front, back = given["pad"]
        return [{} for _ in range(front)] + vector + [{} for _ in range(back)]
    return None


def _written(vector: Any, part: Any, given: dict[str, Any]) -> list[Total] | None:
    """A vector over a part of which another is written."""
    bounds = (given["start"], given["end"], given["step"])
    if given["dim"] != 0 or not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    if not isinstance(vector, list) or not isinstance(part, list) or len(vector[slice(*bounds)]) != len(part):
        return None
    whole = list(vector)
    whole[slice(*bounds)] = part
    return whole


def _combined(left: Any, right: Any, sign: int) -> Any:
    if isinstance(left, dict) and isinstance(right, dict):
        return _sum(left, right, sign)
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [_sum(one, other, sign) for one, other in zip(left, right, strict=True)]
    return None


def _sum(left: Total, right: Total, sign: int) -> Total:
    added = {expert: left.get(expert, 0) + sign * right.get(expert, 0) for expert in {*left, *right}}
    return {expert: many for expert, many in added.items() if many}
