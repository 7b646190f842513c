"""Values for the numeric check that belong together: of what the layer reads, and of what the original made that of."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import Node

from moe_fx.check_inputs import Sizes, random_value, windows
from moe_fx.matcher import op_name
from moe_fx.rewrite import EXPERTS_FIRST
from moe_fx.shapes import shape_of

__all__ = ["random_parameters", "with_source"]


def random_parameters(params: Sequence[Node], count: int, generator: torch.Generator) -> dict[Node, Any]:
    """Of each parameter of the experts, and of what it was stacked, shortened or moved from."""
    env: dict[Node, Any] = {}
    for node in params:
        env[node] = _tied(windows(node, generator), _parts(node))
        env.update(zip(_parts(node), env[node], strict=False))
        if _is_shortened(node):
            # What it holds for experts of no layer is not read; if it is, it shows.
            longer = _source(node)
            beyond = shape_of(longer)[0] - count
            env[longer] = torch.cat([env[node], env[node].new_full((beyond, *env[node].shape[1:]), math.nan)])
        env.update(_moved_back(node, env[node]))
    return env


def with_source(
    view: Node, value: torch.Tensor, ids: torch.Tensor, sizes: Sizes, not_negative: Collection[Node],
    generator: torch.Generator,
) -> dict[Node, torch.Tensor]:  # fmt: skip
    """Of an operand that is a view of what the original reads, and of that: a table, a number for each token, rows."""
    source = _source(view)
    if op_name(view) == "aten::gather":
        # A table holds nothing for the experts that a token was not routed to.
        table = random_value(source, sizes, generator)
        table = table.clamp_min(0) if source in not_negative else table
        table = torch.zeros_like(table).scatter(-1, ids, table.gather(-1, ids))
        return {source: table, view: table.gather(-1, ids)}
    if op_name(view) == "aten::expand":
        number = value[:, :1].clone()
        return {source: number, view: number.expand_as(value)}
    return {source: value.reshape(sizes.evaluate(source.meta["val"].shape))}


def _source(view: Node) -> Node:
    source = view.args[0]
    assert isinstance(source, Node)
    return source


def _parts(param: Node) -> list[Node]:
    """What a parameter was stacked of."""
    parts: Any = param.args[0] if op_name(param) == "aten::stack" else []
    return list(parts)


def _is_shortened(param: Node) -> bool:
    """Whether a parameter is the first part of what the model holds."""
    return op_name(param) == "aten::slice" and tuple(param.args[1:3]) == (0, 0)


def _moved_back(param: Node, value: Any) -> list[tuple[Node, Any]]:
    """What a parameter was made of by putting its experts first, and their values given that of the parameter."""
    found = []
    while EXPERTS_FIRST in param.meta:
        source, argument = _source(param), param.args[1]
        if value is not None and op_name(param) == "aten::permute":
            value = value.permute(sorted(range(len(argument)), key=argument.__getitem__))
        elif value is not None:
            value = value.reshape(shape_of(source))
        found.append((source, value))
        param = source
    return found


def _tied(stack: torch.Tensor, parts: Sequence[Node]) -> torch.Tensor:
    """Random parameters that are the same for experts of which the model holds one in several places."""
    first = [parts.index(part) for part in parts]
    return stack if first == list(range(len(parts))) else stack[first]
