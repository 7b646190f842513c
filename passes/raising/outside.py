"""What a layer takes from outside: tokens, ids, routing weights, parameters, and what all experts share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from moe_fx.passes.raising import pieces as kinds
from moe_fx.passes.raising.anchors import leads_to_experts
from moe_fx.passes.raising.axes import (
    EXPERT,
    HIT,
    SLOT,
    SORTED_ROW,
    Place,
    aligned,
    axes_of,
    features,
    is_row_dim,
    rows_first,
    size_of,
)
from moe_fx.passes.raising.pieces import LOCAL
from moe_fx.passes.raising.region import Region, told_of_ids
from moe_fx.passes.raising.tables import Slots, is_step, read_table
from moe_fx.passes.raising.through import Through, is_view, through
from moe_fx.passes.raising.writer import EXPERTS_OWN, ROWS, SHARED, Value, Writer
from torch.fx import Node

from moe_fx.matcher import Match, Miss, arguments, match, op_name
from moe_fx.pattern import Last, Pattern, Var, either
from moe_fx.pattern import aten as aten_
from moe_fx.shapes import Dim, known_equal, shape_of

__all__ = ["Outside"]

aten = torch.ops.aten

#: 0, 1, 2, ... as a column
each_token = either(aten_.unsqueeze(kinds.arange(), Last(1)), aten_.reshape(kinds.arange(), [-1, 1]))
LEAVES = ("placeholder", "get_attr")


class Outside:
    """One walk from ``root``; ``sizes`` of the row axes, the ``tokens`` axes among them.

    ``own`` is the pattern by which a step of a loop reads its expert's ``param``. ``ending`` are calls by which the
    root reads what it sums. Where every token is given to every expert, ``specific`` are the nodes of one of them.
    ``cuts`` are values known to be some rows of others.
    """

    def __init__(
        self, root: Node, sizes: Mapping[str, Dim], tokens: tuple[str, ...], pieces: Sequence[kinds.Piece],
        bindings: Mapping[str, Any], own: Pattern | None = None, ending: Collection[Node] = (),
        specific: Collection[Node] | None = None, cuts: Mapping[Node, Node] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.ending, self.specific, self.cuts = ending, specific, cuts
        #: whether all experts are summed, or all tokens are given to each
        self.dense = EXPERT in sizes or specific is not None
        self.root, self.sizes, self.tokens, self.pieces, self.own = root, sizes, tokens, pieces, own
        self.bindings: dict[str, Any] = dict(bindings)
        self.layouts: dict[str, Place] = {
            kinds.SLOTS: (tokens, (SLOT,)), kinds.TOKEN_MAJOR: ((*tokens, SLOT),), kinds.SORTED: ((SORTED_ROW,),),
            kinds.HITS: ((HIT,),), kinds.EXPERT_MAJOR: ((EXPERT, *tokens),),
            kinds.TOKENS: tuple((token,) for token in tokens if specific is not None) or ((HIT,),),
        }  # fmt: skip
        if known_equal(sizes.get(SLOT, 0), 1):
            self.layouts[kinds.TOKEN_MAJOR] = (tokens,)
        self.body = Writer()
        self.known: dict[tuple[Node, Place], Value | Miss] = {}
        #: how many values were looked at: the further a walk came, the more its mismatch tells
        self.visited = 0
        self.interior: set[Node] = set()
        self.deepest: Miss | None = None
        self.forms: set[str] = set()
        #: the sizes that a row of tokens and slots has
        self.outer: dict[Node, tuple[int, ...]] = {}
        #: routing weights that stand by token and expert
        self.tables: set[Node] = set()
        #: the ops of the body whose results are taken apart
        self.splits: dict[tuple[Node, Node], Node] = {}
        #: the experts whose rows are in a joined value, in order
        self.visits: list[tuple[int, ...]] = []
        #: values of the body that are zero for a token's row where it was not routed to the expert
        self.zeros: list[Node] = []
        #: copies that stand for what a mask leaves of a value
        self.marks: list[Node] = []

    def value(self, node: Node, place: Place) -> Value | Miss:
        """A value, written into the body."""
        raise NotImplementedError

    def inside(self, node: Node, place: Place) -> Value | Miss:
        """A value that the body computes of others."""
        raise NotImplementedError

    def applied(self, node: Node, place: Place, step: Through, operands: Sequence[Value]) -> Value:
        """An op on values of the body."""
        raise NotImplementedError

    def miss(self, wanted: str, node: Node, found: str | None = None) -> Miss:
        text = found or f"{node.name} ({op_name(node) or node.op})"
        return self.note(Miss(wanted, text, node, dict(self.bindings), 100 * self.visited))

    def note(self, miss: Miss) -> Miss:
        if self.deepest is None or miss.depth >= self.deepest.depth:
            self.deepest = miss
        return miss

    #: how a stack of the experts' results is read: set where the disguises are put together
    stacked: Callable[[Any, Node, Place], Value | Miss | None] = staticmethod(lambda walk, node, place: None)
    #: the same for what the experts wrote, each into its rows
    written: Callable[[Any, Node, Place], Value | Miss | None] = staticmethod(lambda walk, node, place: None)
    #: the same for what was selected of the experts' results
    selected: Callable[[Any, Node, Place], Value | Miss | None] = staticmethod(lambda walk, node, place: None)
    #: the same for what was joined of the experts' rows
    joined: Callable[[Any, Node, Place], Value | Miss | None] = staticmethod(lambda walk, node, place: None)

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
        return self.single and leads_to_experts(node)

    @property
    def single(self) -> bool:
        """Whether each token has one slot: then a value per slot need not have a dimension for it."""
        return known_equal(self.sizes.get(SLOT, 0), 1)

    def reads_own(self, node: Node, place: Place) -> bool:
        """Whether a row per token is what the expert of its one slot has, such as a bias."""
        if not self.single or "ids" not in self.bindings:
            return False
        node, place = self.unviewed(node, place)
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

    def in_order(self, place: Place) -> bool:
        """Whether a value's tokens stand before its features, in the order of the layer's tokens."""
        axes = axes_of(place)
        return rows_first(place) == tuple(token for token in self.tokens if token in axes)

    def token_rows(self, node: Node, place: Place) -> Value | Miss:
        """Token rows come in; a number per token is the same in each of its slots."""
        shape = features(place)
        node, place = self.unviewed(node, place)
        if not self.in_order(place):
            return self.miss("tokens in the order of the layer's, before their features", node)
        if self.single and all(size == 1 for size in features(place)):  # a number for its only slot
            if op_name(node) == "aten::to":
                return self.inside(node, place)
            return self.body.reshaped(self.row("s", node, tuple(features(place))), shape)
        known = self.body.captured["x"]
        if self.specific is not None and node not in known and all(size == 1 for size in features(place)):
            # Of tokens that all experts take, a number is that of their slot, if they have one.
            self.bindings.setdefault("one_number", node)
            return self.body.reshaped(self.row("s", node, ()), shape)
        if known and node not in known:
            return self.miss("one tensor of token rows", node)
        return self.body.reshaped(self.row("x", node, tuple(features(place))), shape)

    def cut_rows(self, source: Node, place: Place) -> Value | Miss:
        """Some rows of another value: those of tokens, or a number for each."""
        shape = tuple(features(place))
        known = self.body.captured["x"]
        if all(size == 1 for size in shape):
            return self.row("s", source, shape)
        if known and source not in known:
            return self.miss("one tensor of rows", source)
        return self.row("x", source, shape)

    def row(self, kind: str, node: Node, shape: tuple[int, ...]) -> Value:
        """A row per token, or per slot, from outside."""
        self.outer[node] = shape
        return Value(self.body.placeholder(kind, node), ROWS, shape)

    def expert_value(self, node: Node, place: Place) -> Value | Miss:
        """A parameter of the experts ``[E, ...]``."""
        if place[0] != (EXPERT,) or is_view(node):
            step = through(node, place, self.sizes) if is_view(node) else "a parameter with its experts first"
            if isinstance(step, str):
                return self.miss(step, node)
            before = step.operands[0][1]
            # One matrix of all experts' rows is theirs when it is cut.
            if place[0] != (EXPERT,) or all(is_row_dim(dim) or EXPERT not in dim for dim in before):
                inner = self.value(*step.operands[0])
                return inner if isinstance(inner, Miss) else self.applied(node, place, step, [inner])
        outer = Value(self.body.placeholder("p", node), EXPERTS_OWN, self.numbers(node, 1))
        return self.body.reshaped(outer, features(place))

    def gathered(self, node: Node, place: Place) -> Value | Miss | None:
        """``param[ids]``: the parameters of the experts that slots were routed to. None for any other op."""
        if op_name(node) != "aten::index":
            return None
        param, indices = arguments(node)["self"], arguments(node)["indices"]
        if len(indices) != 1:
            return None
        (index,) = indices
        rank = len(shape_of(index) or ())
        count = (shape_of(param) or (0,))[0]
        if axes_of(place[rank:]) or not isinstance(count, int) or not (is_view(param) or param.op in LEAVES):
            return None
        ids = self.ids_of(index, place[:rank])
        if ids is None:
            return self.miss("the ids of the experts, or a view of them", index)
        if self.bindings.setdefault("ids", ids) is not ids:
            return self.miss(f"ids = {self.bindings['ids'].name}, as elsewhere in the layer", ids)
        self.bindings.setdefault("indexed", node)
        self.interior.add(node)
        self.sizes = {**self.sizes, EXPERT: count}
        return self.expert_value(param, ((EXPERT,), *place[rank:]))

    def chosen(self, node: Node, place: Place) -> Value | Miss | None:
        """``results.gather(1, ids)``: of what every expert makes of a token, what it was routed to."""
        at, rows = len(self.tokens), len(self.slot_places[1])
        if place[:rows] != self.slot_places[1]:
            return None
        by_token = (*place[:at], (EXPERT,), *place[rows:])
        by_expert = ((EXPERT,), *place[:at], *place[rows:])
        for pattern, before, whole in (
            (aten_.gather(Var("results"), Last(at), Var("index")), by_token, True),
            (aten_.take_along_dim(Var("results"), Var("index"), Last(at)), by_token, True),
            (aten_.index(Var("results"), [each_token, Var("index")]), by_token, False),
            (aten_.index(Var("results"), [Var("index"), each_token]), by_expert, False),
        ):
            found = match(pattern, node)
            if not isinstance(found, Match) or (not whole and at > 1):
                continue
            count = (shape_of(found["results"]) or (0,) * len(before))[before.index((EXPERT,))]
            # take_along_dim broadcasts the index; gather takes it as wide as the result.
            own = aligned(place, shape_of(found["index"]) or (), self.sizes) if whole else place[:rows]
            ids = self.ids_of(found["index"], own) if own is not None else None
            if ids is None or not isinstance(count, int) or self.bindings.setdefault("ids", ids) is not ids:
                return None
            self.sizes = {**self.sizes, EXPERT: count}
            self.interior.add(node)
            if not whole:
                self.bindings.setdefault("indexed", node)
            return self.value(found["results"], before)
        return None

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
                return None
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
        if place in self.slot_places or place in tuple((*each, ()) for each in self.slot_places):
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
        if found.values is None:
            self.tables.add(node)
        value = found.write(self.body.graph, self.row("s", found.values or node, ()).node)
        self.zeros.append(value)
        return self.body.reshaped(Value(value, ROWS, ()), shape)

    def column_of(self, table: Node, rows: Place) -> Value | Miss:
        """One expert's routing weights."""
        self.sizes = {**self.sizes, EXPERT: (shape_of(table) or (0,))[-1]}
        return self.table(table, (*rows, (EXPERT,)))

    def table_at(self, node: Node, place: Place, after: Sequence[Node]) -> Slots | Miss:
        if place not in ((self.tokens, (EXPERT,)), (*((token,) for token in self.tokens), (EXPERT,))):
            return Miss("a table [T, E] of routing weights", f"{node.name} ({op_name(node) or node.op})", node)
        return read_table(node, after)

    def bind(self, found: Match) -> None:
        self.bindings = {name: bound for name, bound in found.bindings.items() if name not in LOCAL}

    @property
    def slot_shape(self) -> tuple[Dim, ...]:
        return (self.token_count, self.sizes[SLOT]) if SLOT in self.sizes else ()

    @property
    def token_count(self) -> Dim:
        return size_of(self.tokens, self.sizes)

    def numbers(self, node: Node, start: int) -> tuple[int, ...]:
        """The sizes of a value behind its first dimensions."""
        return tuple(size for size in (shape_of(node) or ())[start:] if isinstance(size, int))
