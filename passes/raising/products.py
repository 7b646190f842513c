"""Products of rows and matrices in a body, whatever the order of their dimensions was: all become linears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from moe_fx.passes.raising.axes import Place, features, is_row_dim
from moe_fx.passes.raising.contraction import Contraction
from moe_fx.passes.raising.writer import ROWS, Value, Writer

__all__ = ["Factor", "elementwise_product", "product"]


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
    """``linear(rows, matrix)``; None for what is no product of rows with one matrix."""
    rows, matrix = factors
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


def elementwise_product(body: Writer, factors: Sequence[Factor], found: Contraction, place: Place) -> Value | None:
    """``left * right`` of which nothing is summed; None if one of them would have to be turned around."""
    shape = features(place)
    written = []
    for factor in factors:
        inner = [letter for letter in found.out if letter in factor.inner]
        if list(factor.inner) != inner:
            return None
        wide = [letter for letter, dim in zip(found.out, place, strict=True) if not is_row_dim(dim)]
        value = body.reshaped(factor.value, [factor.size(letter) if letter in factor.inner else 1 for letter in wide])
        written.append(body.beside_rows(value, len(shape)))
    if not any(factor.value.kind == ROWS for factor in factors):
        return None
    return Value(body.write(torch.ops.aten.mul.Tensor, *written), ROWS, tuple(shape))
