"""Equations of einsum: a letter for every dimension, and every letter of the result.

einsum("... h, e i h -> ... e i", [x, w])       =>      einsum("ABh,eih->ABei", [x, w])
einsum("th,hi", [x, w])                         =>      einsum("th,hi->it", [x, w])
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from moe_fx.passes.normalize.recompose import Spelling
from torch.fx import Node

from moe_fx.shapes import shape_of

__all__ = ["RULES"]

DOTS = "..."


def _einsum(node: Node, given: dict[str, Any]) -> Spelling | None:
    written, operands = str(given["equation"]), given["tensors"]
    inputs, arrow, out = written.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if given.get("path") is not None or len(letters) != len(operands) or "." in "".join(letters).replace(DOTS, ""):
        return None
    ranks = [len(shape_of(operand) or ()) - len(each.replace(DOTS, "")) for operand, each in _zip(operands, letters)]
    hidden = max([rank for rank, each in _zip(ranks, letters) if DOTS in each], default=0)
    free = [letter for letter in string.ascii_uppercase + string.ascii_lowercase if letter not in written]
    if hidden > len(free) or any(rank < 0 or (rank > 0 and DOTS not in each) for rank, each in _zip(ranks, letters)):
        return None
    dots = "".join(free[:hidden])
    if not arrow:  # what is named once, in the order of the alphabet
        named = "".join(letters).replace(DOTS, "")
        out = dots + "".join(sorted(letter for letter in set(named) if named.count(letter) == 1))
    # Operands with fewer dimensions lack the first ones.
    letters = [each.replace(DOTS, dots[hidden - rank :]) for rank, each in _zip(ranks, letters)]
    equation = f"{','.join(letters)}->{out.replace(DOTS, dots)}"
    return (torch.ops.aten.einsum.default, (equation, operands)) if equation != written else None


def _zip(one: list[Any], other: list[Any]) -> zip[Any]:
    return zip(one, other, strict=True)


RULES: dict[str, Callable[[Node, dict[str, Any]], Spelling | None]] = {"aten::einsum": _einsum}
