"""A layer of one token in two kernels: see :mod:`moe_fx.kernels.triton_token`.

Tried and dropped: weights of one byte for more experts than one, quantized rows and int4, where the sums bound the
kernel and not memory (int8 and int4 take rows in digits, see triton_digits.py); and loading a step ahead, into
registers. Figures are in docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fx.kernels.fused_projection import Projection, operands
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
#: the same for weights [E, K, N]
EACH_TRANSPOSED, SUMMED_TRANSPOSED = TokenTile(32, 256, 4), TokenTile(32, 256, 8)


def takes_token(ids: torch.Tensor, projections: tuple[Projection, ...]) -> bool:
    """Whether these kernels are for a layer: one token, and weights of two bytes, or float8 weights of one expert."""
    tokens, top_k = ids.shape
    plain = all(each.kind == "plain" for each in projections)
    widened = top_k == 1 and all(each.kind in ("plain", "widened") and not each.digits for each in projections)
    return tokens == 1 and top_k <= max(SUMMED) and (plain or widened)


def _tile(projection: Projection, summed: bool, slots: int) -> TokenTile:
    if projection.transposed:
        return SUMMED_TRANSPOSED if summed else EACH_TRANSPOSED
    if not summed:
        return EACH
    return SUMMED[slots] if projection.kind == "plain" else SUMMED_BYTES


def token_product(
    rows: torch.Tensor, projection: Projection, ids: torch.Tensor, num_experts: int, row_div: int, *,
    summed: bool = False, dtype: torch.dtype | None = None, activation: str = "none", alpha: float = 0.0,
    limit: float = 0.0, slot: torch.Tensor | None = None, slot_before: bool = False,
) -> torch.Tensor:  # fmt: skip
    """For each slot, its row (``slot // row_div``) times its expert's weights, and the epilogue.

    Returns:
        ``[T*K, N]``; or ``[T, N]``, the sums over each token's slots, if ``summed``. Of ``dtype``, or that of ``rows``.
    """
    given = operands(projection, ids)
    inputs, size = rows.shape[1], given.weight.element_size()
    count, slots = ids.shape if summed else (ids.numel(), 1)
    padded = 1 << (slots - 1).bit_length()
    tile = _tile(projection, summed, padded)
    block_k = tile.block_bytes // size
    out = rows.new_empty((count, given.width), dtype=dtype or rows.dtype)
    overlapped(token_kernel)[(count * -(-given.width // tile.block_n),)](
        rows, given.weight, given.other, out, given.scale, given.other_scale, given.bias, given.other_bias,
        ids if slot is None else slot, ids,
        num_experts, given.width, inputs, row_div, rows.stride(0), given.weight.stride(0), given.weight.stride(1),
        given.weight_rows, given.gate_row, given.up_row,
        ALPHA=alpha, LIMIT=limit, SCALED=projection.kind == "widened", TRANSPOSED=projection.transposed,
        GATED="halves" if projection.gated in ("gate_up", "up_gate") else projection.gated, ACT=activation,
        SLOT=0 if slot is None else 1 if slot_before else 2, BIAS=bool(projection.bias),
        EVEN_N=given.width % tile.block_n == 0, EVEN_K=inputs % block_k == 0, ASM=not INTERPRETED, OVERLAP=overlaps(),
        SUM=summed, SLOTS=slots, SP=padded,
        BN=tile.block_n, BK=block_k, VEC=1 if projection.transposed else 16 // size, num_warps=tile.warps,
    )  # fmt: skip
    return out


def run_token(
    tokens: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor | None, up: Projection, down: Projection,
    num_experts: int, activation: str, alpha: float, limit: float, slot_before: bool, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """As :func:`moe_fx.kernels.fused_launch.run_experts`; right for any number of tokens."""
    inner = token_product(
        tokens, up, ids, num_experts, ids.shape[1], activation=activation, alpha=alpha, limit=limit,
        slot=slot if slot_before else None, slot_before=True,
    )  # fmt: skip
    return token_product(
        inner, down, ids, num_experts, 1, summed=True, dtype=out_dtype, slot=None if slot_before else slot
    )
