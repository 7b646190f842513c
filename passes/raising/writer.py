"""Writes the body of a layer: one expert, as a graph over its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_fx.experts import per_row
from moe_fx.matcher import op_name

__all__ = ["ROWS", "Value", "Writer"]

aten = torch.ops.aten
#: what a value has: a row for each routed row; a value for each expert; one value for all
ROWS, EXPERTS_OWN, SHARED = "rows", "expert", "shared"


@dataclass(frozen=True)
class Value:
    """A value in the body: of ``kind`` "rows" it is ``[R, *shape]``, otherwise ``shape``."""

    node: Node
    kind: str
    shape: tuple[int, ...]


class Writer:
    """The body being written, and the values from outside that it takes as inputs."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.captured: dict[str, dict[Node, Node]] = {"x": {}, "s": {}, "p": {}, "h": {}}
        #: of what was reshaped, the shape it had
        self._shapes: dict[Node, tuple[int, ...]] = {}

    def placeholder(self, kind: str, outer: Node) -> Node:
        """The body's input for a value from outside: x tokens, s slots, p expert parameters, h shared operands."""
        known = self.captured[kind]
        if outer not in known:
            name = "x" if kind == "x" else f"{kind}{len(known)}"
            # Placed first; the finished body has them in the order of its signature.
            first = next(iter(self.graph.nodes), None)
            before = self.graph.inserting_before(first) if first is not None else self.graph.inserting_after()
            with before:
                known[outer] = self.graph.placeholder(name)
        return known[outer]

    def write(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """The same elements of each row in another shape."""
        shape = tuple(shape)
        if value.shape == shape:
            return value
        source = value.node
        if op_name(source) == "aten::reshape" and isinstance(source.args[0], Node):
            source = source.args[0]  # a reshape of a reshape is one
            if self._shapes[source] == shape:
                return Value(source, value.kind, shape)
        self._shapes.setdefault(source, value.shape)
        rows = [-1] if value.kind == ROWS else []
        return Value(self.write(aten.reshape.default, source, [*rows, *shape]), value.kind, shape)

    def turned(self, value: Value) -> Value:
        """The last two dimensions of each row exchanged."""
        shape = (*value.shape[:-2], value.shape[-1], value.shape[-2])
        if op_name(value.node) == "aten::transpose" and value.kind != ROWS:
            source = value.node.args[0]
            assert isinstance(source, Node)
            return Value(source, value.kind, shape)  # turned around twice is as it was
        dims = (0, 1) if value.kind != ROWS and len(shape) == 2 else (-2, -1)
        return Value(self.write(aten.transpose.int, value.node, *dims), value.kind, shape)

    def beside_rows(self, value: Value, rank: int) -> Node:
        """A value as an operand of an elementwise op whose rows have ``rank`` dimensions."""
        if value.kind == EXPERTS_OWN:
            # How many rows there are, the tokens will tell: filled in when the body is complete.
            value = Value(self.write(per_row, value.node, None), ROWS, value.shape)
        if value.kind == ROWS and len(value.shape) < rank:
            value = self.reshaped(value, (*[1] * (rank - len(value.shape)), *value.shape))
        return value.node

    def linear(self, rows: Value, weight: Value) -> Value:
        return Value(self.write(aten.linear.default, rows.node, weight.node), ROWS, (*rows.shape[:-1], weight.shape[0]))
