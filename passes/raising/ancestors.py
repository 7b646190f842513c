"""What a value is computed from, as far as that is its token's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch.fx import Node

from moe_fx.matcher import op_name

__all__ = ["MIXING", "ancestors"]

#: where one token's features are mixed: what lies behind is no longer the router's doing
MIXING = frozenset({"aten::linear", "aten::mm", "aten::addmm", "aten::matmul", "aten::bmm"})


def ancestors(node: Node, limit: int = 200, through: Collection[str] = ()) -> Iterator[Node]:
    """What a value is computed from, up to and including matrix products (but those named in ``through``)."""
    pending = [node]
    seen: set[Node] = set()
    while pending and len(seen) < limit:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if (op_name(current) not in MIXING or op_name(current) in through) and current.op == "call_function":
            pending.extend(current.all_input_nodes)
