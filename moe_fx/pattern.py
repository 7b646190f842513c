"""The pattern language: what a piece of graph looks like, as plain data.

| word | matches |
|---|---|
| `Var("ids")` | any value; the same name is the same value wherever it stands |
| `Var("ids", rank=2)` | the same, of that many dimensions (or one of several numbers: `rank=(2, 3)`) |
| `ANY` | any value, not captured |
| `aten.sort(x, dim=0)` | a call of that op; an argument not mentioned has its default value |
| `call("aten::mm", "aten::bmm", args=...)` | a call of one of several ops that take the same arguments |
| `As("perm", p)` | `p`, captured under a name: the same node wherever the name stands |
| `item(p, 1)` | element 1 of what `p` returns several of |
| `either(p, q)` | the first of these that fits |
| `optional(aten.clone, p)` | `p`, or that op applied to `p` |
| `0`, `[1]`, `None`, `torch.int32` | exactly that value |
| `Last(-1)` | a dimension, counted from either end |
| `OneOfValues(a, b)` | one of these literals |
| `AtLeast(n)` | an int that is not smaller |
| `Fold(step, start, each=("w",))` | `step` repeated, peeled from the last: `ACC` in it is the rest of the chain |

In a Fold, names in `each` are collected per step (innermost first); all others are the same in every step.
An op whose arguments commute (`add`, `mul`, ...) is tried both ways round: that is a property of the op, not of a
rule. Bookkeeping arguments (layout, device, pin_memory, memory_format, non_blocking) are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "ACC",
    "ANY",
    "WHOLE",
    "As",
    "AtLeast",
    "Either",
    "Fold",
    "Item",
    "Last",
    "OneOfValues",
    "Op",
    "Pattern",
    "Var",
    "aten",
    "call",
    "either",
    "item",
    "optional",
]  # fmt: skip

COMMUTATIVE = frozenset({"aten::add", "aten::mul", "aten::eq", "aten::ne", "aten::maximum", "aten::minimum"})
BOOKKEEPING = frozenset({"layout", "device", "pin_memory", "memory_format", "non_blocking"})


class Pattern:
    """Base of the words of the language. Anything else in a pattern is a literal."""


@dataclass(frozen=True)
class Var(Pattern):
    """Captures a value under a name."""

    name: str
    rank: int | tuple[int, ...] | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that it may have; none stands for any."""
        return self.rank if isinstance(self.rank, tuple) else () if self.rank is None else (self.rank,)

    def __str__(self) -> str:
        return f"{self.name} of rank {' or '.join(map(str, self.ranks))}" if self.ranks else self.name


@dataclass(frozen=True)
class Wildcard(Pattern):
    """Matches everything and captures nothing."""

    def __str__(self) -> str:
        return "_"


ANY = Wildcard()
ACC = Var("<accumulator>")


@dataclass(frozen=True)
class As(Pattern):
    """``pattern``, and the value itself captured under a name."""

    name: str
    pattern: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.pattern}"


@dataclass(frozen=True)
class Op(Pattern):
    """A call of one of the ops ``names`` ("aten::sort")."""

    names: tuple[str, ...]
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()

    @property
    def commutes(self) -> bool:
        return self.names[0] in COMMUTATIVE

    def __str__(self) -> str:
        shown = [str(arg) for arg in self.args] + [f"{name}={value}" for name, value in self.kwargs]
        return f"{' or '.join(self.names)}({', '.join(shown)})"


@dataclass(frozen=True)
class Item(Pattern):
    """Element ``index`` of an op that returns several values."""

    source: Pattern
    index: int

    def __str__(self) -> str:
        return f"{self.source}[{self.index}]"


@dataclass(frozen=True)
class Either(Pattern):
    """Alternatives, tried in order; a later mismatch comes back to the next."""

    choices: tuple[Any, ...]

    def __str__(self) -> str:
        return " or ".join(str(choice) for choice in self.choices)


@dataclass(frozen=True)
class Last(Pattern):
    """A dimension of the op's first argument (of ``unsqueeze``: of its result), however it is counted."""

    dim: int

    def __str__(self) -> str:
        return f"dimension {self.dim}"


@dataclass(frozen=True)
class OneOfValues(Pattern):
    """One of several literals."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def __str__(self) -> str:
        return " or ".join(str(value) for value in self.values)


#: the dtype of numbers each of which is the number of an expert: in others, such as bfloat16, 256 and 257 are one
WHOLE = OneOfValues(None, torch.int64, torch.int32, torch.int16, torch.float32, torch.float64)


@dataclass(frozen=True)
class AtLeast(Pattern):
    """An int literal of at least ``least``."""

    least: int

    def __str__(self) -> str:
        return f"an int >= {self.least}"


@dataclass(frozen=True)
class Fold(Pattern):
    """``step`` repeated: ``step(step(step(start)))``; how often is captured under ``count``."""

    step: Pattern
    start: Any
    each: tuple[str, ...] = ()
    count: str = "count"

    def __str__(self) -> str:
        return f"{self.step} repeated from {self.start}"


def call(*names: str, args: tuple[Any, ...] = (), **kwargs: Any) -> Op:
    """A call of any of ``names``, which take the same arguments."""
    return Op(names, args, tuple(kwargs.items()))


class Namespace:
    """``aten.sort(x)`` for ``call("aten::sort", args=(x,))``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, op: str) -> Callable[..., Op]:
        return lambda *args, **kwargs: call(f"{self._name}::{op}", args=args, **kwargs)


aten = Namespace("aten")


def item(source: Pattern, index: int) -> Item:
    return Item(source, index)


def either(*choices: Any) -> Either:
    return Either(choices)


def optional(wrap: Callable[[Any], Pattern], inner: Pattern) -> Either:
    """``inner``, or ``inner`` with one more op around it."""
    return Either((wrap(inner), inner))
