"""Whether each linear of a body takes one row of a routed row: lowerings sort and gather no others."""

from __future__ import annotations

from typing import Any

import torch
from moe_fx.passes.raising.region import Region
from torch.fx import Interpreter, Node

from moe_fx.matcher import Miss, op_name
from moe_fx.shapes import is_number, tensor_of

__all__ = ["several_rows_at_once"]

#: how many routed rows are tried
ROWS = 3


def several_rows_at_once(region: Region) -> Miss | None:
    """A linear with an expert's weight whose rows are ``[R, M, K]``; None if there is none, or that cannot be told."""
    sizes = [(node, 1, [ROWS]) for node in [region.tokens]] + [(node, 2, [ROWS]) for node in region.slots]
    sizes += [(node, 1, []) for node in region.params if isinstance(node, Node)]
    sizes += [(node, 0, []) for node in region.shared]
    found: list[Node] = []

    class Shapes(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if op_name(n) == "aten::linear" and self.env[n.args[0]].dim() > 2 and _is_own(n.args[1]):
                found.append(n)
            return result

    try:
        Shapes(region.body).run(*(_like(node, start, rows) for node, start, rows in sizes))
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None  # the check says more about it
    if not found:
        return None
    return Miss("one row of each token where it meets its expert's weight", "several", region.root)


def _like(node: Node, start: int, rows: list[int]) -> Any:
    if is_number(node):
        value = node.meta["val"]
        return value.node.hint if isinstance(value, torch.SymInt | torch.SymFloat) else value
    value = tensor_of(node)
    assert value is not None
    return torch.empty([*rows, *value.shape[start:]], dtype=value.dtype, device="meta")


def _is_own(weight: Any) -> bool:
    """Whether a weight of the body is made of an expert's parameter."""
    pending = [weight]
    while pending:
        node = pending.pop()
        if node.op == "placeholder" and str(node.target).startswith("p"):
            return True
        pending.extend(node.all_input_nodes)
    return False
