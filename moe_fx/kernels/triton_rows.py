"""Kernels over rows: quantized, even and odd columns apart, sorted into tiles, and the sum of each token's slots."""

from __future__ import annotations

import torch

from moe_fx.formats.per_channel import LARGEST_ACTIVATION, SMALLEST_SCALE, quantize_activations
from moe_fx.kernels.triton_or_none import INTERPRETED, after_previous, before_next, jit, overlapped, overlaps, tl

__all__ = [
    "apart", "quantize_rows", "quantize_rows_reference", "scale_of_largest", "sort_rows", "sort_rows_reference",
    "split_pairs", "split_pairs_reference", "store_columns", "sum_slots", "sum_slots_reference",
]  # fmt: skip

#: from how many rows in the order of tiles on the next kernel is not set up early: its programs, which go on from tile
#: to tile, would stay where multiprocessors happened to be free first, and take up to 9 % longer
MANY_ROWS = 1024
#: up to how many rows that are sorted each copy is made by a program of its own: a layer of 128 experts took 5 to 10 %
#: longer behind fewer programs than that
FEW_ROWS = 1024


def quantize_rows_reference(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows [R, N]`` as int8 or float8_e4m3fn values and a float32 scale ``[R]``."""
    values, scale = quantize_activations(rows.float(), dtype)
    return values, scale.squeeze(-1)


@jit()
def scale_of_largest(largest, BOUND: tl.constexpr, SMALLEST: tl.constexpr):
    """Of rows whose absolute values are at most largest [ROWS, BLOCK]; not a number where one of them is none."""
    # Compared as bits: as numbers, NaN would be passed over.
    most = tl.max(largest.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    return tl.maximum(tl.math.div_rn(most, BOUND), SMALLEST, propagate_nan=tl.PropagateNan.ALL)


@jit()
def _steps(x, scale, INT: tl.constexpr, ASM: tl.constexpr):
    inverse = tl.math.div_rn(1.0, scale)
    steps = x * inverse
    if INT:
        # Rounded to the nearest integer, ties to even. By adding 3 * 2^22 the product would be rounded once, as one
        # multiply-add, and not twice as the reference does.
        if ASM:
            steps = tl.inline_asm_elementwise(
                "cvt.rni.f32.f32 $0, $1;", "=f,f", [steps], dtype=tl.float32, is_pure=True, pack=1
            )
        else:
            steps = (steps + 12582912.0) - 12582912.0
        return tl.minimum(tl.maximum(steps, -128.0), 127.0)
    else:
        # x / scale, rounded once: a first guess and its remainder (Markstein 1990). A division takes 8 times as long.
        # Beyond float8's largest it is by that rounding only, so that it needs no bound. -scale, since of -steps the
        # compiler makes another product.
        return tl.fma(tl.fma(steps, tl.broadcast_to(-scale, steps.shape), x), inverse, steps)


@jit(do_not_specialize=("R", "S"))
def quantize_rows_kernel(rows, values, scales, slots, R, S, N, stride, BOUND: tl.constexpr, SMALLEST: tl.constexpr,
                         SLOTS: tl.constexpr, COPIES: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
                         BLOCK: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr,
                         NEXT: tl.constexpr):  # fmt: skip
    """ROWS rows per program, rounded as :func:`quantize_rows_reference` does; SLOTS: only rows that are a slot's.

    COPIES: of each row so many, at the places slots [R, COPIES] that are not negative; 0: one, where the row is. PARTS
    of BLOCK columns hold a row. NEXT: the next kernel may be set up at once.
    """
    after_previous(OVERLAP)
    before_next(NEXT)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = r < R
    if SLOTS:
        there = there & (tl.load(slots + r, mask=there, other=S) < S)
        if tl.sum(there.to(tl.int32), 0) == 0:
            return
    n = tl.arange(0, BLOCK)[None, :]
    at = r.to(tl.int64)[:, None]
    parts = ()
    largest = tl.zeros((ROWS, BLOCK), tl.int32)
    for part in tl.static_range(PARTS):
        column = part * BLOCK + n
        x = tl.load(rows + at * stride + column, mask=there[:, None] & (column < N), other=0.0)
        parts = parts + (x,)  # type: ignore[assignment]  # noqa: RUF005 (what Triton takes)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)).to(tl.int32, bitcast=True))
    scale = scale_of_largest(largest.to(tl.float32, bitcast=True), BOUND, SMALLEST)
    places = ()
    for copy in tl.static_range(COPIES):
        place = tl.load(slots + r * COPIES + copy, mask=there, other=-1)
        places = places + (place,)  # type: ignore[assignment]  # noqa: RUF005 (what Triton takes)
    tl.store(scales + r, scale, mask=there)
    for part in tl.static_range(PARTS):
        column = part * BLOCK + n
        steps = _steps(parts[part].to(tl.float32), scale[:, None], values.dtype.element_ty == tl.int8, ASM)
        steps = steps.to(values.dtype.element_ty)
        if COPIES == 0:
            tl.store(values + at * N + column, steps, mask=there[:, None] & (column < N))
        for copy in tl.static_range(COPIES):
            to = places[copy][:, None]
            tl.store(values + to.to(tl.int64) * N + column, steps, mask=(to >= 0) & (column < N))


def _parts(width: int) -> int:
    """Of how many parts, whose lengths are powers of two, a row is made without a rest; else 1, with one."""
    return next((parts for parts in (3, 5, 7) if width % parts == 0 and (width // parts).bit_count() == 1), 1)


def quantize_rows(
    rows: torch.Tensor, dtype: torch.dtype, slots: torch.Tensor | None = None, num_slots: int = 0, *,
    places: torch.Tensor | None = None, num_places: int = 0, for_large: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As :func:`quantize_rows_reference`, in one kernel; the last dimension must be dense.

    Where ``slots`` int32 ``[R]`` is given, only rows whose slot is below ``num_slots`` are written. Where ``places``
    int32 ``[R * C]`` are, the values are ``[num_places, N]``, with C copies of each row, none at a negative place; the
    scales stay ``[R]``. for_large: the next kernel is one of large tiles, and not to be set up early (see MANY_ROWS).
    """
    count, width = rows.shape
    values = rows.new_empty((num_places if places is not None else count, width), dtype=dtype)
    scales = rows.new_empty((count,), dtype=torch.float32)
    block = 1 << (width - 1).bit_length()
    # Of many rows a warp takes 4096 numbers, in one row or several: that warps need not wait for one another counts for
    # more than how many there are.
    many = count >= 1024
    parts = _parts(width) if many else 1
    at_once = max(1, 4096 // block) if many else 1
    warps = min(max(1, block // 4096), 32) if many else 4 if block <= 2048 else 8 if block <= 4096 else 16
    overlapped(quantize_rows_kernel)[(-(-count // at_once),)](
        rows, values, scales, next((each for each in (slots, places) if each is not None), rows),
        count, num_slots, width, rows.stride(0), BOUND=LARGEST_ACTIVATION[dtype], SMALLEST=SMALLEST_SCALE,
        SLOTS=slots is not None, COPIES=places.numel() // count if places is not None else 0, ROWS=at_once,
        PARTS=parts, BLOCK=block if parts == 1 else width // parts, ASM=not INTERPRETED, OVERLAP=overlaps(),
        NEXT=overlaps() and not for_large, num_warps=warps,
    )  # fmt: skip
    return values, scales


def apart(rows: torch.Tensor) -> torch.Tensor:
    """``rows [R, N]`` with the even columns first, then the odd ones."""
    return rows.unflatten(-1, (-1, 2)).transpose(-2, -1).reshape(rows.shape)


def split_pairs_reference(rows: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``rows [R, N]`` with the even columns first, and their float32 sums over ``block`` columns of these."""
    return apart(rows), apart(rows).float().unflatten(-1, (-1, block)).sum(-1)


@jit()
def split_pairs_kernel(rows, out, sums, N, stride, BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """BLOCK pairs of one row per program."""
    after_previous(OVERLAP)
    before_next(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    half = N // 2
    j = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    pairs = tl.load(rows + r * stride + j, mask=j < N, other=0.0)
    even, odd = tl.split(tl.reshape(pairs, (BLOCK, 2)))
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + r * N + p, even, mask=p < half)
    tl.store(out + r * N + half + p, odd, mask=p < half)
    if SUM_BLOCK != 0:
        blocks: tl.constexpr = BLOCK // SUM_BLOCK
        b = tl.program_id(1) * blocks + tl.arange(0, blocks)
        count = half // SUM_BLOCK
        even_sums = tl.sum(tl.reshape(even.to(tl.float32), (blocks, SUM_BLOCK)), 1)
        odd_sums = tl.sum(tl.reshape(odd.to(tl.float32), (blocks, SUM_BLOCK)), 1)
        tl.store(sums + r * 2 * count + b, even_sums, mask=b < count)
        tl.store(sums + r * 2 * count + count + b, odd_sums, mask=b < count)


def split_pairs(rows: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`split_pairs_reference`, in one kernel; ``block`` 0: without sums."""
    count, width = rows.shape
    out = rows.new_empty((count, width))
    sums = rows.new_empty((count, width // block) if block else (1, 1), dtype=torch.float32)
    at_once = max(block, 512)
    overlapped(split_pairs_kernel)[(count, -(-width // (2 * at_once)))](
        rows, out, sums, width, rows.stride(0), BLOCK=at_once, SUM_BLOCK=block, OVERLAP=overlaps(), num_warps=4
    )
    return out, sums


@jit()
def store_columns(to, first, values, there, N, PAIRS_APART: tl.constexpr):
    """The columns [R, C] from ``first`` on of rows [R] (there) of N columns that begin at ``to`` [R]."""
    C: tl.constexpr = values.shape[1]
    if PAIRS_APART:
        even, odd = tl.split(tl.reshape(values, (values.shape[0], C // 2, 2)))
        column = first // 2 + tl.arange(0, C // 2)[None, :]
        mask = there[:, None] & (column < N // 2)
        tl.store(to[:, None] + column, even, mask=mask)
        tl.store(to[:, None] + (column + N // 2), odd, mask=mask)
    else:
        column = first + tl.arange(0, C)[None, :]
        tl.store(to[:, None] + column, values, mask=there[:, None] & (column < N))


def sort_rows_reference(
    rows: torch.Tensor, slots: torch.Tensor, row_div: int, num_slots: int, pairs_apart: bool = False
) -> torch.Tensor:
    """``[B * BM, N]``: the row ``slot // row_div`` of each slot of ``slots [B, BM]``; elsewhere, here, zero.

    pairs_apart: with the even columns first, then the odd ones.
    """
    flat = slots.reshape(-1).long()
    there = flat < num_slots
    rows = apart(rows) if pairs_apart else rows
    return torch.where(there.unsqueeze(-1), rows[torch.where(there, flat, 0) // row_div], 0)


@jit()
def sort_rows_kernel(rows, places, out, N, stride, PARTS: tl.constexpr, COPIES: tl.constexpr,
                     PAIRS_APART: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
                     NEXT: tl.constexpr):  # fmt: skip
    """BLOCK columns of one row per program, to COPIES of its PARTS * COPIES places.

    NEXT: as in :func:`quantize_rows_kernel`.
    """
    after_previous(OVERLAP)
    before_next(NEXT)
    p = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    n = first + tl.arange(0, BLOCK)
    row = tl.load(rows + (p // PARTS).to(tl.int64) * stride + n, mask=n < N)[None, :]
    found = ()
    for copy in tl.static_range(COPIES):
        place = tl.load(places + p * COPIES + copy + tl.arange(0, 1))
        found = found + (place,)  # type: ignore[assignment]  # noqa: RUF005 (what Triton takes)
    for copy in tl.static_range(COPIES):
        place = found[copy]
        store_columns(out + place.to(tl.int64) * N, first, row, place >= 0, N, PAIRS_APART)


def sort_rows(rows: torch.Tensor, places: torch.Tensor, num_places: int, pairs_apart: bool = False) -> torch.Tensor:
    """As :func:`sort_rows_reference`, in one kernel; what is no slot's is left unwritten.

    places: int32 ``[R * C]``: where in ``[num_places, N]`` the C copies of each row go; nowhere, if negative.
    """
    count, width = rows.shape
    out = rows.new_empty((num_places, width))
    block = min(1 << (width - 1).bit_length(), 4096)
    parts = places.numel() // count if count < FEW_ROWS else 1
    overlapped(sort_rows_kernel)[(count * parts, -(-width // block))](
        rows, places, out, width, rows.stride(0), PARTS=parts, COPIES=places.numel() // count // parts,
        PAIRS_APART=pairs_apart, BLOCK=block, OVERLAP=overlaps(), NEXT=overlaps() and num_places < MANY_ROWS,
        num_warps=4,
    )  # fmt: skip
    return out


def sum_slots_reference(rows: torch.Tensor, ids: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """``rows [T*K*P, H]`` to ``[T, H]`` of ``dtype``: the float32 sum over P rows of each slot that names an expert."""
    by_token = rows.unflatten(0, (*ids.shape, -1)).float().sum(2)
    valid = ((ids >= 0) & (ids < num_experts)).unsqueeze(-1)
    return torch.where(valid, by_token, 0).sum(1).to(dtype)


@jit()
def sum_slots_kernel(rows, ids, out, E, H, K: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
                     OVERLAP: tl.constexpr):  # fmt: skip
    after_previous(OVERLAP)
    before_next(OVERLAP)
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(K):
        expert = tl.load(ids + t * K + slot)
        valid = (expert >= 0) & (expert < E)
        for part in tl.static_range(PARTS):
            row = rows + ((t * K + slot) * PARTS + part) * H
            # Read before it is known whether it is anything: ids are on their way.
            total += tl.where(valid, tl.load(row + h, mask=h < H, other=0.0).to(tl.float32), 0.0)
    tl.store(out + t * H + h, total.to(out.dtype.element_ty), mask=h < H)


def sum_slots(rows: torch.Tensor, ids: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """As :func:`sum_slots_reference`, in one kernel and in the same order every time; both operands contiguous."""
    count, top_k = ids.shape
    hidden = rows.shape[1]
    out = rows.new_empty((count, hidden), dtype=dtype)
    block = 512 if count < 64 else 1024
    overlapped(sum_slots_kernel)[(count, -(-hidden // block))](
        rows, ids, out, num_experts, hidden, K=top_k, PARTS=rows.shape[0] // ids.numel(), BLOCK=block,
        OVERLAP=overlaps(), num_warps=4,
    )  # fmt: skip
    return out
