"""The one equation, as a graph node.

    y[t] = sum over k < K of  body(x[t], s[t, k]; P[e]),   e = ids[t, k]

`experts` is an ordinary function: a node that calls it is the canonical form of an MoE layer, and calling it is
the plain, slow and obviously right reference of every lowering. It exists only between raise and lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moe_fx.formats import WeightFormat

__all__ = ["expert_linear", "experts", "per_row"]


def experts(
    tokens: torch.Tensor,
    ids: torch.Tensor,
    slots: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor | float],
    body: GraphModule,
) -> torch.Tensor:
    """Apply to every token the experts it was routed to, and sum.

    Args:
        tokens: ``[T, ...]`` token rows.
        ids: ``[T, K]`` int64, the experts of each token; an id outside ``0..E-1`` contributes zero.
        slots: values ``[T, K, ...]`` that travel with a routed slot, such as the routing weight.
        params: per-expert parameters ``[E, ...]``.
        shared: operands of the body, tensors or numbers, that are the same for every expert.
        body: one expert: ``body(x [R, ...], *slots [R, ...], *params [...], *shared) -> [R, ...]``, row-local:
            row i of the result depends on row i of the rows given only.

    Returns:
        ``[T, ...]`` in the dtype of the body's output.
    """
    total = None
    for expert in range(params[0].shape[0]):
        token, slot = torch.where(ids == expert)
        rows = body(tokens[token], *(s[token, slot] for s in slots), *(param[expert] for param in params), *shared)
        if total is None:
            total = rows.new_zeros(tokens.shape[0], ids.shape[1], *rows.shape[1:])
        total[token, slot] = rows
    assert total is not None
    return total.sum(1)


def expert_linear(rows: torch.Tensor, tensors: Sequence[torch.Tensor], weight_format: WeightFormat) -> torch.Tensor:
    """``rows [R, K]`` times one expert's weight ``[N, K]``, stored in ``weight_format``: ``[R, N]``."""
    return weight_format.linear(rows, *tensors)


def per_row(param: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """One expert's parameter ``[...]``, such as a bias, seen by each of the rows ``[R, ...]``: ``[R, ...]``."""
    return param.expand(rows.shape[0], *param.shape)


def body_of(node: Node) -> GraphModule:
    """The body of an ``experts`` node."""
    body = node.args[5]
    assert isinstance(body, Node)
    owner = node.graph.owning_module
    assert owner is not None
    module: Any = owner.get_submodule(str(body.target))
    assert isinstance(module, GraphModule)
    return module
