"""How a layer reads its routing: ids, routing weights by slot, and tables of them by token and expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_fx.passes.raising.anchors import leads_to_experts
from moe_fx.passes.raising.axes import (
    EXPERT,
    SLOT,
    Place,
    features,
    size_of,
)
from moe_fx.passes.raising.routing import chosen_once, selection_of
from moe_fx.passes.raising.state import State
from moe_fx.passes.raising.tables import Slots, is_step, read_table
from moe_fx.passes.raising.through import is_view, through
from moe_fx.passes.raising.writer import ROWS, Value
from torch.fx import Node

from moe_fx.matcher import Miss, arguments, op_name
from moe_fx.shapes import known_equal, same_shape, shape_of

__all__ = ["Routes"]


class Routes(State):
    """A walk that recognises ids and routing weights."""

    def ids_of(self, node: Node, place: Place) -> Node | None:
        """The ids ``[T, K]`` that an index is; they may be clamped first, which is then part of the routing."""
        clamped = False
        while True:
            if op_name(node) == "aten::clamp" and not clamped:
                given, clamped = arguments(node), True
                highest = self.bindings.setdefault("last_expert", given["max"])
                if given["min"] not in (0, None) or highest != given["max"]:
                    return None
                self.bindings.setdefault("lowest_expert", given["min"])
                node = given["self"]
                continue
            if op_name(node) == "aten::remainder":  # nothing, of ids that name experts
                given = arguments(node)
                known = self.bindings.setdefault("num_compared", given["other"])
                if not isinstance(known, int) or known != given["other"]:
                    return None
                self.bindings["counts_beyond"] = node = given["self"]
                continue
            if place in self.slot_places:
                return node
            if self.single and not is_view(node) and tuple(axis for dim in place for axis in dim) == self.tokens:
                return node
            step = through(node, place, self.sizes) if is_view(node) else ""
            if isinstance(step, str):
                # Batch and sequence in one dimension, of which each token chose one expert: no slots are among them.
                flat = self.single and op_name(node) == "aten::reshape" and place == (self.tokens,)
                return node if flat and chosen_once(node) else None
            ((node, place),) = step.operands

    @property
    def slot_places(self) -> tuple[Place, Place]:
        """How a value per slot may stand: ``[T, K]``, or with the dimensions of the tokens apart."""
        return (self.tokens, (SLOT,)), (*((token,) for token in self.tokens), (SLOT,))

    def routing_weight(self, node: Node, place: Place, axes: frozenset[str]) -> Value | Miss | None:
        """A number per slot, or per token and expert, that no expert computes. None for any other value."""
        scalar = all(size == 1 for size in features(place))
        if not scalar or not axes >= set(self.tokens) or leads_to_experts(node):
            return None
        if axes == {*self.tokens, EXPERT}:
            if place != (self.tokens, (EXPERT,)) and is_view(node):
                return None
            if place == (self.tokens, (EXPERT,)) and not self.dense:  # only what it holds for a slot's own expert
                self.tables.add(node)
                return self.row("s", node, tuple(features(place)))
            return self.table(node, place)
        alone = not is_view(node) and self.is_row_of(SLOT, place)
        if alone or place in self.slot_places or place in tuple((*each, ()) for each in self.slot_places):
            return self.row("s", node, tuple(features(place)))
        if not is_view(node) and tuple(dim for dim in place if dim) in self.slot_places:  # of a batch of one
            return self.row("s", node, tuple(features(place)))
        if place == ((*self.tokens, SLOT), ()) and known_equal(self.sizes[SLOT], 1):  # [T, 1] is [T, K]
            return self.body.reshaped(self.row("s", node, ()), features(place))
        return None

    def table(self, node: Node, place: Place) -> Value | Miss:
        """Routing weights by token and expert; what is done to them may follow when the table was turned around."""
        shape, after = features(place), list[Node]()
        while not isinstance(found := self.table_at(node, place, after), Slots):
            step = through(node, place, self.sizes) if is_view(node) or is_step(node) else ""
            if isinstance(step, str):
                return self.note(replace(found, depth=100 * self.visited + 80))
            after += [node] if is_step(node) else []
            ((node, place),) = step.operands
        if self.bindings.setdefault("ids", found.ids) is not found.ids:
            return self.miss("the layer's own ids", found.ids)
        of_tokens = same_shape(shape_of(found.ids) or (), [self.sizes[token] for token in self.tokens])
        if len(self.tokens) > 1 and of_tokens:
            chooser = selection_of(found.ids, int(self.sizes[EXPERT])).chooser
            if chooser is not None and "k" in (given := arguments(chooser)) and given["k"] != 1:
                return self.miss("a table by token and expert", node, f"{node.name}, which is by slot")
            self.bindings.setdefault("one_each", found.ids)  # no dimension for the one slot of a token
        if found.values is None:
            self.tables.add(node)
        value = found.write(self.body.graph, self.row("s", found.values or node, ()).node)
        self.zeros.append(value)
        return self.body.reshaped(Value(value, ROWS, ()), shape)

    def column_of(self, table: Node, rows: Place) -> Value | Miss:
        """One expert's routing weights."""
        self.count(EXPERT, (shape_of(table) or (0,))[-1])
        return self.table(table, (*rows, (EXPERT,)))

    def table_at(self, node: Node, place: Place, after: Sequence[Node]) -> Slots | Miss:
        apart = (*((token,) for token in self.tokens), (EXPERT,))
        if place not in ((self.tokens, (EXPERT,)), apart) and not self.is_row_of(EXPERT, place):
            return Miss("a table [T, E] of routing weights", f"{node.name} ({op_name(node) or node.op})", node)
        return read_table(node, after)

    def is_row_of(self, axis: str, place: Place) -> bool:
        """Whether a value is ``[1, E]``, ``[1, 1, K]`` for a single token, which may count to any dimension."""
        one = len(place) > 1 and known_equal(size_of(self.tokens, self.sizes), 1)
        others = [size_of((each,), self.sizes) for dim in place for each in dim if each != axis]
        return one and axis in place[-1] and all(known_equal(size, 1) for size in others)
