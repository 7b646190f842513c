"""How many rows experts have, as numbers: what `tolist` of the experts' counts answers under `moe_fx.export`.

A number of rows is a symbol. Comparing it with zero is the question whether the expert has rows, and so is comparing
where an expert's rows end with where they begin; everything else is arithmetic on symbols.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_fx.errors import ExportError
from moe_fx.shapes import depends_on_values

__all__ = ["Count", "Counts", "Part", "length_of", "listed", "plain_slices", "rows_between", "slice_bounds"]


@dataclass(frozen=True, eq=False)
class Part:
    """The ``number`` of rows of one expert; ``has_rows`` is asked whether that is more than zero.

    ``there``: whether the trace is one in which the expert has rows; ``meaning``: what was counted.
    """

    number: torch.SymInt
    has_rows: Callable[[torch.SymInt], bool]
    there: bool
    meaning: Any

    def more(self) -> bool:
        return self.has_rows(self.number)


class Nothing(int):
    """No rows, where a model expects a tensor that holds a number."""

    def item(self) -> int:
        return 0


class Count(torch.SymInt):
    """The number of rows of one expert, or of several together."""

    parts: tuple[Part, ...]

    @staticmethod
    def of(part: Part) -> Count:
        count = Count(part.number.node)
        count.parts = (part,)
        return count

    @staticmethod
    def sum(*parts: Part) -> Any:
        """Several together: experts without rows have none."""
        there = [part.number for part in parts if part.there]
        if not there:
            return Nothing(0)
        count = Count(functools.reduce(operator.add, there).node)
        count.parts = parts
        return count

    def item(self) -> Count:
        return self

    def __int__(self) -> int:
        raise ExportError(
            "int() of how many rows an expert has: what tolist() answers is a number already (of counts in a floating "
            "dtype, as torch.histc makes them, take counts.long().tolist())"
        )

    def __bool__(self) -> bool:
        return bool(self != 0)

    def _more_than(self, other: object) -> bool | None:
        """Whether this is more than a number that lacks the rows of one expert; None for any other."""
        mine, theirs = self.parts, _parts(other)
        if theirs is None or any(part not in mine for part in theirs):
            return None
        rest = [part for part in mine if part not in theirs]
        there = [part for part in rest if part.there]
        if not rest or len(there) > 1:
            return None if rest else False
        return (there or rest)[-1].more()

    def _less_than(self, other: object) -> bool | None:
        return other._more_than(self) if isinstance(other, Count) else None

    def __eq__(self, other: object) -> Any:
        more = self._more_than(other)
        more = self._less_than(other) if more is None else more
        return super().__eq__(other) if more is None else not more

    def __ne__(self, other: object) -> Any:
        more = self._more_than(other)
        more = self._less_than(other) if more is None else more
        return super().__ne__(other) if more is None else more

    def __gt__(self, other: Any) -> Any:
        more = self._more_than(other)
        return super().__gt__(other) if more is None else more

    def __ge__(self, other: Any) -> Any:
        more = self._more_than(0) if _is(other, 1) else None
        return super().__ge__(other) if more is None else more

    def __lt__(self, other: Any) -> Any:
        less = self._less_than(other)
        if _is(other, 1):
            more = self._more_than(0)
            less = None if more is None else not more
        return super().__lt__(other) if less is None else less

    def __le__(self, other: Any) -> Any:
        more = self._more_than(other)
        return super().__le__(other) if more is None else not more

    def __add__(self, other: Any) -> Any:
        theirs = _parts(other)
        known = theirs is not None and not any(part in self.parts for part in theirs)
        return Count.sum(*self.parts, *(theirs or ())) if known else super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        return self + other if _is(other, 0) else super().__radd__(other)

    def __sub__(self, other: Any) -> Any:
        theirs = _parts(other)
        rest = [part for part in self.parts if part not in (theirs or ())]
        known = theirs is not None and all(part in self.parts for part in theirs) and rest
        return Count.sum(*rest) if known else super().__sub__(other)

    __hash__ = torch.SymInt.__hash__


class Counts(list[Any]):
    """How many rows the experts have, one after the other, where a model expects an array of numbers."""

    def tolist(self) -> Counts:
        return self

    cpu = numpy = detach = tolist

    def cumsum(self, *_: Any, **__: Any) -> Counts:
        """Where the rows of each expert end."""
        return Counts(Count.sum(*parts) for parts in _prefixes([count.parts for count in self]))


def _prefixes(parts: Sequence[tuple[Part, ...]]) -> Sequence[tuple[Part, ...]]:
    return [tuple(part for each in parts[: place + 1] for part in each) for place in range(len(parts))]


def _parts(value: object) -> tuple[Part, ...] | None:
    if isinstance(value, Count):
        return value.parts
    return () if _is(value, 0) else None


def _is(value: object, literal: int) -> bool:
    return isinstance(value, int) and value == literal


@dataclass(frozen=True)
class Listed:
    """One of an expert's ``places``, from a list that ``tolist`` makes of them: the list as a whole can be an index."""

    places: torch.Tensor
    number: int
    count: int

    def item(self) -> Listed:
        return self


def listed(places: torch.Tensor, length: int) -> tuple[Listed, ...]:
    """A list of an expert's places, of which nobody knows how many there are."""
    count = min(length, 50)  # one, or several: where it matters how many there are, two traces differ
    return tuple(Listed(places, number, count) for number in range(count))


def plain_slices(index: Any) -> Any:
    """An index whose slices are bounded by numbers where tensors held them: torch.export knows no others."""
    if isinstance(index, tuple):
        return tuple(plain_slices(each) for each in index)
    if isinstance(index, Listed):
        raise ExportError("one of an expert's places, read of their list: only the whole list can be an index")
    if isinstance(index, list) and index and isinstance(index[0], Listed):
        return _whole(index)
    if not isinstance(index, slice):
        return index
    bounds = (index.start, index.stop, index.step)
    return slice(*(bound.item() if isinstance(bound, torch.Tensor) else bound for bound in bounds))


def _whole(index: list[Any]) -> torch.Tensor:
    """The places that a list holds, all of them in their order."""
    places, count = index[0].places, index[0].count
    same = all(isinstance(each, Listed) and each.places is places for each in index)
    if not same or [each.number for each in index] != [*range(count)]:
        raise ExportError("some of an expert's places, read of their list: only the whole list can be an index")
    return places


def slice_bounds(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Any] | None:
    """Where a slice of rows begins and ends, if that depends on values."""
    if func in (torch.ops.aten.slice, torch.ops.aten.slice.Tensor):  # what torch.export makes of ``x[start:end]``
        start, stop = args[2:4] if len(args) > 3 and args[1] == 0 else (None, None)
    elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
        first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        start, stop = (first.start, first.stop) if isinstance(first, slice) else (None, None)
    else:
        return None
    return (start or 0 if isinstance(start, int | None) else start, stop) if depends_on_values(stop) else None


def length_of(start: Any, stop: Any) -> Any:
    """How many rows lie between, as an expression."""
    length = stop if isinstance(start, int) and start == 0 else stop - start
    return length.node.expr if isinstance(length, torch.SymInt) else length


def rows_between(rows: torch.Tensor, start: Any, stop: Any) -> torch.Tensor:
    """``rows[start:stop]``, of a length that torch.export knows; an error where a slice would have been cut short."""
    length = stop if isinstance(start, int) and start == 0 else stop - start
    return rows.split([start, length, rows.shape[0] - stop])[1]
