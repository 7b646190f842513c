"""Products of rows and matrices in a body, whatever the order of their dimensions was: all become linears."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from moe_fx.passes.raising.axes import Axis, Place, features, is_row_dim
from moe_fx.passes.raising.contraction import Contraction
from moe_fx.passes.raising.writer import ROWS, Value, Writer

__all__ = ["Factor", "product"]


@dataclass(frozen=True)
class Factor:
    """An operand of a product: its value, and the letters and places of its dimensions."""

    value: Value
    letters: str
    place: Place

    @property
    def inner(self) -> str:
        """The letters that are seen within a row."""
        return "".join(letter for letter, dim in zip(self.letters, self.place, strict=True) if not is_row_dim(dim))

    def size(self, letter: str) -> int:
        return self.value.shape[self.inner.index(letter)]


def product(body: Writer, factors: Sequence[Factor], found: Contraction, place: Place) -> Value | None:
    """The product of all factors; None if one of them is a matrix that changes from row to row.

    Two by two and from the left, as torch does, but for matrices that are not multiplied with rows yet.
    """
    waiting, at = list(factors), dict(zip(found.out, place, strict=True))
    while len(waiting) > 2:
        for one, other in itertools.combinations(waiting, 2):
            rest = "".join(each.letters for each in waiting if each is not one and each is not other)
            kept = "".join(dict.fromkeys(letter for letter in one.letters + other.letters
                                         if letter in rest or letter in found.out))  # fmt: skip
            both = Contraction(found.operands[:2], (one.letters, other.letters), kept)
            if both.summed or one.value.kind == other.value.kind == ROWS:
                own = tuple(_place_of(letter, at, one, other) for letter in kept)
                value = _of_two(body, one, other, both, own)
                if value is not None:
                    waiting[waiting.index(one)] = Factor(value, kept, own)
                    waiting.remove(other)
                    break
        else:
            return None
    if len(waiting) == 1:
        (only,) = waiting
        ordered = [letter for letter in found.out if letter in only.inner] == list(only.inner)
        return body.reshaped(only.value, features(place)) if ordered and not found.summed else None
    one, other = waiting
    return _of_two(body, one, other, replace(found, letters=(one.letters, other.letters)), place)


def _place_of(letter: str, at: Mapping[str, tuple[Axis, ...]], *factors: Factor) -> tuple[Axis, ...]:
    """What a dimension of a product stands for: one factor may be broadcast there."""
    places = [each.place[each.letters.index(letter)] for each in factors if letter in each.letters]
    return at.get(letter) or next((place for place in places if place), ())


def _of_two(body: Writer, one: Factor, other: Factor, found: Contraction, place: Place) -> Value | None:
    return (linear if found.summed else elementwise)(body, one, other, found, place)


def linear(body: Writer, rows: Factor, matrix: Factor, found: Contraction, place: Place) -> Value | None:
    """``linear(rows, matrix)``; None for what is no product of rows with one matrix."""
    if rows.value.kind != ROWS:
        rows, matrix = matrix, rows
    if rows.value.kind != ROWS or matrix.value.kind == ROWS:
        return None
    summed = [letter for letter in matrix.inner if letter in found.summed]
    wide = [letter for letter in matrix.inner if letter not in summed and matrix.size(letter) > 1]
    beside = [letter for letter in rows.inner if letter not in summed and rows.size(letter) > 1]
    if set(wide) & set(beside) or not summed or any(letter not in rows.inner for letter in summed):
        return None
    left = _ordered(body, rows, beside, summed)
    right = _ordered(body, matrix, wide, summed)
    if left is None or right is None:
        return None
    out_sizes = {letter: matrix.size(letter) for letter in wide} | {letter: rows.size(letter) for letter in beside}
    result = body.linear(left, right)
    result = body.reshaped(result, [out_sizes[letter] for letter in (*beside, *wide)])
    order = [letter for letter in found.out if letter in out_sizes]
    if order != [*beside, *wide]:
        if len(order) != 2:
            return None
        result = body.turned(result)
    return body.reshaped(result, features(place))


def _ordered(body: Writer, factor: Factor, first: Sequence[str], last: Sequence[str]) -> Value | None:
    """A factor with the letters ``first`` in front, and ``last`` as one dimension; of rows, ``first`` stay apart."""
    kept = [letter for letter in factor.inner if letter in first or letter in last]
    value = body.reshaped(factor.value, [factor.size(letter) for letter in kept])
    rows = factor.value.kind == ROWS

    def sizes(letters: Sequence[str]) -> list[int]:
        whole = [factor.size(letter) for letter in letters]
        return whole if rows and letters is first else [math.prod(whole)]

    if kept == [*first, *last]:
        return body.reshaped(value, [*sizes(first), *sizes(last)] if first or not rows else sizes(last))
    if kept == [*last, *first]:
        if rows and len(first) != 1:
            return None
        flat = body.reshaped(value, [math.prod(factor.size(letter) for letter in part) for part in (last, first)])
        return body.turned(flat)
    return None


def elementwise(body: Writer, one: Factor, other: Factor, found: Contraction, place: Place) -> Value | None:
    """``left * right`` of which nothing is summed; None if one of them would have to be turned around."""
    shape = features(place)
    written = []
    for factor in (one, other):
        inner = [letter for letter in found.out if letter in factor.inner]
        if list(factor.inner) != inner:
            return None
        wide = [letter for letter, dim in zip(found.out, place, strict=True) if not is_row_dim(dim)]
        value = body.reshaped(factor.value, [factor.size(letter) if letter in factor.inner else 1 for letter in wide])
        written.append(body.beside_rows(value, len(shape)))
    if ROWS not in (one.value.kind, other.value.kind):
        return None
    return Value(body.write(torch.ops.aten.mul.Tensor, *written), ROWS, tuple(shape))
