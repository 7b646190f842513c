"""From tensors to kernel launches: what :mod:`moe_fx.kernels.fused_experts` runs on a GPU.

Every choice here (tiles, routing, widening) is about speed; it depends on sizes, which the host knows, never on values.
"""

from __future__ import annotations

import torch

from moe_fx.kernels.fused_large import run_large, run_linear_large, takes_descriptors
from moe_fx.kernels.fused_projection import Projection, Routing, operands, output_width, widened
from moe_fx.kernels.fused_tiles import FEW_SLOTS, Product, Tile, parts_of, tile_of, widens_first
from moe_fx.kernels.fused_token import run_token, takes_token
from moe_fx.kernels.triton_digits import split_digits
from moe_fx.kernels.triton_gemm import expert_gemm_kernel
from moe_fx.kernels.triton_or_none import INTERPRETED, overlapped, overlaps
from moe_fx.kernels.triton_rows import quantize_rows, split_pairs, sum_slots

__all__ = ["expert_gemm", "run_experts", "run_linear"]

#: rows per tile at which it pays to leave int4 weights shifted (see int4_step): beside wider matrix instructions, the
#: sums cost more than the subtractions
SHIFTED_BLOCK = 8


def expert_gemm(
    rows: torch.Tensor, projection: Projection, routing: Routing, row_div: int, *, activation: str = "none",
    alpha: float = 0.0, limit: float = 0.0, slot: torch.Tensor | None = None, slot_before: bool = False,
    sums: torch.Tensor | None = None, result_sums: int | None = None, parted: bool = False, early: bool = False,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``[S, N]``: for each slot, its row (``slot // row_div``) times its expert's weights, and the epilogue.

    Args:
        sums: int4: the even columns of ``rows`` come first, and these are their sums, as split_pairs gives them.
        result_sums: the result is to be such rows; with sums over so many columns, unless 0.
        parted: it may be float32 ``[S * P, N]`` instead, P terms of each slot's result.
        early: the kernel before this call makes ``rows`` and ``sums`` only.

    Returns:
        the result, and its sums (``ids`` where there are none).
    """
    ids, dtype, kind = routing.ids, rows.dtype, projection.kind
    given = operands(projection, ids)
    inputs = rows.shape[1]
    if tile is None:
        stored = "columns" if projection.transposed else "plain" if given.weight.dtype is dtype else kind
        product = Product(stored, projection.gated != "none", routing.block, given.width, inputs)
        tile = tile_of(product, min(ids.numel(), routing.num_experts))
    left, row_scale, sums = _left(rows, projection, routing, sums)
    form = "dynamic" if routing.digits and kind == "widened" else kind
    block_k, group_bytes, unroll, shifted, length = tile.block_k, 1, tile.unroll, False, inputs
    if kind == "int4":
        group_bytes, length = inputs // given.scale.shape[-1] // 2, inputs // 2
        while group_bytes % block_k:
            block_k //= 2
        while length % (block_k * unroll):
            unroll //= 2
        shifted = sums is not ids and sums.shape[1] > 1 and routing.block == SHIFTED_BLOCK and group_bytes == block_k
    columns, parts = -(-given.width // tile.block_n), 1
    if parted and routing.alone and not projection.bias:
        parts = parts_of(ids.numel() * columns, -(-length // (block_k * unroll)))
    out = rows.new_empty((ids.numel() * parts, given.width), dtype=dtype if parts == 1 else torch.float32)
    out_sums = ids
    block = result_sums if result_sums and tile.block_n % result_sums == 0 else 0
    if result_sums is not None:
        out_sums = rows.new_empty((ids.numel(), given.width // block) if block else (1, 1), dtype=torch.float32)
    if routing.tiles is None:
        row_tiles, slots, tile_expert, tile_group, tile_count = ids.numel(), ids, ids, ids, ids
    else:
        slots, tile_expert, tile_group, tile_count = routing.tiles
        row_tiles = slots.shape[0]
    overlapped(expert_gemm_kernel)[(row_tiles * columns * parts,)](
        left, given.weight, given.other, out, row_scale, given.scale, given.other_scale, given.zero, given.other_zero,
        given.bias, given.other_bias, ids if slot is None else slot,
        sums if shifted else ids, out_sums, ids, slots, tile_expert, tile_group, tile_count,
        ids.numel(), routing.num_experts, given.width, inputs, row_div, left.stride(0), given.weight.stride(0),
        given.weight.stride(1), given.weight_rows, given.gate_row, given.up_row,
        ALPHA=alpha, LIMIT=limit, FMT=form, ZERO=given.zero is not ids, TRANSPOSED=projection.transposed,
        GATED="halves" if projection.gated in ("gate_up", "up_gate") else projection.gated, ACT=activation,
        SLOT=0 if slot is None else 1 if slot_before else 2, BIAS=bool(projection.bias),
        PAIRS_APART=result_sums is not None, GROUP_BYTES=group_bytes, UNROLL=unroll, SHIFTED=shifted, SUM_BLOCK=block,
        EVEN_N=given.width % tile.block_n == 0, EVEN_K=inputs % block_k == 0, ASM=not INTERPRETED, OVERLAP=overlaps(),
        ROUTED="tiles" if routing.tiles is not None else "alone" if routing.alone else "leader", SP=FEW_SLOTS,
        DIGITS=routing.digits, SPLIT=parts, EARLY=overlaps() and (early or left is not rows),
        BM=max(routing.block, 2), BN=tile.block_n, BK=block_k, GROUP_M=tile.group_m, SWAP=tile.swap,
        WAIT=tile.swap and form in ("widened", "int4") and routing.block >= 16 and tile.warps % 4 == 0,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, out_sums


def _left(
    rows: torch.Tensor, projection: Projection, routing: Routing, sums: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as they are multiplied, their scale, and their sums; ids where there is none."""
    ids, kind = routing.ids, projection.kind
    if routing.digits:
        return *split_digits(rows, pairs_apart=kind == "int4"), ids
    if kind == "dynamic":
        return *quantize_rows(rows, projection.tensors[0].dtype), ids
    if kind == "int4" and sums is None:
        rows, sums = split_pairs(rows, sum_block(projection, rows.dtype, rows.shape[1], routing))
    return rows, ids, ids if sums is None else sums


def sum_block(projection: Projection, dtype: torch.dtype, inputs: int, routing: Routing) -> int:
    """Over how many columns, of rows with even and odd apart, an int4 projection wants sums; 0 if over none."""
    group_bytes = inputs // projection.tensors[1].shape[-1] // 2
    wanted = dtype is torch.bfloat16 and routing.block == SHIFTED_BLOCK and group_bytes & (group_bytes - 1) == 0
    return group_bytes if wanted else 0


def run_linear(rows: torch.Tensor, ids: torch.Tensor, num_experts: int, projection: Projection) -> torch.Tensor:
    """What ``moe_fx::slot_linear`` does."""
    if ids.numel() == 0:
        return rows.new_empty((0, output_width(projection)))
    large = takes_descriptors(rows, (projection,), ids.numel(), num_experts)
    routing = Routing.of(ids.contiguous(), num_experts, (projection,), rows.dtype, placed=large)
    row_div = 1 if rows.shape[0] == ids.numel() else ids.shape[1]
    if large:
        return run_linear_large(_dense(rows), projection, routing, row_div)
    if widens_first(projection.kind, ids.numel(), num_experts):
        projection = widened(projection, rows.dtype)
    return expert_gemm(_dense(rows), projection, routing, row_div)[0]


def run_experts(
    tokens: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor | None, up: Projection, down: Projection,
    num_experts: int, activation: str, alpha: float, limit: float, slot_before: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """What ``moe_fx::fused_experts`` does."""
    num_slots = ids.numel()
    if num_slots == 0:
        return tokens.new_zeros((ids.shape[0], output_width(down)), dtype=out_dtype)
    tokens, ids = _dense(tokens), ids.contiguous()
    slot = slot.contiguous() if slot is not None else None
    if takes_token(ids, num_experts, (up, down), tokens.dtype):
        return run_token(tokens, ids, slot, up, down, num_experts, activation, alpha, limit, slot_before, out_dtype)
    large = takes_descriptors(tokens, (up, down), num_slots, num_experts)
    routing = Routing.of(ids, num_experts, (up, down), tokens.dtype, placed=large)
    if large:
        return run_large(tokens, slot, up, down, routing, activation, alpha, limit, slot_before, out_dtype)
    if widens_first(up.kind, num_slots, num_experts):
        up = widened(up, tokens.dtype)
    pairs = None
    if down.kind == "int4" and not routing.digits and not widens_first("int4", num_slots, num_experts):
        pairs = sum_block(down, tokens.dtype, operands(up, ids).width, routing)
    inner, sums = expert_gemm(
        tokens, up, routing, ids.shape[1], activation=activation, alpha=alpha, limit=limit,
        slot=slot if slot_before else None, slot_before=True, result_sums=pairs,
    )  # fmt: skip
    del up  # what was widened is freed
    if widens_first(down.kind, num_slots, num_experts):
        down = widened(down, tokens.dtype)
    rows, _ = expert_gemm(
        inner, down, routing, 1, slot=None if slot_before else slot, sums=None if pairs is None else sums,
        parted=True, early=True,
    )  # fmt: skip
    return sum_slots(rows, ids, num_experts, out_dtype)


def _dense(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()
