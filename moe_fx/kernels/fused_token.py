"""A layer of few tokens in two kernels: see :mod:`moe_fx.kernels.triton_token`.

Integer weights are multiplied by rows in digits (:mod:`moe_fx.kernels.triton_blocks`): the first projection splits the
tokens as it reads them, and its results as it makes them. float8 dynamic has sums of its own as well
(:mod:`moe_fx.kernels.triton_token_float8`). Tried and dropped: weights of one byte that are widened, for more experts
than one, which bounds the kernel and not memory; loading steps ahead, into registers or (but for sums of 2-byte
weights) shared memory; and fetching the second kernel's weights into L2 from the first. Figures are in docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_fx.formats.per_channel import LARGEST_ACTIVATION, SMALLEST_SCALE
from moe_fx.kernels.fused_projection import Projection, operands
from moe_fx.kernels.fused_tiles import reads_apart, reads_together
from moe_fx.kernels.triton_blocks import BLOCK_INPUTS
from moe_fx.kernels.triton_or_none import INTERPRETED, overlapped, overlaps
from moe_fx.kernels.triton_token import token_kernel

__all__ = ["TokenTile", "run_token", "takes_token", "token_product"]


@dataclass(frozen=True)
class TokenTile:
    """``block_n`` output columns of each slot, and ``block_bytes`` of their weights along K, at a time.

    Attributes:
        stages: of 2-byte weights, how many steps are under way at once, in shared memory.
    """

    block_n: int
    block_bytes: int
    warps: int
    stages: int = 1


#: for a slot's own result, and for sums over slots, by how many (a power of two; of 16 and 32 not measured)
EACH = TokenTile(8, 512, 4)
SUMMED = {
    1: TokenTile(4, 1024, 4, 3), 2: TokenTile(4, 1024, 4, 3), 4: TokenTile(4, 512, 4, 3), 8: TokenTile(4, 256, 4, 3),
    16: TokenTile(2, 256, 4, 3), 32: TokenTile(1, 256, 4, 3),
}  # fmt: skip
SUMMED_BYTES = TokenTile(8, 1024, 4)
#: where those are many of int8, or few
MANY_SUMS, FEW_SUMS, FEW_COLUMNS = TokenTile(8, 256, 4), TokenTile(2, 256, 4), 4096
#: the same for weights [E, K, N]
EACH_TRANSPOSED, SUMMED_TRANSPOSED = TokenTile(32, 256, 4), TokenTile(32, 256, 8)
#: of a result in digits: a multiple of their blocks; and of one in float8
EACH_DIGITS, EACH_FLOAT8 = TokenTile(16, 512, 4), TokenTile(8, 512, 4)
#: up to how many tokens, where each slot reads its expert's weights for itself
MOST_TOKENS = 8


def takes_token(
    ids: torch.Tensor, num_experts: int, projections: tuple[Projection, ...], dtype: torch.dtype
) -> bool:  # fmt: skip
    """Whether these kernels are for a layer: for few tokens of ``dtype`` that hardly share an expert."""
    tokens, top_k = ids.shape
    if tokens > MOST_TOKENS or top_k > max(SUMMED):
        return False
    rows, kinds = {_rows_as(each) for each in projections}, {each.kind for each in projections}
    if len(rows) > 1 or (rows != {"plain"} and dtype.itemsize != 2):
        return False
    if rows == {"plain"} and kinds != {"plain"}:
        return tokens == top_k == 1 and kinds <= {"plain", "widened"} and not any(each.digits for each in projections)
    return reads_apart(*_read(projections, num_experts), tokens, top_k, num_experts)


def _read(projections: tuple[Projection, ...], num_experts: int) -> tuple[str, float]:
    """What is read of each expert: of which kind, how many bytes."""
    stored = sum(tensor.numel() * tensor.element_size() for each in projections for tensor in each.tensors)
    return "int4" if any(each.kind == "int4" for each in projections) else "plain", stored / num_experts


def _rows_as(projection: Projection) -> str:
    """As what rows are multiplied: "plain"; or, where weights can be read by sixteen bytes, "digits" or "float8"."""
    inputs = projection.tensors[0].shape[-1] * (2 if projection.kind == "int4" else 1)
    if inputs % BLOCK_INPUTS or any(each[0].storage_offset() % 16 for each in projection.weights()):
        return "plain"
    return "digits" if projection.digits else "float8" if projection.form == "float8_dynamic" else "plain"


def _tile(projection: Projection, rows_as: str, summed: bool, slots: int, columns: int) -> TokenTile:
    if projection.transposed:
        return SUMMED_TRANSPOSED if summed else EACH_TRANSPOSED
    if not summed:
        return {"plain": EACH, "digits": EACH_DIGITS, "float8": EACH_FLOAT8}[rows_as]
    if slots == 8 and projection.kind == "widened":
        return MANY_SUMS if columns > FEW_COLUMNS else FEW_SUMS
    return SUMMED[slots] if projection.kind == "plain" or slots > 1 else SUMMED_BYTES


def token_product(
    rows: torch.Tensor, extra: torch.Tensor | None, projection: Projection, ids: torch.Tensor, num_experts: int,
    row_div: int, dtype: torch.dtype, *, summed: bool = False, then: Projection | None = None,
    activation: str = "none", alpha: float = 0.0, limit: float = 0.0, slot: torch.Tensor | None = None,
    slot_before: bool = False, together: bool = False, tile: TokenTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """For each slot, its row (``slot // row_div``) times its expert's weights, and the epilogue.

    Args:
        then: the projection that the result is for, which decides how it is left.
        extra: what such a call left beside ``rows``, if they are its result.
        together: all rows of one column tile are made one after the other, then those of the next.

    Returns:
        ``[T*K, N]`` of ``dtype``, or ``[T, N]``, the sums over each token's slots, if ``summed``; and ``extra``.
    """
    given = operands(projection, ids)
    rows_as, int4 = _rows_as(projection), projection.kind == "int4"
    leaves = "plain" if then is None else _rows_as(then)
    count, slots = ids.shape if summed else (ids.numel(), 1)
    padded = 1 << (slots - 1).bit_length()
    tile = tile or _tile(projection, rows_as, summed, padded, count * given.width)
    columns = -(-given.width // tile.block_n)
    size = 4 if rows_as != "plain" else given.weight.element_size()
    block_k = tile.block_bytes // size
    inputs = given.weight.shape[2 - projection.transposed] * (2 if int4 else 1)
    length = inputs if rows_as == "plain" else inputs // (8 if int4 else 4)
    tiles = inputs if extra is None else extra.shape[1]
    left = None
    if leaves == "digits":
        out = rows.new_empty((count, 2 * given.width), dtype=torch.int8)
        left = rows.new_empty((count, given.width // BLOCK_INPUTS), dtype=torch.float32)
        leaves = "digits apart" if then is not None and then.kind == "int4" else leaves
    else:
        out = rows.new_empty((count, given.width), dtype=dtype)
        if leaves == "float8":
            left, leaves = rows.new_empty((count, columns), dtype=torch.float32), "largest"
    overlapped(token_kernel)[(count * columns,)](
        rows, given.weight, given.other, out, ids if extra is None else extra, ids if left is None else left,
        given.scale, given.other_scale, given.bias, given.other_bias, ids if slot is None else slot, ids,
        num_experts, given.width, inputs, row_div, rows.stride(0), given.weight.stride(0), given.weight.stride(1),
        given.weight_rows, given.gate_row, given.up_row, tiles,
        ALPHA=alpha, LIMIT=limit, SCALED=projection.kind in ("widened", "dynamic"), TRANSPOSED=projection.transposed,
        GATED="halves" if projection.gated in ("gate_up", "up_gate") else projection.gated, ACT=activation,
        SLOT=0 if slot is None else 1 if slot_before else 2, BIAS=bool(projection.bias),
        EVEN_N=given.width % tile.block_n == 0, EVEN_K=length % block_k == 0, ASM=not INTERPRETED, OVERLAP=overlaps(),
        SUM=summed, SLOTS=slots, SP=padded, BN=tile.block_n, BK=block_k, VEC=1 if projection.transposed else 16 // size,
        ROWS=rows_as, MADE=extra is not None, GROUP=inputs // given.scale.shape[-1] if int4 else 0,
        MOST=1 << (tiles - 1).bit_length() if rows_as == "float8" else 1, BOUND=LARGEST_ACTIVATION[torch.float8_e4m3fn],
        SMALLEST=SMALLEST_SCALE, OUT=leaves, HALF=dtype is torch.float16, STAGES=tile.stages, TOGETHER=together,
        num_warps=tile.warps,
    )  # fmt: skip
    return out, left


def run_token(
    tokens: torch.Tensor, ids: torch.Tensor, slot: torch.Tensor | None, up: Projection, down: Projection,
    num_experts: int, activation: str, alpha: float, limit: float, slot_before: bool, out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """As :func:`moe_fx.kernels.fused_launch.run_experts`; right for any number of tokens."""
    kind, stored = _read((up, down), num_experts)
    together = reads_together(kind, stored, ids.shape[0], ids.shape[1], num_experts)
    inner, extra = token_product(
        tokens, None, up, ids, num_experts, ids.shape[1], tokens.dtype, then=down, activation=activation, alpha=alpha,
        limit=limit, slot=slot if slot_before else None, slot_before=True, together=together,
    )  # fmt: skip
    return token_product(
        inner, extra, down, ids, num_experts, 1, out_dtype, summed=True, slot=None if slot_before else slot,
        together=together,
    )[0]  # fmt: skip
