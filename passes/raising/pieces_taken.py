"""Pieces of a disguise on the way back to the tokens: which one a value is, and what it makes of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from moe_fx.passes.raising import pieces as kinds
from moe_fx.passes.raising.axes import HIT, SLOT, Place, axes_of, features
from moe_fx.passes.raising.outside import Outside
from moe_fx.passes.raising.writer import EXPERTS_OWN, Value
from torch.fx import Node

from moe_fx.constants import is_zero
from moe_fx.matcher import Match, Miss, arguments, match, op_name
from moe_fx.shapes import known_equal, same_shape, shape_of

__all__ = ["Taking", "writes_whole_rows"]

aten = torch.ops.aten

#: ops through which the rows of an expert linear pass
ROW_STEPS = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback", "moe_fx::grouped_mm"})
#: how many calls an expert may take
FAR = 400


class Taking(Outside):
    """A walk that recognises the pieces of its disguise."""

    def piece(self, node: Node, place: Place) -> tuple[bool, Value | Miss | None]:
        """Whether a piece fits, and what it makes of the value; or the nearest mismatch."""
        near: Miss | None = None
        for piece in self.pieces:
            layout = self.layouts.get(piece.layout)
            if layout is None or axes_of(place[len(layout) :]):
                continue
            number = isinstance(piece, kinds.Column) or (isinstance(piece, kinds.Slot) and piece.layout == kinds.TOKENS)
            if number and max(features(place), default=1) != 1:
                continue  # what a token has for each slot, or expert, is a number
            # With one slot, a dimension of size 1 for it may stand beside the tokens or not.
            alone = self.single and piece.layout == kinds.TOKEN_MAJOR and place[:1] == ((*self.tokens, SLOT),)
            if place[: len(layout)] != layout and not alone:
                continue
            found = match(piece.pattern, node, self.known_of(piece, place))
            if isinstance(found, Match) and not (self.one_slot_fits(found) and self.has_slots(piece, found)):
                continue
            if isinstance(found, Match):
                return True, self.take(piece, node, place, found)
            if near is None or found.depth >= near.depth:
                near = found
        return False, near

    def known_of(self, piece: kinds.Piece, place: Place) -> dict[str, Any]:
        """What a piece is held to: a number for each token is read as token rows are, and is none; nor is what an
        expert makes of every token."""
        if self.is_number(piece, place) or (isinstance(piece, kinds.Dispatch) and piece.layout == kinds.HITS):
            return {name: bound for name, bound in self.bindings.items() if name != "tokens"}
        return self.bindings

    def is_number(self, piece: kinds.Piece, place: Place) -> bool:
        return isinstance(piece, kinds.Dispatch) and not self.single and all(size == 1 for size in features(place))

    def one_slot_fits(self, found: Match) -> bool:
        """Whether ids of one slot each, as a piece takes them for, have no dimension for it, or one of size 1.

        A mask ``[T, K]`` beside rows ``[T, H]`` would be one of features, where K is H.
        """
        shape, tokens = shape_of(found.get("ids")) or (), len(self.tokens)
        if known_equal(self.token_count, 1) and all(known_equal(size, 1) for size in shape):
            return True  # the only id there is
        without = "one_each" not in found.bindings or len(shape) == tokens
        wide = "one_wide" not in found.bindings or (len(shape) == tokens + 1 and known_equal(shape[-1], 1))
        return without and wide

    def has_slots(self, piece: kinds.Piece, found: Match) -> bool:
        """Whether what a piece takes for a value of each slot is one: the rows of a batch of sequences are none."""
        if not isinstance(piece, kinds.Slot) or (piece.layout == kinds.SORTED and _is_repeated(found["slot"])):
            return True
        rows = self.slots_of(found)
        return same_shape((shape_of(found["slot"]) or ())[: len(rows)], rows)

    def slots_of(self, found: Match) -> tuple[Any, ...]:
        return shape_of(found.get("ids")) or self.slot_shape

    def take(self, piece: kinds.Piece, node: Node, place: Place, found: Match) -> Value | Miss:
        shape = features(place)
        layout = self.layouts[piece.layout]
        match piece:
            case kinds.Dispatch() if self.is_number(piece, place):
                tokens_known = {name: bound for name, bound in self.bindings.items() if name == "tokens"}
                self.bind(found)
                del self.bindings["tokens"]
                self.bindings |= tokens_known
                number = self.number(found["tokens"])
                return number if isinstance(number, Miss) else self.body.reshaped(number, shape)
            case kinds.Dispatch() if (made := self.made_of_all(piece, node, place, found)) is not None:
                return made
            case kinds.Dispatch():
                self.bind(found)
                known = self.body.captured["x"]
                if known and found["tokens"] not in known:
                    return self.miss("one tensor of token rows", node)
                tokens = found["tokens"]
                whole = self.numbers(tokens, 1)
                if math.prod(whole) != math.prod(shape):
                    return self.miss("whole rows of tokens", node, f"{node.name}, of shape {[*shape]} each")
                return self.body.reshaped(self.row("x", tokens, whole), shape)
            case kinds.Slot():
                slot = found["slot"]
                if piece.layout == kinds.SORTED and _is_repeated(slot):
                    self.bind(found)
                    self.interior.add(node)
                    return self.value(
                        arguments(node)["self"], (*self.layouts[kinds.TOKEN_MAJOR], *place[len(layout) :])
                    )
                self.bind(found)
                row = self.row("s", slot, self.numbers(slot, len(self.slots_of(found))))
                self.summed |= {slot} if piece.summed else set()
                if piece.layout == kinds.TOKENS:
                    self.zeros.append(row.node)  # added up over the slots of this expert: of other tokens, nothing
                return self.body.reshaped(row, shape)
            case kinds.Column():
                self.bind(found)
                if piece.layout == kinds.TOKENS and not piece.masked:
                    weight = self.column_of(found["table"], layout)
                    return weight if isinstance(weight, Miss) else self.body.reshaped(weight, shape)
                self.tables.add(found["table"])
                row = self.row("s", found["table"], ())
                self.zeros += [row.node] if piece.masked else []
                return self.body.reshaped(row, shape)
            case kinds.View():
                self.bind(found)
                self.interior.add(node)
                return self.value(found["rows"], (*self.layouts[piece.to], *place[len(layout) :]))
            case kinds.Mask():
                self.bind(found)
                self.bindings.setdefault("rows_masked", node)
                self.interior.add(node)
                kept = self.value(found["rows"], place)
                return kept if piece.layout != kinds.TOKENS or isinstance(kept, Miss) else self.zero_elsewhere(kept)
            case kinds.Put():
                if not is_zero(found["put_into"]):
                    return self.miss("rows put into zeros", node)
                if not writes_whole_rows(node, found["rows"]):
                    return self.miss("whole rows put", node)
                self.bind(found)
                self.interior.add(node)
                if op_name(node) == "aten::index_add" or arguments(node).get("accumulate"):
                    self.bindings["counted_once"] = node  # of a token that is there twice, the sum is put
                self.count(HIT, (shape_of(found["rows"]) or (0,))[0])
                kept = self.value(found["rows"], ((HIT,), *place[len(layout) :]))
                return kept if isinstance(kept, Miss) else self.zero_elsewhere(kept)
            case kinds.ExpertRow():
                self.bind(found)
                param = found["param"]
                if piece.by_id:
                    self.bindings.setdefault("looked_up", node)
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
                matrix = Value(
                    self.body.placeholder("p", found["weight"]), EXPERTS_OWN, self.numbers(found["weight"], 1)
                )
                return self.body.linear(rows, self.body.turned(matrix) if piece.transposed else matrix)
        raise AssertionError(f"a piece of unknown kind: {piece}")

    def made_of_all(self, piece: kinds.Piece, node: Node, place: Place, found: Match) -> Value | None:
        """Of what an expert makes of every token, the rows that hit it: it is made of these. None for token rows."""
        whole = found["tokens"]
        only = read_only_by(node, whole) if piece.layout == kinds.HITS and self.specific is None else None
        if not only:
            return None
        before = self.progress()
        self.bind(Match({name: bound for name, bound in found.bindings.items() if name != "tokens"}, found.nodes))
        self.interior.add(node)
        self.of_all = only
        made = self.value(whole, (self.tokens, *place[1:]))
        if not isinstance(made, Miss):
            return made
        self.go_back(before)
        self.of_all = set()
        return None

    def zero_elsewhere(self, kept: Value) -> Value:
        """What is zero for other experts' rows, because a mask or a place says so; what it was before need not be."""
        kept = Value(self.body.write(aten.clone.default, kept.node), kept.kind, kept.shape)
        self.zeros.append(kept.node)
        self.marks.append(kept.node)
        return kept


def writes_whole_rows(node: Node, rows: Node) -> bool:
    """Whether a scatter, or any other write, takes every element of the rows that it is given."""
    index = arguments(node)["index"] if op_name(node) in ("aten::scatter", "aten::scatter_add") else None
    return index is None or same_shape(shape_of(index) or (), shape_of(rows) or ())


def read_only_by(reader: Node, value: Node) -> set[Node]:
    """The calls by which a value is computed for one reader alone; none, if others read it."""
    only, pending = {reader}, [value]
    while pending and len(only) < FAR:
        node = max(pending)  # all readers of a value come before it
        pending = [each for each in pending if each is not node]
        if node.op == "call_function" and all(user in only for user in node.users):
            only.add(node)
            pending.extend(node.all_input_nodes)
    return only - {reader}


def _is_repeated(slot: Node) -> bool:
    """Whether what stands for each slot is a token's row, the same in all of its slots."""
    source = slot.args[0] if op_name(slot) == "aten::clone" else slot
    shape, before = shape_of(slot) or (), source.args[0] if op_name(source) == "aten::expand" else None
    return len(shape) == 3 and shape[-1] != 1 and known_equal((shape_of(before) or (0, 0))[1], 1)
