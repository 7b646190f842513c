"""``moe_fx::kept``: a weight that the compiler must keep as it is stored.

With freezing, Inductor computes whatever depends on constants alone, and so would widen quantized weights once and for
all. What reads a weight through this op is computed at run time, from the stored bytes. Compiled by Inductor the op is
nothing at all; eagerly it is a copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["ON_TRACE", "kept"]

#: called when the op is traced: the moment to tell a compiler what it means
ON_TRACE: list[Callable[[], None]] = []


@torch.library.custom_op("moe_fx::kept", mutates_args=())
def kept(weight: torch.Tensor) -> torch.Tensor:
    """The same values."""
    return weight.clone()


@kept.register_fake
def _(weight: torch.Tensor) -> torch.Tensor:
    for tell in ON_TRACE:
        tell()
    return torch.empty_like(weight)
