"""The grouped GEMM for many rows per expert: weights, and rows that were sorted, come by the tensor memory accelerator.

One instruction copies a whole tile (Hopper's cp.async.bulk.tensor), so that what is left to the threads is to multiply.
Tensor descriptors are made on the host, and only by ops that a compiler does not look into. Rows of the result are
slots, or places of tiles, which the next product reads as they lie. An expert's last tile is multiplied by half, if no
more of it is filled (HALF).

The definition is :func:`moe_fx.kernels.fused_experts.slot_linear_reference`.
"""

from __future__ import annotations

from moe_fx.kernels.triton_epilogue import activated, gated, of_columns, rescaled
from moe_fx.kernels.triton_gemm import tile_place
from moe_fx.kernels.triton_or_none import jit, tl
from moe_fx.kernels.triton_unpack import dot

__all__ = ["large_gemm_kernel"]


@jit()
def _large_tile(
    a, w, u, out, a_scale, w_scale, u_scale, w_bias, u_bias, slot_weight, slots,
    S, N, K, row_div, a_stride, w_rows, gate_row, up_row, row, pid_n, expert,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, FMT: tl.constexpr, TWO: tl.constexpr, ACT: tl.constexpr,
    SLOT: tl.constexpr, BIAS: tl.constexpr, GATHER: tl.constexpr, SORTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    """The BM places from ``row`` on, times the columns of ``pid_n``."""
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    slot = tl.load(slots + row + m)
    there = slot < S
    source = (slot // row_div).to(tl.int64)
    first = expert * w_rows + pid_n * BN
    if GATHER:
        a_ptrs = a + source[:, None] * a_stride + k[None, :]
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.int32 if INT else tl.float32)
    acc_up = acc
    for k0 in range(0, K, BK):
        if GATHER:
            rows = tl.load(a_ptrs + k0, mask=there[:, None], other=0.0)
        else:
            rows = a.load([row, k0])
        acc = dot(rows, w.load([first + gate_row, k0]), acc, SWAP, False)
        if TWO:
            acc_up = dot(rows, u.load([first + up_row, k0]), acc_up, SWAP, False)
    if SWAP:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    columns = pid_n * BN + tl.arange(0, BN)
    column = tl.minimum(columns, N - 1)
    scale_at = row + m if SORTED == "in" else source
    row_scale = tl.load(a_scale + scale_at, mask=there, other=0.0) if FMT == "dynamic" else 1.0
    weight = tl.load(slot_weight + slot, mask=there, other=0.0).to(tl.float32) if SLOT != 0 else 1.0
    e = expert.to(tl.int64) * w_rows
    scale, bias = of_columns(w_scale + e, w_bias + e, column + gate_row, FMT, BIAS)
    acc = rescaled(acc, row_scale, scale, bias, weight, FMT == "dynamic", FMT, SLOT, BIAS)
    if TWO:
        scale, bias = of_columns(u_scale + e, u_bias + e, column + up_row, FMT, BIAS)
        acc_up = rescaled(acc_up, row_scale, scale, bias, weight, FMT == "dynamic", FMT, SLOT, BIAS)
        acc = gated(acc, acc_up, ACT, ALPHA, LIMIT)
    else:
        acc = activated(acc, ACT)
    place = row + m if SORTED == "out" else slot
    to = out + place.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=there[:, None] & (columns < N)[None, :])


@jit(do_not_specialize=("S",))
def large_gemm_kernel(
    a, a_half, w, u, out, a_scale, w_scale, u_scale, w_bias, u_bias, slot_weight,
    slots, tile_expert, tile_group, tile_count,
    S, N, K, row_div, a_stride, w_rows, gate_row, up_row,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, FMT: tl.constexpr, TWO: tl.constexpr, ACT: tl.constexpr,
    SLOT: tl.constexpr, BIAS: tl.constexpr, GATHER: tl.constexpr, SORTED: tl.constexpr, HALF: tl.constexpr,
    PERSISTENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    SWAP: tl.constexpr, INT: tl.constexpr,
):  # fmt: skip
    """As expert_gemm_kernel, for rows and weights of one dtype.

    a: rows [*, K] of which slot s has row s // row_div (GATHER), or a descriptor of rows in the order of ``slots``, in
    blocks [BM, BK]; a_half: the same in blocks of half as many rows. SORTED: "out" if the result is in that order, "in"
    if a_scale is (otherwise it goes with the rows before they were sorted). w, u: descriptors of [E * w_rows, K] in
    blocks [BN, BK]. PERSISTENT: as many programs as run at once, each taking many tiles; otherwise one for each.
    """
    pid = tl.program_id(0)
    num_n = tl.cdiv(N, BN)
    total = tl.load(tile_count) * num_n
    if PERSISTENT:
        for tile in tl.range(pid, total, tl.num_programs(0), flatten=True):
            pid_m, pid_n = tile_place(tile, num_n, tile_group, GROUP_M)
            _large_tile(
                a, w, u, out, a_scale, w_scale, u_scale, w_bias, u_bias, slot_weight, slots,
                S, N, K, row_div, a_stride, w_rows, gate_row, up_row, pid_m * BM, pid_n, tl.load(tile_expert + pid_m),
                ALPHA, LIMIT, FMT, TWO, ACT, SLOT, BIAS, GATHER, SORTED, BM, BN, BK, SWAP, INT,
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
                    S, N, K, row_div, a_stride, w_rows, gate_row, up_row, pid_m * BM, pid_n, expert,
                    ALPHA, LIMIT, FMT, TWO, ACT, SLOT, BIAS, GATHER, SORTED, BM // 2, BN, BK, SWAP, INT,
                )  # fmt: skip
                return
        _large_tile(
            a, w, u, out, a_scale, w_scale, u_scale, w_bias, u_bias, slot_weight, slots,
            S, N, K, row_div, a_stride, w_rows, gate_row, up_row, pid_m * BM, pid_n, expert,
            ALPHA, LIMIT, FMT, TWO, ACT, SLOT, BIAS, GATHER, SORTED, BM, BN, BK, SWAP, INT,
        )  # fmt: skip
