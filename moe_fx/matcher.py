"""match(pattern, value) -> Match | Miss. Pure: nothing is changed, and a failure is a value.

A miss keeps the deepest place that was reached: the node, what was wanted there, what was found, and what had
been bound until then.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from moe_fx import pattern as p
from moe_fx.shapes import shape_of

__all__ = ["Match", "Miss", "arguments", "chain", "is_pointwise", "match", "op_name"]

#: ops with a factor of their second operand
SUMS = frozenset({"aten::add", "aten::sub", "aten::rsub"})
#: elementwise ops that lack the tag (torch 2.11 to 2.15)
UNTAGGED = frozenset({"aten::hardswish", "aten::log_sigmoid"})

Bindings = Mapping[str, Any]


@dataclass(frozen=True)
class Match:
    """A pattern that fits: what its names stand for, and the nodes between its root and its captures."""

    bindings: Bindings
    nodes: frozenset[Node] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def get(self, name: str) -> Any:
        return self.bindings.get(name)


@dataclass(frozen=True)
class Miss:
    """Why something does not fit. ``depth`` orders misses: the deepest one is the most telling."""

    wanted: str
    found: str
    node: Node | None = None
    bindings: Bindings = field(default_factory=dict)
    depth: int = 0

    def __bool__(self) -> bool:
        return False


def op_name(node: object) -> str | None:
    """``"aten::sort"`` for a node that calls any overload of it; None for anything that is no op call.

    What says something else by the same name has another: what is given a tensor for its result ``"aten::sort.out"``,
    a sum that takes its second operand several times ``"aten::add.alpha"``, and a scatter that adds to or multiplies
    what is there ``"aten::scatter.reduce"``.
    """
    if not isinstance(node, Node) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = _name_of(node.target)
    scales = name in SUMS and (node.kwargs.get("alpha", 1) != 1 or (len(node.args) > 2 and node.args[2] != 1))
    return f"{name}.alpha" if scales else name


def is_pointwise(target: object) -> bool:
    """Whether a call's target is an op that makes every element of its result of one element of each operand."""
    tagged = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return tagged or (isinstance(target, torch._ops.OpOverload) and _name_of(target) in UNTAGGED)


@functools.cache
def _name_of(overload: torch._ops.OpOverload) -> str:
    schema = overload._schema
    if any(arg.kwarg_only and arg.alias_info is not None and arg.alias_info.is_write for arg in schema.arguments):
        return f"{schema.name}.out"
    reduces = schema.name == "aten::scatter" and any(arg.name == "reduce" for arg in schema.arguments)
    return f"{schema.name}.reduce" if reduces else schema.name


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of an op call by name, defaults filled in."""
    schema = node.target._schema
    values = {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
    values.update(zip((arg.name for arg in schema.arguments), node.args, strict=False))
    values.update(node.kwargs)
    return values


def match(pattern: Any, value: Any, bindings: Bindings | None = None) -> Match | Miss:
    """Match ``pattern`` against a node (or a literal), with the names in ``bindings`` already bound."""
    search = _Search()
    for found, nodes in search.solve(pattern, value, dict(bindings or {}), frozenset(), 0):
        return Match(found, nodes)
    assert search.deepest is not None
    return search.deepest


def chain(step: Any, last: Node) -> tuple[list[tuple[Node, Match]], Node]:
    """The calls that match ``step``, of which each captures the one before as ``base``, up to ``last``; in order, and
    what they begin with."""
    steps: list[tuple[Node, Match]] = []
    node = last
    while isinstance(found := match(step, node), Match):
        steps.insert(0, (node, found))
        node = found["base"]
    return steps, node


def _describe(value: Any) -> str:
    if isinstance(value, Node):
        what = op_name(value) or (value.op if value.op != "call_function" else getattr(value.target, "__name__", "?"))
        return f"{value.name} ({what})"
    return f"the literal {value!r}"


def _describe_pattern(pattern: Any) -> str:
    """The head of a pattern: a reader wants the op that was missing, not the whole tree below it."""
    if isinstance(pattern, p.Op):
        return " or ".join(pattern.names)
    if isinstance(pattern, p.As):
        return _describe_pattern(pattern.pattern)
    if isinstance(pattern, p.Item):
        return f"element {pattern.index} of {_describe_pattern(pattern.source)}"
    if isinstance(pattern, p.Either):
        return " or ".join(dict.fromkeys(_describe_pattern(choice) for choice in pattern.choices))
    if isinstance(pattern, p.Fold):
        return _describe_pattern(pattern.step)
    if isinstance(pattern, list | tuple):
        return f"[{', '.join(map(_describe_pattern, pattern))}]"
    return str(pattern) if isinstance(pattern, p.Pattern) else repr(pattern)


Solution = tuple[dict[str, Any], frozenset[Node]]


class _Search:
    """One depth-first search with backtracking; remembers the deepest failure."""

    def __init__(self) -> None:
        self.deepest: Miss | None = None

    def miss(self, wanted: str, value: Any, env: Bindings, depth: int, at: Node | None = None) -> None:
        if self.deepest is None or depth >= self.deepest.depth:
            node = value if isinstance(value, Node) else at
            self.deepest = Miss(wanted, _describe(value), node, dict(env), depth)

    def solve(
        self,
        pattern: Any,
        value: Any,
        env: dict[str, Any],
        nodes: frozenset[Node],
        depth: int,
        at: Node | None = None,
    ) -> Iterator[Solution]:
        """Every way in which ``pattern`` fits ``value``. ``at`` is the call whose argument ``value`` is."""
        if isinstance(pattern, p.Wildcard):
            yield env, nodes
        elif isinstance(pattern, p.Var):
            yield from self.solve_var(pattern, value, env, nodes, depth, at)
        elif isinstance(pattern, p.As):
            for found, seen in self.solve_var(p.Var(pattern.name), value, env, nodes, depth, at):
                yield from self.solve(pattern.pattern, value, found, seen, depth, at)
        elif isinstance(pattern, p.Op):
            yield from self.solve_op(pattern, value, env, nodes, depth)
        elif isinstance(pattern, p.Item):
            if isinstance(value, Node) and value.target is operator.getitem and value.args[1] == pattern.index:
                yield from self.solve(pattern.source, value.args[0], env, nodes | {value}, depth + 1)
            else:
                self.miss(_describe_pattern(pattern), value, env, depth, at)
        elif isinstance(pattern, p.Either):
            for choice in pattern.choices:
                yield from self.solve(choice, value, env, nodes, depth, at)
        elif isinstance(pattern, p.Fold):
            yield from self.solve_fold(pattern, value, env, nodes, depth)
        elif isinstance(pattern, list | tuple) and isinstance(value, list | tuple):
            if len(pattern) == len(value):
                yield from self.solve_all(list(zip(pattern, value, strict=True)), env, nodes, depth, at)
            else:
                self.miss(_describe_pattern(pattern), value, env, depth, at)
        elif self.literal_fits(pattern, value, at):
            yield env, nodes
        else:
            self.miss(_describe_pattern(pattern), value, env, depth, at)

    def literal_fits(self, pattern: Any, value: Any, at: Node | None) -> bool:
        if isinstance(value, Node):
            return False
        if isinstance(pattern, p.OneOfValues):
            return any(self.literal_fits(choice, value, at) for choice in pattern.values)
        if isinstance(pattern, p.AtLeast):
            return isinstance(value, int) and value >= pattern.least
        if isinstance(pattern, p.Last):
            shape = shape_of(at.args[0]) if at is not None else None
            if shape is None or not isinstance(value, int):
                return False
            rank = len(shape) + (op_name(at) == "aten::unsqueeze")  # a new dimension is counted among the result's
            return (value - pattern.dim) % rank == 0
        return bool(value == pattern) and isinstance(value, bool) == isinstance(pattern, bool)

    def solve_var(
        self, var: p.Var, value: Any, env: dict[str, Any], nodes: frozenset[Node], depth: int, at: Node | None
    ) -> Iterator[Solution]:
        shape = shape_of(value)
        if var.ranks and (shape is None or len(shape) not in var.ranks):
            self.miss(str(var), value, env, depth, at)
        elif var.name not in env:
            yield {**env, var.name: value}, nodes
        elif env[var.name] is value or (not isinstance(value, Node) and env[var.name] == value):
            yield env, nodes
        else:
            self.miss(f"{var.name} = {_describe(env[var.name])}, as elsewhere in the layer", value, env, depth, at)

    def solve_op(
        self, pattern: p.Op, value: Any, env: dict[str, Any], nodes: frozenset[Node], depth: int
    ) -> Iterator[Solution]:
        if op_name(value) not in pattern.names:
            self.miss(_describe_pattern(pattern), value, env, depth)
            return
        given = arguments(value)
        schema = [arg.name for arg in value.target._schema.arguments]
        wanted = dict(zip(schema, pattern.args, strict=False)) | dict(pattern.kwargs)
        defaults = {arg.name: arg.default_value for arg in value.target._schema.arguments if arg.has_default_value()}
        missing = [name for name in wanted if name not in given]
        for name, actual in given.items():
            if name not in wanted and name not in p.BOOKKEEPING and actual != defaults.get(name):
                self.miss(f"{pattern.names[0]} with {name}={defaults.get(name)!r}", value, env, depth + 1)
                return
        if missing:
            self.miss(f"{pattern.names[0]} with {missing[0]}", value, env, depth + 1)
            return
        pairs = [(want, given[name]) for name, want in wanted.items()]
        orders = [pairs]
        if pattern.commutes and len(pairs) >= 2:
            (left, a), (right, b) = pairs[:2]
            orders.append([(left, b), (right, a), *pairs[2:]])
        for order in orders:
            yield from self.solve_all(order, env, nodes | {value}, depth + 1, value)

    def solve_all(
        self,
        pairs: list[tuple[Any, Any]],
        env: dict[str, Any],
        nodes: frozenset[Node],
        depth: int,
        at: Node | None,
    ) -> Iterator[Solution]:
        if not pairs:
            yield env, nodes
            return
        (pattern, value), rest = pairs[0], pairs[1:]
        for found, seen in self.solve(pattern, value, env, nodes, depth, at):
            yield from self.solve_all(rest, found, seen, depth, at)

    def solve_fold(
        self, fold: p.Fold, value: Any, env: dict[str, Any], nodes: frozenset[Node], depth: int
    ) -> Iterator[Solution]:
        steps: list[dict[str, Any]] = []
        shared = dict(env)
        while True:
            local = {name: bound for name, bound in shared.items() if name not in fold.each}
            # The first way in which a step fits is kept: a chain of N steps costs N matches, not 2^N.
            step = next(self.solve(fold.step, value, local, nodes, depth + len(steps)), None)
            if step is None:
                break
            found, nodes = step
            value = found.pop(p.ACC.name)
            steps.append({name: found[name] for name in fold.each})
            shared = {name: bound for name, bound in found.items() if name not in fold.each}
        if not steps:
            return
        collected = {name: tuple(step[name] for step in reversed(steps)) for name in fold.each}
        end = {**shared, **collected, fold.count: len(steps)}
        yield from self.solve(fold.start, value, end, nodes, depth + len(steps))
