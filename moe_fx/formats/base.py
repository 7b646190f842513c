"""What a weight format is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "Unquantized", "WeightFormat", "format_from_record", "format_record", "known_formats", "slices_of_experts",
]  # fmt: skip

#: elements of a float32 working copy, 4 MiB
WORKING_SIZE = 2**20

_KNOWN: list[type[WeightFormat]] = []


def known_formats() -> Iterable[type[WeightFormat]]:
    """The quantized formats a user can name, in the order of their definition."""
    return tuple(_KNOWN)


class WeightFormat(ABC):
    """How one projection of every expert is stored. Frozen dataclasses, so that they compare and hash.

    A format says what its tensors mean; how a lowering computes with them is the business of the
    emitters in ``moe_fx.passes.lowering``.
    """

    #: what the report and the lowering table call it
    name: str

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("user_facing", True):
            _KNOWN.append(cls)

    @property
    @abstractmethod
    def tensor_names(self) -> tuple[str, ...]:
        """The suffixes under which the tensors appear in the state dict, in the order of ``quantize``."""

    def unfit(self, weight: torch.Tensor) -> str | None:
        """Why stacked weights ``[E, N, K]`` cannot be stored in this format, or None."""
        return None

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Quantize stacked weights ``[E, N, K]`` (any float dtype); every result is stacked over E too."""

    @abstractmethod
    def dequantize(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The weights ``[..., N, K]`` that the tensors (stacked, or of one expert) stand for."""

    def linear(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        """What an expert linear in this format means: ``rows [R, K]`` times one expert's weight, ``[R, N]``."""
        return F.linear(rows, self.dequantize(*tensors).to(rows.dtype))


@dataclass(frozen=True)
class Unquantized(WeightFormat):
    """The model's own weights: ``[N, K]`` per expert, or ``[K, N]`` if ``transposed``."""

    user_facing = False
    name = "none"
    tensor_names = ("",)
    transposed: bool = False

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (weight.transpose(-2, -1) if self.transposed else weight,)

    def dequantize(self, *tensors: torch.Tensor) -> torch.Tensor:
        (weight,) = tensors
        return weight.transpose(-2, -1) if self.transposed else weight


def slices_of_experts(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of dimension 0, few enough experts each that working copies stay small; one expert at least."""
    count = max(1, WORKING_SIZE // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], count):
        yield slice(start, start + count)


def format_record(form: WeightFormat) -> dict[str, Any]:
    """A format as data that JSON can hold: its class's name, and its options."""
    options = {each.name: getattr(form, each.name) for each in dataclasses.fields(form) if each.init}
    plain = {name: value for name, value in options.items() if isinstance(value, bool | int | float | str)}
    return {"format": type(form).__name__, **plain}


def format_from_record(record: dict[str, Any]) -> WeightFormat | None:
    """The format of a record; None if it is not one that a user can name."""
    options = {name: value for name, value in record.items() if name != "format"}
    for known in known_formats():
        if known.__name__ == record["format"]:
            return known(**options)
    return None
