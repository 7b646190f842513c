"""A chain of ``torch.where``, each of which takes one expert's result at the tokens that were routed to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import As, AtLeast, Var, aten
from moe_fx.shapes import tensor_of

__all__ = ["Selected", "is_where_chain", "starts_with_zeros", "where_chain"]

CHOICE = aten.eq(Var("ids"), As("expert", AtLeast(0)))
VIEWS = frozenset({"aten::unsqueeze", "aten::reshape", "aten::expand"})


@dataclass(frozen=True)
class Selected:
    """One step: ``where(mask, value, ...)``, the mask a view of ``ids == expert``."""

    step: Node
    mask: Node
    ids: Node
    expert: int
    value: Node


def where_chain(node: Node) -> tuple[list[Selected], Node]:
    """The steps of a chain that ends in ``node``, the first first, and what it starts from."""
    steps: list[Selected] = []
    while op_name(node) == "aten::where" and len(node.args) == 3:
        mask, value, base = node.args
        if not isinstance(mask, Node) or not isinstance(value, Node) or not isinstance(base, Node):
            break
        choice: Any = mask
        while op_name(choice) in VIEWS:
            choice = choice.args[0]
        found, ids = match(CHOICE, choice), steps[0].ids if steps else None
        if not isinstance(found, Match) or (ids is not None and found["ids"] is not ids):
            break
        numbers = tensor_of(found["ids"])
        if numbers is None or numbers.is_floating_point():
            break
        steps.insert(0, Selected(node, mask, found["ids"], found["expert"], value))
        node = base
    return steps, node


def is_where_chain(node: Node) -> bool:
    """Whether a value is the last of at least two steps by the same ids."""
    steps, _ = where_chain(node)
    if len(steps) < 2:
        return False
    readers = (where_chain(user)[0] for user in node.users if op_name(user) == "aten::where")
    return not any(node in {step.step for step in chain} for chain in readers)


def starts_with_zeros(base: Node) -> bool:
    """Whether what no step takes is zero."""
    if op_name(base) == "aten::scalar_tensor":
        return bool(arguments(base)["s"] == 0)
    return filled_with(base) == 0
