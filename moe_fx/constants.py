"""Tensors that hold one value throughout: what it is, whatever they were shaped after."""

from __future__ import annotations

from torch.fx import Node

from moe_fx.matcher import arguments, op_name

__all__ = ["filled_with"]

#: ops that make such tensors: the value, or the argument that holds it
_FILLS: dict[str, float | str] = {
    "aten::zeros": 0.0, "aten::zeros_like": 0.0, "aten::new_zeros": 0.0, "aten::ones": 1.0, "aten::ones_like": 1.0,
    "aten::new_ones": 1.0, "aten::full": "fill_value", "aten::full_like": "fill_value", "aten::new_full": "fill_value",
}  # fmt: skip


def filled_with(node: Node) -> float | None:
    """The one value of a tensor, or None if it is not known to have one."""
    value = _FILLS.get(op_name(node) or "")
    if isinstance(value, str):
        value = arguments(node)[value]
    return value if isinstance(value, int | float) else None
