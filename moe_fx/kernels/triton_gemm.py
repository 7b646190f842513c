"""The grouped GEMM of one projection: gathered rows times their experts' weights, in every format, with the epilogue.

A tile is BM rows of one expert times BN output columns. Which rows: either a tile stands for one slot, and takes in
all slots of the same expert if its own is the first of them (LEADER: no routing kernel at all, for few slots), or the
rows were sorted by expert beforehand (see :mod:`moe_fx.kernels.triton_routing`). Rows of the result are slots.

Weights are widened in registers. int8 and int4 to bfloat16 without a conversion instruction: 0x4300 + n is the
bfloat16 128 + n for n < 128, so a byte permutation and a subtraction make two weights at once (conversions from
integers run at a quarter of that rate, and would bound the kernel instead of memory).

The definition is :func:`moe_fx.kernels.fused_experts.slot_linear_reference`.
"""

from __future__ import annotations

from moe_fx.kernels.triton_or_none import jit, tl

__all__ = ["expert_gemm_kernel"]


@jit()
def _int8_to_float(w, dtype: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 a, b, c, d;
                prmt.b32 a, $2, 0x43434343, 0x4140;
                prmt.b32 b, $2, 0x43434343, 0x4342;
                and.b32 c, a, 0xff80ff80;
                and.b32 d, b, 0xff80ff80;
                and.b32 a, a, 0xff7fff7f;
                and.b32 b, b, 0xff7fff7f;
                sub.bf16x2 $0, a, c;
                sub.bf16x2 $1, b, d;
                }
                """,
                "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 a, b, c;
                xor.b32 c, $2, 0x80808080;
                prmt.b32 a, c, 0x64646464, 0x4140;
                prmt.b32 b, c, 0x64646464, 0x4342;
                mov.b32 c, 0x64806480;
                sub.f16x2 $0, a, c;
                sub.f16x2 $1, b, c;
                }
                """,
                "=r,=r,r", [w], dtype=tl.float16, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        return w.to(dtype)


@jit()
def _nibbles(w, dtype: tl.constexpr, ASM: tl.constexpr):
    """Bytes [BN, B] to what their low and their high four bits mean, less 8: two of [BN, B]."""
    if ASM:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 l, h, c, p, q, r, s;
                and.b32 l, $4, 0x0f0f0f0f;
                shr.u32 h, $4, 4;
                and.b32 h, h, 0x0f0f0f0f;
                prmt.b32 p, l, 0x43434343, 0x4140;
                prmt.b32 q, l, 0x43434343, 0x4342;
                prmt.b32 r, h, 0x43434343, 0x4140;
                prmt.b32 s, h, 0x43434343, 0x4342;
                mov.b32 c, 0x43084308;
                sub.bf16x2 $0, p, c;
                sub.bf16x2 $1, q, c;
                sub.bf16x2 $2, r, c;
                sub.bf16x2 $3, s, c;
                }
                """,
                "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """
                {
                .reg .b32 l, h, c, p, q, r, s;
                and.b32 l, $4, 0x0f0f0f0f;
                shr.u32 h, $4, 4;
                and.b32 h, h, 0x0f0f0f0f;
                prmt.b32 p, l, 0x64646464, 0x4140;
                prmt.b32 q, l, 0x64646464, 0x4342;
                prmt.b32 r, h, 0x64646464, 0x4140;
                prmt.b32 s, h, 0x64646464, 0x4342;
                mov.b32 c, 0x64086408;
                sub.f16x2 $0, p, c;
                sub.f16x2 $1, q, c;
                sub.f16x2 $2, r, c;
                sub.f16x2 $3, s, c;
                }
                """,
                "=r,=r,=r,=r,r", [w], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
    else:
        low = (w & 15).to(tl.float32) - 8.0
        high = (w >> 4).to(tl.float32) - 8.0
        return low.to(dtype), high.to(dtype)


@jit()
def _widened(w, dtype: tl.constexpr, ASM: tl.constexpr):
    if w.dtype == tl.int8:
        return _int8_to_float(w, dtype, ASM)
    else:
        return w.to(dtype)


@jit()
def _dot(a, w, acc, SWAP: tl.constexpr, TRANSPOSED: tl.constexpr):
    """acc + a @ w^T for a [BM, BK] and w [BN, BK] ([BK, BN] if TRANSPOSED); SWAP: the transpose of all that.

    Swapped, few rows become the narrow side of a wide matrix instruction, and weights its left operand.
    """
    if TRANSPOSED:
        w = tl.trans(w)
    if SWAP:
        return tl.dot(w, tl.trans(a), acc, out_dtype=acc.dtype)
    else:
        return tl.dot(a, tl.trans(w), acc, out_dtype=acc.dtype)


@jit()
def _int4_step(low_rows, high_rows, packed, scale, zero, acc, SWAP: tl.constexpr, SCALE_ACC: tl.constexpr,
               ZERO: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """One group of inputs: its scale [BN] multiplies the products of few rows, or the weights of many."""
    low, high = _nibbles(packed, low_rows.dtype, ASM)
    if ZERO:
        low -= zero.to(low.dtype)[:, None]
        high -= zero.to(low.dtype)[:, None]
    if SCALE_ACC:
        part = tl.zeros(acc.shape, tl.float32)
        part = _dot(low_rows, low, part, SWAP, False)
        part = _dot(high_rows, high, part, SWAP, False)
        if SWAP:
            return acc + part * scale.to(tl.float32)[:, None]
        else:
            return acc + part * scale.to(tl.float32)[None, :]
    else:
        acc = _dot(low_rows, (low * scale.to(low.dtype)[:, None]).to(low.dtype), acc, SWAP, False)
        return _dot(high_rows, (high * scale.to(low.dtype)[:, None]).to(low.dtype), acc, SWAP, False)


@jit()
def _activated(x, ACT: tl.constexpr):
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # tanh(z) = 2 sigmoid(2 z) - 1
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "relu_squared":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACT == "none")
        return x


@jit()
def _gated(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    if ACT == "clamped_swiglu":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1.0) * gate * tl.sigmoid(gate * ALPHA)
    else:
        return _activated(gate, ACT) * up


@jit()
def _rescaled(acc, a_scale, scales, bias, slot, rows, FMT: tl.constexpr, SLOT: tl.constexpr, BIAS: tl.constexpr):
    """Products [BM, BN] times the scales of their row and column; the routing weight before (1) or after (2) bias."""
    acc = acc.to(tl.float32)
    if FMT == "dynamic":
        acc = acc * a_scale[:, None]
    if FMT == "dynamic" or FMT == "widened":
        acc = acc * tl.load(scales + rows)[None, :]
    if SLOT == 1:
        acc = acc * slot[:, None]
    if BIAS:
        acc = acc + tl.load(bias + rows).to(tl.float32)[None, :]
    if SLOT == 2:
        acc = acc * slot[:, None]
    return acc


@jit(do_not_specialize=("S",))
def expert_gemm_kernel(
    a, w, u, out, a_scale, w_scale, u_scale, w_zero, u_zero, w_bias, u_bias, slot_weight,
    ids, slots, tile_expert, tile_count,
    S, E, N, K, row_div, a_stride, w_stride_e, w_stride, w_rows, gate_row, up_row,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, FMT: tl.constexpr, ZERO: tl.constexpr, TRANSPOSED: tl.constexpr,
    GATED: tl.constexpr, ACT: tl.constexpr, SLOT: tl.constexpr, BIAS: tl.constexpr, PAIRS_APART: tl.constexpr,
    GROUP_BYTES: tl.constexpr, UNROLL: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ASM: tl.constexpr,
    LEADER: tl.constexpr, SP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """out[s, n] for the slots s of every tile.

    a [*, K] with row s // row_div for slot s (int4: the even inputs, then the odd ones). w (and u, if GATED is "two" or
    "halves"): the weights, gate_row and up_row the rows at which gate and up begin. FMT: "plain" (w of a's dtype),
    "widened" (int8 or float8, times w_scale [E, w_rows]), "dynamic" (a too, times a_scale [*]), "int4".
    PAIRS_APART: the result has the even columns first, as an int4 projection reads its inputs.
    """
    pid = tl.program_id(0)
    num_n = tl.cdiv(N, BN)
    m = tl.arange(0, BM)
    if LEADER:
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
        # GROUP_M row tiles for one column tile after the other: their weights and rows stay in L2.
        group = pid // (GROUP_M * num_n)
        size = tl.minimum(num_m - group * GROUP_M, GROUP_M)
        pid_m = group * GROUP_M + (pid % (GROUP_M * num_n)) % size
        pid_n = (pid % (GROUP_M * num_n)) // size
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
    if EVEN_N == 0:
        c = tl.minimum(c, N - 1)
    if PAIRS_APART:
        c = tl.where(c < N // 2, 2 * c, 2 * c - N + 1)
    if GATED == "interleaved":
        if PAIRS_APART or EVEN_N == 0:
            r = 2 * c + j % 2
        else:
            r = pid_n * WIDE + j
    else:
        r = c
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
        for k0 in range(0, half, BK * UNROLL):
            for step in tl.static_range(UNROLL):
                low_rows = tl.load(a_ptrs + step * BK, mask=there[:, None], other=0.0)
                high_rows = tl.load(a_ptrs + (half + step * BK), mask=there[:, None], other=0.0)
                packed = tl.load(w_ptrs + step * BK)
                following = tl.minimum(k0 + (step + 1) * BK, half - 1) // GROUP_BYTES
                next_scale = tl.load(w_scale + w_groups + following)
                next_zero = tl.load(w_zero + w_groups + following) if ZERO else next_scale
                acc = _int4_step(low_rows, high_rows, packed, scale, zero, acc, SWAP, SCALE_ACC, ZERO, ASM)
                scale = next_scale
                zero = next_zero
                if TWO:
                    packed = tl.load(u_ptrs + step * BK)
                    next_scale = tl.load(u_scale + u_groups + following)
                    next_zero = tl.load(u_zero + u_groups + following) if ZERO else next_scale
                    acc_up = _int4_step(
                        low_rows, high_rows, packed, scale_up, zero_up, acc_up, SWAP, SCALE_ACC, ZERO, ASM
                    )
                    scale_up = next_scale
                    zero_up = next_zero
            a_ptrs += BK * UNROLL
            w_ptrs += BK * UNROLL
            u_ptrs += BK * UNROLL
    else:
        for k0 in range(0, K, BK):
            if EVEN_K:
                rows = tl.load(a_ptrs, mask=there[:, None], other=0.0)
                weights = tl.load(w_ptrs)
            else:
                rows = tl.load(a_ptrs, mask=there[:, None] & (k[None, :] < K - k0), other=0.0)
                if TRANSPOSED:
                    weights = tl.load(w_ptrs, mask=(k < K - k0)[:, None], other=0.0)
                else:
                    weights = tl.load(w_ptrs, mask=(k < K - k0)[None, :], other=0.0)
            if FMT == "widened":
                weights = _widened(weights, rows.dtype, ASM)
            acc = _dot(rows, weights, acc, SWAP, TRANSPOSED)
            if TWO:
                if EVEN_K:
                    weights = tl.load(u_ptrs)
                elif TRANSPOSED:
                    weights = tl.load(u_ptrs, mask=(k < K - k0)[:, None], other=0.0)
                else:
                    weights = tl.load(u_ptrs, mask=(k < K - k0)[None, :], other=0.0)
                if FMT == "widened":
                    weights = _widened(weights, rows.dtype, ASM)
                acc_up = _dot(rows, weights, acc_up, SWAP, TRANSPOSED)
                u_ptrs += BK * w_stride if TRANSPOSED else BK
            a_ptrs += BK
            w_ptrs += BK * w_stride if TRANSPOSED else BK

    if SWAP:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    row_scale = tl.load(a_scale + source, mask=there, other=0.0) if FMT == "dynamic" else 1.0
    weight = tl.load(slot_weight + slot, mask=there, other=0.0).to(tl.float32) if SLOT != 0 else 1.0
    first = e * w_rows
    acc = _rescaled(acc, row_scale, w_scale + first, w_bias + first, weight, r_gate, FMT, SLOT, BIAS)
    if GATED == "interleaved":
        gate, up = tl.split(tl.reshape(acc, (BM, BN, 2)))
        acc = _gated(gate, up, ACT, ALPHA, LIMIT)
    elif TWO:
        acc_up = _rescaled(acc_up, row_scale, u_scale + first, u_bias + first, weight, r_up, FMT, SLOT, BIAS)
        acc = _gated(acc, acc_up, ACT, ALPHA, LIMIT)
    else:
        acc = _activated(acc, ACT)
    columns = pid_n * BN + tl.arange(0, BN)
    to = out + slot.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=there[:, None] & (columns < N)[None, :])
