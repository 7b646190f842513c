"""What the dimensions of a value stand for.

A *place* says it, one tuple per dimension: the names of row axes (a token, a slot, an expert, ...) and the sizes of
features. A reshape may merge axes in one dimension, or take it apart:

    [T, K, 8]     (("T",), ("K",), (8,))
    [T*K, 8]      (("T", "K"), (8,))
    [E, H, T]     (("E",), (8,), ("T",))

Walking from the sum back to the tokens, the place of a result says what the operands of its op are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moe_fx.shapes import Dim, known_equal

__all__ = [
    "EXPERT", "HIT", "ONE", "PLACE", "SLOT", "SORTED_ROW", "TOKEN", "Axis", "Place", "aligned", "axes_of",
    "feature_dim", "features", "is_row_dim", "regrouped", "rows_first", "size_of",
]  # fmt: skip

Axis = str | int
Place = tuple[tuple[Axis, ...], ...]

#: row axes: tokens (of several dimensions, perhaps: "T0", "T1"), slots of a token, experts, rows sorted by expert, rows
#: that hit one expert, places in an expert's bin; and a dimension of size 1 where other values have rows
TOKEN, SLOT, EXPERT, SORTED_ROW, HIT, PLACE, ONE = "T", "K", "E", "S", "R", "C", "1"


def is_row_dim(dim: Sequence[Axis]) -> bool:
    """Whether a dimension stands for rows only: it is not seen within one expert."""
    return bool(dim) and all(isinstance(axis, str) for axis in dim)


def axes_of(place: Place) -> frozenset[str]:
    """The row axes that a value has."""
    return frozenset(axis for dim in place for axis in dim if isinstance(axis, str) and axis != ONE)


def rows_first(place: Place) -> tuple[str, ...] | None:
    """The row axes in their order, if all of them stand before the features; None if one does not."""
    axes = [axis for dim in place for axis in dim if axis not in (ONE, 1)]
    rows = tuple(axis for axis in axes if isinstance(axis, str))
    return rows if axes[: len(rows)] == list(rows) else None


def features(place: Place) -> list[int]:
    """The sizes that a row (or one expert's part) of a value has."""
    return [math.prod(axis for axis in dim if isinstance(axis, int)) for dim in place if not is_row_dim(dim)]


def feature_dim(place: Place, dim: int) -> int | None:
    """Where a dimension is found in a row, counted from the end; None if it stands for rows."""
    if is_row_dim(place[dim]):
        return None
    return -sum(not is_row_dim(each) for each in place[dim:])


def size_of(dim: Sequence[Axis], sizes: Mapping[str, Dim]) -> Dim:
    total: Dim = 1
    for axis in dim:
        total = total * (axis if isinstance(axis, int) else sizes[axis])
    return total


def regrouped(place: Place, shape: Sequence[Dim], sizes: Mapping[str, Dim]) -> Place | None:
    """The place of what has the same elements in another ``shape``; None where its dimensions cut through row axes."""
    rest: list[Axis] = [axis for dim in place for axis in dim if axis != ONE]
    result: list[tuple[Axis, ...]] = []
    for number, size in enumerate(shape):
        follows = number + 1 < len(shape) and known_equal(shape[number + 1], 1)
        dim: list[Axis] = []
        while not known_equal(size_of(dim, sizes), size):
            if not rest:
                return None
            axis = rest.pop(0)
            done = size_of(dim, sizes)
            if isinstance(axis, int) and isinstance(size, int) and isinstance(done, int) and size % done == 0:
                missing = size // done
                if axis > missing and axis % missing == 0 and missing > 1:
                    rest.insert(0, axis // missing)
                    axis = missing
            dim.append(axis)
            if len(dim) > 16:
                return None
        # Axes of size 1 belong to the rows beside which they stand, or to a dimension of size 1.
        while rest and isinstance(rest[0], str) and known_equal(sizes[rest[0]], 1):
            if not (is_row_dim(dim) or not dim) or (dim and follows):
                break
            dim.append(rest.pop(0))
        result.append(tuple(dim))
    if any(not known_equal(size_of((axis,), sizes), 1) for axis in rest):
        return None
    if rest and any(isinstance(axis, str) for axis in rest):
        return None
    return tuple(result)


def aligned(place: Place, shape: Sequence[Dim], sizes: Mapping[str, Dim]) -> Place | None:
    """The place of an operand of ``shape`` that is broadcast to a value in ``place``."""
    if len(shape) > len(place):
        return None
    result: list[tuple[Axis, ...]] = []
    for size, dim in zip(shape, place[len(place) - len(shape) :], strict=True):
        if isinstance(size, int) and size == 1 and not known_equal(size_of(dim, sizes), 1):
            result.append((ONE,) if is_row_dim(dim) else ())
        else:
            result.append(dim)
    return tuple(result)
