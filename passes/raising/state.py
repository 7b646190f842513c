"""What one walk knows: where it began, what it found on its way, and how it tells of a mismatch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from moe_fx.passes.raising import pieces as kinds
from moe_fx.passes.raising.axes import (
    EXPERT,
    HIT,
    SLOT,
    SORTED_ROW,
    Place,
    axes_of,
    rows_first,
    size_of,
)
from moe_fx.passes.raising.pieces import LOCAL
from moe_fx.passes.raising.through import Through
from moe_fx.passes.raising.writer import ROWS, Value, Writer
from torch.fx import Node

from moe_fx.matcher import Match, Miss, op_name
from moe_fx.pattern import Pattern
from moe_fx.shapes import Dim, known_equal, shape_of

__all__ = ["State"]


class State:
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
            kinds.SLOT_MAJOR: ((SLOT, *tokens),), kinds.HITS: ((HIT,),), kinds.EXPERT_MAJOR: ((EXPERT, *tokens),),
            kinds.TOKENS: tuple((token,) for token in tokens if specific is not None) or ((HIT,),),
            kinds.FLAT_TOKENS: (tokens,) if specific is not None else ((HIT,),),
        }  # fmt: skip
        if known_equal(sizes.get(SLOT, 0), 1):
            self.layouts[kinds.TOKEN_MAJOR] = (tokens,)
        self.body = Writer()
        self.known: dict[tuple[Node, Place], Value | Miss] = {}
        #: how many values were looked at: the further a walk came, the more its mismatch tells
        self.visited = 0
        self.interior: set[Node] = set()
        #: products of which only the factors are read
        self.apart: set[Node] = set()
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
        #: numbers for each token, which are those of all its slots
        self.each_token: set[Node] = set()
        #: values of the body that are zero for a token's row where it was not routed to the expert
        self.zeros: list[Node] = []
        #: what an expert of a loop makes of every token, although it has the rows of some
        self.of_all: set[Node] = set()
        #: routing weights that are added up over all slots in which a token's ids name the expert
        self.summed: set[Node] = set()
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

    @property
    def single(self) -> bool:
        """Whether each token has one slot: then a value per slot need not have a dimension for it."""
        return known_equal(self.sizes.get(SLOT, 0), 1)

    def in_order(self, place: Place) -> bool:
        """Whether a value's tokens stand before its features, in the order of the layer's tokens."""
        axes = axes_of(place)
        return rows_first(place) == tuple(token for token in self.tokens if token in axes)

    def row(self, kind: str, node: Node, shape: tuple[int, ...]) -> Value:
        """A row per token, or per slot, from outside."""
        self.outer[node] = shape
        return Value(self.body.placeholder(kind, node), ROWS, shape)

    def count(self, axis: str, many: Dim) -> None:
        """How many experts there are, or rows of one, shows on the way."""
        self.sizes = {**self.sizes, axis: many}

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
