"""From tensors to kernel launches: what :mod:`moe_fx.kernels.fused_experts` runs on a GPU.

Every choice here (tiles, routing, widening) is about speed; it depends on sizes, which the host knows, never on values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_fx.kernels.fused_tiles import FEW_SLOTS, Tile, block_of_rows, tile_of, widens_first
from moe_fx.kernels.triton_gemm import expert_gemm_kernel
from moe_fx.kernels.triton_or_none import INTERPRETED, wrapped
from moe_fx.kernels.triton_routing import route
from moe_fx.kernels.triton_rows import quantize_rows, sum_slots
from moe_fx.kernels.triton_widen import widen_int4

__all__ = ["Projection", "Routing", "apart", "expert_gemm", "run_experts", "run_linear"]

#: what a format's weights are multiplied as
KINDS = {
    "none": "plain", "int8_weight_only": "widened", "float8_weight_only": "widened", "int8_dynamic": "dynamic",
    "float8_dynamic": "dynamic", "int4_weight_only": "int4",
}  # fmt: skip


@dataclass(frozen=True)
class Projection:
    """One projection's weights, or two (gate and up) that are stored apart.

    Attributes:
        tensors: of the format, stacked over experts; of gate, then of up, where ``gated`` is "two".
        bias: as many, or none. form: the format's name. transposed: unquantized weights are ``[E, K, N]``.
        gated: "none", "gate_up" and "up_gate" (halves, in that order), "interleaved", "two".
    """

    tensors: Sequence[torch.Tensor]
    form: str
    transposed: bool = False
    bias: Sequence[torch.Tensor] = ()
    gated: str = "none"

    @property
    def kind(self) -> str:
        return KINDS[self.form]

    def weights(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """The tensors of the first weight and of the second, which may be the same."""
        half = len(self.tensors) // 2
        return (self.tensors[:half], self.tensors[half:]) if self.gated == "two" else (self.tensors, self.tensors)


@dataclass(frozen=True)
class Routing:
    """ids ``[T, K]``, and the slots sorted into tiles of ``block`` rows; or not, if there are few."""

    ids: torch.Tensor
    num_experts: int
    block: int
    tiles: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None

    @staticmethod
    def of(ids: torch.Tensor, num_experts: int) -> Routing:
        block = block_of_rows(ids.numel(), num_experts)
        few = ids.numel() <= FEW_SLOTS
        return Routing(ids, num_experts, block, None if few else route(ids, num_experts, block))


def apart(rows: torch.Tensor) -> torch.Tensor:
    """``[R, N]`` with the even columns first, then the odd ones."""
    return rows.unflatten(-1, (-1, 2)).transpose(-2, -1).reshape(rows.shape)


def widened(projection: Projection, dtype: torch.dtype) -> Projection:
    """The same weights in ``dtype``: int4 as what they stand for, others still to be scaled."""
    parts: list[torch.Tensor] = []
    first, second = projection.weights()
    for tensors in (first, second) if projection.gated == "two" else (first,):
        parts += [widen_int4(tensors, dtype)] if projection.kind == "int4" else [tensors[0].to(dtype), *tensors[1:]]
    form = "none" if projection.kind == "int4" else projection.form
    return Projection(parts, form, False, projection.bias, projection.gated)


def expert_gemm(
    rows: torch.Tensor, projection: Projection, routing: Routing, row_div: int, *, activation: str = "none",
    alpha: float = 0.0, limit: float = 0.0, slot: torch.Tensor | None = None, slot_before: bool = False,
    rows_are_apart: bool = False, result_apart: bool = False, tile: Tile | None = None,
) -> torch.Tensor:  # fmt: skip
    """``[S, N]``: for each slot, its row (``slot // row_div``) times its expert's weights, and the epilogue."""
    ids = routing.ids
    dtype = rows.dtype
    kind = projection.kind
    first, second = projection.weights()
    weight, other = first[0].contiguous(), second[0].contiguous()
    scale, other_scale = (first[1].contiguous(), second[1].contiguous()) if len(first) > 1 else (ids, ids)
    zero, other_zero = (first[2].contiguous(), second[2].contiguous()) if len(first) > 2 else (ids, ids)
    bias, other_bias = ids, ids
    if projection.bias:
        bias, other_bias = projection.bias[0].contiguous(), projection.bias[-1].contiguous()
    weight_rows = weight.shape[2 if projection.transposed else 1]
    halves = projection.gated in ("gate_up", "up_gate")
    width = weight_rows // 2 if halves or projection.gated == "interleaved" else weight_rows
    if tile is None:
        tile = tile_of("plain" if weight.dtype is dtype else kind, projection.gated != "none", routing.block)

    inputs = rows.shape[1]
    row_scale = ids
    if kind == "dynamic":
        rows, row_scale = quantize_rows(rows, weight.dtype)
    elif kind == "int4" and not rows_are_apart:
        rows = apart(rows)
    block_k, group_bytes, unroll = tile.block_k, 1, tile.unroll
    if kind == "int4":
        group_bytes = inputs // scale.shape[-1] // 2
        while group_bytes % block_k:
            block_k //= 2
        while inputs // 2 % (block_k * unroll):
            unroll //= 2
    out = rows.new_empty((ids.numel(), width), dtype=dtype)
    columns = -(-width // tile.block_n)
    if routing.tiles is None:
        row_tiles, slots, tile_expert, tile_count = ids.numel(), ids, ids, ids
    else:
        slots, tile_expert, tile_count = routing.tiles
        row_tiles = slots.shape[0]
    wrapped(expert_gemm_kernel)[(row_tiles * columns,)](
        rows, weight, other, out, row_scale, scale, other_scale, zero, other_zero, bias, other_bias,
        ids if slot is None else slot, ids, slots, tile_expert, tile_count,
        ids.numel(), routing.num_experts, width, inputs, row_div, rows.stride(0), weight.stride(0),
        weight.stride(1), weight_rows, width if projection.gated == "up_gate" else 0,
        width if projection.gated == "gate_up" else 0,
        ALPHA=alpha, LIMIT=limit, FMT=kind, ZERO=len(first) > 2, TRANSPOSED=projection.transposed,
        GATED="halves" if halves else projection.gated, ACT=activation,
        SLOT=0 if slot is None else 1 if slot_before else 2, BIAS=bool(projection.bias), PAIRS_APART=result_apart,
        GROUP_BYTES=group_bytes, UNROLL=unroll, EVEN_N=width % tile.block_n == 0, EVEN_K=inputs % block_k == 0,
        ASM=not INTERPRETED,
        LEADER=routing.tiles is None, SP=32 if ids.numel() <= 32 else FEW_SLOTS,
        BM=routing.block, BN=tile.block_n, BK=block_k, GROUP_M=tile.group_m, SWAP=tile.swap,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def run_linear(rows: torch.Tensor, ids: torch.Tensor, num_experts: int, projection: Projection) -> torch.Tensor:
    """What ``moe_fx::slot_linear`` does."""
    if ids.numel() == 0:
        return rows.new_empty((0, output_width(projection)))
    routing = Routing.of(ids.contiguous(), num_experts)
    if widens_first(projection.kind, ids.numel(), num_experts):
        projection = widened(projection, rows.dtype)
    row_div = 1 if rows.shape[0] == ids.numel() else ids.shape[1]
    return expert_gemm(_dense(rows), projection, routing, row_div)


def run_experts(
    tokens: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor | None, up: Projection, down: Projection,
    num_experts: int, activation: str, alpha: float, limit: float, slot_before: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """What ``moe_fx::fused_experts`` does."""
    if ids.numel() == 0:
        return tokens.new_zeros((ids.shape[0], output_width(down)), dtype=out_dtype)
    ids = ids.contiguous()
    slot = slot.contiguous() if slot is not None else None
    routing = Routing.of(ids, num_experts)
    if widens_first(up.kind, ids.numel(), num_experts):
        up = widened(up, tokens.dtype)
    pairs = down.kind == "int4" and not widens_first("int4", ids.numel(), num_experts)
    inner = expert_gemm(
        _dense(tokens), up, routing, ids.shape[1], activation=activation, alpha=alpha, limit=limit,
        slot=slot if slot_before else None, slot_before=True, result_apart=pairs,
    )  # fmt: skip
    if widens_first(down.kind, ids.numel(), num_experts):
        down = widened(down, tokens.dtype)
    rows = expert_gemm(inner, down, routing, 1, slot=None if slot_before else slot, rows_are_apart=pairs)
    return sum_slots(rows, ids, num_experts, out_dtype)


def output_width(projection: Projection) -> int:
    """The outputs of a projection that is not gated."""
    return int(projection.tensors[0].shape[2 if projection.transposed else 1])


def _dense(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()
