"""What the numeric check runs a layer on: numbers for symbolic sizes, random operands, and random routing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moe_fx.shapes import is_number, shape_of

__all__ = ["Routing", "Sizes", "random_ids", "random_value", "windows"]


#: how far apart experts may lie in the memory of their windows
PRIMES = (7, 11, 13, 17, 19, 23)


@dataclass(frozen=True)
class Routing:
    """What must be true of the random routing, because it is of the original."""

    num_experts: int
    in_range: bool
    distinct: bool


class Sizes:
    """Numbers for symbolic sizes; to ``shrink`` a large static token count, a smaller one."""

    def __init__(self, ids: Node, num_experts: int, wanted: int, shrink: bool) -> None:
        # Not of the value itself: a count that is fixed may still be written as a symbol.
        total, top_k = shape_of(ids) or ()
        assert isinstance(top_k, int)
        self.symbols: dict[Any, int] = {}
        self.rows: dict[int, int] = {}
        self.num_experts = num_experts
        if isinstance(total, int):
            if total > 4 * wanted and shrink:
                self.rows = {total * many: wanted * many for many in (num_experts, top_k, 1)}
        else:
            # The first symbol makes up the count, all others are 2: of 1, no exchange of dimensions would show.
            free = sorted(total.node.expr.free_symbols, key=str)
            self.symbols = {symbol: 2 if place else 1 for place, symbol in enumerate(free)}
            unit = int(total.node.expr.subs(self.symbols))
            self.symbols[free[0]] = max(min(2, len(free)), wanted // max(1, unit))

    def evaluate(self, value: Any) -> Any:
        """A size, or any nest of sizes and other literals, with its numbers filled in."""
        if isinstance(value, torch.SymInt):
            # Of tokens that a mask chose, the sizes of what it chose them from tell nothing.
            others = dict.fromkeys(value.node.expr.free_symbols - self.symbols.keys(), 3)
            return int(value.node.expr.subs({**self.symbols, **others}))
        if isinstance(value, torch.Size | tuple | list):
            return (
                type(value)(self.evaluate(element) for element in value)
                if not isinstance(value, torch.Size)
                else tuple(self.evaluate(element) for element in value)
            )
        return value

    def leading(self, shape: Any) -> Any:
        """A shape whose dimension 0, or the one behind the experts, may be a static number of rows."""
        shape = list(self.evaluate(shape))
        if shape and shape[0] in self.rows:
            shape[0] = self.rows[shape[0]]
        elif len(shape) > 1 and shape[0] == self.num_experts and shape[1] in self.rows:
            shape[1] = self.rows[shape[1]]
        return shape


def random_value(node: Node, sizes: Sizes, generator: torch.Generator) -> Any:
    value = node.meta["val"]
    if is_number(node):
        # A float's own value keeps limits and factors what they are in the model.
        return value.node.hint if isinstance(value, torch.SymFloat) else sizes.evaluate(value)
    shape = sizes.leading(value.shape)
    if value.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if not value.is_floating_point():
        return torch.randint(0, 3, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def windows(node: Node, generator: torch.Generator) -> torch.Tensor:
    """``[E, ...]`` random parameters in the memory of little more than one expert's."""
    count, *shape = shape_of(node)  # type: ignore[misc]
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    # As far apart as a parameter's own rows, experts exchanged with these would be the same.
    size, step = math.prod(shape), next(each for each in PRIMES if each not in strides)
    buffer = torch.randn(size + step * count, generator=generator, dtype=torch.float64)
    # Small values keep exponentials and squares in the activation well inside float64.
    return buffer.mul_(shape[-1] ** -0.5 if shape else 1.0).as_strided((count, *shape), (step, *strides))


def random_ids(shape: tuple[int, ...], routing: Routing, generator: torch.Generator) -> torch.Tensor:
    """Ids ``[T, K]`` with an idle expert; repeated within a token, and out of range, where that can be."""
    total, top_k = shape
    count = routing.num_experts
    candidates = max(count - 1, top_k)  # the last expert stays idle
    keys = torch.rand(total, candidates, generator=generator)
    ids = keys.topk(top_k, dim=-1).indices if candidates >= top_k else torch.zeros(total, top_k, dtype=torch.int64)
    if not routing.distinct:
        ids[0] = ids[0, 0]
    if not routing.in_range:
        ids[-1, -1] = count
    return ids
