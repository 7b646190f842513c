"""Sizes of a reshape to one line, row or column: its only wide dimension is named -1, as most authors do.

reshape(x, [T * K])        =>     reshape(x, [-1])
reshape(x, [E * T, 1])     =>     reshape(x, [-1, 1])

Decomposition tables write each size as it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from moe_fx.passes.normalize.recompose import Spelling
from torch.fx import Node

from moe_fx.shapes import Dim, known_equal, shape_of

__all__ = ["RULES", "only_wide"]

aten = torch.ops.aten


def only_wide(shape: Sequence[Dim]) -> list[int] | None:
    """A shape with its only dimension that is not of size 1 left open; None if there are several, or none."""
    wide = [place for place, size in enumerate(shape) if not known_equal(size, 1)]
    # Beside dimensions of size 1, -1 is how many elements there are, be there none.
    return [-1 if place in wide else 1 for place in range(len(shape))] if len(wide) == 1 else None


def _reshape(node: Node, given: dict[str, Any]) -> Spelling | None:
    sizes, written = only_wide(shape_of(node) or ()), given["shape"]
    if sizes is None or all(
        not isinstance(each, Node) and each == size for each, size in zip(written, sizes, strict=True)
    ):
        return None
    return aten.reshape.default, (given["self"], sizes)


RULES: dict[str, Callable[[Node, dict[str, Any]], Spelling | None]] = {"aten::reshape": _reshape}
