"""``moe_fx::top_k``: a router's choice of experts in one kernel, where ``torch.topk`` takes two launches and more time.

It chooses what ``torch.topk`` chooses, to the bit: the same values, and of equal scores the first. So nothing else of a
router needs to be known, and whatever comes before and after stays the model's own ops.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_fx.kernels.no_gradient import register_no_gradient
from moe_fx.kernels.triton_or_none import AVAILABLE, jit, tl, wrapped

__all__ = ["MOST_CHOSEN", "MOST_SCORES", "top_k", "top_k_reference"]

#: sizes up to which a row is held in the registers of one warp, and chosen from in turn
MOST_SCORES, MOST_CHOSEN = 1024, 32


def top_k_reference(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of the last dimension of ``scores [..., E]``, in descending order: values and int64 places."""
    values, places = scores.topk(k, dim=-1)
    return values, places


@jit(do_not_specialize=("R",))
def top_k_kernel(scores, values, places, R, E, K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr):
    """One row per program: the largest score that is left is chosen, of equal ones the first.

    A warp finds the largest or the smallest of 32-bit integers by one instruction; of scores and places in 64 bits, by
    some twenty.
    """
    r = tl.program_id(0).to(tl.int64)
    if r >= R:
        return
    e = tl.arange(0, EP)
    score = tl.load(scores + r * E + e, mask=e < E, other=0.0).to(tl.float32)
    # Floats as integers of the same order, in which -0 is less than 0, and any NaN the largest: as torch.topk has it.
    # None of them is the lowest integer.
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    left = tl.where(e < E, order, -0x80000000)
    j = tl.arange(0, KP)
    chosen = tl.zeros((KP,), tl.int32)
    for i in tl.static_range(K):
        place = tl.min(tl.where(left == tl.max(left, 0), e, EP), 0)
        chosen = tl.where(j == i, place, chosen)
        left = tl.where(e == place, -0x80000000, left)
    tl.store(values + r * K + j, tl.load(scores + r * E + chosen, mask=j < K), mask=j < K)
    tl.store(places + r * K + j, chosen.to(tl.int64), mask=j < K)


def _launch(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    *lead, count = scores.shape
    rows = scores.reshape(-1, count).contiguous()
    values = rows.new_empty((rows.shape[0], k))
    places = rows.new_empty((rows.shape[0], k), dtype=torch.int64)
    # At least a warp, whose threads are not asked in turn then.
    padded = max(1 << (count - 1).bit_length(), 32)
    with torch.cuda.device_of(scores):
        # A grid of no programs is an error, and asking whether there are rows would fix their number in a graph.
        wrapped(top_k_kernel)[(rows.shape[0] + 1,)](
            rows, values, places, rows.shape[0], count, K=k, EP=padded, KP=1 << (k - 1).bit_length(),
            num_warps=1 if padded <= 256 else 4,
        )  # fmt: skip
    return values.reshape(*lead, k), places.reshape(*lead, k)


def _fake(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*scores.shape[:-1], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


def _op() -> Any:
    op: Any
    if AVAILABLE:
        op = torch.library.triton_op("moe_fx::top_k", _launch, mutates_args=())
        op.register_kernel("cpu")(top_k_reference)
    else:
        op = torch.library.custom_op("moe_fx::top_k", top_k_reference, mutates_args=())
    op.register_fake(_fake)
    register_no_gradient(op)
    return op


top_k = _op()
