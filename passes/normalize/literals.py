"""Numbers that a program holds as tensors, in one spelling.

lift_fresh_copy(constant)  of `torch.tensor(0.0)`      =>     scalar_tensor(0.0)
new_zeros(x, [])    full([], 1)                        =>     scalar_tensor(0)    scalar_tensor(1)
"""

from __future__ import annotations

import torch
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.matcher import op_name
from moe_fx.program import Program
from moe_fx.rewrite import respell
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["spell_literals"]

COPIES = frozenset({"aten::lift_fresh_copy", "aten::lift_fresh", "aten::clone"})


def spell_literals(program: Program) -> None:
    """Rewrite what makes a tensor of no dimensions that holds a known number."""
    for node in program.graph.nodes:
        if op_name(node) == "aten::scalar_tensor" or shape_of(node) != ():
            continue
        number = filled_with(node)
        if op_name(node) in COPIES and isinstance(node.args[0], Node):
            number = program.literals.get(node.args[0])
        if number is not None and op_name(node) != "aten::to":
            value = tensor_of(node)
            kwargs = {"dtype": value.dtype, "device": value.device}
            respell(node, torch.ops.aten.scalar_tensor.default, (number,), kwargs)
