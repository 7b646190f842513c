"""One token's rows times the weights of its experts, as sums of products: no tile of rows, no matrix instruction.

With a token alone nothing is read twice, so that what counts is how many bytes are under way: a program multiplies all
inputs of a few columns, and there are enough programs to keep memory busy. The second projection sums over slots at
once, so that two kernels make the layer.

The definition is :func:`moe_fx.kernels.fused_experts.fused_experts_reference`.
"""

from __future__ import annotations

from moe_fx.kernels.triton_epilogue import activated, gated
from moe_fx.kernels.triton_or_none import after_previous, before_next, jit, tl
from moe_fx.kernels.triton_unpack import widened

__all__ = ["token_kernel"]


@jit()
def _products(rows, weights, VEC: tl.constexpr, ASM: tl.constexpr):
    """[SP, BN, BK // VEC]: rows [SP, 1, BK] times weights [SP, BN, BK], added within what a thread holds."""
    if ASM and weights.dtype == tl.int8:
        weights = widened(weights, tl.bfloat16, ASM)
    products = weights.to(tl.float32) * rows
    return tl.sum(tl.reshape(products, (weights.shape[0], weights.shape[1], weights.shape[2] // VEC, VEC)), 3)


@jit()
def _scaled(acc, scales, bias, at, weight, there, SCALED: tl.constexpr, SLOT: tl.constexpr, BIAS: tl.constexpr):
    """As :func:`moe_fx.kernels.triton_epilogue.rescaled`, where every row has an expert of its own: at [SP, BN]."""
    if SCALED:
        acc = acc * tl.load(scales + at, mask=there, other=0.0)
    if SLOT == 1:
        acc = acc * weight[:, None]
    if BIAS:
        acc = acc + tl.load(bias + at, mask=there, other=0.0).to(tl.float32)
    if SLOT == 2:
        acc = acc * weight[:, None]
    return acc


@jit()
def token_kernel(
    a, w, u, out, w_scale, u_scale, w_bias, u_bias, slot_weight, ids,
    E, N, K, row_div, a_stride, w_stride_e, w_stride, w_rows, gate_row, up_row,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, SCALED: tl.constexpr, TRANSPOSED: tl.constexpr, GATED: tl.constexpr,
    ACT: tl.constexpr, SLOT: tl.constexpr, BIAS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    ASM: tl.constexpr, OVERLAP: tl.constexpr, SUM: tl.constexpr, SLOTS: tl.constexpr, SP: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """out[s, n] for a slot s; if SUM, out[t, n], the sum of a token's SLOTS. SP: how many slots a program takes.

    The operands are those of expert_gemm_kernel; SCALED: w [E, w_rows, K] of one byte, times w_scale [E, w_rows].
    """
    # The sum follows the kernel that makes its rows: which experts they are of was known before that.
    if not SUM:
        after_previous(OVERLAP)
    num_n = tl.cdiv(N, BN)
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
    source = a + (slot // row_div).to(tl.int64)[:, None] * a_stride

    WIDE: tl.constexpr = 2 * BN if GATED == "interleaved" else BN
    TWO: tl.constexpr = GATED == "halves" or GATED == "two"
    r = pid_n * WIDE + tl.arange(0, WIDE)
    valid = there[:, None]
    if EVEN_N == 0:
        valid = valid & (r < (2 * N if GATED == "interleaved" else N))[None, :]
    k = tl.arange(0, BK)
    if TRANSPOSED:
        at = e[:, None, None] * w_stride_e + k.to(tl.int64)[None, None, :] * w_stride
        w_ptrs = w + at + (r + gate_row)[None, :, None]
        u_ptrs = u + at + (r + up_row)[None, :, None]
    else:
        at = e[:, None, None] * w_stride_e + k[None, None, :]
        w_ptrs = w + at + (r + gate_row).to(tl.int64)[None, :, None] * w_stride
        u_ptrs = u + at + (r + up_row).to(tl.int64)[None, :, None] * w_stride
    acc = tl.zeros((SP, WIDE, BK // VEC), tl.float32)
    acc_up = acc
    if SUM:
        after_previous(OVERLAP)
    for k0 in range(0, K, BK):
        mask = valid[:, :, None]
        if EVEN_K == 0:
            mask = mask & (k0 + k < K)[None, None, :]
        weights = tl.load(w_ptrs, mask=mask, other=0.0)
        if TWO:
            weights_up = tl.load(u_ptrs, mask=mask, other=0.0)
        rows = tl.load(source + k0 + k[None, :], mask=there[:, None] & (k0 + k < K)[None, :], other=0.0)
        rows = rows.to(tl.float32)[:, None, :]
        acc += _products(rows, weights, VEC, ASM)
        if TWO:
            acc_up += _products(rows, weights_up, VEC, ASM)
        w_ptrs += BK * w_stride if TRANSPOSED else BK
        u_ptrs += BK * w_stride if TRANSPOSED else BK

    before_next(OVERLAP)
    weight = tl.load(slot_weight + slot, mask=there, other=0.0).to(tl.float32) if SLOT != 0 else 1.0
    first = e[:, None] * w_rows + r[None, :]
    total = _scaled(tl.sum(acc, 2), w_scale, w_bias, first + gate_row, weight, valid, SCALED, SLOT, BIAS)
    if GATED == "interleaved":
        gate, up = tl.split(tl.reshape(total, (SP, BN, 2)))
        total = gated(gate, up, ACT, ALPHA, LIMIT)
    elif TWO:
        up = _scaled(tl.sum(acc_up, 2), u_scale, u_bias, first + up_row, weight, valid, SCALED, SLOT, BIAS)
        total = gated(total, up, ACT, ALPHA, LIMIT)
    else:
        total = activated(total, ACT)
    # In float32; where there is no expert, nothing is added.
    result = tl.sum(tl.where(there[:, None], total, 0.0), 0).to(out.dtype.element_ty)
    columns = pid_n * BN + tl.arange(0, BN)
    tl.store(out + row.to(tl.int64) * N + columns, result, mask=columns < N)
