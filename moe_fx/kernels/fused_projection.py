"""What a launch multiplies: a projection's weights, and the slots that were routed to experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_fx.kernels.fused_tiles import FEW_SLOTS, block_of_digits, block_of_rows
from moe_fx.kernels.triton_or_none import is_opaque
from moe_fx.kernels.triton_routing import Tiles, route, route_and_places
from moe_fx.kernels.triton_widen import widen, widen_int4

__all__ = ["KINDS", "Operands", "Projection", "Routing", "in_registers", "operands", "output_width", "widened"]

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

    @property
    def digits(self) -> bool:
        """Whether rows may be multiplied in digits: weights are integers, and integer sums hold what is added."""
        inputs = self.tensors[0].shape[-1]
        if self.form == "int4_weight_only":
            return len(self.weights()[0]) == 2 and inputs // self.tensors[1].shape[-1] % 32 == 0
        return self.form == "int8_weight_only" and inputs < 1 << 17

    @property
    def fits_descriptors(self) -> bool:
        """Whether tiles can be loaded by descriptors: weights ``[E, N, K]``, of a multiple of 64 inputs.

        In one byte that may be half a step of the loop: beyond the last, descriptors read zeros.
        """
        inputs = self.tensors[0].shape[-1] * (2 if self.kind == "int4" else 1)
        return not self.transposed and inputs % 64 == 0

    def weights(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """The tensors of the first weight and of the second, which may be the same."""
        half = len(self.tensors) // 2
        return (self.tensors[:half], self.tensors[half:]) if self.gated == "two" else (self.tensors, self.tensors)


def in_registers(projection: Projection, dtype: torch.dtype) -> bool:
    """Whether tiles that are loaded by descriptors can widen stored weights in registers, for rows of ``dtype``.

    int8; and int4 of which a step of 64 or 32 bytes has one scale, in the dtype of the rows.
    """
    if projection.form == "int4_weight_only":
        group_bytes = projection.tensors[0].shape[-1] // projection.tensors[1].shape[-1]
        same = projection.tensors[1].dtype is dtype
        stored = len(projection.weights()[0]) == 2 and group_bytes % 32 == 0 and same
    else:
        stored = projection.form == "int8_weight_only"
    return stored and dtype.itemsize == 2 and projection.fits_descriptors


@dataclass(frozen=True)
class Operands:
    """A projection as a kernel takes it; ``ids`` stand where a kernel reads nothing.

    Attributes:
        width: outputs, of gate or of up. weight_rows: outputs that are stored in one weight.
        gate_row, up_row: the first row of gate and of up. two: whether two products are made at once.
    """

    weight: torch.Tensor
    other: torch.Tensor
    scale: torch.Tensor
    other_scale: torch.Tensor
    zero: torch.Tensor
    other_zero: torch.Tensor
    bias: torch.Tensor
    other_bias: torch.Tensor
    weight_rows: int
    width: int
    gate_row: int
    up_row: int
    two: bool


def operands(projection: Projection, ids: torch.Tensor) -> Operands:
    first, second = projection.weights()

    def both(place: int) -> tuple[torch.Tensor, torch.Tensor]:
        if len(first) <= place:
            return ids, ids
        one = first[place].contiguous()
        return one, one if second is first else second[place].contiguous()

    bias, other_bias = ids, ids
    if projection.bias:
        bias, other_bias = projection.bias[0].contiguous(), projection.bias[-1].contiguous()
    rows = output_width(projection)
    halves = projection.gated in ("gate_up", "up_gate")
    width = rows // 2 if halves or projection.gated == "interleaved" else rows
    return Operands(
        *both(0), *both(1), *both(2), bias, other_bias, rows, width,
        width if projection.gated == "up_gate" else 0, width if projection.gated == "gate_up" else 0,
        halves or projection.gated == "two",
    )  # fmt: skip


def output_width(projection: Projection) -> int:
    """The rows of one weight: the outputs of a projection, where it holds no gate."""
    return int(projection.tensors[0].shape[2 if projection.transposed else 1])


@dataclass(frozen=True)
class Routing:
    """ids ``[T, K]``, and the slots sorted into tiles of ``block`` rows; or not, if there are few.

    Blocks of fewer than 8 rows are of rows in digits. places: where each slot is in the tiles, if that was asked for.
    """

    ids: torch.Tensor
    num_experts: int
    block: int
    tiles: Tiles | None
    places: torch.Tensor | None = None

    @staticmethod
    def of(
        ids: torch.Tensor, num_experts: int, projections: Sequence[Projection], dtype: torch.dtype, *,
        placed: bool = False,
    ) -> Routing:  # fmt: skip
        """For all of these projections, of rows of ``dtype``."""
        block = None
        if dtype.itemsize == 2 and all(each.digits for each in projections):
            block = block_of_digits(ids.shape[0], ids.numel(), num_experts)
        if block is None:
            wide = is_opaque() and all(in_registers(each, dtype) for each in projections)
            block = block_of_rows(projections[0].kind, ids.numel(), num_experts, wide)
        if ids.numel() <= FEW_SLOTS:
            return Routing(ids, num_experts, block, None)
        if placed:
            return Routing(ids, num_experts, block, *route_and_places(ids, num_experts, block))
        return Routing(ids, num_experts, block, route(ids, num_experts, block))

    @property
    def digits(self) -> bool:
        return self.block < 8

    @property
    def alone(self) -> bool:
        """Whether every slot is a tile of its own."""
        return self.tiles is None and self.ids.shape[0] == 1


def widened(projection: Projection, dtype: torch.dtype) -> Projection:
    """The same weights in ``dtype``: int4 as what they stand for, others still to be scaled."""
    parts: list[torch.Tensor] = []
    first, second = projection.weights()
    for tensors in (first, second) if projection.gated == "two" else (first,):
        parts += [widen_int4(tensors, dtype)] if projection.kind == "int4" else [widen(tensors[0], dtype), *tensors[1:]]
    form = "none" if projection.kind == "int4" else projection.form
    return Projection(parts, form, False, projection.bias, projection.gated)
