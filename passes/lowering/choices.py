"""A router's ``topk`` as one kernel: beside layers that are lowered fused, whatever the router does before and after.

values, ids = topk(scores, k)   =>   values, ids = moe_fx.top_k(scores, k)
"""

from __future__ import annotations

import torch
from moe_fx.passes.raising.ancestors import ancestors
from torch.fx import Node

from moe_fx.kernels.top_k import MOST_CHOSEN, MOST_SCORES, top_k
from moe_fx.kernels.triton_or_none import unavailable
from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import Emitter, FakeValues, erase_dead, replace
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["lower_choices"]

assert top_k is not None  # importing it registers the op


def lower_choices(ids: Node, values: FakeValues) -> None:
    """Write anew every ``topk`` that the ids of a layer come from, back to the router's matrix product."""
    for node in list(ancestors(ids)):
        if op_name(node) == "aten::topk" and _fits(node):
            given = arguments(node)
            chosen = Emitter(node.graph, node, values)(torch.ops.moe_fx.top_k.default, given["self"], given["k"])
            replace(node, chosen)
            erase_dead(node.graph, [node])


def _fits(node: Node) -> bool:
    given = arguments(node)
    scores, shape = tensor_of(given["self"]), shape_of(given["self"]) or ()
    return (
        unavailable(scores.device) is None
        and scores.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and isinstance(shape[-1], int)
        and shape[-1] <= MOST_SCORES
        and 0 < given["k"] <= MOST_CHOSEN
        and given["dim"] in (-1, len(shape) - 1)
        and given["largest"]
    )
