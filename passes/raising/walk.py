"""From the sum over slots back to the tokens: everything between is one expert, written as the body."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from moe_fx.passes.raising import pieces as kinds
from moe_fx.passes.raising.pieces import EXPERT_MAJOR, EXPERTS, HITS, LOCAL, SLOTS, SORTED, TOKEN_MAJOR
from moe_fx.passes.raising.region import Region
from moe_fx.passes.raising.row_local import row_op
from moe_fx.passes.raising.tables import counts_zero, read_table
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.experts import per_row
from moe_fx.matcher import Match, Miss, match, op_name
from moe_fx.rewrite import only_asserted
from moe_fx.shapes import Dim, is_number, known_equal, same_shape, shape_of, tensor_of

__all__ = ["find_region"]

aten = torch.ops.aten


#: the calls of an expert linear through which the rows themselves pass
ROW_STEPS = frozenset({
    "aten::bmm", "aten::matmul", "aten::mm", "aten::linear", "aten::squeeze", "aten::unsqueeze",
    "aten::_grouped_mm", "transformers::grouped_mm_fallback", "moe_fx::grouped_mm",
})  # fmt: skip


def find_region(root: Node, combine: Match, layout: str, pieces: Sequence[kinds.Piece]) -> Region | Miss:
    """The layer whose rows, which stand in ``layout`` (slots, experts or hits), are summed by ``root``."""
    summed: Node = combine["summed"]
    bindings = {name: bound for name, bound in combine.bindings.items() if name not in ("summed", "base")}
    builder = _Builder(root, summed, layout, pieces, bindings)
    output = builder.value(summed, layout)
    if isinstance(output, Miss):
        return builder.deepest if builder.deepest is not None else output
    return builder.region(output)


def _sizes(shape: Sequence[Dim], layout: str, bindings: dict[str, Any]) -> tuple[dict[str, tuple[Dim, ...]], Dim, Dim]:
    outer, inner = shape[:2]
    if layout == SLOTS:
        return {SLOTS: (outer, inner), TOKEN_MAJOR: (outer * inner,), SORTED: (outer * inner,)}, outer, inner
    if layout == EXPERTS:
        return {EXPERTS: (outer, inner), EXPERT_MAJOR: (outer * inner,)}, inner, 0
    tokens, slots = shape_of(bindings["ids"]) or (0, 0)
    return {HITS: (outer,)}, tokens, slots


@dataclass
class _Builder:
    root: Node
    summed: Node
    layout: str
    pieces: Sequence[kinds.Piece]
    bindings: dict[str, Any] = field(default_factory=dict)
    written: dict[tuple[Node, str], Node | Miss] = field(default_factory=dict)
    interior: set[Node] = field(default_factory=set)
    deepest: Miss | None = None
    forms: set[str] = field(default_factory=set)
    #: values of the body that are zero for a token's row where it was not routed to the expert (dense layouts)
    zeros: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.graph = Graph()
        self.captured: dict[str, dict[Node, Node]] = {"x": {}, "s": {}, "p": {}, "h": {}}
        shape = shape_of(self.summed)
        assert shape is not None
        #: what stands for the rows in each layout, and how many slots a token has
        self.leading, self.T, self.top_k = _sizes(shape, self.layout, self.bindings)

    def capture(self, kind: str, node: Node) -> Node:
        """The body's placeholder for a value from outside."""
        known = self.captured[kind]
        if node not in known:
            name = "x" if kind == "x" else f"{kind}{len(known)}"
            # Placed first; `region` brings them into the order of the body's signature.
            first = next(iter(self.graph.nodes), None)
            before = self.graph.inserting_before(first) if first is not None else self.graph.inserting_after()
            with before:
                known[node] = self.graph.placeholder(name)
        return known[node]

    def write(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.graph.call_function(target, args, kwargs)

    def miss(self, wanted: str, node: Node, found: str | None = None, depth: int = 0) -> Miss:
        text = found or f"{node.name} ({op_name(node) or node.op})"
        return self.note(Miss(wanted, text, node, dict(self.bindings), depth + 100 * len(self.written)))

    def note(self, miss: Miss) -> Miss:
        if self.deepest is None or miss.depth >= self.deepest.depth:
            self.deepest = miss
        return miss

    def value(self, node: Node, layout: str) -> Node | Miss:
        """A value of routed rows, written into the body."""
        key = (node, layout)
        if key not in self.written:
            self.written[key] = self.find(node, layout)
        return self.written[key]

    def find(self, node: Node, layout: str) -> Node | Miss:
        shape = shape_of(node)
        rows = self.leading[layout]
        pieces = [piece for piece in self.pieces if piece.layout == layout]
        if shape is not None and not same_shape(shape[: len(rows)], rows):
            beside = self.expert_row(node, layout) if layout in (EXPERTS, HITS) else None
            if beside is not None:
                return self.take(beside[0], node, beside[1])
            return self.miss(f"{' x '.join(map(str, rows))} rows", node, f"{node.name} of shape {list(shape)}")
        near: Miss | None = None
        for piece in pieces:
            found = match(piece.pattern, node, self.bindings)
            if isinstance(found, Match):
                return self.take(piece, node, found)
            if near is None or found.depth >= near.depth:
                near = found
        inner = self.row_local(node, layout)
        # Where a piece came further than its first op, its mismatch says more than "this op is not row-local".
        if isinstance(inner, Miss) and near is not None and near.depth > 0:
            self.note(replace(near, depth=near.depth + 100 * len(self.written) + 50))
        return inner

    def expert_row(self, node: Node, layout: str) -> tuple[kinds.Piece, Match] | None:
        """One row of each expert's, which is laid beside all of its rows and so has another shape than they."""
        for piece in self.pieces:
            if isinstance(piece, kinds.ExpertRow) and piece.layout == layout:
                found = match(piece.pattern, node, self.bindings)
                if isinstance(found, Match):
                    return piece, found
        return None

    def take(self, piece: kinds.Piece, node: Node, found: Match) -> Node | Miss:
        shared = {name: bound for name, bound in found.bindings.items() if name not in LOCAL}
        match piece:
            case kinds.Dispatch():
                self.bindings = shared
                if not self.captured["x"] or found["tokens"] in self.captured["x"]:
                    return self.capture("x", found["tokens"])
                return self.miss("one tensor of token rows", node)
            case kinds.Slot():
                shape = shape_of(found["slot"])
                if shape is None or not same_shape(shape[:2], (self.T, self.top_k)):
                    return self.miss("a value for every token and slot", found["slot"])
                self.bindings = shared
                inner = self.capture("s", found["slot"])
                # [T, K] seen by the rows is [R]; dimensions that the reshape adds follow.
                trailing = list((shape_of(node) or ())[1:])
                return self.write(aten.reshape.default, inner, [-1, *trailing]) if trailing else inner
            case kinds.Table():
                return self.table(node, found["table"], shared)
            case kinds.View():
                self.bindings = shared
                self.interior.add(node)
                return self.value(found["rows"], piece.to)
            case kinds.Mask():
                self.bindings = shared
                self.interior.add(node)
                return self.value(found["rows"], piece.layout)
            case kinds.ExpertRow():
                self.bindings = shared
                param = self.capture("p", found["param"])
                # How many rows there are, the tokens will tell: `region` fills them in.
                return self.write(per_row, param, None)
            case kinds.ExpertLinear():
                return self.expert_linear(piece, node, found, shared)
        raise AssertionError(f"a piece of unknown kind: {piece}")

    def expert_linear(self, piece: kinds.ExpertLinear, node: Node, found: Match, shared: dict[str, Any]) -> Node | Miss:
        self.bindings = shared
        self.forms.add(piece.form)
        between = [n for n in found.nodes if self.is_row_value(n)]
        self.interior.update(between)
        rows = self.value(found["rows"], piece.layout)
        if isinstance(rows, Miss):
            return rows
        weight = self.capture("p", found["weight"])
        matrix = self.write(aten.transpose.int, weight, 0, 1) if piece.transposed else weight
        product = self.write(aten.linear.default, rows, matrix)
        if found.get("bias") is None:
            return product
        return self.write(aten.add.Tensor, product, self.write(per_row, self.capture("p", found["bias"]), None))

    def table(self, node: Node, table: Node, shared: dict[str, Any]) -> Node | Miss:
        """Routing weights by token and expert."""
        slots = read_table(table)
        if isinstance(slots, Miss):
            return self.note(replace(slots, depth=100 * len(self.written) + 80))
        if shared.setdefault("ids", slots.ids) is not slots.ids:
            return self.miss("the layer's own ids", slots.ids)
        self.bindings = shared
        value = slots.write(self.graph, self.capture("s", slots.values))
        self.zeros.append(value)
        trailing = list((shape_of(node) or ())[len(self.leading[self.layout]) :]) if self.layout == EXPERTS else []
        return self.write(aten.reshape.default, value, [-1, *(trailing or [1])])

    def is_row_value(self, node: Node) -> bool:
        """Whether a node of an expert linear holds routed rows, and not ids or weights."""
        return op_name(node) in ROW_STEPS and tensor_of(node) is not None

    def row_local(self, node: Node, layout: str) -> Node | Miss:
        if node.op != "call_function":
            return self.as_slot(node, layout) or self.miss("a value computed from the token rows", node)
        if getattr(node.target, "__name__", "") == "getitem":
            source = self.value(node.args[0], layout)
            if isinstance(source, Miss):
                return source
            self.interior.add(node)
            return self.write(node.target, source, node.args[1])
        op = row_op(node, len(self.leading[layout]))
        if isinstance(op, str):
            return self.as_slot(node, layout) or self.miss(op, node)
        before = self.progress()
        operands: dict[Node, Node] = {}
        wanted: list[Node] = []
        map_arg((op.args, op.kwargs), lambda n: wanted.append(n))
        for operand in dict.fromkeys(wanted):
            if operand in op.shared:
                operands[operand] = self.capture("h", operand)
                continue
            inner = self.operand(node, operand, layout, op.elementwise)
            if isinstance(inner, Miss):
                self.interior, self.captured, self.bindings, self.written = before
                return self.as_slot(node, layout) or inner
            operands[operand] = inner
        self.interior.add(node)
        args, kwargs = map_arg((op.args, op.kwargs), operands.__getitem__)
        return self.write(node.target, *args, **kwargs)

    def progress(self) -> tuple[set[Node], dict[str, dict[Node, Node]], dict[str, Any], dict[Any, Any]]:
        """What a walk that turns out to lead outside has to give back."""
        captured = {kind: dict(known) for kind, known in self.captured.items()}
        return set(self.interior), captured, self.bindings, dict(self.written)

    def operand(self, node: Node, operand: Node, layout: str, elementwise: bool) -> Node | Miss:
        """One tensor operand of a row-local op: routed rows, or something that is the same for every row."""
        leading = len(self.leading[layout])
        shape, mine = shape_of(operand), shape_of(node)
        if is_number(operand):
            return self.capture("h", operand)
        if shape is None and mine is not None and not isinstance(operand.meta.get("val"), list | tuple):
            return self.miss("an operand that is a tensor or a number", operand)
        if elementwise and shape is not None and mine is not None and len(shape) <= len(mine):
            padded = (1,) * (len(mine) - len(shape)) + tuple(shape)
            same_for_all = all(isinstance(size, int) and size == 1 for size in padded[:leading])
            if layout == HITS and self.expert_row(operand, layout) is not None:
                return self.value(operand, layout)
            if same_for_all and (len(shape) < len(mine) or not known_equal(math.prod(self.leading[layout]), 1)):
                if len(shape) <= len(mine) - leading:
                    return self.capture("h", operand)
                return self.write(aten.reshape.default, self.capture("h", operand), list(padded[leading:]))
        return self.value(operand, layout)

    def as_slot(self, node: Node, layout: str) -> Node | None:
        """A value from outside that travels with the slot: [T, K, 1], or [T, 1] where K = 1 makes slots of tokens."""
        shape = shape_of(node)
        if shape is None or not known_equal(shape[-1], 1) or self.layout != SLOTS:
            return None
        if layout == SLOTS and len(shape) == 3:
            return self.capture("s", node)
        if layout != SLOTS and len(shape) == 2 and known_equal(self.top_k, 1):
            return self.write(aten.reshape.default, self.capture("s", node), [-1, 1])
        return None

    def region(self, output: Node) -> Region | Miss:
        """Everything was found: check that it fits together."""
        if not self.forms and self.layout != HITS:
            return self.miss("a row that meets its expert's weight", self.summed, "no such op")
        if not self.captured["x"]:
            return self.miss("token rows sent to their experts", self.summed, "no dispatch")
        used = self.outside_use()
        if used is not None:
            return used
        if self.layout == EXPERTS and not counts_zero(output, self.zeros):
            wanted = "an expert's output that is zero wherever its routing weight is"
            return Miss(wanted, "one that need not be", self.summed, dict(self.bindings), 10**6)
        self.graph.output(output)
        ordered = [node for kind in self.captured.values() for node in kind.values()]
        # Walks that led outside left calls that nobody reads, and perhaps inputs.
        self.graph.eliminate_dead_code()
        for placeholder in self.graph.find_nodes(op="placeholder"):
            if placeholder not in ordered:
                self.graph.erase_node(placeholder)
        for placeholder in reversed(ordered):
            first = next(iter(self.graph.nodes))
            if first is not placeholder:
                first.prepend(placeholder)
        (x,) = self.captured["x"].values()
        for node in self.graph.find_nodes(op="call_function", target=per_row):
            node.args = (node.args[0], x)
        s, p, h = (list(self.captured[kind]) for kind in "sph")
        (tokens,) = self.captured["x"]
        region = Region(
            self.root, "+".join(sorted(self.forms)) or "expert_loop", tokens, self.bindings["ids"], s, p, h,
            GraphModule({}, self.graph), self.interior, self.bindings, distinct=bool(self.zeros),
        )  # fmt: skip
        region.size = (self.T, self.top_k or region.top_k)
        return region

    def outside_use(self) -> Miss | None:
        for node in self.interior:
            for user in node.users:
                if user not in self.interior and user is not self.root and not only_asserted(user):
                    return Miss(
                        f"{node.name} to be read inside the layer only", f"{user.name} ({op_name(user) or user.op})",
                        node, dict(self.bindings), 10**6,
                    )  # fmt: skip
        return None
