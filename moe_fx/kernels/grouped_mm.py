"""``moe_fx::grouped_mm``: one matrix per group of rows, for the dtypes in which ``aten::_grouped_mm`` does not compile.

``aten::_grouped_mm`` goes through Inductor in bf16 only (torch 2.11 to 2.13; in 2.15 in other dtypes too on a CPU,
where nothing is gained; not tried on a GPU). This op takes any float dtype and int8 weights, reads one expert's
matrix at a time, and is opaque to the compiler. It reads the group sizes on the host: free on CPU, a synchronisation
on a GPU. On a CPU with AMX, bfloat16 rows have a kernel of their own: grouped_amx.py.
"""

from __future__ import annotations

import torch

from moe_fx.kernels.grouped_amx import grouped_mm_amx, unfit

__all__ = ["grouped_mm"]


@torch.library.custom_op("moe_fx::grouped_mm", mutates_args=())
def grouped_mm(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Multiply each group of consecutive rows with its own matrix.

    Args:
        rows: ``[S, K]``, ordered by group.
        matrices: ``[E, K, N]``, of the dtype of ``rows`` or int8, of any strides.
        offsets: int32 ``[E]``, where each group ends; rows behind the last group give zero.

    Returns:
        ``[S, N]`` in the dtype of ``rows``.
    """
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    if unfit(rows, matrices.mT) is None:
        grouped_mm_amx(rows, matrices.mT, offsets, out)
        out[offsets[-1] :] = 0
        return out
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(rows[start:end], matrices[expert].to(rows.dtype), out=out[start:end])
            start = end
    out[start:] = 0
    return out


@grouped_mm.register_fake
def _(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[2])


@torch.library.custom_op("moe_fx::grouped_outer", mutates_args=())
def grouped_outer(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """``[E, K, N]``: for each group of rows, ``left[group].T @ right[group]``; the weight gradient of grouped_mm."""
    out = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(left[start:end].t(), right[start:end], out=out[expert])
            start = end
    return out


@grouped_outer.register_fake
def _(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    rows, matrices, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_rows = grouped_mm(grad, matrices.transpose(-2, -1), offsets) if ctx.needs_input_grad[0] else None
    grad_matrices = grouped_outer(rows, grad, offsets) if ctx.needs_input_grad[1] else None
    return grad_rows, grad_matrices, None


grouped_mm.register_autograd(_backward, setup_context=_setup)
