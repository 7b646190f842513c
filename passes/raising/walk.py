"""From the sum back to the tokens: everything between is one expert, written as the body.

At each value it is known what its dimensions stand for (`axes.py`). A piece of the disguise may say what it is; what
has no rows, or tokens only, comes from outside (`outside.py`); a product with an expert's weight is its linear; what is
left is an op that takes each row by itself and belongs to the body (`through.py`), or the walk ends with a Miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from moe_fx.passes.raising.anchors import reads_stack
from moe_fx.passes.raising.axes import EXPERT, HIT, PLACE, SLOT, SORTED_ROW, Place, aligned, axes_of, features, size_of
from moe_fx.passes.raising.bins import binned
from moe_fx.passes.raising.choices import chosen
from moe_fx.passes.raising.contraction import Contraction, contraction
from moe_fx.passes.raising.counted_rows import counted_rows
from moe_fx.passes.raising.pieces_taken import Taking
from moe_fx.passes.raising.products import Factor, product
from moe_fx.passes.raising.region import Region, computed_with, read_outside
from moe_fx.passes.raising.tables import counts_zero, is_multiple
from moe_fx.passes.raising.through import Through, is_elementwise, through
from moe_fx.passes.raising.writer import EXPERTS_OWN, ROWS, SHARED, Value
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.experts import per_row
from moe_fx.matcher import Miss, op_name
from moe_fx.shapes import is_number, known_equal, same_shape, shape_of

__all__ = ["NO_EXPERT", "Walk"]

aten = torch.ops.aten

#: what is missed where rows meet no parameters
NO_EXPERT = "a row that meets its expert's weight"
FORMS = {SLOT: "gather_bmm", EXPERT: "dense_bmm", PLACE: "binned_bmm"}


class Walk(Taking):
    """One walk: what is known from outside, and the ops between."""

    def value(self, node: Node, place: Place) -> Value | Miss:
        """A value, written into the body."""
        key = (node, place)
        if key not in self.known:
            self.known[key] = self.find(node, place)
        return self.known[key]

    def find(self, node: Node, place: Place) -> Value | Miss:
        self.visited += 1
        axes = axes_of(place)
        if node in self.cuts:
            return self.cut_rows(self.cuts[node], place)
        # Before shapes are compared: how many rows the parts have together, only their counts tell.
        if SORTED_ROW in axes and (joined := self.joined(self, node, place)) is not None:
            return joined
        put = HIT not in axes and self.specific is not None
        if not put and op_name(node) == "aten::index_put" and (rows := self.written(self, node, place)) is not None:
            return rows
        shape = shape_of(node)
        if shape is not None and not same_shape(shape, [size_of(dim, self.sizes) for dim in place]):
            wanted = " x ".join(str(size_of(dim, self.sizes)) for dim in place)
            return self.miss(f"a value of shape {wanted}", node, f"{node.name} of shape {list(shape)}")
        if EXPERT in axes and axes > {EXPERT} and self.is_one_tokens(node, axes):
            place = self.without_tokens(place)
            axes = axes_of(place)
        if not axes:
            return self.same_for_all(node, place)
        if (in_bins := binned(self, node, place)) is not None:
            return in_bins
        if (counted := counted_rows(self, node, place)) is not None:
            self.interior.add(node)
            return self.value(*counted)
        if op_name(node) == "aten::where" and (rows := self.selected(self, node, place)) is not None:
            return rows
        fits, found = self.piece(node, place)
        if fits and found is not None:
            return found
        if axes <= set(self.tokens) and not self.walks_on(node) and not self.reads_own(node, place):
            return self.token_rows(node, place)
        if axes == {EXPERT}:
            return self.expert_value(node, place)
        if axes & {EXPERT, SLOT} and (stacked := self.stacked(self, node, place)) is not None:
            return stacked
        if (SLOT in axes or self.single) and (chosen := self.chosen(node, place)) is not None:
            return chosen
        if (SLOT in axes or self.single) and (gathered := self.gathered(node, place)) is not None:
            return gathered
        outside = self.routing_weight(node, place, axes)
        if outside is not None:
            return outside
        inner = self.inside(node, place)
        # Where a piece came further than its first op, its mismatch says more than "this op is not row-local".
        if isinstance(inner, Miss) and isinstance(found, Miss) and found.depth > 0:
            self.note(replace(found, depth=found.depth + 100 * self.visited + 50))
        return inner

    # What is inside

    def inside(self, node: Node, place: Place) -> Value | Miss:
        if node.op != "call_function":
            return self.miss("a value computed from the token rows", node)
        before = self.progress()
        multiplied = contraction(node)
        if multiplied is not None:
            result = self.multiplied(node, place, multiplied)
            if not isinstance(result, Miss) or op_name(node) != "aten::sum":
                return result
            self.go_back(before)
        step = through(node, place, self.sizes)
        if isinstance(step, str):
            return self.miss(step, node)
        operands: list[Value] = []
        for operand, own in step.operands:
            inner = self.operand(operand, own, place)
            if isinstance(inner, Miss):
                self.go_back(before)
                return inner
            operands.append(inner)
        self.interior.add(node)
        if op_name(node) is None:
            self.interior.add(node.args[0])  # the split whose part this is
        return self.applied(node, place, step, operands)

    def operand(self, node: Node, place: Place, result: Place) -> Value | Miss:
        if is_number(node):
            return Value(self.body.placeholder("h", node), SHARED, ())
        return self.value(node, place)

    def progress(self) -> Any:
        """What a walk that turns out to lead nowhere has to give back."""
        captured = {kind: dict(known) for kind, known in self.body.captured.items()}
        return set(self.interior), captured, dict(self.bindings), dict(self.known), set(self.forms), list(self.zeros)

    def go_back(self, before: Any) -> None:
        self.interior, self.body.captured, self.bindings, self.known, self.forms, self.zeros = before

    def applied(self, node: Node, place: Place, step: Through, operands: Sequence[Value]) -> Value:
        """An op on values of the body."""
        shape = features(place)
        if step.args is None:
            return self.body.reshaped(operands[0], shape if step.shape is not None else operands[0].shape)
        kind = max((each.kind for each in operands), key=(SHARED, EXPERTS_OWN, ROWS).index)
        if op_name(node) in ("aten::transpose", "aten::permute"):
            flat = self.body.reshaped(operands[0], [size for size in operands[0].shape if size > 1])
            return self.body.reshaped(self.body.turned(flat), shape)
        given = {source: each for (source, _), each in zip(step.operands, operands, strict=True)}
        written = {source: each.node for source, each in given.items()}
        if is_elementwise(node) and kind == ROWS:
            written = {source: self.body.beside_rows(each, len(shape)) for source, each in given.items()}
        written |= {source: self.body.placeholder("h", source) for source in step.shared}
        args, kwargs = map_arg((step.args, dict(step.kwargs or {})), written.__getitem__)
        if op_name(node) == "aten::expand":
            args = (args[0], [-1, *args[1][1:]] if kind == ROWS else args[1][1:])
        target: Any = node.target
        if op_name(node) is None:  # one part of a split: the split, and its part
            split: Any = node.args[0]
            key = (split, operands[0].node)
            if key not in self.splits:
                self.splits[key] = self.body.write(split.target, *args, **kwargs)
            return Value(self.body.write(target, self.splits[key], node.args[1]), kind, tuple(shape))
        return Value(self.body.write(target, *args, **kwargs), kind, tuple(shape))

    def multiplied(self, node: Node, place: Place, found: Contraction) -> Value | Miss:
        """A product: of rows with an expert's matrix, or with one that all experts share."""
        choice, shape_of_row = chosen(self, found, place), features(place)
        if choice is not None:
            found, place = choice.found, choice.place
            self.apart |= choice.apart
        elif not set(found.out) <= set("".join(found.letters)):
            return self.miss("one-hot rows of the experts' ids, and of ranks among an expert's rows", node)
        places: list[Place] = []
        for operand, letters in zip(found.operands, found.letters, strict=True):
            whole = []
            for letter in letters:
                at = found.out.find(letter)
                size = found.size(letter)
                if at < 0 and not isinstance(size, int):
                    return self.miss("a sum over a fixed number of features", node)
                whole.append(place[at] if at >= 0 else () if known_equal(size, 1) else (size,))
            shape = shape_of(operand)
            own = aligned(tuple(whole), shape, self.sizes) if shape is not None else None
            if own is None:
                return self.miss("an operand that is a tensor", operand)
            places.append(own)
        # Rows first, so that an expert's parameters are numbered as it uses them.
        factors: dict[int, Factor] = {}
        for which in sorted(range(len(found.operands)), key=lambda which: reads_stack(found.operands[which])):
            inner = self.value(found.operands[which], places[which])
            if isinstance(inner, Miss):
                return inner
            factors[which] = Factor(inner, found.letters[which], places[which])
            if choice is not None:
                factors[which] = choice.factor(self.body, which, factors[which])
        result = product(self.body, [factors[which] for which in sorted(factors)], found, place)
        if result is None:
            return self.miss("a product of rows and a matrix that does not change from row to row", node)
        self.interior.add(node)
        if op_name(node) == "aten::sum":
            self.interior.add(node.args[0])
        if any(factor.value.kind == EXPERTS_OWN for factor in factors.values()):
            self.forms.add(FORMS[EXPERT if self.dense else PLACE if PLACE in axes_of(place) else SLOT])
        if found.bias is not None:
            own = aligned(place, shape_of(found.bias) or (), self.sizes)
            bias = self.value(found.bias, own if own is not None else place)
            if isinstance(bias, Miss):
                return bias
            total = self.body.write(aten.add.Tensor, result.node, self.body.beside_rows(bias, len(result.shape)))
            result = Value(total, ROWS, result.shape)
        return self.body.reshaped(result, shape_of_row)

    # The layer

    def region(self, output: Value) -> Region | Miss:
        """Everything was found: check that it fits together."""
        step = self.own is not None
        nested = self.specific is not None and "ids" not in self.bindings
        if not self.forms and not step:
            return self.miss(NO_EXPERT, self.root, "no such op")
        captured = self.body.captured
        if not captured["x"]:
            return self.miss("token rows sent to their experts", self.root, "no dispatch")
        if "ids" not in self.bindings and not nested:
            return self.miss("the ids of the experts", self.root, "none")
        self.settle_interior()
        shared = (*captured["p"], *captured["h"])
        own = None if nested else computed_with(shared, self.interior)
        operands = (*captured["x"], *captured["s"], *shared)
        used = read_outside(self.interior, {self.root, *self.ending}, own, operands)
        if used is not None:
            return replace(used, bindings=dict(self.bindings))
        if self.dense and not nested and not counts_zero(output.node, self.zeros):
            wanted = "an expert's output that is zero wherever its routing weight is"
            return Miss(wanted, "one that need not be", self.root, dict(self.bindings), 10**6)
        graph = self.body.graph
        graph.output(output.node)
        for mark in self.marks:
            mark.replace_all_uses_with(mark.args[0])
        ordered = [node for kind in captured.values() for node in kind.values()]
        # Walks that led nowhere left calls that nobody reads, and perhaps inputs.
        graph.eliminate_dead_code()
        for placeholder in graph.find_nodes(op="placeholder"):
            if placeholder not in ordered:
                graph.erase_node(placeholder)
        for placeholder in reversed(ordered):
            first = next(iter(graph.nodes))
            if first is not placeholder:
                first.prepend(placeholder)
        (x,) = captured["x"].values()
        for node in graph.find_nodes(op="call_function", target=per_row):
            node.args = (node.args[0], x)
        s, p, h = (list(captured[kind]) for kind in "sph")
        once = not {"counted_once", "listed_once"}.isdisjoint(self.bindings)
        adds_up = self.summed == {*s} and len(s) == 1 and is_multiple(output.node, captured["s"][s[0]])
        (tokens,) = captured["x"]
        form = "expert_loop" if step else "+".join(sorted(self.forms))
        region = Region(
            self.root, form, tokens, self.bindings.get("ids", tokens), s, p, h, GraphModule({}, graph), self.interior,
            self.bindings, distinct=once or (bool(self.zeros) and not adds_up), summed=bool(self.summed),
            adds_up=adds_up,
        )  # fmt: skip
        region.features = {node: self.outer[node] for node in (tokens, *s)}
        slots = 1 if "one_each" in self.bindings else self.sizes.get(SLOT)
        region.size = (self.token_count, region.top_k if slots is None else slots)
        region.tables, region.each_token = self.tables, self.each_token
        region.visits = self.visits
        return region
