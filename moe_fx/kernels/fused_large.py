"""Launches for many rows per expert: tensor descriptors, and rows sorted into tiles or gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_fx.kernels.fused_projection import (
    Operands,
    Projection,
    Routing,
    in_registers,
    operands,
    output_width,
    widened,
)
from moe_fx.kernels.fused_tiles import (
    HALF_STEPS_FROM,
    LargeTile,
    Product,
    block_of_rows,
    large_tile_of,
    loads_by_descriptor,
    sorts,
    widens_first,
)
from moe_fx.kernels.triton_large import large_gemm_kernel
from moe_fx.kernels.triton_or_none import INTERPRETED, is_opaque, overlapped, overlaps
from moe_fx.kernels.triton_rows import quantize_rows, sort_rows, sum_slots

__all__ = [
    "as_read", "in_pairs", "large_gemm", "product_of", "rows_for", "run_large", "run_linear_large", "takes_descriptors",
]  # fmt: skip


def takes_descriptors(
    tokens: torch.Tensor, projections: Sequence[Projection], num_slots: int, num_experts: int
) -> bool:
    """Whether descriptors can be made and pay: weights lie at multiples of 16 bytes, and are read by rows enough."""
    dtype = tokens.dtype
    return is_opaque() and all(
        each.fits_descriptors
        and _has_rows_enough(each, dtype, num_slots, num_experts)
        and all(tensors[0].data_ptr() % 16 == 0 for tensors in each.weights())
        for each in projections
    )


def _has_rows_enough(projection: Projection, dtype: torch.dtype, num_slots: int, num_experts: int) -> bool:
    wide = in_registers(projection, dtype)
    block = block_of_rows(projection.kind, num_slots, num_experts, wide)
    if block < HALF_STEPS_FROM and _half_steps(projection, dtype):
        return False
    return loads_by_descriptor(projection.kind, num_slots, num_experts, wide)


def _descriptor(tensor: torch.Tensor, *block: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, list(block))


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
        rows: ``[*, K]``, gathered by the kernel, or ``[B * BM, K]`` in the order of the tiles; with the even
            columns first where weights are widened in registers.
        row_scale: float32, of the rows before they were sorted; in their order if ``sorted_rows`` is "in".
        sorted_rows: "out": the result is ``[B * BM, N]`` in the order of the tiles; otherwise ``[S, N]``.
        pairs_apart: the result has its even columns first.
    """
    assert routing.tiles is not None
    slots, tile_expert, tile_group, tile_count = routing.tiles
    given = operands(projection, routing.ids)
    bits, pairs = bits_of(projection, rows.dtype), in_pairs(projection, rows.dtype, routing.block)
    every = 2 if projection.gated == "interleaved" else 1
    product = product_of(projection, rows, routing)
    if tile is None:
        tile = large_tile_of(product, routing.ids.numel() / routing.num_experts, gather)
    block_m, block_k = routing.block, _step(projection, rows.dtype, pairs)
    joined = projection.gated if product.joined and not tile.swap else ""
    weight, other = _weights(given, projection.gated, bool(joined), bits == 8 and pairs, tile.block_n, block_k)
    left = rows if gather else _descriptor(rows, block_m, block_k)
    half = rows if gather else _descriptor(rows, block_m // 2, block_k)
    num_slots = routing.ids.numel()
    out = rows.new_empty((slots.numel() if sorted_rows == "out" else num_slots, given.width), dtype=dtype)
    grid = slots.shape[0] * -(-given.width // tile.block_n)
    if tile.persistent:
        grid = min(grid, tile.persistent * multiprocessors(rows.device))
    overlapped(large_gemm_kernel)[(grid,)](
        left, half, weight, other, out, row_scale, given.scale, given.other_scale, given.bias, given.other_bias,
        routing.ids if slot is None else slot, slots, tile_expert, tile_group, tile_count,
        num_slots, given.width, rows.shape[1], row_div, rows.stride(0), given.weight_rows // every, given.gate_row,
        given.up_row, given.weight.shape[0] * given.weight_rows // every - 1,
        ALPHA=alpha, LIMIT=limit, FMT="plain" if projection.form == "none" else projection.kind, TWO=product.two,
        ACT=activation, SLOT=0 if slot is None else 1 if slot_before else 2, BIAS=bool(projection.bias),
        GATHER=gather, SORTED=sorted_rows, BITS=bits, PAIRS=pairs, PAIRS_APART=pairs_apart,
        GROUP=rows.shape[1] // given.scale.shape[-1] if bits == 4 else 0,
        EVERY=every, EVEN_K=rows.shape[1] % block_k == 0, JOINED=joined, HALF=tile.half,
        PERSISTENT=bool(tile.persistent), ASM=not INTERPRETED, OVERLAP=overlaps(),
        BM=block_m, BN=tile.block_n, BK=block_k, GROUP_M=tile.group_m, SWAP=tile.swap,
        INT=rows.dtype is torch.int8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _weights(given: Operands, gated: str, joined: bool, words: bool, *block: int) -> tuple[Any, Any]:
    """Descriptors of a weight and of the other, which may be the same; of gate and up in one, if they are joined.

    words: of two weights of one byte.
    """
    first, second = given.weight, given.other
    if words:
        first, second = first.view(torch.int16), second.view(torch.int16)
    inputs = first.shape[-1]
    if joined:
        both = first.view(-1, 2, inputs) if gated == "interleaved" else first.view(-1, given.width, inputs)
        rows, columns = block
        one = _descriptor(both, *((rows, 2) if gated == "interleaved" else (2, rows)), columns)
        return one, one
    if gated == "interleaved":
        gate, up = first.view(-1, 2, inputs).unbind(1)
        return _descriptor(gate, *block), _descriptor(up, *block)
    one = _descriptor(first.flatten(0, 1), *block)
    return one, one if given.other is given.weight else _descriptor(second.flatten(0, 1), *block)


def product_of(projection: Projection, rows: torch.Tensor, routing: Routing) -> Product:
    """What tiles are tuned for; widened beforehand, weights are "plain"."""
    given = operands(projection, routing.ids)
    bits = bits_of(projection, rows.dtype)
    kind = projection.kind if projection.kind == "dynamic" or bits else "plain"
    joined = projection.gated in ("gate_up", "up_gate", "interleaved") and not bits
    return Product(kind, projection.gated != "none", routing.block, given.width, rows.shape[1], joined)


def bits_of(projection: Projection, dtype: torch.dtype) -> int:
    """Of weights that tiles widen in registers, for rows of ``dtype``, the bits of one; else 0."""
    if projection.kind == "dynamic" or projection.tensors[0].element_size() == dtype.itemsize:
        return 0
    return 4 if projection.kind == "int4" else 8


def in_pairs(projection: Projection, dtype: torch.dtype, block: int) -> bool:
    """Whether weights are read as words of two: int4; and int8, but in tiles of 128 rows.

    Words of 16 bits take fewer instructions to widen than those of 8; but rows are then read in two parts.
    """
    bits = bits_of(projection, dtype)
    return bits == 4 or (bits == 8 and block < 128)


def _step(projection: Projection, dtype: torch.dtype, pairs: bool) -> int:
    """How many inputs, or words of two weights, are a step of the loop: 128 bytes of rows, or half of that."""
    most = 128 // dtype.itemsize
    stored = projection.tensors[0].shape[-1]
    if projection.kind == "int4":  # within one group
        whole = stored // projection.tensors[1].shape[-1] % most == 0
    else:
        whole = stored % (2 * most) == 0
    return most if whole or not pairs else most // 2


def _half_steps(projection: Projection, dtype: torch.dtype) -> bool:
    """Whether words of two weights, widened in registers, are read in half steps of the loop."""
    return in_registers(projection, dtype) and _step(projection, dtype, True) < 128 // dtype.itemsize


def run_large(
    tokens: torch.Tensor, slot: torch.Tensor | None, up: Projection, down: Projection, routing: Routing,
    activation: str, alpha: float, limit: float, slot_before: bool, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The whole layer, as :func:`moe_fx.kernels.fused_launch.run_experts` does it."""
    assert routing.tiles is not None
    ids, dtype, num_slots = routing.ids, tokens.dtype, routing.ids.numel()
    slots = routing.tiles[0]
    read = as_read(up, dtype, routing)
    gather = _gathers(read, dtype, routing)
    rows, scale = rows_for(read, tokens, routing, gather)
    inner = large_gemm(
        rows, scale, read, routing, ids.shape[1], gather=gather, sorted_rows="out", dtype=dtype,
        activation=activation, alpha=alpha, limit=limit, slot=slot if slot_before else None, slot_before=True,
        pairs_apart=in_pairs(down, dtype, routing.block) and not _widens(down, dtype, routing),
    )  # fmt: skip
    del read  # what was widened is freed
    scale = ids
    if down.kind == "dynamic":
        inner, scale = quantize_rows(inner, down.tensors[0].dtype, slots, num_slots, for_large=True)
    result = large_gemm(
        inner, scale, as_read(down, dtype, routing), routing, 1, gather=False, sorted_rows="in", dtype=dtype,
        slot=None if slot_before else slot,
    )  # fmt: skip
    return sum_slots(result, ids, routing.num_experts, out_dtype)


def run_linear_large(rows: torch.Tensor, projection: Projection, routing: Routing, row_div: int) -> torch.Tensor:
    """One projection, as :func:`moe_fx.kernels.fused_launch.run_linear` does it."""
    dtype = rows.dtype
    read = as_read(projection, dtype, routing)
    gather = bits_of(read, dtype) == 0
    rows, scale = rows_for(read, rows, routing, gather)
    return large_gemm(rows, scale, read, routing, row_div, gather=gather, sorted_rows="", dtype=dtype)


def as_read(projection: Projection, dtype: torch.dtype, routing: Routing) -> Projection:
    """Weights as tiles of many rows read them: widened beforehand, where that pays (of int4, nothing is left then)."""
    return widened(projection, dtype) if _widens(projection, dtype, routing) else projection


def _widens(projection: Projection, dtype: torch.dtype, routing: Routing) -> bool:
    return widens_first(
        projection.kind, routing.ids.numel(), routing.num_experts, in_registers(projection, dtype),
        _half_steps(projection, dtype),
    )  # fmt: skip


def rows_for(
    projection: Projection, rows: torch.Tensor, routing: Routing, gather: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a projection multiplies them, in the order of the tiles unless it gathers them; and their scale, of rows
    as they were, or ids where there is none.
    """
    assert routing.tiles is not None
    assert routing.places is not None
    num_places = routing.tiles[0].numel()
    if projection.kind == "dynamic":
        return quantize_rows(
            rows, projection.tensors[0].dtype, places=None if gather else routing.places, num_places=num_places,
            for_large=True,
        )  # fmt: skip
    if gather:
        return rows, routing.ids
    return sort_rows(rows, routing.places, num_places, in_pairs(projection, rows.dtype, routing.block)), routing.ids


def _gathers(projection: Projection, dtype: torch.dtype, routing: Routing) -> bool:
    """Whether the kernel gathers rows; a copy of them in their order pays if each is read by many tiles."""
    if bits_of(projection, dtype) != 0:
        return False
    inner = output_width(projection) // (1 if projection.gated in ("none", "two") else 2)
    return not sorts(projection.kind, inner, routing.ids.numel() / routing.num_experts)
