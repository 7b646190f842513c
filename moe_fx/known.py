"""What is known of the tensors of a trace: which of them say something of the rows of an expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moe_fx.meaning import (
    BINS,
    CHOICES,
    ELEMENTS,
    EQUALS,
    NEGATIONS,
    POSITIVE,
    PRODUCTS,
    READS,
    RESHAPES,
    RUNNING,
    SCATTERS,
    SORTS,
    SUMS,
    TOTALS,
    Meaning,
    Tensor,
)
from moe_fx.shapes import known_equal
from moe_fx.tracing import NONZERO

__all__ = ["Known", "is_counts"]


class Known:
    """Follows what tensors say of the rows of an expert, op by op."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, Meaning]] = []
        #: the same tensors in another shape or dtype: what they were made of
        self._views: list[tuple[Tensor, Tensor]] = []
        #: masks by token and expert, and the ids that they were made of
        self._masks: list[tuple[Tensor, Tensor]] = []
        #: ids in the order of their numbers, and what brings which ids to that order
        self._ordered: list[Tensor] = []
        self._orders: list[tuple[Tensor, Tensor]] = []
        #: what two numbers come to, of which one is how many rows an expert has
        self._sums: list[tuple[Tensor, tuple[Any, Any]]] = []
        #: ids, and of how many experts they are
        self._ranges: list[tuple[Tensor, int]] = []

    def of(self, tensor: object) -> Meaning | None:
        return next((meaning for known, meaning in self._known if known is tensor), None)

    def remember(self, tensor: Tensor, meaning: Meaning | None) -> None:
        if meaning is not None:
            self._known.append((tensor, meaning))

    def follow(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], first: Meaning | None,
        result: Tensor,
    ) -> Meaning | None:  # fmt: skip
        """What a result says of an expert's rows, if that is known."""
        if first is None:
            return self.begin(func, args, kwargs, result)
        literal = args[1] if len(args) > 1 and isinstance(args[1], int) else None
        if func in RESHAPES:
            return first
        if first.kind == "mask" and ((func is torch.where and len(args) == 1) or func in NONZERO):
            return dataclasses.replace(first, kind="rows")
        if first.kind == "rows":
            columns = func in ELEMENTS and result.dim() < args[0].dim()
            return first if columns or (func in READS and _of_every_row(args[1])) else None
        if first.kind == "mask" and func in TOTALS[:2] and args[0].is_floating_point():
            return None  # weights of either sign may add up to anything
        if first.kind == "mask" and func in TOTALS and (result.dim() == 0 or first.expert is None):
            return dataclasses.replace(first, kind="count")
        if first.kind == "mask" and func in POSITIVE and literal == 0:
            signed = func not in POSITIVE[-3:] and args[0].is_floating_point()
            return dataclasses.replace(first, positive=True) if signed else first
        if first.kind == "mask" and (func in TOTALS[2:4] or result.dtype is torch.int64):
            return first if func in TOTALS else None  # over the slots of a token
        if first.kind != "count":
            return None
        if func in READS and first.expert is None:
            each = literal is not None and literal >= 0 and first.ends is None
            return dataclasses.replace(first, expert=literal) if each else None
        if func in RUNNING and is_counts(args[0], first):
            return dataclasses.replace(first, ends=args[0])
        if func in POSITIVE and literal == 0:
            return first
        if func in NEGATIONS or (func in EQUALS and literal == 0):
            return dataclasses.replace(first, no=not first.no)
        return None

    def begin(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> Meaning | None:
        """What is read of an unknown tensor: one expert's part of a mask, or the rows that every expert has."""
        if not args or not isinstance(args[0], Tensor):
            return None
        if func in RESHAPES and (self.origin(args[0]) is not args[0] or not args[0].is_floating_point()):
            self._views.append((result, self.origin(args[0])))
            return None
        if (func in READS or func in EQUALS) and len(args) == 2 and isinstance(args[1], int):
            return self.of_expert(self.origin(args[0]), args[1])
        if func is Tensor.__getitem__ and isinstance(args[1], tuple) and self.is_table(args[0]):
            *rows, expert = args[1]
            every = rows in ([slice(None)] * (args[0].dim() - 1), [...])
            return self.of_expert(self.named(args[0]), expert) if every and isinstance(expert, int) else None
        if func in READS and len(args) == 2 and (by := self.of(args[1])) is not None and by.expert is not None:
            return dataclasses.replace(by, kind="rows") if by.kind in ("mask", "rows") else None
        if func in BINS and result.dim() == 1:
            bins = kwargs.get("minlength", args[2] if len(args) > 2 else None)
            return Meaning("count", self.origin(args[0]), None, total=args[0].numel(), bins=bins, ids=args[0])
        if func in SCATTERS and isinstance((*args, None, None)[3], int | float):
            self._masks += [(args[0], args[2]), (result, args[2])]
        if func is F.one_hot:
            self._masks.append((result, args[0]))
        if func in TOTALS:
            if (
                func in TOTALS[:2]
                and args[0].is_floating_point()
                and not any(args[0] is mask for mask, _ in self._masks)
            ):
                return None
            return self.counted(args[0], kwargs.get("dim", args[1] if len(args) > 1 else None), result)
        return None

    def apart(self, whole: Tensor, parts: list[Tensor]) -> list[Tensor]:
        """The parts of a mask by expert, which are what is read of it one by one."""
        if self.range(whole) is None:
            for number, each in enumerate(parts):
                self.remember(each, self.of_expert(self.origin(whole), number))
        return parts

    def is_table(self, tensor: Tensor) -> bool:
        """Whether the columns of a tensor may be those of experts: numbers of experts are integers themselves."""
        known = any(mask is tensor for mask, _ in self._masks)
        return tensor.dim() > 1 and (known or tensor.is_floating_point() or tensor.dtype is torch.bool)

    def counted(self, mask: Tensor, dims: Any, result: Tensor) -> Meaning | None:
        """The rows that every expert has, as a mask by token and expert says, or one by expert, token and slot."""
        ids = next((ids for known, ids in self._masks if known is mask), None)
        summed = {dim % mask.dim() for dim in ([dims] if isinstance(dims, int) else dims or ())}
        if mask.dim() == 3 and result.dim() == 1 and summed == {1, 2}:
            return Meaning("count", mask, None)
        if mask.dim() == 3 and summed == {1} and ids is not None:
            self._masks.append((result, ids))  # added up over the slots of a token
        by_expert = result.dim() == 1 and summed == set(range(mask.dim() - 1))
        if by_expert and (mask.dim() == 2 or ids is not None):
            # The same tensor in another shape has the same columns if its last dimension stayed.
            whole = self.origin(mask)
            whole = whole if whole.dim() > 0 and known_equal(whole.shape[-1], mask.shape[-1]) else mask
            source, total = (whole, None) if ids is None else (self.origin(ids), ids.numel())
            return Meaning("count", source, None, total=total)
        return None

    def choose(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Of how many experts some ids are: of as many as there were scores to choose from."""
        if func in CHOICES:
            place, default = CHOICES[func], 2 if func in (torch.topk, Tensor.topk) else 1
            dim = kwargs.get("dim", args[default] if len(args) > default else None)
            if not isinstance(dim, int | None):
                return  # the larger of two tensors
            last = dim in (-1, args[0].dim() - 1) or (dim is None and func not in (torch.argmax, Tensor.argmax))
            if last and isinstance(args[0].shape[-1], int) and (place is None or isinstance(result, tuple)):
                self._ranges.append((result if place is None else result[place], args[0].shape[-1]))
        elif func in (*PRODUCTS, *SUMS) and isinstance(result, Tensor) and not result.is_floating_point():
            most = [each if isinstance(each, int) else (self.range(each) or 0) - 1 for each in args[:2]]
            if not kwargs and min(most) >= 0:
                self._ranges.append((result, (most[0] * most[1] if func in PRODUCTS else most[0] + most[1]) + 1))
        elif func in READS and isinstance(result, Tensor) and (count := self.range(args[0])) is not None:
            self._ranges.append((result, count))
            if any(args[1] is order and self.origin(args[0]) is ids for order, ids in self._orders):
                self._ordered.append(result)
        if func in SORTS and args[0].dim() == 1 and not kwargs.get("descending", args[2] if len(args) > 2 else False):
            self.sorts(args[0], *(result if isinstance(result, tuple) else (None, result)))

    def sorts(self, ids: Tensor, values: Tensor | None, order: Tensor) -> None:
        """Ids that were sorted are of the same experts."""
        self._orders.append((order, self.origin(ids)))
        count = self.range(ids)
        if values is not None and count is not None:
            self._ranges.append((values, count))
            self._ordered.append(values)

    def in_order(self, ids: Tensor) -> bool:
        return any(known is ids for known in self._ordered)

    def add(self, func: Callable[..., Any], args: tuple[Any, ...], result: Any) -> None:
        """A number added to how many rows an expert has."""
        if func in (*SUMS, Tensor.__radd__) and len(args) == 2 and isinstance(result, Tensor) and result.dim() == 0:
            self._sums.append((result, (args[0], args[1])))

    def counted_between(self, start: Any, stop: Any) -> Meaning | None:
        """What is known of the number that added to ``start`` is ``stop``."""
        one, other = next((parts for known, parts in self._sums if known is stop), (None, None))
        begins = [start is each or (isinstance(each, int) and each == (start or 0)) for each in (one, other)]
        return self.of(other if begins[0] else one) if any(begins) and isinstance(start, Tensor | int | None) else None

    def range(self, ids: Tensor) -> int | None:
        ids = self.origin(ids)
        return next((count for known, count in self._ranges if known is ids), None)

    def origin(self, tensor: Tensor) -> Tensor:
        return next((origin for view, origin in self._views if view is tensor), tensor)

    def named(self, table: Tensor) -> Tensor:
        """The ids that a mask by token and expert was made of; any other table itself."""
        return self.origin(next((ids for mask, ids in self._masks if mask is table), table))

    def of_expert(self, source: Tensor, expert: int) -> Meaning:
        return Meaning("mask", source, expert)


def _of_every_row(index: Any) -> bool:
    """Whether something is read of each row: some rows, or their first, may not be there where others are."""
    every = isinstance(index, tuple) and bool(index) and index[0] == slice(None)
    return every and all(isinstance(each, int | slice | None) for each in index)


def is_counts(tensor: Tensor, meaning: Meaning) -> bool:
    return meaning.expert is None and not meaning.no and tensor.dim() == 1 and tensor.dtype is not torch.bool
