"""A mode under which a model is traced, in which the question which experts were hit has an answer.

The answer depends on the data, so torch.export refuses to trace a model that asks. What is answered instead is not true
of every input: `moe_fx.export` has to prove that the program means the same whatever the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from moe_fx.carried import Steps
from moe_fx.counted import plain_slices
from moe_fx.errors import ExportError
from moe_fx.kernels import each_expert
from moe_fx.kernels.grouped_mm import grouped_mm

__all__ = ["NONZERO", "EachExpert", "Number", "Places", "Row", "is_vector", "with_fake"]

assert each_expert is not None  # importing it registers the op

NONZERO = (torch.Tensor.nonzero, torch.nonzero)
#: ``torch.nn.functional.grouped_mm``, and what it was before it had a public name
GROUPED = ("grouped_mm", "_grouped_mm")


def with_fake(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """What stands for an op that runs eagerly, and that torch.export cannot trace like this; None for any other.

    That is a grouped product in other dtypes than bfloat16 (torch 2.11 to 2.13), of rows and one matrix per group, and
    one-hot rows of which only a symbol says how many classes they have.
    """
    if func is F.one_hot and isinstance(classes := kwargs.get("num_classes", (*args, None)[1]), torch.SymInt):
        ids = kwargs.get("tensor", args[0] if args else None)
        numbers: Any = classes  # torch declares it an int
        return lambda: (ids.unsqueeze(-1) == torch.arange(numbers, device=ids.device)).long()
    if getattr(func, "__name__", "") not in GROUPED or not all(isinstance(arg, torch.Tensor) for arg in args):
        return None
    operands = dict(zip(("rows", "matrices", "offs"), args, strict=False)) | kwargs
    rows, matrices, offsets = (operands.pop(name, None) for name in ("rows", "matrices", "offs"))
    whole = offsets is not None and matrices is not None and rows.dim() == 2 and matrices.dim() == 3
    plain = whole and all(other is None for other in operands.values())
    if not plain or rows.dtype is torch.bfloat16 or rows.dtype != matrices.dtype:
        return None
    return lambda: grouped_mm(rows, matrices, offsets)


class Number(int):
    """The number of an expert (or of a class), where a model expects a tensor that holds one."""

    def item(self) -> int:
        return self

    def tolist(self) -> int:
        return self


class _Place(torch.SymInt):
    """The number of an expert that is known as a symbol only, where a model expects a tensor that holds one."""

    def item(self) -> _Place:
        return self

    def tolist(self) -> _Place:
        return self


class _Answer(list[Any]):
    """What stands where a model expects a tensor; what it cannot answer is said in the model's words."""

    what: str

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"'.{name}' of {self.what}: which these are depends on the routing, so that torch.export knows no tensor "
            "of them; loop over them, or index with them, as they are"
        )


class Row(_Answer):
    """A row of what ``nonzero`` answers: a tensor of one place, which also counts as that place."""

    what = "an expert that was hit"

    def __index__(self) -> int:
        return int(self[0])

    __int__ = __index__

    def __eq__(self, other: object) -> bool:
        return bool(self[0] == other) if isinstance(other, int | torch.SymInt) else super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def squeeze(self, dim: int = -1) -> Any:
        return self[0]

    def item(self) -> Any:
        return self[0]

    def tolist(self, *_: Any, **__: Any) -> Row:
        return self

    cpu = to = long = tolist


class Places(_Answer):
    """What ``nonzero`` of a vector answers: rows of one column, ``[[e], [e]]``; or, flattened, the column."""

    what = "the experts that were hit"
    #: the loops over these places so far, where they stand for more; None where they are all there are
    loops: list[Steps] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self.loops is None:
            return list.__iter__(self)
        self.loops.append(Steps())
        return self.loops[-1].over([*list.__iter__(self)])

    def __reversed__(self) -> Iterator[Any]:
        if self.loops is None:
            return list.__reversed__(self)
        self.loops.append(Steps())
        return self.loops[-1].over([*list.__reversed__(self)])

    def __len__(self) -> int:
        if self.loops is not None:
            self.loops.append(Steps.of_count())
        return list.__len__(self)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, tuple) and place == (slice(None), 0):
            return self.flatten()
        if place in (slice(None), (slice(None), slice(None)), Ellipsis):
            return self
        if not isinstance(place, int):
            raise ExportError("some of the experts that were hit are taken, not all")
        return super().__getitem__(place)

    def squeeze(self, dim: int = -1) -> Places:
        return self.flatten() if dim in (-1, 1) else self

    def flatten(self) -> Places:
        flat = Places(place[0] if isinstance(place, list) else place for place in list.__iter__(self))
        flat.loops = self.loops
        return flat

    view = reshape = lambda self, *_: self.flatten()

    def tolist(self, *_: Any, **__: Any) -> Places:
        return self

    cpu = to = long = int = contiguous = detach = tolist

    def numel(self) -> Any:
        return len(self)

    def dim(self) -> Any:
        return 2 if any(isinstance(place, Row) for place in list.__iter__(self)) else 1

    def size(self, dim: Any = None) -> Any:
        sizes = torch.Size([len(self), 1][: self.dim()])
        return sizes if dim is None else sizes[dim]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.size())

    ndim = property(dim)


def is_vector(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 1 and isinstance(tensor.shape[0], int) and tensor.dtype is torch.bool


class EachExpert(TorchFunctionMode):
    """Answers ``nonzero`` of a vector of fixed length with ``steps`` symbolic places.

    With ``last_apart``, the last place is no expert but a class of its own, such as that of tokens masked out: the
    symbolic places lie before it, and with ``last_too`` it follows them as the number it is.
    """

    def __init__(self, steps: int, last_apart: bool, last_too: bool) -> None:
        super().__init__()
        self.steps, self.last_apart, self.last_too = steps, last_apart, last_too
        self.places: list[int | torch.SymInt] = []
        self.loops: list[Steps] = []
        #: what was read at one of the places: of an expert that was hit, so some row of it is not zero
        self.chosen: list[torch.Tensor] = []

    @property
    def asked(self) -> bool:
        return bool(self.places)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (other := with_fake(func, args, kwargs)) is not None:
            return other()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], plain_slices(args[1]), *args[2:])
        if func in NONZERO and is_vector(args[0]):
            rows = Places(Row([place]) for place in self.places_of(args[0]))
            rows.loops = self.loops
            return (rows.flatten(),) if kwargs.get("as_tuple") else rows
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and any(arg is place for arg in args for place in self.places):
            self.chosen.append(result)
        elif func is torch.where and len(args) == 1 and any(args[0] is tensor for tensor in self.chosen):
            # Models ask whether an expert has rows, and skip it otherwise. One that was hit has.
            torch._check(result[0].shape[0] > 0)
        return result

    def finish(self) -> None:
        """The trace is complete.

        Raises:
            ExportError: it may not be that of a loop with more steps.
        """
        for loop in self.loops:
            loop.check()

    def places_of(self, hits: torch.Tensor) -> list[int | torch.SymInt]:
        count = hits.shape[0] - self.last_apart
        found: list[int | torch.SymInt] = []
        for step in range(self.steps):
            place = _Place(torch.ops.moe_fx.each_expert(hits, step, count).node)
            torch._check(place >= 0)
            torch._check(place < count)
            found.append(place)
        if self.last_too:
            found.append(Number(count))
        self.places += found
        return found
