"""A mode under which a model is traced, in which every expert has rows, or none.

Whether an expert has rows depends on the data, so torch.export refuses to trace a model that asks. Here it gets the
same answer for every expert. That is not true of every input: `moe_fx.export` traces with both answers, and proves that
they differ by the experts only. For that, what decides whether an expert is left out has to be whether it has rows
itself: a question is answered only if it is known to ask that, and what the model does next is held to that expert.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from moe_fx.counted import Count, length_of, plain_slices, rows_between, slice_bounds
from moe_fx.errors import ExportError
from moe_fx.shapes import depends_on_values, known_equal
from moe_fx.tracing import NONZERO, Number, Places, Row, is_vector

__all__ = ["EveryExpert"]

Tensor = torch.Tensor
#: what a model asks to learn how many elements a tensor has
SIZES = (
    Tensor.numel, torch.numel, Tensor.nelement, Tensor.size, Tensor.__len__, Tensor.shape.__get__,  # type: ignore[attr-defined]
)  # fmt: skip
NEGATIONS = (torch.logical_not, Tensor.logical_not, torch.bitwise_not, Tensor.bitwise_not, Tensor.__invert__)
EQUALS = (torch.eq, Tensor.eq, Tensor.__eq__)
POSITIVE = (torch.gt, Tensor.gt, Tensor.__gt__, torch.greater, Tensor.greater, torch.ne, Tensor.ne, Tensor.__ne__)
TOTALS = (torch.sum, Tensor.sum, torch.any, Tensor.any, torch.count_nonzero, Tensor.count_nonzero)
RESHAPES = (
    torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze, Tensor.reshape, torch.reshape, Tensor.view,
    torch.flatten, Tensor.flatten, Tensor.bool, Tensor.long, Tensor.int, Tensor.to, Tensor.contiguous, Tensor.cpu,
)  # fmt: skip
LISTS = (Tensor.tolist, Tensor.numpy, Tensor.unbind, torch.unbind)
BINS = (torch.bincount, Tensor.bincount, torch.histc, Tensor.histc)
SCATTERS = (Tensor.scatter, Tensor.scatter_, torch.scatter)
JOINS = (torch.cat, torch.concat, torch.concatenate)
READS = (Tensor.__getitem__, Tensor.select, torch.select)


@dataclass(frozen=True)
class _Meaning:
    """What a tensor says of the rows of an expert.

    ``kind``: "mask" where they are, "rows" their places, "count" how many there are, or whether there are any (``no``:
    whether there are none). ``source``: the tensor that it was read from, which says it of all experts. ``total``: of
    counts, how many ids were counted, and ``bins`` how many experts there are, if that is known.
    """

    kind: str
    source: Tensor
    expert: int | None
    no: bool = False
    total: Any = None
    bins: Any = None

    def same_expert(self, other: _Meaning) -> bool:
        return self.source is other.source and self.expert == other.expert


class _ListedNumber(Number):
    """The number of an expert, from a list of those that were hit."""

    source: Tensor


class EveryExpert(TorchFunctionMode):
    """Answers questions about the rows of an expert alike for all experts.

    Args:
        hit: a list of the experts that were hit names all; otherwise none.
        idle: which experts have no rows, if they are looked at.
    """

    def __init__(self, hit: bool, idle: Callable[[int], bool]) -> None:
        super().__init__()
        self.hit, self.idle = hit, idle
        #: how often it was asked which experts were hit, and whether one has rows
        self.lists = self.questions = 0
        self._known: list[tuple[Tensor, _Meaning]] = []
        self._settled: list[Tensor] = []
        #: the same tensors in another shape or dtype: what they were made of
        self._views: list[tuple[Tensor, Tensor]] = []
        #: masks by token and expert, and the ids that they were made of
        self._masks: list[tuple[Tensor, Tensor]] = []
        #: sums of all numbers of rows, and what they come to
        self._totals: list[tuple[torch.SymInt, Any]] = []
        self._last: _Meaning | None = None
        self._number: Count | None = None
        self._used = False

    @property
    def asked(self) -> bool:
        return self.lists + self.questions > 0

    def meaning(self, tensor: object) -> _Meaning | None:
        return next((meaning for known, meaning in self._known if known is tensor), None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = self.meaning(args[0]) if args else None
        if func in NONZERO and is_vector(args[0]) and first is not None and first.expert is None:
            return self.listed(args[0], first, kwargs.get("as_tuple", False))
        if func is Tensor.__bool__ and first is not None and first.kind == "count" and first.expert is not None:
            return self.answer(first) is not first.no
        if func in LISTS and first is not None and first.kind == "count" and is_counts(args[0], first):
            return self.numbers(args[0], first)
        self.hold_to_the_last(args, kwargs, func)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], plain_slices(args[1]), *args[2:])
        bounds = slice_bounds(func, args)
        if bounds is not None and func is not Tensor.__setitem__:
            self.hold_slice(*bounds)
            return rows_between(args[0], *bounds)
        if func in READS and isinstance(args[1], Row):
            result = args[0][int(args[1])].unsqueeze(0)
            self.remember(result, self.of_expert(args[0], args[1][0]))
            return result
        result = func(*(int(arg) if isinstance(arg, Row) else arg for arg in args), **kwargs)
        if func in SIZES:
            return self.size(args[0], first, result)
        if func in JOINS and depends_on_values(result.shape[0]):
            return self.joined(result)
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, Tensor):
                self.remember(each, self.follow(func, args, kwargs, first, each))
        return result

    def remember(self, tensor: Tensor, meaning: _Meaning | None) -> None:
        if meaning is not None:
            self._known.append((tensor, meaning))

    def of_expert(self, source: Tensor, expert: int) -> _Meaning:
        return _Meaning("mask", source, expert)

    def follow(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], first: _Meaning | None,
        result: Tensor,
    ) -> _Meaning | None:  # fmt: skip
        """What a result says of an expert's rows, if that is known."""
        if first is None:
            return self.begin(func, args, kwargs, result)
        literal = args[1] if len(args) > 1 and isinstance(args[1], int) else None
        if func in RESHAPES:
            return first
        if first.kind == "mask" and ((func is torch.where and len(args) == 1) or func in NONZERO):
            return dataclasses.replace(first, kind="rows")
        if first.kind == "rows":
            return first if func in READS else None
        if first.kind == "mask" and func in TOTALS and (result.dim() == 0 or first.expert is None):
            return dataclasses.replace(first, kind="count")
        if first.kind == "mask" and func in TOTALS[2:4]:
            return first  # over the slots of a token
        if first.kind != "count":
            return None
        if func in POSITIVE and literal == 0:
            return first
        if func in NEGATIONS or (func in EQUALS and literal == 0):
            return dataclasses.replace(first, no=not first.no)
        return None

    def begin(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> _Meaning | None:
        """What is read of an unknown tensor: one expert's part of a mask, or the rows that every expert has."""
        if not args or not isinstance(args[0], Tensor):
            return None
        if func in RESHAPES and (self.origin(args[0]) is not args[0] or not args[0].is_floating_point()):
            self._views.append((result, self.origin(args[0])))
            return None
        if (func in READS or func in EQUALS) and len(args) == 2 and isinstance(args[1], int):
            return self.of_expert(self.origin(args[0]), args[1])
        if func in BINS and result.dim() == 1:
            bins = kwargs.get("minlength", args[2] if len(args) > 2 else None)
            return _Meaning("count", self.origin(args[0]), None, total=args[0].numel(), bins=bins)
        if func in SCATTERS:
            self._masks += [(args[0], args[2]), (result, args[2])]
        if func is F.one_hot:
            self._masks.append((result, args[0]))
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if func in TOTALS and args[0].dim() == 3 and isinstance(dims, list | tuple):
            inner = {dim % 3 for dim in dims} == {1, 2}
            return _Meaning("count", args[0], None) if inner and result.dim() == 1 else None
        if func in TOTALS and args[0].dim() == 2 and dims in (0, [0], (0,)) and result.dim() == 1:
            ids = next((ids for mask, ids in self._masks if mask is args[0]), None)
            return _Meaning("count", args[0], None, total=ids.numel() if ids is not None else None)
        return None

    def listed(self, hits: Tensor, meaning: _Meaning, as_tuple: bool) -> Any:
        """The places of a vector that says which experts have rows."""
        if meaning.kind != "count" or meaning.no:
            raise ExportError("a list of experts that is not known to name those that were hit")
        self.lists += 1
        places = []
        for place in (place for place in range(hits.shape[0]) if self.hit and not self.idle(place)):
            number = _ListedNumber(place)
            number.source = meaning.source
            places.append(Row([number]))
        rows = Places(places)
        return (rows.flatten(),) if as_tuple else rows

    def origin(self, tensor: Tensor) -> Tensor:
        return next((origin for view, origin in self._views if view is tensor), tensor)

    def numbers(self, counts: Tensor, meaning: _Meaning) -> list[Count]:
        """How many rows the experts have, as numbers."""
        found = []
        # bincount answers with more than it was asked for if an id is none of an expert: these are not looked at.
        unsure = depends_on_values(counts.shape[0]) and meaning.bins is not None
        numbers = [counts[expert].item() for expert in range(meaning.bins)] if unsure else counts.tolist()
        for expert, number in enumerate(numbers):
            of_expert = dataclasses.replace(meaning, expert=expert)
            found.append(Count.of(number, functools.partial(self.answer, of_expert)))
        there = [count for expert, count in enumerate(found) if not self.idle(expert)]
        if meaning.total is not None and there:
            self._totals.append((functools.reduce(operator.add, there), meaning.total))
        return found

    def joined(self, rows: Tensor) -> Tensor:
        """Rows of which there are certainly as many as ids, in a shape that says so; an error where there are not."""
        for total, known in self._totals:
            if known_equal(total, rows.shape[0]):
                return rows.split([known])[0]
        return rows

    def answer(self, meaning: _Meaning, number: Count | None = None) -> bool:
        """Whether an expert has rows."""
        self.finish()
        self.questions += 1
        self._last, self._number, self._used = meaning, number, False
        assert meaning.expert is not None
        return not self.idle(meaning.expert)

    def hold_slice(self, start: Any, stop: Any) -> None:
        """A slice that follows the question for a number takes that many rows."""
        if self._number is None:
            return
        if length_of(start, stop) != self._number.node.expr:
            assert self._last is not None
            raise ExportError(f"other rows than those of expert {self._last.expert}, which was asked for")
        self._used = True

    def finish(self) -> None:
        """What was asked about must have been used: otherwise the answer decides on something else."""
        if self._last is not None and not self._used and not self.idle(self._last.expert or 0):
            raise ExportError(f"a question whether expert {self._last.expert} has rows, which are not used then")

    def size(self, places: Tensor, meaning: _Meaning | None, size: Any) -> Any:
        """How many rows there are was asked: the answer."""
        count = places.shape[0] if places.dim() else None
        if meaning is None or meaning.kind != "rows" or not isinstance(count, torch.SymInt):
            return size
        idle = self.idle(meaning.expert or 0)
        if not any(places is known for known in self._settled):
            self.answer(meaning)
            self._settled.append(places)
            if not idle:
                torch._check(count > 0)
        if idle:
            return torch.Size([0, *size[1:]]) if isinstance(size, torch.Size) else 0
        return size

    def hold_to_the_last(self, args: tuple[Any, ...], kwargs: dict[str, Any], func: Callable[..., Any]) -> None:
        """What follows a question concerns the expert that was asked for, and a listed expert the list's own mask."""
        for arg in _leaves((args, kwargs)):
            meaning = self.meaning(arg)
            if meaning is None or meaning.kind == "count":
                continue
            expert = meaning.expert
            chooses = meaning.kind == "rows" or (arg.dtype is torch.bool and func not in RESHAPES)
            if chooses and isinstance(expert, _ListedNumber) and expert.source is not meaning.source:
                raise ExportError("a loop over the experts that one mask hits, whose rows another chooses")
            if self._last is None or func in SIZES or not chooses:
                continue
            if meaning.same_expert(self._last):
                self._used = True
            elif meaning.kind == "rows" and (meaning.source is self._last.source or expert == self._last.expert):
                raise ExportError(f"rows of expert {expert}, after the question whether there are others")


def is_counts(tensor: Tensor, meaning: _Meaning) -> bool:
    return meaning.expert is None and not meaning.no and tensor.dim() == 1 and tensor.dtype is not torch.bool


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
