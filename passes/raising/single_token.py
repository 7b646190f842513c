"""Programs of a single token, in which a dimension of tokens looks like any other of size 1.

What is read there all the same is the layer; where nothing is, the report says how to export for more to be found.
"""

from __future__ import annotations

import dataclasses
import math

from moe_fx.passes.raising.routing import CHOOSING
from torch.fx import Node

from moe_fx.matcher import Miss, op_name
from moe_fx.shapes import known_equal, shape_of, tensor_of

__all__ = ["chosen_for_one_token", "with_remedy"]

REMEDY = (
    "there is a single token, whose dimension looks like others of size 1: exported with two tokens, or with any "
    "number of them, the layer may be found"
)


def chosen_for_one_token(choice: Node) -> bool:
    """Whether a choice is made by the scores of one token, on every run of the program."""
    return known_equal(math.prod((shape_of(choice.args[0]) or (0, 0))[:-1]), 1)


def with_remedy(miss: Miss, root: Node) -> Miss:
    """A miss, and what to do about it where the experts nearest to ``root`` are chosen for a single token."""
    before = after = None
    passed = False
    for node in root.graph.nodes:
        passed |= node is root
        value = tensor_of(node.args[0]) if op_name(node) in CHOOSING and node.args else None
        if value is None or not value.is_floating_point():
            continue
        if not passed:
            before = node
        elif after is None:
            after = node
    choice = before if before is not None else after
    if choice is None or not chosen_for_one_token(choice):
        return miss
    return dataclasses.replace(miss, found=f"{miss.found}; {REMEDY}")
