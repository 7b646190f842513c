"""How many rows an expert has, as a number: what `tolist` of the experts' counts answers under `moe_fx.export`.

A number of rows is a symbol. Comparing it with zero is the question whether the expert has rows; everything else, such
as adding up where its rows begin, is arithmetic on symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_fx.shapes import depends_on_values

__all__ = ["Count", "length_of", "plain_slices", "rows_between", "slice_bounds"]


class Count(torch.SymInt):
    """The number of rows of an expert; ``has_rows`` is asked whether that is more than zero."""

    has_rows: Callable[[Count], bool]

    @staticmethod
    def of(number: torch.SymInt, has_rows: Callable[[Count], bool]) -> Count:
        count = Count(number.node)
        count.has_rows = has_rows
        return count

    def item(self) -> Count:
        return self

    def __bool__(self) -> bool:
        return self.has_rows(self)

    def __eq__(self, other: object) -> Any:
        return not self.has_rows(self) if _is(other, 0) else super().__eq__(other)

    def __ne__(self, other: object) -> Any:
        return self.has_rows(self) if _is(other, 0) else super().__ne__(other)

    def __gt__(self, other: Any) -> Any:
        return self.has_rows(self) if _is(other, 0) else super().__gt__(other)

    def __ge__(self, other: Any) -> Any:
        return self.has_rows(self) if _is(other, 1) else super().__ge__(other)

    def __lt__(self, other: Any) -> Any:
        return not self.has_rows(self) if _is(other, 1) else super().__lt__(other)

    def __le__(self, other: Any) -> Any:
        return not self.has_rows(self) if _is(other, 0) else super().__le__(other)

    __hash__ = torch.SymInt.__hash__


def _is(value: object, literal: int) -> bool:
    return isinstance(value, int) and value == literal


def plain_slices(index: Any) -> Any:
    """An index whose slices are bounded by numbers where tensors held them: torch.export knows no others."""
    if isinstance(index, tuple):
        return tuple(plain_slices(each) for each in index)
    if not isinstance(index, slice):
        return index
    bounds = (index.start, index.stop, index.step)
    return slice(*(bound.item() if isinstance(bound, torch.Tensor) else bound for bound in bounds))


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
