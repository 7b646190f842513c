"""A few tokens' rows times the weights of their experts, as sums of products: no tile of rows, no matrix instruction.

Where hardly any weight is read twice, what counts is how many bytes are under way: a program multiplies all
inputs of a few columns, and there are enough programs to keep memory busy. The second projection sums over slots at
once, so that two kernels make the layer.

The definition is :func:`moe_fx.kernels.fused_experts.fused_experts_reference`.
"""

from __future__ import annotations

from moe_fx.kernels.triton_blocks import integer_products, store_blocks
from moe_fx.kernels.triton_epilogue import activated, gated
from moe_fx.kernels.triton_or_none import after_previous, before_next, jit, tl
from moe_fx.kernels.triton_token_float8 import float8_products, largest_of_tile

__all__ = ["token_kernel"]


@jit()
def _sums_of_products(rows, weights, VEC: tl.constexpr):
    """[SP, BN, BK // VEC]: rows [SP, 1, BK] times weights [SP, BN, BK], added within what a thread holds."""
    products = weights.to(tl.float32) * rows
    return tl.sum(tl.reshape(products, (weights.shape[0], weights.shape[1], weights.shape[2] // VEC, VEC)), 3)


@jit()
def _of_columns(scales, bias, at, there, SCALED: tl.constexpr, BIAS: tl.constexpr):
    """As :func:`moe_fx.kernels.triton_epilogue.of_columns`, where every row has an expert of its own: at [SP, BN]."""
    scale = 1.0
    added = 0.0
    if SCALED:
        scale = tl.load(scales + at, mask=there, other=0.0)
    if BIAS:
        added = tl.load(bias + at, mask=there, other=0.0).to(tl.float32)
    return scale, added


@jit()
def _scaled(acc, scale, bias, weight, SCALED: tl.constexpr, SLOT: tl.constexpr, BIAS: tl.constexpr):
    """As :func:`moe_fx.kernels.triton_epilogue.rescaled`, of [SP, BN] each."""
    if SCALED:
        acc = acc * scale
    if SLOT == 1:
        acc = acc * weight[:, None]
    if BIAS:
        acc = acc + bias
    if SLOT == 2:
        acc = acc * weight[:, None]
    return acc


@jit()
def _float_products(
    a, w, u, source, there, at, at_up, valid, K, w_stride, TRANSPOSED: tl.constexpr, TWO: tl.constexpr,
    EVEN_K: tl.constexpr, BK: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[SP, N] float32, twice: the rows of a at source [SP] times what begins at ``at`` and ``at_up`` [SP, N] of w, u.

    there [SP], valid [SP, N]: which are. STAGES: how many steps are loaded ahead, into shared memory; 1: none.
    """
    k = tl.arange(0, BK)
    if TRANSPOSED:
        w_ptrs = w + at[:, :, None] + k.to(tl.int64)[None, None, :] * w_stride
        u_ptrs = u + at_up[:, :, None] + k.to(tl.int64)[None, None, :] * w_stride
    else:
        w_ptrs = w + at[:, :, None] + k[None, None, :]
        u_ptrs = u + at_up[:, :, None] + k[None, None, :]
    acc = tl.zeros((at.shape[0], at.shape[1], BK // VEC), tl.float32)
    acc_up = acc
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        mask = valid[:, :, None]
        if EVEN_K == 0:
            mask = mask & (k0 + k < K)[None, None, :]
        weights = tl.load(w_ptrs, mask=mask, other=0.0)
        if TWO:
            weights_up = tl.load(u_ptrs, mask=mask, other=0.0)
        rows = tl.load(a + source[:, None] + k0 + k[None, :], mask=there[:, None] & (k0 + k < K)[None, :], other=0.0)
        rows = rows.to(tl.float32)[:, None, :]
        acc += _sums_of_products(rows, weights, VEC)
        if TWO:
            acc_up += _sums_of_products(rows, weights_up, VEC)
        w_ptrs += BK * w_stride if TRANSPOSED else BK
        u_ptrs += BK * w_stride if TRANSPOSED else BK
    return tl.sum(acc, 2), tl.sum(acc_up, 2)


@jit()
def token_kernel(
    a, w, u, out, a_extra, out_extra, w_scale, u_scale, w_bias, u_bias, slot_weight, ids,
    E, N, K, row_div, a_stride, w_stride_e, w_stride, w_rows, gate_row, up_row, tiles,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr, GATED: tl.constexpr,
    ACT: tl.constexpr, SLOT: tl.constexpr, BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    ASM: tl.constexpr, OVERLAP: tl.constexpr, SUM: tl.constexpr, SLOTS: tl.constexpr, SP: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, MADE: tl.constexpr, GROUP: tl.constexpr,
    MOST: tl.constexpr, BOUND: tl.constexpr, SMALLEST: tl.constexpr, OUT: tl.constexpr, HALF: tl.constexpr,
    STAGES: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out[s, n] for a slot s; if SUM, out[t, n], the sum of a token's SLOTS. SP: how many slots a program takes.

    The operands are those of expert_gemm_kernel; SCALED: w [E, w_rows, K] of one byte, times w_scale [E, w_rows].
    ROWS says how rows are multiplied: "plain"; in "digits", w being integers, int4 where GROUP inputs share a scale
    (see triton_blocks.py); or in "float8" (see triton_token_float8.py), quantized to at most BOUND, with scales of at
    least SMALLEST, their largest numbers being among MOST values. BK of these two is in words of four bytes. MADE: the
    kernel before left more than rows a: digits [*, 2 * K] with scales a_extra [*, K / 16], or the largest numbers of
    its ``tiles`` in a_extra [*, tiles]. OUT: what this one leaves, "plain", as "digits" or "digits apart" (the even
    columns first), or with "largest"; out_extra is then a_extra of the next. HALF: digits are of the result in float16,
    not bfloat16. TOGETHER: the rows of one column tile come one after the other.
    """
    # The sum follows the kernel that makes its rows: which experts they are of was known before that.
    if not SUM:
        after_previous(OVERLAP)
    num_n = tl.cdiv(N, BN)
    if TOGETHER:
        count = tl.num_programs(0) // num_n
        row = tl.program_id(0) % count
        pid_n = tl.program_id(0) // count
    else:
        row = tl.program_id(0) // num_n
        pid_n = tl.program_id(0) % num_n
    s = tl.arange(0, SP)
    slot = row * SLOTS + s
    expert = tl.load(ids + slot, mask=s < SLOTS, other=-1).to(tl.int64)
    there = (expert >= 0) & (expert < E)
    if not SUM:  # noqa: SIM102 (what the compiler knows beforehand is asked apart)
        if tl.sum(there.to(tl.int32), 0) == 0:
            return
    e = tl.where(there, expert, 0)
    source = tl.where(there, slot // row_div, 0).to(tl.int64)

    WIDE: tl.constexpr = 2 * BN if GATED == "interleaved" else BN
    TWO: tl.constexpr = GATED == "halves" or GATED == "two"
    r = pid_n * WIDE + tl.arange(0, WIDE)
    valid = there[:, None]
    if EVEN_N == 0:
        valid = valid & (r < (2 * N if GATED == "interleaved" else N))[None, :]
    first = e[:, None] * w_rows + r[None, :]
    # What follows the products is read ahead of them: at the end, nothing would hide how long it takes.
    weight = tl.load(slot_weight + slot, mask=there, other=0.0).to(tl.float32) if SLOT != 0 else 1.0
    scale, added = _of_columns(w_scale, w_bias, first + gate_row, valid, SCALED, BIAS)
    if TWO:
        scale_up, added_up = _of_columns(u_scale, u_bias, first + up_row, valid, SCALED, BIAS)
    if SUM:
        after_previous(OVERLAP)
    MASKED: tl.constexpr = EVEN_N == 0 or EVEN_K == 0 or SP != SLOTS
    if ROWS == "digits":
        acc, acc_up = integer_products(
            a, a_extra, w, u, w_scale, u_scale, source, a_stride, first + gate_row, first + up_row, valid, K,
            MADE, GROUP, TWO, MASKED, EVEN_K, ASM, BK,
        )  # fmt: skip
    elif ROWS == "float8":
        acc, acc_up = float8_products(
            a, a_extra, w, u, source, a_stride, first + gate_row, first + up_row, valid, K, tiles,
            MADE, MOST, BOUND, SMALLEST, TWO, MASKED, EVEN_K, ASM, BK,
        )  # fmt: skip
    else:
        across = 1 if TRANSPOSED else w_stride
        at = e[:, None] * w_stride_e + (r + gate_row).to(tl.int64)[None, :] * across
        at_up = e[:, None] * w_stride_e + (r + up_row).to(tl.int64)[None, :] * across
        acc, acc_up = _float_products(
            a, w, u, source * a_stride, there, at, at_up, valid, K, w_stride, TRANSPOSED, TWO, EVEN_K, BK, VEC,
            STAGES,
        )  # fmt: skip

    before_next(OVERLAP)
    total = _scaled(acc, scale, added, weight, SCALED, SLOT, BIAS)
    if GATED == "interleaved":
        gate, up = tl.split(tl.reshape(total, (SP, BN, 2)))
        total = gated(gate, up, ACT, ALPHA, LIMIT)
    elif TWO:
        up = _scaled(acc_up, scale_up, added_up, weight, SCALED, SLOT, BIAS)
        total = gated(total, up, ACT, ALPHA, LIMIT)
    else:
        total = activated(total, ACT)
    # In float32; where there is no expert, nothing is added.
    result = tl.sum(tl.where(there[:, None], total, 0.0), 0)
    columns = pid_n * BN + tl.arange(0, BN)
    if OUT == "digits" or OUT == "digits apart":
        rounded = result.to(tl.float16 if HALF else tl.bfloat16).to(tl.float32)
        to = row.to(tl.int64) * N
        blocks = tl.reshape(rounded, (BN // 16, 16))
        store_blocks(blocks, out + 2 * to, out_extra + to // 16, pid_n * BN, N, OUT == "digits apart")
    else:
        rounded = result.to(out.dtype.element_ty)
        tl.store(out + row.to(tl.int64) * N + columns, rounded, mask=columns < N)
        if OUT == "largest":
            largest = largest_of_tile(tl.where(columns < N, rounded.to(tl.float32), 0.0))
            tl.store(out_extra + row.to(tl.int64) * num_n + pid_n + tl.arange(0, 1), largest)
