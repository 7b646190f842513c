"""A slot's place among the slots of its expert, read back from how it is counted.

hot = one_hot(ids.reshape(-1), E)                  # [T*K, E]: 1 at a slot's own expert, 0 elsewhere
rank = ((hot.cumsum(0) - 1) * hot).sum(-1)         # how many slots of its expert come before it
place = ids.reshape(-1) * capacity + rank          # its row in bins [E * capacity, ...]

rank = arange(T * K) - starts[sorted_ids]          # the same of rows sorted by expert: how far behind the first one
row = starts[ids.reshape(-1)] + rank               # where a slot stands among those sorted by expert

What is read of a value is what it holds at a slot's own expert: a sum of the expert's number, the rank, and a number.
Whether every rank is below a capacity is a question of how many rows an expert can get.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from moe_fx.passes.raising import grouped
from moe_fx.passes.raising.axes import EXPERT, SLOT, SORTED_ROW, Place, axes_of
from moe_fx.passes.raising.counts import EXACT, Counts
from moe_fx.passes.raising.one_hot import OneHotRows
from moe_fx.passes.raising.pieces import arange
from moe_fx.passes.raising.rank import HOT, Rank, slot_places
from moe_fx.passes.raising.through import is_view, through
from torch.fx import Node

from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import aten
from moe_fx.shapes import Dim, is_number, known_at_least, shape_of, tensor_of

__all__ = ["Ranks"]


#: where an expert's rows begin, found in the sorted ids themselves
FIRST = aten.searchsorted(grouped.sorted_ids, grouped.numbers)

#: comparisons: whether they ask for what is below a limit, and whether for the limit itself
COMPARED = {
    "aten::lt": (True, False), "aten::less": (True, False), "aten::le": (True, True), "aten::less_equal": (True, True),
    "aten::gt": (False, False), "aten::greater": (False, False), "aten::ge": (False, True),
    "aten::greater_equal": (False, True),
}  # fmt: skip


class Ranks(OneHotRows):
    """Reads values that are made of ids and ranks."""

    def read(self, node: Any, place: Place) -> Rank | None:
        """What a value holds; None for anything that is not made of ids and ranks."""
        value = tensor_of(node)
        if value is None:
            return None
        found = self._read(node, place)
        # A float of few bits counts no further than it can: 256, say.
        if found is None or found.fixed or value.dtype in EXACT:
            return found
        self.miss("counts in a dtype that holds every number of rows", f"{node.name} of {value.dtype}", node)
        return None

    def _read(self, node: Node, place: Place) -> Rank | None:
        if node is self.walk.bindings.get("ids") and self.by_slot(place):
            return Rank(ids=1)
        if self.is_hot(node, place):
            return HOT
        if (found := self._in_order(node, place)) is not None:
            return found
        if is_view(node):
            step = through(node, place, self.sizes)
            if isinstance(step, str):
                return None
            ((source, own),) = step.operands
            return self.spread(source, own, place)
        rule = _RULES.get(op_name(node) or "")
        source = node.args[0] if node.target is operator.getitem and node.args[1] == 0 else None
        if isinstance(source, Node) and op_name(source) == "aten::max":
            return self._reduced(source, place, largest=True)
        return rule(self, node, place) if rule is not None else None

    def _in_order(self, node: Node, place: Place) -> Rank | None:
        """Of rows sorted by expert: their ids, where they stand, and where the rows of their expert begin."""
        bound, by_row = self.walk.bindings, place == ((SORTED_ROW,),)
        for pattern, read in ((grouped.sorted_ids, Rank(ids=1)), (arange(), Rank(row=1))) if by_row else ():
            if isinstance(found := match(pattern, node, bound), Match):
                self.walk.bind(found)
                return read
        if place == ((*self.walk.tokens, SLOT),) and isinstance(found := match(grouped.inverse, node, bound), Match):
            self.walk.bind(found)
            return Rank(row=1)
        if op_name(node) == "aten::index" and len(node.args[1]) == 1:
            return Rank(first=1) if self.own(node.args[1][0], place) and self._begins(node.args[0]) else None
        return None

    def own(self, index: Any, place: Place) -> bool:
        """Whether a value is the number of each slot's own expert."""
        return self.read(index, place) == Rank(ids=1) or self.ids(index, place)

    def _begins(self, node: Any) -> bool:
        """Whether a value by expert tells where its rows begin among the sorted ones."""
        bound = self.walk.bindings
        if isinstance(found := match(FIRST, node, bound), Match):
            bound, count = dict(found.bindings), found["num_experts"]
        else:
            counts = Counts(bound)
            if counts.read(node) != [dict.fromkeys(range(each), 1) for each in range(counts.num_experts)]:
                return False
            bound, count = dict(counts.bindings), counts.num_experts
        if bound.setdefault("num_classes", count) != count:
            return False
        bound.setdefault("counts_beyond", node)  # an id that is no expert's begins nowhere
        self.walk.bindings, self.walk.sizes = bound, {**self.walk.sizes, EXPERT: count}
        return True

    def holds_all(self, capacity: Dim, node: Node) -> bool:
        """Also where the capacity is more than the largest rank."""
        ranks = self._largest_rank(capacity, node) if isinstance(capacity, torch.SymInt) and not self.groups else None
        return ranks is not None or super().holds_all(capacity, node)

    def _largest_rank(self, capacity: Dim, node: Node) -> Node | None:
        """The ranks of all slots, of which the largest is less than ``capacity``."""
        for number in node.graph.nodes:
            if op_name(number) not in ("aten::item", "aten::_local_scalar_dense"):
                continue
            given = arguments(number.args[0]) if op_name(number.args[0]) in ("aten::max", "aten::amax") else {}
            values, more = given.get("self"), capacity - number.meta["val"]
            if (
                not isinstance(values, Node)
                or given.get("dim") not in (None, [], [0], 0)
                or not known_at_least(more, 0)
            ):
                continue
            for slots in slot_places(self.walk):
                if len(slots) != len(shape_of(values) or ()) or (given.get("dim") is not None and len(slots) > 1):
                    continue
                found = self.read(values, slots)
                if found == Rank(rank=1, plus=found.plus if found else 0) and known_at_least(more, 1 - found.plus):
                    return values
        return None

    def spread(self, node: Any, own: Place, place: Place) -> Rank | None:
        """What a value holds that stands in ``own`` place, and is seen in another."""
        found = self.read(node, own)
        if found is not None and self.by_token(own) and not self.by_token(place):
            return replace(found, elsewhere=None)  # the experts of a token's other slots are not elsewhere
        return found

    def operand(self, value: Any, place: Place) -> Rank | None:
        if isinstance(value, int | float) and int(value) == value:
            return Rank(plus=int(value), elsewhere=int(value))
        if isinstance(value, Node) and not is_number(value):
            own = self.beside(value, place)
            found = self.spread(value, own, place) if own is not None else None
            if found is None and own is not None and EXPERT not in axes_of(own) and self.by_slot(own):
                return Rank(ids=1) if "ids" in self.walk.bindings and self.ids(value, own) else None
            return found
        return None

    def _sum(self, node: Node, place: Place) -> Rank | None:
        if len(node.args) > 2 or node.kwargs:
            return None
        # Ranks first: the one-hot rows they are counted from tell which ids are the layer's.
        right = self.operand(node.args[1], place)
        left = self.operand(node.args[0], place)
        right = right if right is not None else self.operand(node.args[1], place)
        if left is None or right is None:
            return None
        sign = -1 if op_name(node) == "aten::sub" else 1
        elsewhere = None
        if left.elsewhere is not None and right.elsewhere is not None:
            elsewhere = left.elsewhere + sign * right.elsewhere
        row, first, rank = (
            getattr(left, name) + sign * getattr(right, name) for name in ("row", "first", "rank")
        )  # fmt: skip
        if (row, first) == (1, -1):
            if self.walk.bindings.setdefault("rank_order", "sorted") != "sorted":
                return None
            row, first, rank = 0, 0, rank + 1
        elif (rank, first) == (1, 1):  # in whatever order an expert's slots are counted
            row, first, rank = row + 1, 0, 0
        return Rank(left.ids + sign * right.ids, rank, left.plus + sign * right.plus, elsewhere, row, first)

    def _product(self, node: Node, place: Place) -> Rank | None:
        left, right = (self.operand(each, place) for each in node.args[:2])
        size = next((each.meta["val"] for each in node.args[:2] if isinstance(each, Node) and is_number(each)), None)
        if size is not None:
            each = left or right
            return replace(each, ids=each.ids * size) if each == Rank(ids=1) else None
        if left is None or right is None:
            return None
        if not left.fixed:
            left, right = right, left
        if not left.fixed:
            return None
        elsewhere = 0 if 0 in (left.elsewhere, right.elsewhere) else None
        if left.elsewhere is not None and right.elsewhere is not None:
            elsewhere = left.elsewhere * right.elsewhere
        many = left.plus
        return Rank(
            many * right.ids, many * right.rank, many * right.plus, elsewhere, many * right.row, many * right.first
        )

    def _counted(self, node: Node, place: Place) -> Rank | None:
        """A running sum of one-hot rows over all slots: how many of its expert there are up to each, and with it.

        Of tokens in groups, such as a batch, it may be one over the slots of each group.
        """
        given = arguments(node)
        if EXPERT in place[given["dim"]]:
            return None
        order = tuple(axis for axis in place[given["dim"]] if axis in self.slot_axes)
        if self.read(given["self"], place) != HOT:
            return None
        every = set(self.walk.tokens) if self.by_token(place) else self.slot_axes
        if SLOT in every - set(order) or not set(self.walk.tokens) & set(order):
            found = f"{node.name}, over dimension {given['dim']}"
            self.miss("a count over all slots of all tokens", found, node)
            return None
        # Slots may be counted token by token, or choice by choice: all of a layer's ranks are of one order.
        if self.walk.bindings.setdefault("rank_order", order) != order:
            self.miss("ranks counted in one order of the slots", f"{node.name}, in another", node)
            return None
        return Rank(rank=1, plus=1)

    def _reduced(self, node: Node, place: Place, largest: bool = False) -> Rank | None:
        """A sum or a maximum over the experts."""
        given = arguments(node)
        dims = given.get("dim")
        dims = dims if isinstance(dims, list | tuple) else [dims]
        if len(dims) != 1 or not isinstance(dims[0], int) or given.get("dtype") is not None:
            return None
        if self.by_token((*place, (EXPERT,))):
            return None  # that would be a sum over the slots of a token
        dim = dims[0] % len(shape_of(given["self"]) or (0,))
        rest = place[dim + 1 :] if given.get("keepdim") else place[dim:]
        if not self.experts(given["self"], dim):
            return None
        found = self.read(given["self"], (*place[:dim], (EXPERT,), *rest))
        if found is None or found.elsewhere is None:
            return None
        if largest:
            return replace(found, elsewhere=None) if found.ids == 0 and found.elsewhere <= found.plus else None
        count = self.walk.bindings["num_classes"]
        return replace(found, plus=found.plus + found.elsewhere * (count - 1), elsewhere=None)

    def _looked_up(self, node: Node, place: Place) -> Rank | None:
        """What a value by expert holds for the slot's own."""
        given = arguments(node)
        dim = given["dim"] % len(place)
        if not self.experts(given["self"], dim) or EXPERT in axes_of(place):
            return None
        found = self.read(given["self"], (*place[:dim], (EXPERT,), *place[dim + 1 :]))
        return replace(found, elsewhere=None) if found is not None and self.ids(given["index"], place) else None

    def _cast(self, node: Node, place: Place) -> Rank | None:
        found = self.read(node.args[0], place)
        if node.args[1] is not torch.bool or found is None:
            return found
        if not found.fixed:
            return None
        elsewhere = None if found.elsewhere is None else int(found.elsewhere != 0)
        return Rank(plus=int(found.plus != 0), elsewhere=elsewhere)

    def _compared(self, node: Node, place: Place) -> Rank | None:
        """Whether a rank is below a capacity: always, if the capacity holds every row an expert can get."""
        found, limit, (below, equal) = self.operand(node.args[0], place), node.args[1], COMPARED[op_name(node) or ""]
        limit = limit.meta["val"] if isinstance(limit, Node) and is_number(limit) else limit
        plain = found is not None and found == replace(Rank(rank=1), plus=found.plus, elsewhere=found.elsewhere)
        if found is None or not plain or not isinstance(limit, int | torch.SymInt):
            return None
        capacity = limit - found.plus + int(below == equal)  # torch 2.11 makes no number of a size and a bool
        return Rank(plus=int(below)) if self.holds_all(capacity, node) else None

    def _negated(self, node: Node, place: Place) -> Rank | None:
        found = self.read(node.args[0], place)
        if found is None or not found.fixed or tensor_of(node).dtype is not torch.bool:
            return None
        return Rank(plus=1 - found.plus, elsewhere=None if found.elsewhere is None else 1 - found.elsewhere)

    def _selected(self, node: Node, place: Place) -> Rank | None:
        """One of two values by a mask that is the same for every slot."""
        mask, one, other = node.args[:3]
        if op_name(node) == "aten::masked_fill":
            one, mask, other = other, one, mask
        known = self.operand(mask, place)
        if known is None or not known.fixed:
            return None
        found = self.operand(one if known.plus else other, place)
        return replace(found, elsewhere=None) if found is not None else None

    def _clamped(self, node: Node, place: Place) -> Rank | None:
        """A clamp that changes nothing."""
        given = arguments(node)
        found, low, high = self.read(given["self"], place), given.get("min"), given.get("max")
        high = high.meta["val"] if isinstance(high, Node) and is_number(high) else high
        if found is None or not found.ranked or low not in (None, 0):
            return None
        rows = high + 1 if isinstance(high, int | torch.SymInt) else None
        if found.ids == 0:
            return found if rows is None or self.holds_all(rows, node) else None
        every = found.ids * self.walk.bindings["num_classes"]
        return found if rows is None or (known_at_least(rows, every) and self.holds_all(found.ids, node)) else None


Rule = Callable[[Ranks, Node, Place], Rank | None]
_RULES: dict[str, Rule] = {
    **dict.fromkeys(COMPARED, Ranks._compared),
    "aten::add": Ranks._sum,
    "aten::sub": Ranks._sum,
    "aten::mul": Ranks._product,
    "aten::bitwise_and": Ranks._product,
    "aten::logical_and": Ranks._product,
    "aten::cumsum": Ranks._counted,
    "aten::sum": Ranks._reduced,
    "aten::amax": lambda ranks, node, place: ranks._reduced(node, place, largest=True),
    "aten::gather": Ranks._looked_up,
    "aten::to": Ranks._cast,
    "aten::bitwise_not": Ranks._negated,
    "aten::logical_not": Ranks._negated,
    "aten::where": Ranks._selected,
    "aten::masked_fill": Ranks._selected,
    "aten::clamp": Ranks._clamped,
}
