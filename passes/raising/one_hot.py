"""The ids of a layer and their one-hot rows, and how many rows an expert can get.

hot = one_hot(ids.reshape(-1), E)        # or eq(ids[..., None], arange(E)), or zeros.scatter(1, ids[:, None], 1)

A value of slots may stand as `[T, K]`, `[T*K]`, or choice by choice as `[K*T]`: its place tells.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from moe_fx.passes.raising.axes import EXPERT, ONE, PLACE, SLOT, Place, aligned, axes_of, size_of
from moe_fx.passes.raising.counts import EXACT, largest_count
from moe_fx.passes.raising.outside import Outside
from moe_fx.passes.raising.pieces import arange
from moe_fx.passes.raising.routing import selection_of
from moe_fx.passes.raising.through import is_view, through
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.matcher import Match, Miss, arguments, match, op_name
from moe_fx.shapes import Dim, known_at_least, known_equal, shape_of, tensor_of

__all__ = ["OneHotRows", "is_arange"]

#: a mismatch of bins says more than what other readings of the same values end in
FAR = 10**5


class OneHotRows:
    """Reads values of a walk; what it binds (the ids, the number of classes) is bound for the whole layer."""

    def __init__(self, walk: Outside) -> None:
        self.walk = walk
        self.top_k = walk.sizes.get(SLOT, 1)

    @property
    def sizes(self) -> dict[str, Dim]:
        return dict(self.walk.sizes)

    @property
    def slot_axes(self) -> set[str]:
        return set(self.walk.tokens) if known_equal(self.top_k, 1) else {*self.walk.tokens, SLOT}

    @property
    def groups(self) -> frozenset[str]:
        """Axes of tokens over which ranks are not counted, such as the batch: each group of tokens has its own bins."""
        order = self.walk.bindings.get("rank_order", "sorted")
        counted = self.walk.tokens if order == "sorted" else order
        apart = (token for token in self.walk.tokens if token not in counted)
        return frozenset(token for token in apart if not known_equal(self.walk.sizes[token], 1))

    def by_slot(self, place: Place) -> bool:
        """Whether a value of whole numbers has one for every slot, in the order of the ids."""
        wide = tuple(dim for dim in place if dim not in ((), (ONE,)))
        tokens = self.walk.tokens
        single = known_equal(self.top_k, 1) and wide in ((tokens,), tuple((token,) for token in tokens))
        return wide in self.walk.slot_places or single

    def ids(self, node: Node, place: Place) -> bool:
        """Whether a value is the layer's ids, or a view of them."""
        chain: list[Node] = []
        plain: list[Node] = []
        while True:
            value = tensor_of(node)
            if value is None or value.dtype not in (torch.int64, torch.int32):
                break
            if self.by_slot(place):
                chain.append(node)
                before = tuple(dim for dim in place[:-1] if dim)  # the batch may be one; behind the slots is nothing
                plain += [node] if (*before, place[-1]) in self.walk.slot_places else []
            if op_name(node) == "aten::select":
                given = arguments(node)
                dim = given["dim"] % (len(place) + 1)
                if not known_equal((shape_of(given["self"]) or ())[dim], 1):
                    break
                node, place = given["self"], (*place[:dim], (), *place[dim:])
                continue
            step = through(node, place, self.sizes) if is_view(node) or op_name(node) == "aten::to" else ""
            if isinstance(step, str):
                break
            ((node, place),) = step.operands
        if not chain:
            return False
        # Of one expert per token, the ids as they were chosen: a dimension for slots is taken away and added at will.
        named = chain[-1] if known_equal(self.top_k, 1) else (*plain, chain[0])[0]
        return self.walk.bindings.setdefault("ids", named) in chain

    def is_hot(self, node: Node, place: Place) -> bool:
        """Whether a value by slot and expert is 1 for the slot's own expert and 0 for all others."""
        if EXPERT not in axes_of(place):
            return False
        name = op_name(node)
        if name == "aten::to":
            return self.is_hot(node.args[0], place)
        if self.by_token(place):
            return self.is_mask(node, place)
        if name == "aten::one_hot" and place[-1] == (EXPERT,):
            return self.experts(node, -1) and self.ids(node.args[0], place[:-1])
        if name == "aten::scatter" and place[-1] == (EXPERT,):
            given = arguments(node)
            ones = given.get("value") == 1 and filled_with(given["self"]) == 0 and given["dim"] in (-1, len(place) - 1)
            return ones and self.experts(node, -1) and self.ids(given["index"], (*place[:-1], ()))
        if name != "aten::eq":
            return False
        for one, other in (node.args[:2], node.args[1::-1]):
            numbers, own = self.beside(one, place), self.beside(other, place)
            if numbers is None or own is None or axes_of(numbers) != {EXPERT} or EXPERT in axes_of(own):
                continue
            dim = place.index((EXPERT,)) if (EXPERT,) in place else 0
            if is_arange(one) and self.experts(node, dim) and self.ids(other, own):
                self.walk.bindings.setdefault("counts_beyond", node)  # an id that is no expert's has no 1 anywhere
                return True
        return False

    def by_token(self, place: Place) -> bool:
        """Whether a value by expert has one row for all slots of a token: it is known for the experts of each."""
        return EXPERT in axes_of(place) and SLOT not in axes_of(place) and not known_equal(self.top_k, 1)

    def is_mask(self, node: Node, place: Place) -> bool:
        """Whether a value by token and expert is 1 for the experts of its slots, if these differ, and 0 elsewhere."""
        given = arguments(node) if op_name(node) in ("aten::scatter", "aten::sum") else {}
        if op_name(node) == "aten::scatter" and place[-1] == (EXPERT,):
            ones = given.get("value") == 1 and filled_with(given["self"]) == 0 and given["dim"] in (-1, len(place) - 1)
            found = ones and self.experts(node, -1) and self.ids(given["index"], (*place[:-1], (SLOT,)))
        elif given and isinstance(given["dim"], list | tuple) and len(given["dim"]) == 1 and not given["keepdim"]:
            dim = given["dim"][0] % (len(place) + 1)
            found = self.is_hot(given["self"], (*place[:dim], (SLOT,), *place[dim:]))
        else:
            return False
        if found:
            self.walk.bindings["counted_once"] = node
        return found

    def beside(self, operand: Any, place: Place) -> Place | None:
        shape = shape_of(operand)
        return aligned(place, shape, self.sizes) if shape is not None else None

    def experts(self, node: Any, dim: int) -> bool:
        """The number of experts, as a value by expert has it: the same everywhere."""
        count = (shape_of(node) or (None,))[dim]
        if not isinstance(count, int) or self.walk.bindings.setdefault("num_classes", count) != count:
            return False
        self.walk.sizes = {**self.walk.sizes, EXPERT: count}
        return True

    # Sizes

    def bins_of(self, capacity: Dim, node: Node, grouped: bool = False) -> bool:
        """Whether an expert's bin has ``capacity`` places, as everywhere in the layer, which hold all of its rows.

        Whoever reads bins that are apart for each group of tokens says so: ``grouped``.
        """
        if self.groups and not grouped:
            self.miss("ranks counted over all tokens, as the bins are for all", "ranks counted within groups", node)
            return False
        known = self.walk.sizes.get(PLACE, capacity)
        self.walk.sizes = {**self.walk.sizes, PLACE: known}
        return known_equal(known, capacity) and self.holds_all(capacity, node)

    def holds_all(self, capacity: Dim, node: Node) -> bool:
        """Whether every rank is below ``capacity``. If it need not be, tokens can be dropped: that is noted."""
        bound = self.walk.bindings
        tokens = size_of(tuple(token for token in self.walk.tokens if token not in self.groups), self.sizes)
        every = tokens * self.top_k
        if known_at_least(capacity, every):
            return True
        # The largest number of rows that an expert has, of all tokens.
        known = largest_count(capacity, node.graph, bound) if not self.groups and "ids" in bound else None
        if known is not None and "counted_once" not in known:
            self.walk.bindings = known
            return True
        ids, classes = bound.get("ids"), bound.get("num_classes", 0)
        if isinstance(ids, Node) and selection_of(ids, classes).distinct:
            every = tokens
            if known_at_least(capacity, tokens):
                bound["counted_once"] = node
                return True
        found = f"tokens can be dropped: capacity {capacity} for up to {every} rows"
        self.miss("bins that hold every row an expert can get", found, node)
        return False

    def miss(self, wanted: str, found: str, node: Node, near: int = 0) -> None:
        """For the report; what is ``near`` the reason says less than the reason."""
        self.walk.note(Miss(wanted, found, node, dict(self.walk.bindings), FAR - near))


def is_arange(node: Any) -> bool:
    """Whether a value is 0, 1, 2, ... along its only dimension that is not of size 1."""
    count, source = size_of_all(node), node
    while is_view(source) or op_name(source) == "aten::to":
        if (value := tensor_of(source)) is None or value.dtype not in EXACT:
            return False
        source = source.args[0]
    value = tensor_of(source)
    whole = value is not None and value.dtype in EXACT and isinstance(match(arange(), source), Match)
    return whole and known_equal(count, size_of_all(source))  # nothing is repeated


def size_of_all(node: Any) -> Dim:
    """How many elements a tensor has."""
    return math.prod(shape_of(node) or ())
