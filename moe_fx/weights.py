"""The weights that a program has: one of its tensors, what it stacks of several, or what it makes of one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

__all__ = ["DerivedWeight", "StackedWeight", "Weight", "stacked_name"]


@dataclass(frozen=True)
class Weight:
    """A parameter, buffer or constant: its full name and its tensor (meta or fake if there are no values)."""

    fqn: str
    tensor: torch.Tensor

    @property
    def stored_as(self) -> str:
        """With what its quantized tensors' names begin: those of its parts differ."""
        return self.fqn

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the program holds for it."""
        return (self.tensor,)

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def has_values(self) -> bool:
        fake = any(hasattr(part, "fake_mode") for part in self.parts)
        return not fake and self.device.type != "meta"

    def values(self) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True)
class StackedWeight(Weight):
    """What ``aten.stack`` makes of one weight per expert: ``tensor`` tells its shape and dtype, without values."""

    sources: tuple[Weight, ...] = ()
    nodes: tuple[Node, ...] = ()

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return tuple(source.tensor for source in self.sources)

    def values(self) -> torch.Tensor:
        """The stack, made anew at every call: it is a copy of all of its parts."""
        with torch.no_grad():
            return torch.stack(self.parts)


@dataclass(frozen=True)
class DerivedWeight(Weight):
    """What the program casts or reshapes before it reads it: ``tensor`` tells its shape and dtype, without values."""

    source: Weight | None = None
    step: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
    #: which part of the source it is, if it is one: "_0_24"
    part: str = ""

    @property
    def stored_as(self) -> str:
        return f"{self.source.stored_as if self.source is not None else self.fqn}{self.part}"

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        assert self.source is not None
        return self.source.parts

    @property
    def is_stacked(self) -> bool:
        """Whether it is made of one weight per expert."""
        source = self.source
        return isinstance(source, StackedWeight) or (isinstance(source, DerivedWeight) and source.is_stacked)

    def values(self) -> torch.Tensor:
        """The weight as it is read, made anew at every call."""
        assert self.source is not None
        with torch.no_grad():
            return self.step(self.source.values())


def stacked_name(names: Sequence[str], taken: Collection[str] = ()) -> str:
    """The name of what is stacked of one weight per expert: theirs, without the part that numbers the experts.

    Of a last part such as ``up_0`` only the number goes, as it also tells one weight from another. Where such a name is
    ``taken``, or weights lie beneath it as in a module, another one is made of it.
    """
    split = [name.split(".") for name in names]
    differing = {place for parts in split for place, part in enumerate(parts) if split[0][place : place + 1] != [part]}
    wanted = ""
    if len({len(parts) for parts in split}) == 1 and len(differing) == 1:
        (number,) = differing
        kept = [*split[0][:number], *split[0][number + 1 :]]
        if number == len(split[0]) - 1:
            stems = {re.sub(r"_?\d+$", "", parts[number]) for parts in split}
            kept.append(stems.pop() if len(stems) == 1 else "")
        wanted = ".".join(part for part in kept if part)
    others = set(taken) - set(names)
    choices = itertools.chain(
        (wanted, f"{names[0]}_stacked"), (f"{names[0]}_stacked_{number}" for number in itertools.count(2))
    )
    return next(
        name for name in choices
        if name and name not in taken and not any(other.startswith(f"{name}.") for other in others)
    )  # fmt: skip
