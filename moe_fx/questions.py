"""A mode under which a model is traced, in which every expert has rows, or none.

Whether an expert has rows depends on the data, so torch.export refuses to trace a model that asks. Here it gets the
same answer for every expert. That is not true of every input: `moe_fx.export` traces with both answers, and proves that
they differ by the experts only. For that, what decides whether an expert is left out has to be whether it has rows
itself: a question is answered only if it is known to ask that, and what the model does next is held to that expert.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moe_fx.counted import Count, Counts, Part, length_of, listed, plain_slices, rows_between, slice_bounds
from moe_fx.errors import ExportError
from moe_fx.known import Known, is_counts
from moe_fx.meaning import (
    DESCRIPTIONS,
    ELEMENTS,
    JOINS,
    LISTS,
    READS,
    RESHAPES,
    SIZES,
    SPLITS,
    UNIQUE,
    UNIQUE_IN_ORDER,
    Meaning,
    Tensor,
)
from moe_fx.shapes import depends_on_values, known_equal
from moe_fx.tracing import NONZERO, Number, Places, Row, is_vector, with_fake

__all__ = ["EveryExpert", "NothingJoined"]


class _ListedNumber(Number):
    """The number of an expert, from a list of those that were hit."""

    source: Tensor


class NothingJoined(ExportError):
    """A model joins what no expert computed: where there are no tokens, an error of its own."""


class EveryExpert(TorchFunctionMode):
    """Answers questions about the rows of an expert alike for all experts.

    Args:
        hit: a list of the experts that were hit names all; otherwise none.
        idle: which experts have no rows, if they are looked at.
        length: what ``len`` of an expert's rows answers, which must be a number. Traces with different ones are
            compared, so that it matters only whether that is zero.
    """

    def __init__(self, hit: bool, idle: Callable[[int], bool], length: int = 1) -> None:
        super().__init__()
        self.hit, self.idle, self.length = hit, idle, length
        #: how often it was asked which experts were hit, and whether one has rows
        self.lists = self.questions = 0
        self.known = Known()
        self._settled: list[Tensor] = []
        #: sums of all numbers of rows, and what they come to
        self._totals: list[tuple[torch.SymInt, Any]] = []
        self._numbers: list[tuple[Tensor, Counts]] = []
        self._last: Meaning | None = None
        self._number: torch.SymInt | None = None
        self._used = False

    @property
    def asked(self) -> bool:
        return self.lists + self.questions > 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (other := with_fake(func, args, kwargs)) is not None:
            return other()
        first = self.known.of(args[0]) if args else None
        counted = first is not None and first.kind == "count" and is_counts(args[0], first)
        vector = func in NONZERO and (is_vector(args[0]) or (counted and isinstance(args[0].shape[0], int)))
        if vector and first is not None and first.expert is None:
            return self.listed(args[0], first, kwargs.get("as_tuple", False))
        if func is Tensor.__bool__ and first is not None and first.kind == "count" and first.expert is not None:
            return self.answer(first) is not first.no
        if func in (*LISTS, Tensor.__iter__) and counted:
            numbers = self.numbers(args[0], first)
            return iter(numbers) if func is Tensor.__iter__ else numbers
        if func in READS and counted and first.ends is not None and isinstance(args[1], int):
            return self.numbers(args[0], first)[args[1]]
        elements = func in ELEMENTS and args[0].dtype is torch.int64 and kwargs.get("dim", (*args, 0)[1]) == 0
        if elements and self.has_rows_of_one(args[0], first):
            places = listed(args[0], 0 if self.size(args[0], first, None) == 0 else self.length)
            return iter(places) if func is Tensor.__iter__ else places
        if func is Tensor.__int__ and first is not None and first.kind == "count" and first.expert is not None:
            return self.length if self.answer(first) else 0
        if func is Tensor.item and first is not None and first.kind == "count" and first.expert is not None:
            if args[0].dtype is torch.bool:
                return self.answer(first) is not first.no
            return Count.of(self.part(first, func(*args)))
        unique = func in UNIQUE or (func in UNIQUE_IN_ORDER and self.known.in_order(args[0]))
        if unique and (found := self.unique(args[0], kwargs)) is not None:
            return found
        self.hold_to_the_last(args, kwargs, func)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            self.hold_part(args[1][0] if isinstance(args[1], tuple) and args[1] else args[1])
            args = (args[0], plain_slices(args[1]), *args[2:])
        bounds = slice_bounds(func, args)
        if bounds is not None and func is not Tensor.__setitem__:
            self.hold_slice(*bounds)
            return rows_between(args[0], *bounds)
        if func in READS and isinstance(args[1], Row):
            result = args[0][int(args[1])].unsqueeze(0)
            self.known.remember(result, self.known.of_expert(args[0], args[1][0]))
            return result
        if func is Tensor.__len__ and self.has_rows_of_one(args[0], first):
            return 0 if self.size(args[0], first, None) == 0 else self.length
        if func in JOINS and not args[0]:
            raise NothingJoined("no expert has rows, and what they compute is joined")
        result = func(*(int(arg) if isinstance(arg, Row) else arg for arg in args), **kwargs)
        if (
            func in ELEMENTS
            and first is None
            and kwargs.get("dim", (*args, 0)[1]) == 0
            and not self.known.range(args[0])
        ):
            parts = list(result)
            for number, each in enumerate(parts):
                self.known.remember(each, self.known.of_expert(self.known.origin(args[0]), number))
            return iter(parts) if func is Tensor.__iter__ else tuple(parts)
        if func in SIZES:
            return self.size(args[0], first, result)
        if func in JOINS and depends_on_values(result.shape[0]):
            return self.joined(result)
        if func in SPLITS and isinstance(sizes := (*args, None)[1], list):
            for rows, count in zip(result, sizes, strict=True):
                if isinstance(count, Count) and len(count.parts) == 1:
                    self.known.remember(rows, dataclasses.replace(count.parts[0].meaning, kind="rows"))
            return result
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, Tensor):
                self.known.remember(each, self.known.follow(func, args, kwargs, first, each))
        self.known.choose(func, args, kwargs, result)
        self.known.add(func, args, result)
        return result

    def listed(self, hits: Tensor, meaning: Meaning, as_tuple: bool) -> Any:
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

    def unique(self, ids: Tensor, kwargs: dict[str, Any]) -> Any:
        """The experts that some ids name, and perhaps how often; None for ids of which that is not known."""
        count = self.known.range(ids) if kwargs.get("dim") is None else None
        if count is None or not kwargs.get("sorted", True) or kwargs.get("return_inverse"):
            return None
        self.lists += 1
        there = [expert for expert in range(count) if self.hit and not self.idle(expert)]
        experts = Places()
        for expert in there:
            experts.append(_ListedNumber(expert))
            experts[-1].source = self.known.origin(ids)
        if not kwargs.get("return_counts", False):
            return experts
        counted = Meaning("count", self.known.origin(ids), None, total=ids.numel(), ids=ids)
        counts = self.numbers(ids, counted)
        return experts, Counts(counts[expert] for expert in there)

    def part(self, meaning: Meaning, number: Any) -> Part:
        """How many rows one expert has."""
        return Part(number, functools.partial(self.answer, meaning), not self.idle(meaning.expert or 0), meaning)

    def numbers(self, counts: Tensor, meaning: Meaning) -> Counts:
        """How many rows the experts have, as numbers: the same ones whenever it is asked."""
        found = next((numbers for known, numbers in self._numbers if known is counts), None)
        if found is None:
            found = self._numbers_of(counts, meaning)
            self._numbers.append((counts, found))
        return found

    def _numbers_of(self, counts: Tensor, meaning: Meaning) -> Counts:
        counts = counts if meaning.ends is None else meaning.ends
        bins = meaning.bins
        if bins is None and meaning.ids is not None and (counts is meaning.ids or depends_on_values(counts.shape[0])):
            # Counted up to the last expert that was hit: which that is, is answered like a question.
            bins = self.known.range(meaning.ids)
            if bins is None:
                raise ExportError("experts counted up to the last that was hit, and not known how many there are")
            self.lists += 1
            counts = torch.bincount(meaning.ids.reshape(-1), minlength=bins)
        if counts.is_floating_point():
            counts = counts.to(torch.int64)  # they are whole, and added up as such
        # bincount answers with more than it was asked for if an id is none of an expert: these are not looked at.
        unsure = depends_on_values(counts.shape[0]) and bins is not None
        numbers = [counts[expert].item() for expert in range(bins)] if unsure else counts.tolist()
        parts = [self.part(dataclasses.replace(meaning, expert=at, ends=None), each) for at, each in enumerate(numbers)]
        there = [part for part in parts if part.there]
        if meaning.total is not None and there:
            self._totals.append((Count.sum(*there), meaning.total))
        found = Counts(Count.of(part) for part in parts)
        if meaning.bins is None and bins is not None:
            del found[1 + max((at for at, part in enumerate(parts) if part.there), default=-1) :]
        return found.cumsum() if meaning.ends is not None else found

    def joined(self, rows: Tensor) -> Tensor:
        """Rows of which there are certainly as many as ids, in a shape that says so; an error where there are not."""
        for total, known in self._totals:
            if known_equal(total, rows.shape[0]):
                return rows.split([known])[0]
        return rows

    def answer(self, meaning: Meaning, number: torch.SymInt | None = None) -> bool:
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

    def hold_part(self, part: Any) -> None:
        """A slice whose bounds are tensors is that of the expert that was asked for, if it is as long as its count."""
        if self._last is None or not isinstance(part, slice) or not isinstance(part.stop, Tensor):
            return
        length = self.known.counted_between(part.start, part.stop)
        self._used |= length is not None and length.kind == "count" and length.same_expert(self._last)

    def finish(self) -> None:
        """What was asked about must have been used: otherwise the answer decides on something else."""
        if self._last is not None and not self._used and not self.idle(self._last.expert or 0):
            raise ExportError(
                f"a question whether expert {self._last.expert} has rows, which are not used then (a statistic of how "
                "many rows an expert has can be counted from the ids, by torch.bincount, instead of by len)"
            )

    def size(self, places: Tensor, meaning: Meaning | None, size: Any) -> Any:
        """How many rows there are was asked: the answer."""
        if meaning is None or not self.has_rows_of_one(places, meaning):
            return size
        count = places.shape[0]
        idle = self.idle(meaning.expert or 0)
        if not any(places is known for known in self._settled):
            self.answer(meaning)
            self._settled.append(places)
            if not idle:
                torch._check(count > 0)
        if idle:
            return torch.Size([0, *size[1:]]) if isinstance(size, torch.Size) else 0
        return size

    def has_rows_of_one(self, places: Tensor, meaning: Meaning | None) -> bool:
        """Whether a tensor has a row for each of one expert's, or where they are."""
        known = meaning is not None and meaning.kind == "rows" and places.dim() > 0
        return known and isinstance(places.shape[0], torch.SymInt)

    def hold_to_the_last(self, args: tuple[Any, ...], kwargs: dict[str, Any], func: Callable[..., Any]) -> None:
        """What follows a question concerns the expert that was asked for, and a listed expert the list's own mask."""
        for arg in _leaves((args, kwargs)):
            meaning = self.known.of(arg)
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
            elif (
                func not in (*JOINS, *READS, *RESHAPES, *DESCRIPTIONS)
                and meaning.kind == "rows"
                and (meaning.source is self._last.source or expert == self._last.expert)
            ):
                raise ExportError(f"rows of expert {expert}, after the question whether there are others")


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
