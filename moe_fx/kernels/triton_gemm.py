"""The grouped GEMM of one projection: gathered rows times their experts' weights, in every format, with the epilogue.

A tile is BM rows of one expert times BN output columns. Which rows: those that were sorted by expert beforehand (see
:mod:`moe_fx.kernels.triton_routing`); or, for few slots and without any routing kernel, a tile stands for one slot, and
takes in all slots of the same expert if its own is the first of them (ROUTED "leader"), or that slot and no other
("alone", for one token). Rows of the result are slots.

The definition is :func:`moe_fx.kernels.fused_experts.slot_linear_reference`.
"""

from __future__ import annotations

from moe_fx.kernels.triton_epilogue import activated, gated, rescaled
from moe_fx.kernels.triton_or_none import after_previous, before_next, jit, tl
from moe_fx.kernels.triton_unpack import dot, int4_step, widened

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
def _load_weights(ptrs, inputs, columns, EVEN_K: tl.constexpr, MASK_N: tl.constexpr, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        if MASK_N:
            mask = columns[None, :] if EVEN_K else inputs[:, None] & columns[None, :]
            return tl.load(ptrs, mask=mask, other=0.0)
        else:
            return tl.load(ptrs) if EVEN_K else tl.load(ptrs, mask=inputs[:, None], other=0.0)
    else:
        return tl.load(ptrs) if EVEN_K else tl.load(ptrs, mask=inputs[None, :], other=0.0)


@jit(do_not_specialize=("S",))
def expert_gemm_kernel(
    a, w, u, out, a_scale, w_scale, u_scale, w_zero, u_zero, w_bias, u_bias, slot_weight,
    row_sums, out_sums, ids, slots, tile_expert, tile_group, tile_count,
    S, E, N, K, row_div, a_stride, w_stride_e, w_stride, w_rows, gate_row, up_row,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, FMT: tl.constexpr, ZERO: tl.constexpr, TRANSPOSED: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, SLOT: tl.constexpr, BIAS: tl.constexpr, PAIRS_APART: tl.constexpr,
    GROUP_BYTES: tl.constexpr, UNROLL: tl.constexpr, SHIFTED: tl.constexpr, SUM_BLOCK: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr, ROUTED: tl.constexpr,
    SP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """out[s, n] for the slots s of every tile.

    a [*, K] with row s // row_div for slot s (int4: the even inputs, then the odd ones). w (and u, if GATED is "two" or
    "halves"): the weights, gate_row and up_row the rows at which gate and up begin. FMT: "plain" (w of a's dtype),
    "widened" (int8 or float8, times w_scale [E, w_rows]), "dynamic" (a too, times a_scale [*]), "int4".
    PAIRS_APART: the result has the even columns first, as an int4 projection reads its inputs; with its sums over
    blocks of SUM_BLOCK columns in out_sums, if that is not 0. SHIFTED: such sums of the rows of a are in row_sums, one
    for each group's even inputs, then one for each group's odd ones.
    """
    after_previous(OVERLAP)
    pid = tl.program_id(0)
    num_n = tl.cdiv(N, BN)
    m = tl.arange(0, BM)
    if ROUTED == "alone":
        pid_m = pid // num_n
        pid_n = pid % num_n
        expert = tl.load(ids + pid_m).to(tl.int32)
        if (expert < 0) | (expert >= E):
            return
        there = m == 0
        slot = tl.where(there, pid_m, S)
    elif ROUTED == "leader":
        pid_m = pid // num_n
        pid_n = pid % num_n
        expert = tl.load(ids + pid_m).to(tl.int32)
        s = tl.arange(0, SP)
        same = (tl.load(ids + s, mask=s < S, other=-1).to(tl.int32) == expert) & (s < S)
        rank = tl.cumsum(same.to(tl.int32), 0) - 1
        first = tl.sum(tl.where(s == pid_m, rank, 0), 0)
        if (expert < 0) | (expert >= E) | (first % BM != 0):
            return
        hit = same[None, :] & (rank[None, :] == (first + m)[:, None])
        there = tl.sum(hit.to(tl.int32), 1) > 0
        slot = tl.sum(tl.where(hit, s[None, :], 0), 1)
    else:
        num_m = tl.load(tile_count)
        if pid >= num_m * num_n:
            return
        pid_m, pid_n = tile_place(pid, num_n, tile_group, GROUP_M)
        expert = tl.load(tile_expert + pid_m)
        slot = tl.load(slots + pid_m * BM + m)
        there = slot < S
    e = expert.to(tl.int64)
    source = (slot // row_div).to(tl.int64)

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
    if SWAP:
        acc = tl.zeros((WIDE, BM), tl.int32 if FMT == "dynamic" and a.dtype.element_ty == tl.int8 else tl.float32)
    else:
        acc = tl.zeros((BM, WIDE), tl.int32 if FMT == "dynamic" and a.dtype.element_ty == tl.int8 else tl.float32)
    acc_up = acc

    k = tl.arange(0, BK)
    a_ptrs = a + source[:, None] * a_stride + k[None, :]
    if TRANSPOSED:
        w_ptrs = w + e * w_stride_e + k.to(tl.int64)[:, None] * w_stride + r_gate[None, :]
        u_ptrs = u + e * w_stride_e + k.to(tl.int64)[:, None] * w_stride + r_up[None, :]
    else:
        w_ptrs = w + e * w_stride_e + r_gate.to(tl.int64)[:, None] * w_stride + k[None, :]
        u_ptrs = u + e * w_stride_e + r_up.to(tl.int64)[:, None] * w_stride + k[None, :]

    if FMT == "int4":
        half = K // 2
        groups = half // GROUP_BYTES
        SCALE_ACC: tl.constexpr = BM < 64
        w_groups = (e * w_rows + r_gate) * groups
        u_groups = (e * w_rows + r_up) * groups
        # Scales are too narrow for asynchronous copies: each is loaded a step before it is needed.
        scale = tl.load(w_scale + w_groups)
        zero = tl.load(w_zero + w_groups) if ZERO else scale
        scale_up = tl.load(u_scale + u_groups) if TWO else scale
        zero_up = tl.load(u_zero + u_groups) if TWO and ZERO else scale
        sums = tl.zeros((BM,), tl.float32)
        sum_ptrs = row_sums + source * (2 * groups)
        for k0 in range(0, half, BK * UNROLL):
            for step in tl.static_range(UNROLL):
                low_rows = tl.load(a_ptrs + step * BK, mask=there[:, None], other=0.0)
                high_rows = tl.load(a_ptrs + (half + step * BK), mask=there[:, None], other=0.0)
                packed = tl.load(w_ptrs + step * BK)
                if SHIFTED:
                    group = k0 // BK + step
                    sums = tl.load(sum_ptrs + group, mask=there, other=0.0)
                    sums += tl.load(sum_ptrs + groups + group, mask=there, other=0.0)
                following = tl.minimum(k0 + (step + 1) * BK, half - 1) // GROUP_BYTES
                next_scale = tl.load(w_scale + w_groups + following)
                next_zero = tl.load(w_zero + w_groups + following) if ZERO else next_scale
                acc = int4_step(
                    low_rows, high_rows, sums, packed, scale, zero, acc, SWAP, SCALE_ACC, ZERO, SHIFTED, ASM
                )
                scale = next_scale
                zero = next_zero
                if TWO:
                    packed = tl.load(u_ptrs + step * BK)
                    next_scale = tl.load(u_scale + u_groups + following)
                    next_zero = tl.load(u_zero + u_groups + following) if ZERO else next_scale
                    acc_up = int4_step(
                        low_rows, high_rows, sums, packed, scale_up, zero_up, acc_up,
                        SWAP, SCALE_ACC, ZERO, SHIFTED, ASM,
                    )  # fmt: skip
                    scale_up = next_scale
                    zero_up = next_zero
            a_ptrs += BK * UNROLL
            w_ptrs += BK * UNROLL
            u_ptrs += BK * UNROLL
    else:
        for k0 in range(0, K, BK):
            if EVEN_K:
                rows = tl.load(a_ptrs, mask=there[:, None], other=0.0)
            else:
                rows = tl.load(a_ptrs, mask=there[:, None] & (k[None, :] < K - k0), other=0.0)
            weights = _load_weights(w_ptrs, k < K - k0, columns_there, EVEN_K, MASK_N, TRANSPOSED)
            if FMT == "widened":
                weights = widened(weights, rows.dtype, ASM)
            acc = dot(rows, weights, acc, SWAP, TRANSPOSED)
            if TWO:
                weights = _load_weights(u_ptrs, k < K - k0, columns_there, EVEN_K, MASK_N, TRANSPOSED)
                if FMT == "widened":
                    weights = widened(weights, rows.dtype, ASM)
                acc_up = dot(rows, weights, acc_up, SWAP, TRANSPOSED)
                u_ptrs += BK * w_stride if TRANSPOSED else BK
            a_ptrs += BK
            w_ptrs += BK * w_stride if TRANSPOSED else BK

    # Not before: programs of the next kernel that were set up while some of this one's had ended would crowd there.
    before_next(OVERLAP)
    if SWAP:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    row_scale = tl.load(a_scale + source, mask=there, other=0.0) if FMT == "dynamic" else 1.0
    weight = tl.load(slot_weight + slot, mask=there, other=0.0).to(tl.float32) if SLOT != 0 else 1.0
    first = e * w_rows
    if MASK_N:
        r_gate = tl.minimum(r_gate, w_rows - 1)
        r_up = tl.minimum(r_up, w_rows - 1)
    acc = rescaled(acc, row_scale, w_scale + first, w_bias + first, weight, r_gate, FMT, SLOT, BIAS)
    if GATED == "interleaved":
        gate, up = tl.split(tl.reshape(acc, (BM, BN, 2)))
        acc = gated(gate, up, ACT, ALPHA, LIMIT)
    elif TWO:
        acc_up = rescaled(acc_up, row_scale, u_scale + first, u_bias + first, weight, r_up, FMT, SLOT, BIAS)
        acc = gated(acc, acc_up, ACT, ALPHA, LIMIT)
    else:
        acc = activated(acc, ACT)
    columns = pid_n * BN + tl.arange(0, BN)
    result = acc.to(out.dtype.element_ty)
    to = out + slot.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(to, result, mask=there[:, None] & (columns < N)[None, :])
    if SUM_BLOCK != 0:
        parts = tl.sum(tl.reshape(result.to(tl.float32), (BM, BN // SUM_BLOCK, SUM_BLOCK)), 2)
        block = pid_n * (BN // SUM_BLOCK) + tl.arange(0, BN // SUM_BLOCK)
        to = out_sums + slot.to(tl.int64)[:, None] * (N // SUM_BLOCK) + block[None, :]
        tl.store(to, parts, mask=there[:, None] & (block < N // SUM_BLOCK)[None, :])
