"""``moe_fx::each_expert``: the number of an expert, in a loop that is traced for all of them at once.

It stands in a program only between the trace of ``moe_fx.export`` and the raising of the loop; it cannot be run.
"""

from __future__ import annotations

import torch

__all__ = ["each_expert"]


@torch.library.custom_op("moe_fx::each_expert", mutates_args=())
def each_expert(hits: torch.Tensor, step: int, count: int) -> int:
    """Any of the first ``count`` places at which ``hits`` bool ``[E]`` is true; ``step`` tells one from another."""
    raise RuntimeError("moe_fx::each_expert stands for all experts: the loop around it must be raised before it runs")


@each_expert.register_fake
def _(hits: torch.Tensor, step: int, count: int) -> int:
    return torch.library.get_ctx().new_dynamic_size(min=0)  # type: ignore[return-value]  # an int to be
