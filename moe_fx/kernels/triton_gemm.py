"""The grouped GEMM of one projection: gathered rows times their experts' weights, in every format, with the epilogue.

A tile is BM rows of one expert times BN output columns. Which rows: those that were sorted by expert beforehand (see
:mod:`moe_fx.kernels.triton_routing`); or, for few slots and without any routing kernel, a tile stands for one slot, and
takes in all slots of the same expert if its own is the first of them (ROUTED "leader"), or that slot and no other
("alone", for one token). Rows of the result are slots; or, where a slot's inputs are parted among SPLIT programs, so
many rows for each, to be added.

The definition is :func:`moe_fx.kernels.fused_experts.slot_linear_reference`.
"""

from __future__ import annotations

from moe_fx.kernels.triton_digits import joined
from moe_fx.kernels.triton_epilogue import activated, gated, of_columns, rescaled
from moe_fx.kernels.triton_int4 import int4_products
from moe_fx.kernels.triton_or_none import after_previous, before_next, jit, tl
from moe_fx.kernels.triton_unpack import dot, products_done, widened

__all__ = ["expert_gemm_kernel", "tile_place"]


@jit()
def tile_place(pid, num_n, tile_group, GROUP_M: tl.constexpr):
    """Which row tile and which column tile a program takes.

    The row tiles of one expert take the same column tile one after the other, at most GROUP_M of them: its weights are
    read from memory once, and its rows stay in L2.
    """
    if GROUP_M == 1:
        return pid // num_n, pid % num_n
    else:
        first = tl.load(tile_group + pid // num_n * 2)
        many = tl.load(tile_group + pid // num_n * 2 + 1)
        size = tl.cdiv(many, tl.cdiv(many, GROUP_M))
        local = pid - first * num_n
        group = local // (size * num_n)
        width = tl.minimum(many - group * size, size)
        rest = local - group * size * num_n
        return first + group * size + rest % width, rest // width


@jit()
def _rows_of_tile(
    ids, slots, tile_expert, tile_group, pid, num_n, S, E,
    ROUTED: tl.constexpr, SP: tl.constexpr, BM: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """The column tile, the expert (E or more, or negative, where there is nothing to do), the slots [BM], which are."""
    m = tl.arange(0, BM)
    if ROUTED == "alone":
        expert = tl.load(ids + pid // num_n).to(tl.int32)
        there = m == 0
        return pid % num_n, expert, tl.where(there, pid // num_n, S), there
    elif ROUTED == "leader":
        pid_m = pid // num_n
        expert = tl.load(ids + pid_m).to(tl.int32)
        s = tl.arange(0, SP)
        same = (tl.load(ids + s, mask=s < S, other=-1).to(tl.int32) == expert) & (s < S)
        rank = tl.cumsum(same.to(tl.int32), 0) - 1
        first = tl.sum(tl.where(s == pid_m, rank, 0), 0)
        hit = same[None, :] & (rank[None, :] == (first + m)[:, None])
        there = tl.sum(hit.to(tl.int32), 1) > 0
        return pid % num_n, tl.where(first % BM == 0, expert, -1), tl.sum(tl.where(hit, s[None, :], 0), 1), there
    else:
        pid_m, pid_n = tile_place(pid, num_n, tile_group, GROUP_M)
        slot = tl.load(slots + pid_m * BM + m)
        return pid_n, tl.load(tile_expert + pid_m), slot, slot < S


@jit()
def _load_weights(ptrs, inputs, columns, EVEN_K: tl.constexpr, MASK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        if MASK_N:
            mask = columns[None, :] if EVEN_K else inputs[:, None] & columns[None, :]
            return tl.load(ptrs, mask=mask, other=0.0)
        else:
            return tl.load(ptrs) if EVEN_K else tl.load(ptrs, mask=inputs[:, None], other=0.0)
    else:
        return tl.load(ptrs) if EVEN_K else tl.load(ptrs, mask=inputs[None, :], other=0.0)


@jit()
def _products(
    a_ptrs, w_ptrs, u_ptrs, w_stride, read, columns, begin, end, acc, acc_up,
    TWO: tl.constexpr, WIDENED: tl.constexpr, SWAP: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr,
    MASK_N: tl.constexpr, WAIT: tl.constexpr, ASM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc and acc_up, and what the inputs from begin to end make of the rows at a_ptrs."""
    k = tl.arange(0, BK)
    for k0 in range(begin, end, BK):
        if EVEN_K:
            rows = tl.load(a_ptrs, mask=read[:, None], other=0.0)
        else:
            rows = tl.load(a_ptrs, mask=read[:, None] & (k[None, :] < end - k0), other=0.0)
        if WAIT:
            products_done(ASM)
        weights = _load_weights(w_ptrs, k < end - k0, columns, EVEN_K, MASK_N, TRANSPOSED)
        if WIDENED:
            weights = widened(weights, rows.dtype, ASM)
        acc = dot(rows, weights, acc, SWAP, TRANSPOSED)
        if TWO:
            if WAIT:
                products_done(ASM)
            weights = _load_weights(u_ptrs, k < end - k0, columns, EVEN_K, MASK_N, TRANSPOSED)
            if WIDENED:
                weights = widened(weights, rows.dtype, ASM)
            acc_up = dot(rows, weights, acc_up, SWAP, TRANSPOSED)
            u_ptrs += BK * w_stride if TRANSPOSED else BK
        a_ptrs += BK
        w_ptrs += BK * w_stride if TRANSPOSED else BK
    return acc, acc_up


@jit(do_not_specialize=("S",))
def expert_gemm_kernel(
    a, w, u, out, a_scale, w_scale, u_scale, w_zero, u_zero, w_bias, u_bias, slot_weight,
    row_sums, out_sums, ids, slots, tile_expert, tile_group, tile_count,
    S, E, N, K, row_div, a_stride, w_stride_e, w_stride, w_rows, gate_row, up_row,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, FMT: tl.constexpr, ZERO: tl.constexpr, TRANSPOSED: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, SLOT: tl.constexpr, BIAS: tl.constexpr, PAIRS_APART: tl.constexpr,
    GROUP_BYTES: tl.constexpr, UNROLL: tl.constexpr, SHIFTED: tl.constexpr, SUM_BLOCK: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr, ROUTED: tl.constexpr,
    SP: tl.constexpr, DIGITS: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
    WAIT: tl.constexpr,
):  # fmt: skip
    """out[s, n] for the slots s of every tile.

    a [*, K] with row s // row_div for slot s (int4: the even inputs, then the odd ones). w (and u, if GATED is "two" or
    "halves"): the weights, gate_row and up_row the rows at which gate and up begin. FMT: "plain" (w of a's dtype),
    "widened" (int8 or float8, times w_scale [E, w_rows]), "dynamic" (a too, times a_scale [*]), "int4".
    DIGITS: a [*, 3, K] is rows in digits (see triton_digits.py), times a_scale; "dynamic" and "int4" only.
    SPLIT: out [S, SPLIT, N], of which every one has its part of K; without bias or activation only.
    EARLY: the kernel before this one made rows, their scales and sums only, so that the rest is read while it runs.
    WAIT: weights are widened to be the left operand of products by whole warp groups (see products_done).
    PAIRS_APART: the result has the even columns first, as an int4 projection reads its inputs; with its sums over
    blocks of SUM_BLOCK columns in out_sums, if that is not 0. SHIFTED: such sums of the rows of a are in row_sums, one
    for each group's even inputs, then one for each group's odd ones.
    """
    if not EARLY:
        after_previous(OVERLAP)
    pid = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    num_n = tl.cdiv(N, BN)
    if ROUTED == "tiles":  # noqa: SIM102 (what the compiler knows beforehand is asked apart)
        if pid >= tl.load(tile_count) * num_n:
            if EARLY:
                after_previous(OVERLAP)
            return
    pid_n, expert, slot, there = _rows_of_tile(
        ids, slots, tile_expert, tile_group, pid, num_n, S, E, ROUTED, SP, BM, GROUP_M
    )
    if (expert < 0) | (expert >= E):
        if EARLY:
            after_previous(OVERLAP)
        return
    e = expert.to(tl.int64)
    source = (slot // row_div).to(tl.int64)
    # As the product takes them, rows are MV: those of the tile; or four times as many, the three digits of each.
    MV: tl.constexpr = 4 * BM if DIGITS else BM
    if DIGITS:
        digit = tl.arange(0, MV) // BM
        read = tl.reshape(tl.broadcast_to(there[None, :], (4, BM)), (MV,)) & (digit < 3)
        a_first = tl.reshape(tl.broadcast_to(source[None, :], (4, BM)), (MV,)) * a_stride + digit * K
    else:
        read = there
        a_first = source * a_stride

    # The columns of this tile, and the rows of the weights that make them.
    WIDE: tl.constexpr = 2 * BN if GATED == "interleaved" else BN
    j = tl.arange(0, WIDE)
    if GATED == "interleaved":
        c = pid_n * BN + j // 2
    else:
        c = pid_n * BN + j
    # Columns beyond the last are the last again; where columns lie side by side in memory, that would keep them from
    # being read together, and they are not read instead.
    MASK_N: tl.constexpr = TRANSPOSED and EVEN_N == 0
    if EVEN_N == 0 and not MASK_N:
        c = tl.minimum(c, N - 1)
    if PAIRS_APART:
        c = tl.where(c < N // 2, 2 * c, 2 * c - N + 1)
    if GATED == "interleaved":
        if PAIRS_APART or (EVEN_N == 0 and not MASK_N):
            r = 2 * c + j % 2
        else:
            r = pid_n * WIDE + j
    else:
        r = c
    columns_there = r < (2 * N if GATED == "interleaved" else N)
    TWO: tl.constexpr = GATED == "halves" or GATED == "two"
    r_gate = r + gate_row
    r_up = r + up_row
    INTEGER: tl.constexpr = FMT == "dynamic" and a.dtype.element_ty == tl.int8
    acc = tl.zeros((WIDE, MV) if SWAP else (MV, WIDE), tl.int32 if INTEGER else tl.float32)
    acc_up = acc

    # What is counted along K: inputs, or bytes of two; and which of them are this program's.
    length = K // 2 if FMT == "int4" else K
    begin = 0
    end = length
    if SPLIT > 1:
        STEP: tl.constexpr = BK * UNROLL
        begin = part * tl.cdiv(tl.cdiv(length, STEP), SPLIT) * STEP
        end = tl.minimum(length, begin + tl.cdiv(tl.cdiv(length, STEP), SPLIT) * STEP)
    k = begin + tl.arange(0, BK)
    a_ptrs = a + a_first[:, None] + k[None, :]
    if TRANSPOSED:
        w_ptrs = w + e * w_stride_e + k.to(tl.int64)[:, None] * w_stride + r_gate[None, :]
        u_ptrs = u + e * w_stride_e + k.to(tl.int64)[:, None] * w_stride + r_up[None, :]
    else:
        w_ptrs = w + e * w_stride_e + r_gate.to(tl.int64)[:, None] * w_stride + k[None, :]
        u_ptrs = u + e * w_stride_e + r_up.to(tl.int64)[:, None] * w_stride + k[None, :]

    # What the end needs is read before the loop, while that waits for weights; not for many rows, which need registers.
    first = e * w_rows
    gate_scaled = r_gate
    up_scaled = r_up
    if MASK_N:
        gate_scaled = tl.minimum(r_gate, w_rows - 1)
        up_scaled = tl.minimum(r_up, w_rows - 1)
    if BM <= 16:
        scale, bias = of_columns(w_scale + first, w_bias + first, gate_scaled, FMT, BIAS)
        if TWO:
            scale_up, bias_up = of_columns(u_scale + first, u_bias + first, up_scaled, FMT, BIAS)
    if EARLY:
        after_previous(OVERLAP)

    if FMT == "int4":
        groups = length // GROUP_BYTES
        acc, acc_up = int4_products(
            a_ptrs, w_ptrs, u_ptrs, row_sums + source * (2 * groups), w_scale, u_scale, w_zero, u_zero,
            (e * w_rows + r_gate) * groups, (e * w_rows + r_up) * groups, read, there, begin, end, length, acc, acc_up,
            TWO, SWAP, BM < 64, ZERO, SHIFTED, DIGITS, WAIT, ASM, BK, UNROLL, GROUP_BYTES,
        )  # fmt: skip
    else:
        acc, acc_up = _products(
            a_ptrs, w_ptrs, u_ptrs, w_stride, read, columns_there, begin, end, acc, acc_up,
            TWO, FMT == "widened", SWAP, TRANSPOSED, EVEN_K, MASK_N, WAIT, ASM, BK,
        )  # fmt: skip

    # Not before: programs of the next kernel that were set up while some of this one's had ended would crowd there.
    before_next(OVERLAP)
    if SWAP:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    SCALED: tl.constexpr = FMT == "dynamic" or DIGITS
    if DIGITS:
        acc = joined(acc, BM, FMT)
        acc_up = joined(acc_up, BM, FMT)
    row_scale = tl.load(a_scale + source, mask=there, other=0.0) if SCALED else 1.0
    weight = tl.load(slot_weight + slot, mask=there, other=0.0).to(tl.float32) if SLOT != 0 else 1.0
    if BM > 16:
        scale, bias = of_columns(w_scale + first, w_bias + first, gate_scaled, FMT, BIAS)
        if TWO:
            scale_up, bias_up = of_columns(u_scale + first, u_bias + first, up_scaled, FMT, BIAS)
    acc = rescaled(acc, row_scale, scale, bias, weight, SCALED, FMT, SLOT, BIAS)
    if GATED == "interleaved":
        gate, up = tl.split(tl.reshape(acc, (BM, BN, 2)))
        acc = gated(gate, up, ACT, ALPHA, LIMIT)
    elif TWO:
        acc_up = rescaled(acc_up, row_scale, scale_up, bias_up, weight, SCALED, FMT, SLOT, BIAS)
        acc = gated(acc, acc_up, ACT, ALPHA, LIMIT)
    else:
        acc = activated(acc, ACT)
    columns = pid_n * BN + tl.arange(0, BN)
    result = acc.to(out.dtype.element_ty)
    to = out + (slot.to(tl.int64) * SPLIT + part)[:, None] * N + columns[None, :]
    tl.store(to, result, mask=there[:, None] & (columns < N)[None, :])
    if SUM_BLOCK != 0:
        parts = tl.sum(tl.reshape(result.to(tl.float32), (BM, BN // SUM_BLOCK, SUM_BLOCK)), 2)
        block = pid_n * (BN // SUM_BLOCK) + tl.arange(0, BN // SUM_BLOCK)
        to = out_sums + slot.to(tl.int64)[:, None] * (N // SUM_BLOCK) + block[None, :]
        tl.store(to, parts, mask=there[:, None] & (block < N // SUM_BLOCK)[None, :])
