"""``moe_fx::no_gradient``: stands where the gradient of a fused op would be, and says that there is none when it runs.

With gradients enabled, compilers trace a backward graph of whatever they compile, whether or not it is ever run; so a
forward pass must not fail for want of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["register_no_gradient"]


@torch.library.custom_op("moe_fx::no_gradient", mutates_args=())
def no_gradient(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A gradient shaped as ``like``: none; see the module."""
    raise RuntimeError(
        "the fused expert kernels have no gradient: Config(experts='grouped_mm') can be trained, and inference is "
        "called under torch.no_grad()"
    )


@no_gradient.register_fake
def _(grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Remember which inputs are tensors, and keep them: the traced graph asks for their shapes."""
    ctx.places = []
    tensors: list[torch.Tensor] = []
    for given in inputs:
        some: Sequence[Any] = given if isinstance(given, list | tuple) else [given]
        floats = [isinstance(each, torch.Tensor) and each.dtype.is_floating_point for each in some]
        ctx.places.append((isinstance(given, list | tuple), floats))
        tensors += [each for each, is_float in zip(some, floats, strict=True) if is_float]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    tensors = iter(ctx.saved_tensors)
    grads: list[Any] = []
    for is_list, floats in ctx.places:
        some = [torch.ops.moe_fx.no_gradient(grad, next(tensors)) if is_float else None for is_float in floats]
        grads.append(some if is_list else some[0])
    return tuple(grads)


def register_no_gradient(op: Any) -> None:
    op.register_autograd(_backward, setup_context=_setup)
