"""The products of a tile of rows with int4 weights: along K, a group of inputs after the other."""

from __future__ import annotations

from moe_fx.kernels.triton_or_none import jit, tl
from moe_fx.kernels.triton_unpack import dot, nibbles, nibbles_as_bytes, products_done

__all__ = ["int4_products"]


@jit()
def int4_step(low_rows, high_rows, sums, packed, scale, zero, acc, SWAP: tl.constexpr, SCALE_ACC: tl.constexpr,
              ZERO: tl.constexpr, SHIFTED: tl.constexpr, WAIT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """One group of inputs: its scale [BN] multiplies the products of few rows, or the weights of many.

    SHIFTED: weights are taken 136 too large, so sums [BM] (of a row's inputs of this group) times 136 is taken off.
    WAIT: see products_done; products of few rows are done when their scale multiplies them.
    """
    if WAIT and not SCALE_ACC:
        products_done(ASM)
    low, high = nibbles(packed, low_rows.dtype, SHIFTED, ASM)
    if SHIFTED:
        offset = 136.0 + zero.to(tl.float32) if ZERO else 136.0
    elif ZERO:
        low -= zero.to(low.dtype)[:, None]
        high -= zero.to(low.dtype)[:, None]
    if SCALE_ACC:
        part = tl.zeros(acc.shape, tl.float32)
        part = dot(low_rows, low, part, SWAP, False)
        part = dot(high_rows, high, part, SWAP, False)
        if SWAP:
            if SHIFTED and ZERO:
                part -= sums[None, :] * offset[:, None]
            elif SHIFTED:
                part -= (sums * offset)[None, :]
            return acc + part * scale.to(tl.float32)[:, None]
        else:
            if SHIFTED and ZERO:
                part -= sums[:, None] * offset[None, :]
            elif SHIFTED:
                part -= (sums * offset)[:, None]
            return acc + part * scale.to(tl.float32)[None, :]
    else:
        tl.static_assert(not SHIFTED)
        acc = dot(low_rows, (low * scale.to(low.dtype)[:, None]).to(low.dtype), acc, SWAP, False)
        return dot(high_rows, (high * scale.to(low.dtype)[:, None]).to(low.dtype), acc, SWAP, False)


@jit()
def _digits_step(low_rows, high_rows, packed, scale, acc, SWAP: tl.constexpr, ASM: tl.constexpr):
    """As :func:`int4_step`, of rows in digits (see triton_digits.py): integers times integers, exactly."""
    low, high = nibbles_as_bytes(packed, ASM)
    tl.static_assert(low.shape[1] <= 64)
    # 1.5 * 2^23, of which the mantissa is all integers: what is added to its bits is added to its value. (A group's
    # sum is below 2^22; conversions run at a quarter of the rate.)
    part = tl.full(acc.shape, 0x4B400000, tl.int32)
    part = dot(low_rows, low, part, SWAP, False)
    part = dot(high_rows, high, part, SWAP, False)
    part = part.to(tl.float32, bitcast=True) - 12582912.0
    scale = scale.to(tl.float32)
    return acc + part * (scale[:, None] if SWAP else scale[None, :])


@jit()
def _step(low_rows, high_rows, sums, packed, scale, zero, acc, SWAP: tl.constexpr, SCALE_ACC: tl.constexpr,
          ZERO: tl.constexpr, SHIFTED: tl.constexpr, DIGITS: tl.constexpr, WAIT: tl.constexpr,
          ASM: tl.constexpr):  # fmt: skip
    if DIGITS:
        return _digits_step(low_rows, high_rows, packed, scale, acc, SWAP, ASM)
    else:
        return int4_step(low_rows, high_rows, sums, packed, scale, zero, acc, SWAP, SCALE_ACC, ZERO, SHIFTED, WAIT, ASM)


@jit()
def _of_groups(values, first, k0, half, BK: tl.constexpr, UNROLL: tl.constexpr, GROUP_BYTES: tl.constexpr):
    """A tuple of UNROLL times [BN]: the scales, or zeros, of so many steps of BK bytes from k0 on."""
    at = values + first
    one = tl.load(at + tl.minimum(k0, half - 1) // GROUP_BYTES)
    if UNROLL == 1:
        return (one,)
    else:
        two = tl.load(at + tl.minimum(k0 + BK, half - 1) // GROUP_BYTES)
        if UNROLL == 2:
            return one, two
        else:
            tl.static_assert(UNROLL == 4)
            three = tl.load(at + tl.minimum(k0 + 2 * BK, half - 1) // GROUP_BYTES)
            four = tl.load(at + tl.minimum(k0 + 3 * BK, half - 1) // GROUP_BYTES)
            return one, two, three, four


@jit()
def int4_products(
    a_ptrs, w_ptrs, u_ptrs, sum_ptrs, w_scale, u_scale, w_zero, u_zero, w_first, u_first, read, there, begin, end, half,
    acc, acc_up, TWO: tl.constexpr, SWAP: tl.constexpr, SCALE_ACC: tl.constexpr, ZERO: tl.constexpr,
    SHIFTED: tl.constexpr, DIGITS: tl.constexpr, WAIT: tl.constexpr, ASM: tl.constexpr, BK: tl.constexpr,
    UNROLL: tl.constexpr, GROUP_BYTES: tl.constexpr,
):  # fmt: skip
    """acc and acc_up, and what the bytes from begin to end of half bytes a row make of the rows at a_ptrs.

    w_first and u_first [BN]: where the scales of the columns begin. The rest as in expert_gemm_kernel.
    """
    # Scales are too narrow for asynchronous copies: they are loaded one turn of the loop before they are needed.
    scales = _of_groups(w_scale, w_first, begin, half, BK, UNROLL, GROUP_BYTES)
    zeros = _of_groups(w_zero, w_first, begin, half, BK, UNROLL, GROUP_BYTES) if ZERO else scales
    scales_up = _of_groups(u_scale, u_first, begin, half, BK, UNROLL, GROUP_BYTES) if TWO else scales
    zeros_up = _of_groups(u_zero, u_first, begin, half, BK, UNROLL, GROUP_BYTES) if TWO and ZERO else scales
    sums = tl.zeros(there.shape, tl.float32)
    groups = half // GROUP_BYTES
    for k0 in range(begin, end, BK * UNROLL):
        then = k0 + BK * UNROLL
        next_scales = _of_groups(w_scale, w_first, then, half, BK, UNROLL, GROUP_BYTES)
        next_zeros = _of_groups(w_zero, w_first, then, half, BK, UNROLL, GROUP_BYTES) if ZERO else next_scales
        next_up = _of_groups(u_scale, u_first, then, half, BK, UNROLL, GROUP_BYTES) if TWO else next_scales
        next_zeros_up = _of_groups(u_zero, u_first, then, half, BK, UNROLL, GROUP_BYTES) if TWO and ZERO else next_up
        for step in tl.static_range(UNROLL):
            low_rows = tl.load(a_ptrs + step * BK, mask=read[:, None], other=0)
            high_rows = tl.load(a_ptrs + (half + step * BK), mask=read[:, None], other=0)
            packed = tl.load(w_ptrs + step * BK)
            if SHIFTED:
                group = k0 // BK + step
                sums = tl.load(sum_ptrs + group, mask=there, other=0.0)
                sums += tl.load(sum_ptrs + groups + group, mask=there, other=0.0)
            acc = _step(
                low_rows, high_rows, sums, packed, scales[step], zeros[step], acc,
                SWAP, SCALE_ACC, ZERO, SHIFTED, DIGITS, WAIT, ASM,
            )  # fmt: skip
            if TWO:
                packed = tl.load(u_ptrs + step * BK)
                acc_up = _step(
                    low_rows, high_rows, sums, packed, scales_up[step], zeros_up[step], acc_up,
                    SWAP, SCALE_ACC, ZERO, SHIFTED, DIGITS, WAIT, ASM,
                )  # fmt: skip
        scales = next_scales
        zeros = next_zeros
        scales_up = next_up
        zeros_up = next_zeros_up
        a_ptrs += BK * UNROLL
        w_ptrs += BK * UNROLL
        u_ptrs += BK * UNROLL
    return acc, acc_up
