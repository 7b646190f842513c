"""``moe_fx::fused_experts`` and ``moe_fx::slot_linear``: expert layers and expert linears as Triton kernels.

    fused_experts    route (no kernel, for few slots) | up + activation | down + routing weight | sum over slots
    slot_linear      route | one projection: where the ops between projections are none of the known activations

No value is read on the host, and no row is moved: rows of intermediate results are slots, token-major. On a CPU the
ops are their references. Each op exists twice: through ``triton_op``, whose kernels a compiler embeds in its own code,
for a number of tokens that is fixed in the graph; and opaque (``*_any``), where the number decides at run time which
tiles are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from moe_fx.experts import expert_linear
from moe_fx.formats import Unquantized, WeightFormat, known_formats
from moe_fx.kernels.no_gradient import register_no_gradient
from moe_fx.kernels.triton_or_none import AVAILABLE, opaque

__all__ = ["ACTIVATIONS", "GATED", "fused_experts", "fused_experts_reference", "slot_linear", "slot_linear_reference"]

#: how gate and up lie: no gate; halves of one weight's rows, in either order; every other row; two weights
GATED = ("none", "gate_up", "up_gate", "interleaved", "two")

#: of the gate (and then times up), or of the up projection itself where nothing is gated
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def _form(name: str, transposed: bool, tensors: Sequence[torch.Tensor]) -> WeightFormat:
    if name == "none":
        return Unquantized(transposed)
    if name == "int4_weight_only":
        from moe_fx.formats import Int4WeightOnly

        return Int4WeightOnly(2 * tensors[0].shape[-1] // tensors[1].shape[-1], symmetric=len(tensors) == 2)
    return next(known() for known in known_formats() if known.name == name)


def _by_expert(ids: torch.Tensor, num_experts: int) -> Any:
    flat = ids.reshape(-1)
    return ((expert, torch.where(flat == expert)[0]) for expert in range(num_experts))


def slot_linear_reference(
    rows: torch.Tensor, ids: torch.Tensor, tensors: Sequence[torch.Tensor], form: str, transposed: bool
) -> torch.Tensor:
    """For each slot, its row times its expert's weights.

    Args:
        rows: ``[T, N]``, or ``[T*K, N]`` with a row for each slot.
        ids: ``[T, K]``. tensors: of the format called ``form``, stacked over experts.

    Returns:
        ``[T*K, M]``; undefined (here zero) where an id names no expert.
    """
    weight_format = _form(form, transposed, tensors)
    row_div = 1 if rows.shape[0] == ids.numel() else ids.shape[1]
    width = tensors[0].shape[2 if transposed else 1]
    out = rows.new_zeros(ids.numel(), width)
    for expert, slots in _by_expert(ids, tensors[0].shape[0]):
        out[slots] = expert_linear(rows[slots // row_div], [tensor[expert] for tensor in tensors], weight_format)
    return out


def _activated(inner: Sequence[torch.Tensor], gated: str, activation: str, alpha: float, limit: float) -> torch.Tensor:
    if gated == "none":
        return ACTIVATIONS[activation](inner[0])
    if gated == "two":
        gate, up = inner
    elif gated == "interleaved":
        gate, up = inner[0][..., 0::2], inner[0][..., 1::2]
    else:
        gate, up = inner[0].chunk(2, -1) if gated == "gate_up" else reversed(inner[0].chunk(2, -1))
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return ACTIVATIONS[activation](gate) * up


def fused_experts_reference(
    tokens: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor | None,
    up: Sequence[torch.Tensor], up_bias: Sequence[torch.Tensor], up_form: str, up_transposed: bool,
    down: Sequence[torch.Tensor], down_bias: torch.Tensor | None, down_form: str, down_transposed: bool,
    gated: str, activation: str, alpha: float, limit: float, slot_before: bool, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The whole layer.

        inner = activation(up(x))        y = down(inner) * slot        out[t] = sum over K of y

    Args:
        tokens: ``[T, H]``. ids: ``[T, K]``; one that names no expert contributes zero.
        slot: ``[T, K]``, the routing weight: of the result, or of the token's row if ``slot_before``.
        up: tensors of the format ``up_form``; those of the gate, then those of up, where ``gated`` is "two".
        up_bias: ``[E, ...]``: none, one, or one for each of two weights. down_bias: ``[E, H]``.
        gated: one of GATED. activation: one of ACTIVATIONS, or "clamped_swiglu": gate at most ``limit``, up within
            it, ``(up + 1) * gate * sigmoid(alpha * gate)``.

    Returns:
        ``[T, H]`` of ``out_dtype``: that of ``tokens``, or float32. What is summed has the dtype of ``tokens``.
    """
    half = len(up) // 2
    weights = [up[:half], up[half:]] if gated == "two" else [up]
    down_format = _form(down_form, down_transposed, down)
    top_k = ids.shape[1]
    out = tokens.new_zeros(ids.numel(), down[0].shape[2 if down_transposed else 1])
    for expert, slots in _by_expert(ids, down[0].shape[0]):
        rows = tokens[slots // top_k]
        weight = slot.reshape(-1)[slots].unsqueeze(-1) if slot is not None else None
        if weight is not None and slot_before:
            rows = (rows * weight).to(rows.dtype)
        inner = [
            expert_linear(rows, [tensor[expert] for tensor in some], _form(up_form, up_transposed, some))
            for some in weights
        ]
        inner = [each + bias[expert] for each, bias in zip(inner, up_bias, strict=True)] if up_bias else inner
        hidden = _activated(inner, gated, activation, alpha, limit)
        result = expert_linear(hidden, [tensor[expert] for tensor in down], down_format)
        result = result if down_bias is None else result + down_bias[expert]
        out[slots] = (result * weight if weight is not None and not slot_before else result).to(out.dtype)
    return out.unflatten(0, (ids.shape[0], top_k)).float().sum(1).to(out_dtype)


def _slot_linear(
    rows: torch.Tensor, ids: torch.Tensor, tensors: Sequence[torch.Tensor], form: str, transposed: bool
) -> torch.Tensor:
    from moe_fx.kernels.fused_launch import run_linear
    from moe_fx.kernels.fused_projection import Projection

    with torch.cuda.device_of(rows):
        return run_linear(rows, ids, tensors[0].shape[0], Projection(tensors, form, transposed))


def _fused_experts(
    tokens: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor | None,
    up: Sequence[torch.Tensor], up_bias: Sequence[torch.Tensor], up_form: str, up_transposed: bool,
    down: Sequence[torch.Tensor], down_bias: torch.Tensor | None, down_form: str, down_transposed: bool,
    gated: str, activation: str, alpha: float, limit: float, slot_before: bool, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    from moe_fx.kernels.fused_launch import run_experts
    from moe_fx.kernels.fused_projection import Projection

    first = Projection(up, up_form, up_transposed, up_bias, gated)
    second = Projection(down, down_form, down_transposed, () if down_bias is None else (down_bias,))
    with torch.cuda.device_of(tokens):
        return run_experts(
            tokens, ids, slot, first, second, down[0].shape[0], activation, alpha, limit, slot_before, out_dtype
        )


def _slot_linear_fake(
    rows: torch.Tensor, ids: torch.Tensor, tensors: Sequence[torch.Tensor], form: str, transposed: bool
) -> torch.Tensor:
    return rows.new_empty(ids.shape[0] * ids.shape[1], tensors[0].shape[2 if transposed else 1])


def _fused_experts_fake(
    tokens: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor | None,
    up: Sequence[torch.Tensor], up_bias: Sequence[torch.Tensor], up_form: str, up_transposed: bool,
    down: Sequence[torch.Tensor], down_bias: torch.Tensor | None, down_form: str, down_transposed: bool,
    gated: str, activation: str, alpha: float, limit: float, slot_before: bool, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return tokens.new_empty(tokens.shape[0], down[0].shape[2 if down_transposed else 1], dtype=out_dtype)


def _op(name: str, launch: Any, reference: Any, fake: Any, transparent: bool) -> Any:
    if not AVAILABLE:
        op = torch.library.custom_op(name, reference, mutates_args=())
    else:
        schema = torch.library.infer_schema(launch, mutates_args=())
        register = torch.library.triton_op if transparent else torch.library.custom_op
        op = register(name, launch if transparent else opaque()(launch), mutates_args=(), schema=schema)
        op.register_kernel("cpu")(reference)
    op.register_fake(fake)
    register_no_gradient(op)
    return op


fused_experts = _op("moe_fx::fused_experts", _fused_experts, fused_experts_reference, _fused_experts_fake, True)
slot_linear = _op("moe_fx::slot_linear", _slot_linear, slot_linear_reference, _slot_linear_fake, True)
_op("moe_fx::fused_experts_any", _fused_experts, fused_experts_reference, _fused_experts_fake, False)
_op("moe_fx::slot_linear_any", _slot_linear, slot_linear_reference, _slot_linear_fake, False)
