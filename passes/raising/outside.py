"""What a layer takes from outside: tokens, parameters, what all experts share, and what other walks found."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from moe_fx.passes.raising import pieces as kinds
from moe_fx.passes.raising.anchors import leads_to_experts
from moe_fx.passes.raising.axes import (
    EXPERT,
    ONE,
    SLOT,
    Place,
    aligned,
    axes_of,
    features,
    is_row_dim,
)
from moe_fx.passes.raising.experts_first import experts_first
from moe_fx.passes.raising.region import Region, told_of_ids
from moe_fx.passes.raising.routes import Routes
from moe_fx.passes.raising.through import is_view, through
from moe_fx.passes.raising.whole import cut_from
from moe_fx.passes.raising.writer import EXPERTS_OWN, ROWS, SHARED, Value
from torch.fx import Node

from moe_fx.matcher import Match, Miss, arguments, match, op_name
from moe_fx.pattern import Last, Var, either
from moe_fx.pattern import aten as aten_
from moe_fx.shapes import known_equal, shape_of

__all__ = ["Outside"]

aten = torch.ops.aten

#: 0, 1, 2, ... as a column
each_token_column = either(aten_.unsqueeze(kinds.arange(), Last(1)), aten_.reshape(kinds.arange(), [-1, 1]))
results, index = Var("results"), Var("index")
along_dim = either(aten_.gather(results, Var("dim"), index), aten_.take_along_dim(results, index, Var("dim")))
LEAVES = ("placeholder", "get_attr")


class Outside(Routes):
    """A walk that recognises what its layer takes from outside."""

    def same_for_all(self, node: Node, place: Place) -> Value:
        if self.own is not None and (own := self.own_value(node, place)) is not None:
            return own
        outer = Value(self.body.placeholder("h", node), SHARED, self.numbers(node, 0))
        return self.body.reshaped(outer, features(place))

    def own_value(self, node: Node, place: Place) -> Value | None:
        """What a step of a loop reads of its own expert."""
        assert self.own is not None
        found = match(self.own, node, self.bindings)
        if isinstance(found, Match):
            self.bind(found)
            shape = self.numbers(found["param"], 1)
            return self.body.reshaped(Value(self.body.placeholder("p", found["param"]), EXPERTS_OWN, shape), shape)
        if not is_view(node):
            return None
        step = through(node, place, self.sizes)
        if isinstance(step, str):
            return None
        ((operand, before),) = step.operands
        inner = self.own_value(operand, before)
        return self.applied(node, place, step, [inner]) if inner is not None else None

    def walks_on(self, node: Node) -> bool:
        """Whether a value that has a row per token is computed by experts: with one slot, slots are tokens."""
        if self.specific is not None:
            return node in self.specific
        if node in self.of_all:
            return True
        return self.single and leads_to_experts(node)

    def reads_own(self, node: Node, place: Place) -> bool:
        """Whether a row per token is what the expert of its one slot has, such as a bias."""
        if not self.single or "ids" not in self.bindings:
            return False
        node, place = self.unviewed(node, place)
        while op_name(node) == "aten::to":
            node, place = self.unviewed(node.args[0], place)
        if op_name(node) != "aten::index":
            return False
        (index, *others) = arguments(node)["indices"]
        return not others and self.ids_of(index, place[: len(shape_of(index) or ())]) is self.bindings["ids"]

    def unviewed(self, node: Node, place: Place) -> tuple[Node, Place]:
        """What a value is a view of, as long as its rows stay rows; in their order, once they stand in it."""
        while is_view(node):
            step = through(node, place, self.sizes)
            if isinstance(step, str) or step.shape is None or axes_of(step.operands[0][1]) != axes_of(place):
                break
            if self.in_order(place) and not self.in_order(step.operands[0][1]):
                break
            ((node, place),) = step.operands
        return node, place

    def token_rows(self, node: Node, place: Place) -> Value | Miss:
        """Token rows come in; a number per token is the same in each of its slots."""
        shape = features(place)
        node, place = self.unviewed(node, place)
        if not self.in_order(place):
            return self.miss("tokens in the order of the layer's, before their features", node)
        if self.single and all(size == 1 for size in features(place)):  # a number for its only slot
            if op_name(node) == "aten::to":
                return self.inside(node, place)
            if not known_equal(math.prod(shape_of(node) or ()), self.token_count):
                return self.miss("a number for each token", node)
            return self.body.reshaped(self.row("s", node, tuple(features(place))), shape)
        known = self.body.captured["x"]
        if node not in known and all(size == 1 for size in features(place)):
            number = self.number(node)
            return number if isinstance(number, Miss) else self.body.reshaped(number, shape)
        if known and node not in known:
            return self.miss("one tensor of token rows", node)
        # Batch and sequence of a single token are no features of it.
        wide = tuple(size for size in features(place) if size > 1)
        return self.body.reshaped(self.row("x", node, wide or tuple(features(place))), shape)

    def number(self, node: Node) -> Value | Miss:
        """A number for each token: that of each of its slots."""
        if not known_equal(math.prod(shape_of(node) or ()), self.token_count):
            return self.miss("a number for each token", node)
        self.each_token.add(node)
        return self.row("s", node, ())

    def cut_rows(self, source: Node, place: Place) -> Value | Miss:
        """Some rows of another value: those of tokens, or a number for each."""
        shape = tuple(features(place))
        known = self.body.captured["x"]
        if all(size == 1 for size in shape):
            return self.row("s", source, shape)
        if known and source not in known:
            return self.miss("one tensor of rows", source)
        return self.row("x", source, shape)

    def is_one_tokens(self, node: Node, axes: Collection[str]) -> bool:
        """Whether a parameter seems to differ from token to token, as there is one: its dimension is of size 1."""
        one = known_equal(self.token_count, 1) and not known_equal(self.sizes[EXPERT], 1)
        return one and node.op in LEAVES and set(axes) == {EXPERT, *self.tokens}

    def without_tokens(self, place: Place) -> Place:
        """The place of what is the same for every token."""
        return tuple(tuple(axis for axis in dim if axis not in self.tokens) or ((ONE,) if dim else ()) for dim in place)

    def expert_value(self, node: Node, place: Place) -> Value | Miss:
        """A parameter of the experts ``[E, ...]``."""
        if place[0] != (EXPERT,) and op_name(node) == "aten::to":
            return self.inside(node, place)
        if place[0] != (EXPERT,) or is_view(node):
            step = through(node, place, self.sizes) if is_view(node) else "a parameter with its experts first"
            if isinstance(step, str):
                if not is_view(node) and node.op in LEAVES:
                    return self.own_part(experts_first(node, place, self.sizes), place)
                return self.miss(step, node)
            before = step.operands[0][1]
            # One matrix of all experts' rows is theirs when it is cut.
            if place[0] != (EXPERT,) or all(is_row_dim(dim) or EXPERT not in dim for dim in before):
                inner = self.value(*step.operands[0])
                return inner if isinstance(inner, Miss) else self.applied(node, place, step, [inner])
        return self.own_part(node, place)

    def own_part(self, param: Node, place: Place) -> Value:
        """One expert's part of ``param [E, ...]``; of one that is stacked of the model's own, of these."""
        held: Any = param
        if op_name(param) == "aten::stack" and arguments(param)["dim"] % len(shape_of(param) or ()) == 0:
            parts = arguments(param)["tensors"]
            held = tuple(parts) if all(part.op in LEAVES for part in parts) else param
        outer = Value(self.body.placeholder("p", held), EXPERTS_OWN, self.numbers(param, 1))
        return self.body.reshaped(outer, features(place))

    def gathered(self, node: Node, place: Place) -> Value | Miss | None:
        """``param[ids]``: the parameters of the experts that slots were routed to. None for any other op."""
        if op_name(node) != "aten::index":
            return None
        param, indices = arguments(node)["self"], arguments(node)["indices"]
        *before, index = indices
        if any(each is not None for each in before):
            return None
        # The experts may be any dimension: w[:, :, ids] of [H, I, E].
        at, end = len(before), len(before) + len(shape_of(index) or ())
        count = (shape_of(param) or (0,))[at]
        own_place = (*place[:at], (EXPERT,), *place[end:])
        fixed = isinstance(count, int) and axes_of(own_place) == {EXPERT}
        kept = is_view(param) or param.op in LEAVES or op_name(param) == "aten::stack" or cut_from(param) is not None
        if not fixed or not kept:
            return None
        ids = self.ids_of(index, place[at:end])
        if ids is None:
            return self.miss("the ids of the experts, or a view of them", index)
        if self.bindings.setdefault("ids", ids) is not ids:
            return self.miss(f"ids = {self.bindings['ids'].name}, as elsewhere in the layer", ids)
        self.bindings.setdefault("indexed", node)
        self.interior.add(node)
        self.count(EXPERT, count)
        # Dimensions of size 1 among those of the ids are the row's, too.
        own = self.expert_value(param, own_place)
        return own if isinstance(own, Miss) else self.body.reshaped(own, features(place))

    def chosen(self, node: Node, place: Place) -> Value | Miss | None:
        """``results.gather(1, ids)``: of what every expert makes of a token, what it was routed to."""
        whole = match(along_dim, node)
        if isinstance(whole, Match):
            at = whole["dim"] % len(place)
            alone = (self.single and not place[at]) or self.is_row_of(SLOT, place[: at + 1])
            if place[at] != (SLOT,) and not alone:
                return None
            # take_along_dim broadcasts the index; gather takes it as wide as the result.
            own = aligned(place, shape_of(whole["index"]) or (), self.sizes)
            return self.of_own_expert(node, whole, own, (*place[:at], (EXPERT,), *place[at + 1 :]))
        rows: Place = (self.tokens, (SLOT,)) if SLOT in axes_of(place) else (self.tokens,)
        token, rest = each_token_column if len(rows) > 1 else kinds.arange(), place[len(rows) :]
        for indices, before in (
            ([token, index], (self.tokens, (EXPERT,), *rest)), ([index, token], ((EXPERT,), self.tokens, *rest)),
        ):  # fmt: skip
            found = match(aten_.index(results, indices), node)
            if place[: len(rows)] == rows and isinstance(found, Match):
                return self.of_own_expert(node, found, rows, before)
        return None

    def of_own_expert(self, node: Node, found: Match, own: Place | None, before: Place) -> Value | Miss | None:
        """What experts made of tokens, in the place ``before``, read by an index of the layer's ids, in ``own``."""
        count = (shape_of(found["results"]) or (0,) * len(before))[before.index((EXPERT,))]
        ids = self.ids_of(found["index"], own) if own is not None else None
        if ids is None or not isinstance(count, int) or self.bindings.setdefault("ids", ids) is not ids:
            return None
        self.count(EXPERT, count)
        self.interior.add(node)
        if op_name(node) == "aten::index":
            self.bindings.setdefault("indexed", node)
        return self.value(found["results"], before)

    def is_outside(self, node: Node) -> bool:
        """Whether a value is nothing but a view of what comes from outside: others may go on to read it."""
        outside = {*self.body.captured["x"], *self.body.captured["s"]}
        while node not in outside and is_view(node) and isinstance(node.args[0], Node):
            node = node.args[0]
        return node in outside

    def settle_interior(self) -> None:
        """Views of what comes from outside are not inside; products that were taken apart are, if nobody else reads
        them."""
        self.interior -= {node for node in self.interior if self.is_outside(node)}
        for node in sorted(self.apart, reverse=True):  # nobody else reads them: the layer's
            if all(user in self.interior or user is self.root or user in self.ending for user in node.users):
                self.interior.add(node)

    def inlined(
        self, found: Region, node: Node, place: Place, rows: Place = (), by_token: Collection[Node] = (),
        tables: Collection[Node] = (),
    ) -> Value | Miss:  # fmt: skip
        """What another walk found, written into this body. Its rows are tokens, or ``rows`` of this walk.

        Some are read ``by_token``: for a slot, the row of its token. Of ``tables`` it is what they hold for its id.
        """
        for name, told in told_of_ids(found.bindings).items():
            known = self.bindings.setdefault(name, told)
            if known != told and not (isinstance(known, Node) and isinstance(told, Node)):
                return self.miss("the same for the ids of all slots", node, f"{name} = {known}, and {told}")
        if found.each_token and rows:
            return self.miss("a number for every token and slot", next(iter(found.each_token)))
        if found.slots and (found.distinct or found.summed):
            self.bindings.setdefault("counted_once", node)  # each slot that names the expert reads all of their weights
        self.each_token |= found.each_token
        self.visits += [visited for visited in found.visits if visited not in self.visits]
        given = []
        for kind, outside in (("x", [found.tokens]), ("s", found.slots)):
            for each in outside:
                shape = found.features[each]
                row: Value | Miss
                if each in tables:
                    self.tables.add(each)
                    row = self.body.reshaped(self.row(kind, each, ()), shape)
                elif rows:
                    rank = len(shape_of(each) or ())
                    outer_rows = (self.tokens,) if each in by_token else rows
                    inner: Place = tuple((size,) if size > 1 else () for size in shape)
                    while len(inner) > rank - len(outer_rows) and () in inner:  # of one expert's part only
                        inner = (*inner[: inner.index(())], *inner[inner.index(()) + 1 :])
                    row = self.value(each, (*outer_rows, *(*inner, (), ())[: rank - len(outer_rows)]))
                    if isinstance(row, Miss):
                        return row
                    row = self.body.reshaped(row, shape)
                else:
                    row = self.row(kind, each, shape)
                given.append(row.node)
        for kind, outer in (("p", found.params), ("h", found.shared)):
            given += [self.body.placeholder(kind, each) for each in outer]
        copied = dict(zip(found.body.graph.find_nodes(op="placeholder"), given, strict=True))
        output = self.body.graph.graph_copy(found.body.graph, copied)
        self.interior |= found.interior | {node}
        self.forms.add(found.form)
        return self.body.reshaped(Value(output, ROWS, tuple(features(place))), features(place))
