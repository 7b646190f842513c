"""The grouped GEMM for many rows per expert: weights, and rows that were sorted, come by the tensor memory accelerator.

One instruction copies a whole tile (Hopper's cp.async.bulk.tensor), so that what is left to the threads is to multiply.
Tensor descriptors are made on the host, and only by ops that a compiler does not look into. Rows of the result are
slots, or places of tiles, which the next product reads as they lie. An expert's last tile is multiplied by half, if no
more of it is filled (HALF). Weights of one byte, and int4, are widened in the registers from which a matrix instruction
takes its left operand: see docs/design.md for what their order of calls is about.

The definition is :func:`moe_fx.kernels.fused_experts.slot_linear_reference`.
"""

from __future__ import annotations

from moe_fx.kernels.triton_epilogue import activated, column_halves, gated, of_columns, rescaled
from moe_fx.kernels.triton_gemm import tile_place
from moe_fx.kernels.triton_or_none import after_previous, before_next, jit, tl
from moe_fx.kernels.triton_rows import store_columns
from moe_fx.kernels.triton_unpack import dot, products_done, word_to_float

__all__ = ["large_gemm_kernel"]


@jit()
def _gathered(a_ptrs, k0, there, K, EVEN_K: tl.constexpr, BK: tl.constexpr):
    if EVEN_K:
        return tl.load(a_ptrs + k0, mask=there[:, None], other=0.0)
    else:
        return tl.load(a_ptrs + k0, mask=there[:, None] & (k0 + tl.arange(0, BK) < K)[None, :], other=0.0)


@jit()
def _large_products(
    a, a_ptrs, w, u, row, first, first_up, there, K, acc, acc_up,
    BITS: tl.constexpr, TWO: tl.constexpr, GATHER: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr,
    ASM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """acc and acc_up, and what the rows from ``row`` on (or at a_ptrs, if GATHER) make with those of w and u."""
    # Were the loop left out, what products add to would be written beside them, and they would be made one by one.
    tl.assume(K > 0)
    for k0 in range(0, K, BK):
        if GATHER:
            rows = _gathered(a_ptrs, k0, there, K, EVEN_K, BK)
        else:
            rows = a.load([row, k0])
        if BITS != 0:
            products_done(ASM)
        # Both weights are widened ahead of both products, which follow one another without a pause.
        weights = w.load([first, k0])
        if BITS != 0:
            weights = word_to_float(weights, rows.dtype, BITS, 0, ASM)
        if TWO:
            weights_up = u.load([first_up, k0])
            if BITS != 0:
                weights_up = word_to_float(weights_up, rows.dtype, BITS, 0, ASM)
        acc = dot(rows, weights, acc, SWAP, False)
        if TWO:
            acc_up = dot(rows, weights_up, acc_up, SWAP, False)
    return acc, acc_up


@jit()
def _joined_products(
    a, a_ptrs, w, row, outer, inner, there, K, acc, GATHER: tl.constexpr, EVEN_K: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """The same of gate and up of one weight, at w [outer, inner, :]: one product, of which a matrix instruction makes
    twice as many columns and reads the rows once.
    """
    tl.assume(K > 0)
    for k0 in range(0, K, BK):
        if GATHER:
            rows = _gathered(a_ptrs, k0, there, K, EVEN_K, BK)
        else:
            rows = a.load([row, k0])
        acc = dot(rows, tl.reshape(w.load([outer, inner, k0]), (2 * BN, BK)), acc, False, False)
    return acc


@jit()
def _pair(w, dtype: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    return word_to_float(w, dtype, BITS, 0, ASM), word_to_float(w, dtype, BITS, 1, ASM)


@jit()
def _pair_products(
    a, w, u, w_scale, u_scale, row, first, first_up, last, K, acc, acc_up,
    TWO: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, EVERY: tl.constexpr, SCALE_ACC: tl.constexpr,
    ASM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same for words of two weights, which are widened: rows have their even inputs first, then the odd ones.

    GROUP (int4): a step is within so many inputs, whose scale multiplies the products of few rows (SCALE_ACC), or the
    weights of many.
    """
    half = K // 2
    tl.assume(half > 0)
    if GROUP != 0:
        groups = K // GROUP
        n = tl.arange(0, BN)
        # Rows beyond the last weight's are of no use, and have no scale.
        scales = w_scale + tl.minimum(first + n, last).to(tl.int64) * EVERY * groups
        scales_up = u_scale + (tl.minimum(first_up + n, last).to(tl.int64) * EVERY + (EVERY - 1)) * groups
    for k0 in range(0, half, BK):
        even = a.load([row, k0])
        odd = a.load([row, k0 + half])
        products_done(ASM)
        low, high = _pair(w.load([first, k0]), even.dtype, BITS, ASM)
        if TWO:
            low_up, high_up = _pair(u.load([first_up, k0]), even.dtype, BITS, ASM)
        if GROUP != 0:
            scale = tl.load(scales + k0 * 2 // GROUP)
            if TWO:
                scale_up = tl.load(scales_up + k0 * 2 // GROUP)
        if SCALE_ACC:
            part = dot(odd, high, dot(even, low, tl.zeros(acc.shape, tl.float32), True, False), True, False)
            if TWO:
                part_up = tl.zeros(acc.shape, tl.float32)
                part_up = dot(odd, high_up, dot(even, low_up, part_up, True, False), True, False)
                acc_up += part_up * scale_up.to(tl.float32)[:, None]
            acc += part * scale.to(tl.float32)[:, None]
        else:
            if GROUP != 0:
                low *= scale[:, None]
                high *= scale[:, None]
                if TWO:
                    low_up *= scale_up[:, None]
                    high_up *= scale_up[:, None]
            acc = dot(even, low, acc, True, False)
            if TWO:
                acc_up = dot(even, low_up, acc_up, True, False)
            acc = dot(odd, high, acc, True, False)
            if TWO:
                acc_up = dot(odd, high_up, acc_up, True, False)
    return acc, acc_up


@jit()
def _large_tile(
    a, w, u, out, a_scale, w_scale, u_scale, w_bias, u_bias, slot_weight, slots,
    S, N, K, row_div, a_stride, w_rows, gate_row, up_row, last, row, pid_n, expert,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, FMT: tl.constexpr, TWO: tl.constexpr, ACT: tl.constexpr,
    SLOT: tl.constexpr, BIAS: tl.constexpr, GATHER: tl.constexpr, SORTED: tl.constexpr, BITS: tl.constexpr,
    PAIRS: tl.constexpr, GROUP: tl.constexpr, PAIRS_APART: tl.constexpr, EVERY: tl.constexpr, EVEN_K: tl.constexpr,
    JOINED: tl.constexpr, HALVES: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    """The BM places from ``row`` on, times the columns of ``pid_n``; HALVES: which are stored in two parts."""
    m = tl.arange(0, BM)
    slot = tl.load(slots + row + m)
    there = slot < S
    source = (slot // row_div).to(tl.int64)
    first = expert * w_rows + pid_n * BN
    COLUMNS: tl.constexpr = 2 * BN if JOINED != "" else BN
    acc = tl.zeros((BN, BM) if SWAP else (BM, COLUMNS), tl.int32 if INT else tl.float32)
    acc_up = acc
    if JOINED != "":
        a_ptrs = a
        if GATHER:
            a_ptrs = a + source[:, None] * a_stride + tl.arange(0, BK)[None, :]
        outer = first if JOINED == "interleaved" else 2 * expert
        inner = 0 if JOINED == "interleaved" else pid_n * BN
        acc = _joined_products(a, a_ptrs, w, row, outer, inner, there, K, acc, GATHER, EVEN_K, BN, BK)
    elif PAIRS:
        acc, acc_up = _pair_products(
            a, w, u, w_scale, u_scale, row, first + gate_row, first + up_row, last, K, acc, acc_up,
            TWO, BITS, GROUP, EVERY, GROUP != 0 and BM <= 32, ASM, BN, BK,
        )  # fmt: skip
    else:
        a_ptrs = a
        if GATHER:
            a_ptrs = a + source[:, None] * a_stride + tl.arange(0, BK)[None, :]
        acc, acc_up = _large_products(
            a, a_ptrs, w, u, row, first + gate_row, first + up_row, there, K, acc, acc_up,
            BITS, TWO, GATHER, SWAP, EVEN_K, ASM, BK,
        )  # fmt: skip
    # Not before: programs of the next kernel that were set up while some of this one's had ended would crowd there.
    before_next(OVERLAP)
    if SWAP:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    if JOINED == "gate_up":
        acc, acc_up = column_halves(acc)
    elif JOINED == "up_gate":
        acc_up, acc = column_halves(acc)
    elif JOINED == "interleaved":
        acc, acc_up = tl.split(tl.reshape(acc, (BM, BN, 2)))
    column = tl.minimum(pid_n * BN + tl.arange(0, BN), N - 1) * EVERY
    scale_at = row + m if SORTED == "in" else source
    row_scale = tl.load(a_scale + scale_at, mask=there, other=0.0) if FMT == "dynamic" else 1.0
    weight = tl.load(slot_weight + slot, mask=there, other=0.0).to(tl.float32) if SLOT != 0 else 1.0
    # Without bias, a row's scale and its routing weight are one number.
    ONE: tl.constexpr = FMT == "dynamic" and SLOT != 0 and not BIAS
    if ONE:
        row_scale = row_scale * weight
    LEFT: tl.constexpr = 0 if ONE else SLOT
    e = expert.to(tl.int64) * w_rows * EVERY
    scale, bias = of_columns(w_scale + e, w_bias + e, column + gate_row, FMT, BIAS)
    acc = rescaled(acc, row_scale, scale, bias, weight, FMT == "dynamic", FMT, LEFT, BIAS)
    if TWO:
        scale, bias = of_columns(u_scale + e, u_bias + e, column + up_row + (EVERY - 1), FMT, BIAS)
        acc_up = rescaled(acc_up, row_scale, scale, bias, weight, FMT == "dynamic", FMT, LEFT, BIAS)
        acc = gated(acc, acc_up, ACT, ALPHA, LIMIT, ASM)
    else:
        acc = activated(acc, ACT, ASM)
    place = row + m if SORTED == "out" else slot
    to = out + place.to(tl.int64) * N
    result = acc.to(out.dtype.element_ty)
    if HALVES:
        low, high = column_halves(result)
        store_columns(to, pid_n * BN, low, there, N, PAIRS_APART)
        store_columns(to, pid_n * BN + BN // 2, high, there, N, PAIRS_APART)
    else:
        store_columns(to, pid_n * BN, result, there, N, PAIRS_APART)


@jit(do_not_specialize=("S",))
def large_gemm_kernel(
    a, a_half, w, u, out, a_scale, w_scale, u_scale, w_bias, u_bias, slot_weight,
    slots, tile_expert, tile_group, tile_count,
    S, N, K, row_div, a_stride, w_rows, gate_row, up_row, last,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, FMT: tl.constexpr, TWO: tl.constexpr, ACT: tl.constexpr,
    SLOT: tl.constexpr, BIAS: tl.constexpr, GATHER: tl.constexpr, SORTED: tl.constexpr, BITS: tl.constexpr,
    PAIRS: tl.constexpr, GROUP: tl.constexpr, PAIRS_APART: tl.constexpr, EVERY: tl.constexpr, EVEN_K: tl.constexpr,
    JOINED: tl.constexpr, HALF: tl.constexpr, PERSISTENT: tl.constexpr, ASM: tl.constexpr, OVERLAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    """As expert_gemm_kernel, for rows and weights of one dtype; or for weights of BITS, which are widened in registers.

    a: rows [*, K] of which slot s has row s // row_div (GATHER), or a descriptor of rows in the order of ``slots``, in
    blocks [BM, BK]; a_half: the same in blocks of half as many rows. SORTED: "out" if the result is in that order, "in"
    if a_scale is (otherwise it goes with the rows before they were sorted). w, u: descriptors of [E * w_rows, K] in
    blocks [BN, BK], of weights or (PAIRS) of words of two; rows then have their even inputs first, as the result has
    its even columns if PAIRS_APART. GROUP: how many inputs share a scale of int4. last: the last row of w or u.
    JOINED: "gate_up" or "up_gate": w is a descriptor of [2 * E, N, K] in blocks [2, BN, BK], gate and up in that order;
    "interleaved": of [E * N, 2, K] in blocks [BN, 2, BK]. EVERY: 2 if gate and up are every other row of a weight:
    w_rows is half of these then, gate_row and up_row are 0, and w and u, if not JOINED, descriptors of every other row.
    PERSISTENT: as many programs as run at once, each taking many tiles; otherwise one for each.
    """
    after_previous(OVERLAP)
    pid = tl.program_id(0)
    num_n = tl.cdiv(N, BN)
    total = tl.load(tile_count) * num_n
    if PERSISTENT:
        # Stored in two parts, a tile takes fewer registers beside what is loaded of the next one.
        for tile in tl.range(pid, total, tl.num_programs(0), flatten=True):
            pid_m, pid_n = tile_place(tile, num_n, tile_group, GROUP_M)
            _large_tile(
                a, w, u, out, a_scale, w_scale, u_scale, w_bias, u_bias, slot_weight, slots,
                S, N, K, row_div, a_stride, w_rows, gate_row, up_row, last, pid_m * BM, pid_n,
                tl.load(tile_expert + pid_m), ALPHA, LIMIT, FMT, TWO, ACT, SLOT, BIAS, GATHER, SORTED, BITS, PAIRS,
                GROUP, PAIRS_APART, EVERY, EVEN_K, JOINED, True, ASM, False, BM, BN, BK, SWAP, INT,
            )  # fmt: skip
    else:
        if pid >= total:
            return
        pid_m, pid_n = tile_place(pid, num_n, tile_group, GROUP_M)
        expert = tl.load(tile_expert + pid_m)
        if HALF:  # noqa: SIM102
            if tl.load(slots + pid_m * BM + BM // 2) >= S:
                _large_tile(
                    a_half, w, u, out, a_scale, w_scale, u_scale, w_bias, u_bias, slot_weight, slots,
                    S, N, K, row_div, a_stride, w_rows, gate_row, up_row, last, pid_m * BM, pid_n, expert,
                    ALPHA, LIMIT, FMT, TWO, ACT, SLOT, BIAS, GATHER, SORTED, BITS, PAIRS, GROUP, PAIRS_APART, EVERY,
                    EVEN_K, JOINED, False, ASM, OVERLAP, BM // 2, BN, BK, SWAP, INT,
                )  # fmt: skip
                return
        _large_tile(
            a, w, u, out, a_scale, w_scale, u_scale, w_bias, u_bias, slot_weight, slots,
            S, N, K, row_div, a_stride, w_rows, gate_row, up_row, last, pid_m * BM, pid_n, expert,
            ALPHA, LIMIT, FMT, TWO, ACT, SLOT, BIAS, GATHER, SORTED, BITS, PAIRS, GROUP, PAIRS_APART, EVERY, EVEN_K,
            JOINED, False, ASM, OVERLAP, BM, BN, BK, SWAP, INT,
        )  # fmt: skip
