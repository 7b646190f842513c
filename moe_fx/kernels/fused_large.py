"""Launches for many rows per expert: tensor descriptors, rows sorted into tiles or gathered, tiles of 128 rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_fx.kernels.fused_projection import Projection, Routing, in_registers, operands, output_width, widened
from moe_fx.kernels.fused_tiles import SORT_ABOVE, LargeTile, Product, large_tile_of, loads_by_descriptor, widens_first
from moe_fx.kernels.triton_large import large_gemm_kernel
from moe_fx.kernels.triton_or_none import INTERPRETED, is_opaque, wrapped
from moe_fx.kernels.triton_rows import quantize_rows, sort_rows, split_pairs, sum_slots

__all__ = ["as_read", "large_gemm", "rows_for", "run_large", "run_linear_large", "takes_descriptors"]


def takes_descriptors(
    tokens: torch.Tensor, projections: Sequence[Projection], num_slots: int, num_experts: int
) -> bool:
    """Whether descriptors can be made and pay: rows are whole tiles along K, and lie at multiples of 16 bytes."""
    dtype = tokens.dtype
    return is_opaque() and all(
        each.fits_descriptors
        and loads_by_descriptor(each.kind, num_slots, num_experts, in_registers(each, dtype))
        and all(tensors[0].data_ptr() % 16 == 0 for tensors in each.weights())
        for each in projections
    )


def _descriptor(matrix: torch.Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix.reshape(-1, matrix.shape[-1]), [rows, columns])


def multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def large_gemm(
    rows: torch.Tensor, row_scale: torch.Tensor, projection: Projection, routing: Routing, row_div: int, *,
    gather: bool, sorted_rows: str, dtype: torch.dtype, activation: str = "none", alpha: float = 0.0,
    limit: float = 0.0, slot: torch.Tensor | None = None, slot_before: bool = False, pairs_apart: bool = False,
    tile: LargeTile | None = None,
) -> torch.Tensor:  # fmt: skip
    """For each slot, its row times its expert's weights: see :func:`moe_fx.kernels.triton_large.large_gemm_kernel`.

    Args:
        rows: ``[*, K]``, gathered by the kernel, or ``[B * BM, K]`` in the order of the tiles.
        row_scale: float32, of the rows before they were sorted; in their order if ``sorted_rows`` is "in".
        sorted_rows: "out": the result is ``[B * BM, N]`` in the order of the tiles; otherwise ``[S, N]``.
        pairs_apart: the result has its even columns first, as rows have that are multiplied by int4 weights.
    """
    assert routing.tiles is not None
    slots, tile_expert, tile_group, tile_count = routing.tiles
    given = operands(projection, routing.ids)
    two, block_m, block_k = given.two, routing.block, 128 // rows.element_size()
    wide = _stored(projection, rows)
    kind = projection.kind if wide or projection.kind == "dynamic" else "plain"
    if tile is None:
        product = Product(kind, two, block_m, given.width, rows.shape[1])
        tile = large_tile_of(product, routing.ids.numel() / routing.num_experts)
    weight = _descriptor(given.weight, tile.block_n, block_k)
    other = weight if given.other is given.weight else _descriptor(given.other, tile.block_n, block_k)
    left = rows if gather else _descriptor(rows, block_m, block_k)
    half = rows if gather else _descriptor(rows, block_m // 2, block_k)
    num_slots = routing.ids.numel()
    out = rows.new_empty((slots.numel() if sorted_rows == "out" else num_slots, given.width), dtype=dtype)
    grid = slots.shape[0] * -(-given.width // tile.block_n)
    if tile.persistent:
        grid = min(grid, tile.persistent * multiprocessors(rows.device))
    wrapped(large_gemm_kernel)[(grid,)](
        left, half, weight, other, out, row_scale, given.scale, given.other_scale, given.bias, given.other_bias,
        routing.ids if slot is None else slot, slots, tile_expert, tile_group, tile_count,
        num_slots, given.width, rows.shape[1], row_div, rows.stride(0), given.weight_rows, given.gate_row, given.up_row,
        given.weight.shape[0] * given.weight_rows - 1,
        ALPHA=alpha, LIMIT=limit, FMT="plain" if projection.form == "none" else projection.kind, TWO=two,
        ACT=activation, SLOT=0 if slot is None else 1 if slot_before else 2, BIAS=bool(projection.bias),
        GATHER=gather, SORTED=sorted_rows, WIDE=wide, PAIRS_APART=pairs_apart,
        GROUP=rows.shape[1] // given.scale.shape[-1] if kind == "int4" else 0,
        HALF=tile.half, PERSISTENT=bool(tile.persistent), ASM=not INTERPRETED,
        BM=block_m, BN=tile.block_n, BK=block_k, GROUP_M=tile.group_m, SWAP=tile.swap,
        INT=rows.dtype is torch.int8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def run_large(
    tokens: torch.Tensor, slot: torch.Tensor | None, up: Projection, down: Projection, routing: Routing,
    activation: str, alpha: float, limit: float, slot_before: bool, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The whole layer, as :func:`moe_fx.kernels.fused_launch.run_experts` does it."""
    assert routing.tiles is not None
    ids, dtype, num_slots = routing.ids, tokens.dtype, routing.ids.numel()
    slots, _, _, tile_count = routing.tiles
    read = as_read(up, dtype, routing)
    rows, scale = rows_for(read, tokens, ids)
    if not (gather := _gathers(read, rows)):
        rows = sort_rows(rows, slots, tile_count, ids.shape[1], num_slots)
    inner = large_gemm(
        rows, scale, read, routing, ids.shape[1], gather=gather, sorted_rows="out", dtype=dtype,
        activation=activation, alpha=alpha, limit=limit, slot=slot if slot_before else None, slot_before=True,
        pairs_apart=down.kind == "int4" and not _widens(down, dtype, routing),
    )  # fmt: skip
    del read  # what was widened is freed
    scale = ids
    if down.kind == "dynamic":
        inner, scale = quantize_rows(inner, down.tensors[0].dtype, slots, num_slots)
    result = large_gemm(
        inner, scale, as_read(down, dtype, routing), routing, 1, gather=False, sorted_rows="in", dtype=dtype,
        slot=None if slot_before else slot,
    )  # fmt: skip
    return sum_slots(result, ids, routing.num_experts, out_dtype)


def run_linear_large(rows: torch.Tensor, projection: Projection, routing: Routing, row_div: int) -> torch.Tensor:
    """One projection, as :func:`moe_fx.kernels.fused_launch.run_linear` does it."""
    assert routing.tiles is not None
    dtype, (slots, _, _, tile_count) = rows.dtype, routing.tiles
    read = as_read(projection, dtype, routing)
    rows, scale = rows_for(read, rows, routing.ids)
    if not (gather := not _stored(read, rows)):
        rows = sort_rows(rows, slots, tile_count, row_div, routing.ids.numel())
    return large_gemm(rows, scale, read, routing, row_div, gather=gather, sorted_rows="", dtype=dtype)


def as_read(projection: Projection, dtype: torch.dtype, routing: Routing) -> Projection:
    """Weights as tiles of many rows read them: widened beforehand, where that pays (of int4, nothing is left then)."""
    return widened(projection, dtype) if _widens(projection, dtype, routing) else projection


def _widens(projection: Projection, dtype: torch.dtype, routing: Routing) -> bool:
    return widens_first(
        projection.kind, routing.ids.numel(), routing.num_experts, in_registers(projection, dtype)
    )  # fmt: skip


def rows_for(projection: Projection, rows: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a projection multiplies them, and their scale; ids where there is none."""
    if projection.kind == "dynamic":
        return quantize_rows(rows, projection.tensors[0].dtype)
    return split_pairs(rows, 0)[0] if projection.kind == "int4" else rows, ids


def _stored(projection: Projection, rows: torch.Tensor) -> bool:
    """Whether weights are left to be widened in registers, by tiles that load their rows by descriptors as well."""
    return projection.tensors[0].element_size() < rows.element_size()


def _gathers(projection: Projection, rows: torch.Tensor) -> bool:
    """Whether the kernel gathers rows; a copy of them in their order pays if each is read by many tiles."""
    few = output_width(projection) // (2 if projection.gated in ("gate_up", "up_gate") else 1) < SORT_ABOVE
    return not _stored(projection, rows) and (few or rows.stride(0) * rows.element_size() % 16 != 0)
