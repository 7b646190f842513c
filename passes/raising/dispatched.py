"""Rows dispatched where their routing weight is not zero: a test that changes nothing if the weight counts at the end.

dispatch = combine.bool()            # body(x * (s != 0)) * s    =>    body(x) * s
"""

from __future__ import annotations

import torch
from moe_fx.passes.raising.tables import counts_zero
from moe_fx.passes.raising.writer import Writer
from torch.fx import Node

from moe_fx.matcher import Match, match
from moe_fx.pattern import ANY, Var, aten, either, optional
from moe_fx.shapes import tensor_of

__all__ = ["drop_tests"]

weight = optional(lambda each: aten.reshape(each, ANY), Var("weight"))
test = either(aten.to(weight, torch.bool), aten.ne(weight, 0))
#: rows where a weight is not zero, and zeros elsewhere
DISPATCHED = aten.mul(Var("rows"), optional(lambda each: aten.reshape(each, ANY), aten.to(test, Var("dtype"))))


def drop_tests(body: Writer, output: Node) -> None:
    """Drop tests from a body whose output is zero wherever the weight is without them too."""
    rows = {inner: tensor_of(outer) for outer, inner in body.captured["x"].items()}
    for node in list(body.graph.nodes):
        found = match(DISPATCHED, node)
        if not isinstance(found, Match) or found["weight"] not in body.captured["s"].values() or node is output:
            continue
        value = rows.get(found["rows"])
        if value is None or value.dtype != found["dtype"]:
            continue
        before = {reader: (reader.args, reader.kwargs) for reader in node.users}
        node.replace_all_uses_with(found["rows"])
        if not counts_zero(output, [found["weight"]]):
            for reader, (args, kwargs) in before.items():
                reader.args, reader.kwargs = args, kwargs
