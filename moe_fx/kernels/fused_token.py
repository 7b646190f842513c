"""A layer of few tokens in two kernels: see :mod:`moe_fx.kernels.triton_token`.

Integer weights are multiplied by rows in digits (:mod:`moe_fx.kernels.triton_blocks`): the first projection splits the
tokens as it reads them, and its results as it makes them. Tried and dropped: float8 weights of more experts than one
and quantized rows, where to widen them bounds the kernel and not memory; and loading a step ahead, into registers.
Figures are in docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fx.kernels.fused_projection import Projection, operands
from moe_fx.kernels.fused_tiles import reads_apart
from moe_fx.kernels.triton_blocks import BLOCK_INPUTS
from moe_fx.kernels.triton_or_none import INTERPRETED, overlapped, overlaps
from moe_fx.kernels.triton_token import token_kernel

__all__ = ["TokenTile", "run_token", "takes_token", "token_product"]


@dataclass(frozen=True)
class TokenTile:
    """``block_n`` output columns of each slot, and ``block_bytes`` of their weights along K, at a time."""

    block_n: int
    block_bytes: int
    warps: int


#: for a slot's own result, and for sums over slots, by how many (a power of two; of 16 and 32 not measured)
EACH = TokenTile(8, 512, 4)
SUMMED = {
    1: TokenTile(4, 1024, 4), 2: TokenTile(4, 1024, 4), 4: TokenTile(4, 512, 4), 8: TokenTile(4, 256, 4),
    16: TokenTile(2, 256, 4), 32: TokenTile(1, 256, 4),
}  # fmt: skip
SUMMED_BYTES = TokenTile(8, 1024, 4)
#: where those are many of int8, or few
MANY_SUMS, FEW_SUMS, FEW_COLUMNS = TokenTile(8, 256, 4), TokenTile(2, 256, 4), 4096
#: the same for weights [E, K, N]
EACH_TRANSPOSED, SUMMED_TRANSPOSED = TokenTile(32, 256, 4), TokenTile(32, 256, 8)
#: of a result that is split into digits: a multiple of their blocks
EACH_DIGITS = TokenTile(16, 512, 4)


#: up to how many tokens, where each slot reads its expert's weights for itself
MOST_TOKENS = 8


def takes_token(
    ids: torch.Tensor, num_experts: int, projections: tuple[Projection, ...], dtype: torch.dtype
) -> bool:  # fmt: skip
    """Whether these kernels are for a layer: for few tokens of ``dtype`` that hardly share an expert."""
    tokens, top_k = ids.shape
    if tokens > MOST_TOKENS or top_k > max(SUMMED):
        return False
    kinds = {each.kind for each in projections}
    integers = all(_in_digits(each) for each in projections) and dtype.itemsize == 2
    if not integers and kinds != {"plain"}:
        return tokens == top_k == 1 and kinds <= {"plain", "widened"} and not any(each.digits for each in projections)
    stored = sum(tensor.numel() * tensor.element_size() for each in projections for tensor in each.tensors)
    return reads_apart("int4" if "int4" in kinds else "plain", stored / num_experts, ids.numel(), num_experts)


def _in_digits(projection: Projection) -> bool:
    """Whether rows are multiplied in digits, block by block; weights are then read by sixteen bytes."""
    inputs = projection.tensors[0].shape[-1] * (2 if projection.kind == "int4" else 1)
    aligned = all(each[0].storage_offset() % 16 == 0 for each in projection.weights())
    return projection.digits and inputs % BLOCK_INPUTS == 0 and aligned


def _tile(projection: Projection, summed: bool, slots: int, split: bool, columns: int) -> TokenTile:
    if projection.transposed:
        return SUMMED_TRANSPOSED if summed else EACH_TRANSPOSED
    if not summed:
        return EACH_DIGITS if split else EACH
    if slots == 8 and projection.form == "int8_weight_only":
        return MANY_SUMS if columns > FEW_COLUMNS else FEW_SUMS
    return SUMMED[slots] if projection.kind == "plain" or slots > 1 else SUMMED_BYTES


def token_product(
    rows: torch.Tensor, scales: torch.Tensor | None, projection: Projection, ids: torch.Tensor, num_experts: int,
    row_div: int, dtype: torch.dtype, *, summed: bool = False, split: Projection | None = None,
    activation: str = "none", alpha: float = 0.0, limit: float = 0.0, slot: torch.Tensor | None = None,
    slot_before: bool = False, tile: TokenTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """For each slot, its row (``slot // row_div``) times its expert's weights, and the epilogue.

    Args:
        scales: where rows are in digits (see split_blocks), those of their blocks.
        split: the projection for which the result is to be such rows, made of ``dtype``.

    Returns:
        ``[T*K, N]`` of ``dtype``, or ``[T, N]``, the sums over each token's slots, if ``summed``; and scales, if split.
    """
    given = operands(projection, ids)
    digits, int4 = _in_digits(projection), projection.kind == "int4"
    count, slots = ids.shape if summed else (ids.numel(), 1)
    padded = 1 << (slots - 1).bit_length()
    tile = tile or _tile(projection, summed, padded, split is not None, count * given.width)
    size = 4 if digits else given.weight.element_size()
    block_k = tile.block_bytes // size
    inputs = given.weight.shape[2 - projection.transposed] * (2 if int4 else 1)
    length = inputs // (8 if int4 else 4) if digits else inputs
    out_scales = None
    if split is not None:
        out = rows.new_empty((count, 2 * given.width), dtype=torch.int8)
        out_scales = rows.new_empty((count, given.width // BLOCK_INPUTS), dtype=torch.float32)
    else:
        out = rows.new_empty((count, given.width), dtype=dtype)
    overlapped(token_kernel)[(count * -(-given.width // tile.block_n),)](
        rows, given.weight, given.other, out, ids if scales is None else scales, ids if split is None else out_scales,
        given.scale, given.other_scale, given.bias, given.other_bias, ids if slot is None else slot, ids,
        num_experts, given.width, inputs, row_div, rows.stride(0), given.weight.stride(0), given.weight.stride(1),
        given.weight_rows, given.gate_row, given.up_row,
        ALPHA=alpha, LIMIT=limit, SCALED=projection.kind == "widened", TRANSPOSED=projection.transposed,
        GATED="halves" if projection.gated in ("gate_up", "up_gate") else projection.gated, ACT=activation,
        SLOT=0 if slot is None else 1 if slot_before else 2, BIAS=bool(projection.bias),
        EVEN_N=given.width % tile.block_n == 0, EVEN_K=length % block_k == 0, ASM=not INTERPRETED, OVERLAP=overlaps(),
        SUM=summed, SLOTS=slots, SP=padded, BN=tile.block_n, BK=block_k, VEC=1 if projection.transposed else 16 // size,
        DIGITS="no" if not digits else "whole" if scales is None else "split",
        GROUP=inputs // given.scale.shape[-1] if int4 else 0, SPLIT_OUT=split is not None,
        PAIRS_APART=split is not None and split.kind == "int4", HALF=dtype is torch.float16, num_warps=tile.warps,
    )  # fmt: skip
    return out, out_scales


def run_token(
    tokens: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor | None, up: Projection, down: Projection,
    num_experts: int, activation: str, alpha: float, limit: float, slot_before: bool, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """As :func:`moe_fx.kernels.fused_launch.run_experts`; right for any number of tokens."""
    inner, scales = token_product(
        tokens, None, up, ids, num_experts, ids.shape[1], tokens.dtype, split=down if _in_digits(down) else None,
        activation=activation,
        alpha=alpha, limit=limit, slot=slot if slot_before else None, slot_before=True,
    )  # fmt: skip
    return token_product(
        inner, scales, down, ids, num_experts, 1, out_dtype, summed=True, slot=None if slot_before else slot
    )[0]
