"""From the sum back to the tokens: everything between is one expert, written as the body.

At each value it is known what its dimensions stand for (`axes.py`). A piece of the disguise may say what it is; what
has no rows, or tokens only, comes from outside; a product with an expert's weight is its linear; what is left is an op that
takes each row by itself and belongs to the body (`through.py`), or the walk ends with a Miss.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from moe_fx.passes.raising import pieces as kinds
from moe_fx.passes.raising.anchors import leads_to_experts, reads_stack
from moe_fx.passes.raising.axes import EXPERT, HIT, SLOT, SORTED_ROW, Place, aligned, axes_of, features, size_of
from moe_fx.passes.raising.contraction import Contraction, contraction
from moe_fx.passes.raising.pieces import LOCAL
from moe_fx.passes.raising.products import Factor, elementwise_product, product
from moe_fx.passes.raising.region import Region
from moe_fx.passes.raising.tables import counts_zero, read_table
from moe_fx.passes.raising.through import Through, is_elementwise, is_view, through
from moe_fx.passes.raising.writer import EXPERTS_OWN, ROWS, SHARED, Value, Writer
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.experts import per_row
from moe_fx.matcher import Match, Miss, arguments, match, op_name
from moe_fx.pattern import Last, Pattern, Var, either
from moe_fx.pattern import aten as aten_
from moe_fx.rewrite import only_asserted
from moe_fx.shapes import Dim, is_number, known_equal, same_shape, shape_of

__all__ = ["Walk"]

aten = torch.ops.aten

#: ops through which the rows of an expert linear pass
ROW_STEPS = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback", "moe_fx::grouped_mm"})
#: 0, 1, 2, ... as a column
each_token = either(aten_.unsqueeze(kinds.arange(), Last(1)), aten_.reshape(kinds.arange(), [-1, 1]))
LEAVES = ("placeholder", "get_attr")
FORMS = {SLOT: "gather_bmm", EXPERT: "dense_bmm"}


class Walk:
    """One walk from ``root``; ``sizes`` of the row axes, the ``tokens`` axes among them.

    ``own`` is the pattern by which a step of a loop reads its expert's ``param``. ``ending`` are calls by which the root
    reads what it sums. Where every token is given to every expert, ``specific`` are the nodes of one expert's step.
    """

    def __init__(
        self, root: Node, sizes: Mapping[str, Dim], tokens: tuple[str, ...], pieces: Sequence[kinds.Piece],
        bindings: Mapping[str, Any], own: Pattern | None = None, ending: Collection[Node] = (), specific: Collection[Node] | None = None,
    ) -> None:  # fmt: skip
        self.ending, self.specific = ending, specific
        #: whether all experts are summed, or all tokens are given to each
        self.dense = EXPERT in sizes or specific is not None
        self.root, self.sizes, self.tokens, self.pieces, self.own = root, sizes, tokens, pieces, own
        self.bindings: dict[str, Any] = dict(bindings)
        self.layouts: dict[str, Place] = {
            kinds.SLOTS: (tokens, (SLOT,)), kinds.TOKEN_MAJOR: ((*tokens, SLOT),), kinds.SORTED: ((SORTED_ROW,),),
            kinds.HITS: ((HIT,),), kinds.TOKENS: tuple((token,) for token in tokens if specific is not None) or ((HIT,),),
        }  # fmt: skip
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
        #: values of the body that are zero for a token's row where it was not routed to the expert
        self.zeros: list[Node] = []

    def miss(self, wanted: str, node: Node, found: str | None = None) -> Miss:
        text = found or f"{node.name} ({op_name(node) or node.op})"
        return self.note(Miss(wanted, text, node, dict(self.bindings), 100 * self.visited))

    def note(self, miss: Miss) -> Miss:
        if self.deepest is None or miss.depth >= self.deepest.depth:
            self.deepest = miss
        return miss

    def value(self, node: Node, place: Place) -> Value | Miss:
        """A value, written into the body."""
        key = (node, place)
        if key not in self.known:
            self.known[key] = self.find(node, place)
        return self.known[key]

    def find(self, node: Node, place: Place) -> Value | Miss:
        self.visited += 1
        axes = axes_of(place)
        shape = shape_of(node)
        if shape is not None and not same_shape(shape, [size_of(dim, self.sizes) for dim in place]):
            rows = " x ".join(str(size_of(dim, self.sizes)) for dim in place)
            return self.miss(f"a value of shape {rows}", node, f"{node.name} of shape {list(shape)}")
        if not axes:
            return self.same_for_all(node, place)
        fits, found = self.piece(node, place)
        if fits and found is not None:
            return found
        if axes <= set(self.tokens) and not self.walks_on(node):
            return self.token_rows(node, place)
        if axes == {EXPERT}:
            return self.expert_value(node, place)
        if EXPERT in axes and (stacked := self.stacked(self, node, place)) is not None:
            return stacked
        if SLOT in axes and (chosen := self.chosen(node, place)) is not None:
            return chosen
        if SLOT in axes and (gathered := self.gathered(node, place)) is not None:
            return gathered
        outside = self.routing_weight(node, place, axes)
        if outside is not None:
            return outside
        inner = self.inside(node, place)
        # Where a piece came further than its first op, its mismatch says more than "this op is not row-local".
        if isinstance(inner, Miss) and isinstance(found, Miss) and found.depth > 0:
            self.note(replace(found, depth=found.depth + 100 * self.visited + 50))
        return inner

    #: how a stack of the experts' results is read: set where the disguises are put together
    stacked: Callable[[Walk, Node, Place], Value | Miss | None] = staticmethod(lambda walk, node, place: None)

    # What comes from outside

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
        return known_equal(self.sizes.get(SLOT, 0), 1) and leads_to_experts(node)

    def token_rows(self, node: Node, place: Place) -> Value | Miss:
        """Token rows come in; a number per token is the same in each of its slots."""
        shape = features(place)
        while is_view(node):
            step = through(node, place, self.sizes)
            if isinstance(step, str) or step.shape is None or axes_of(step.operands[0][1]) != axes_of(place):
                break
            ((node, place),) = step.operands
        known = self.body.captured["x"]
        if known and node not in known:
            return self.miss("one tensor of token rows", node)
        return self.body.reshaped(self.row("x", node, tuple(features(place))), shape)

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
            (aten_.index(Var("results"), [each_token, Var("index")]), by_token, False),
            (aten_.index(Var("results"), [Var("index"), each_token]), by_expert, False),
        ):
            found = match(pattern, node)
            if not isinstance(found, Match) or (not whole and at > 1):
                continue
            count = (shape_of(found["results"]) or (0,) * len(before))[before.index((EXPERT,))]
            ids = self.ids_of(found["index"], place if whole else place[:rows])
            if ids is None or not isinstance(count, int) or self.bindings.setdefault("ids", ids) is not ids:
                return None
            self.sizes = {**self.sizes, EXPERT: count}
            self.interior.add(node)
            return self.value(found["results"], before)
        return None

    def inlined(self, found: Region, node: Node, place: Place) -> Value:
        """What another walk found, written into this body."""
        outer = [*found.slots, *found.params, *found.shared]
        kinds_of = ["s"] * len(found.slots) + ["p"] * len(found.params) + ["h"] * len(found.shared)
        given = [self.row("x", found.tokens, found.features[found.tokens]).node]
        given += [self.body.placeholder(kind, each) for kind, each in zip(kinds_of, outer, strict=True)]
        copied = dict(zip(found.body.graph.find_nodes(op="placeholder"), given, strict=True))
        output = self.body.graph.graph_copy(found.body.graph, copied)
        self.interior |= found.interior | {node}
        self.forms.add(found.form)
        return self.body.reshaped(Value(output, ROWS, tuple(features(place))), features(place))  # type: ignore[arg-type]

    def ids_of(self, node: Node, place: Place) -> Node | None:
        """The ids ``[T, K]`` that an index is; they may be clamped first, which is then part of the routing."""
        clamped = False
        while True:
            if op_name(node) == "aten::clamp" and not clamped:
                given, clamped = arguments(node), True
                highest = self.bindings.setdefault("last_expert", given["max"])
                if given["min"] not in (0, None) or highest != given["max"]:
                    return None
                node = given["self"]
                continue
            if place in self.slot_places:
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
            return self.table(node, place)
        if place in self.slot_places or place in tuple((*each, ()) for each in self.slot_places):
            return self.row("s", node, tuple(features(place)))
        if place == ((*self.tokens, SLOT), ()) and known_equal(self.sizes[SLOT], 1):  # [T, 1] is [T, K]
            return self.body.reshaped(self.row("s", node, ()), features(place))
        return None

    def table(self, node: Node, place: Place) -> Value | Miss:
        """Routing weights by token and expert."""
        found = read_table(node)
        if isinstance(found, Miss):
            return self.note(replace(found, depth=100 * self.visited + 80))
        if self.bindings.setdefault("ids", found.ids) is not found.ids:
            return self.miss("the layer's own ids", found.ids)
        if found.values is None:
            self.tables.add(node)
        value = found.write(self.body.graph, self.row("s", found.values or node, ()).node)
        self.zeros.append(value)
        return self.body.reshaped(Value(value, ROWS, ()), features(place))

    # Pieces of a disguise

    def piece(self, node: Node, place: Place) -> tuple[bool, Value | Miss | None]:
        """Whether a piece fits, and what it makes of the value; or the nearest mismatch."""
        near: Miss | None = None
        for piece in self.pieces:
            layout = self.layouts.get(piece.layout)
            if layout is None or place[: len(layout)] != layout or axes_of(place[len(layout) :]):
                continue
            found = match(piece.pattern, node, self.bindings)
            if isinstance(found, Match):
                return True, self.take(piece, node, place, found)
            if near is None or found.depth >= near.depth:
                near = found
        return False, near

    def take(self, piece: kinds.Piece, node: Node, place: Place, found: Match) -> Value | Miss:
        shape = features(place)
        layout = self.layouts[piece.layout]
        match piece:
            case kinds.Dispatch():
                self.bind(found)
                known = self.body.captured["x"]
                if known and found["tokens"] not in known:
                    return self.miss("one tensor of token rows", node)
                tokens = found["tokens"]
                return self.body.reshaped(self.row("x", tokens, self.numbers(tokens, 1)), shape)
            case kinds.Slot():
                slot = found["slot"]
                if not same_shape((shape_of(slot) or ())[:2], shape_of(found.get("ids")) or self.slot_shape):
                    return self.miss("a value for every token and slot", slot)
                self.bind(found)
                row = self.row("s", slot, self.numbers(slot, 2))
                if piece.layout == kinds.TOKENS:
                    self.zeros.append(row.node)  # added up over the slots of this expert: of other tokens, nothing
                return self.body.reshaped(row, shape)
            case kinds.Column():
                self.bind(found)
                if piece.layout == kinds.TOKENS:
                    return self.table(found["table"], place)
                self.tables.add(found["table"])
                return self.body.reshaped(self.row("s", found["table"], ()), shape)
            case kinds.View():
                self.bind(found)
                self.interior.add(node)
                return self.value(found["rows"], (*self.layouts[piece.to], *place[len(layout) :]))
            case kinds.Mask():
                self.bind(found)
                self.interior.add(node)
                return self.value(found["rows"], place)
            case kinds.ExpertRow():
                self.bind(found)
                param = found["param"]
                return self.body.reshaped(
                    Value(self.body.placeholder("p", param), EXPERTS_OWN, self.numbers(param, 1)), shape
                )
            case kinds.ExpertLinear():
                self.bind(found)
                self.forms.add(piece.form)
                self.interior.update(each for each in found.nodes if op_name(each) in ROW_STEPS)
                source = found["rows"]
                rows = self.value(source, (*layout, *((size,) for size in (shape_of(source) or ())[len(layout) :])))
                if isinstance(rows, Miss):
                    return rows
                weight = Value(
                    self.body.placeholder("p", found["weight"]), EXPERTS_OWN, self.numbers(found["weight"], 1)
                )
                return self.body.linear(rows, self.body.turned(weight) if piece.transposed else weight)
        raise AssertionError(f"a piece of unknown kind: {piece}")

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
        places: list[Place] = []
        for operand, letters in zip(found.operands, found.letters, strict=True):
            whole = []
            for letter in letters:
                at = found.out.find(letter)
                size = found.size(letter)
                if at < 0 and not isinstance(size, int):
                    return self.miss("a sum over a fixed number of features", node)
                whole.append(place[at] if at >= 0 else (size,))
            shape = shape_of(operand)
            own = aligned(tuple(whole), shape, self.sizes) if shape is not None else None
            if own is None:
                return self.miss("an operand that is a tensor", operand)
            places.append(own)
        # Rows first, so that an expert's parameters are numbered as it uses them.
        factors: dict[int, Factor] = {}
        for which in sorted((0, 1), key=lambda which: reads_stack(found.operands[which])):
            inner = self.value(found.operands[which], places[which])
            if isinstance(inner, Miss):
                return inner
            factors[which] = Factor(inner, found.letters[which], places[which])
        if found.summed:
            result = product(self.body, (factors[0], factors[1]), found, place)
        else:
            result = elementwise_product(self.body, (factors[0], factors[1]), found, place)
        if result is None:
            return self.miss("a product of rows and a matrix that does not change from row to row", node)
        self.interior.add(node)
        if op_name(node) == "aten::sum":
            self.interior.add(node.args[0])
        if any(factor.value.kind == EXPERTS_OWN for factor in factors.values()):
            self.forms.add(FORMS[EXPERT if self.dense else SLOT])
        if found.bias is not None:
            own = aligned(place, shape_of(found.bias) or (), self.sizes)
            bias = self.value(found.bias, own if own is not None else place)
            if isinstance(bias, Miss):
                return bias
            total = self.body.write(aten.add.Tensor, result.node, self.body.beside_rows(bias, len(result.shape)))
            result = Value(total, ROWS, result.shape)
        return result

    # The layer

    def region(self, output: Value) -> Region | Miss:
        """Everything was found: check that it fits together."""
        step = self.own is not None
        nested = self.specific is not None and "ids" not in self.bindings
        if not self.forms and not step:
            return self.miss("a row that meets its expert's weight", self.root, "no such op")
        captured = self.body.captured
        if not captured["x"]:
            return self.miss("token rows sent to their experts", self.root, "no dispatch")
        if "ids" not in self.bindings and not nested:
            return self.miss("the ids of the experts", self.root, "none")
        used = self.outside_use()
        if used is not None:
            return used
        if self.dense and not nested and not counts_zero(output.node, self.zeros):
            wanted = "an expert's output that is zero wherever its routing weight is"
            return Miss(wanted, "one that need not be", self.root, dict(self.bindings), 10**6)
        graph = self.body.graph
        graph.output(output.node)
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
        (tokens,) = captured["x"]
        form = "expert_loop" if step else "+".join(sorted(self.forms))
        region = Region(
            self.root, form, tokens, self.bindings.get("ids", tokens), s, p, h, GraphModule({}, graph), self.interior,
            self.bindings, distinct=bool(self.zeros),
        )  # fmt: skip
        region.size = (self.token_count, self.sizes.get(SLOT, region.top_k))
        region.tables = self.tables
        region.features = {node: self.outer[node] for node in (tokens, *s)}
        return region

    def outside_use(self) -> Miss | None:
        for node in self.interior:
            for user in node.users:
                ends = user is self.root or user in self.ending
                if user not in self.interior and not ends and not only_asserted(user):
                    return Miss(
                        f"{node.name} to be read inside the layer only", f"{user.name} ({op_name(user) or user.op})",
                        node, dict(self.bindings), 10**6,
                    )  # fmt: skip
        return None
