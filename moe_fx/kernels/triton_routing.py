"""Slots sorted by expert, in tiles: a counting sort on the device, without a word to the host.

    ids [T, K]  =>  slots int32 [B, BM], tile_expert int32 [B], tile_group int32 [B, 2], tile_count int32 [1]

Tile b < tile_count holds slots of the expert ``tile_expert[b]``; ``T * K`` stands where a tile has none. The tiles of
an expert follow one another: ``tile_group[b]`` is the first of them, and how many they are. Ids that name no expert are
in no tile. B is the largest number of tiles that ids of this size can need.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_fx.kernels.triton_or_none import after_previous, before_next, jit, overlapped, overlaps, tl, wrapped

__all__ = ["Tiles", "max_tiles", "route", "route_and_places", "route_reference"]

#: slots, tile_expert, tile_group, tile_count
Tiles = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

#: how many int32 lie between the next free places of more than a few experts: side by side, in one slice of the L2
#: cache, the slots that are placed would wait for one another
APART, FEW_EXPERTS = 32, 16
#: up to how many slots every expert's program looks at all of them, in one kernel; beyond, there are four
ONE_KERNEL = 2048


def max_tiles(num_slots: Any, num_experts: int, block: int) -> Any:
    """How many tiles of ``block`` rows any routing of so many slots fits into."""
    return num_slots // block + min(num_slots, num_experts)


def route_reference(ids: torch.Tensor, num_experts: int, block: int) -> Tiles:
    """What :func:`route` yields, but for the order of the slots of an expert."""
    flat = ids.reshape(-1)
    count = max_tiles(flat.shape[0], num_experts, block)
    slots = torch.full((count, block), flat.shape[0], dtype=torch.int32, device=ids.device)
    tile_expert = torch.zeros(count, dtype=torch.int32, device=ids.device)
    tile_group = torch.zeros(count, 2, dtype=torch.int32, device=ids.device)
    tile = 0
    for expert in range(num_experts):
        own = torch.where(flat == expert)[0]
        many = -(-own.shape[0] // block)
        tile_expert[tile : tile + many] = expert
        tile_group[tile : tile + many] = torch.tensor([tile, many])
        for first in range(0, own.shape[0], block):
            slots[tile, : own.shape[0] - first] = own[first : first + block]
            tile += 1
    return slots, tile_expert, tile_group, torch.tensor([tile], dtype=torch.int32, device=ids.device)


@jit(do_not_specialize=("S",))
def route_few_kernel(ids, slots, places, tile_expert, tile_group, tile_count, S, E, SP: tl.constexpr, EP: tl.constexpr,
                     BM: tl.constexpr, PLACES: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """One program per expert: it counts the slots of all, and places its own in their order.

    PLACES: where each slot is, or -1, is stored as well.
    """
    after_previous(OVERLAP)
    before_next(OVERLAP)
    expert = tl.program_id(0)
    s = tl.arange(0, SP)
    some = tl.load(ids + s, mask=s < S, other=-1).to(tl.int32)
    valid = (some >= 0) & (some < E)
    count = tl.histogram(tl.where(valid, some, 0), EP, mask=valid)
    e = tl.arange(0, EP)
    tiles = tl.cdiv(count, BM)
    first = tl.sum(tl.where(e < expert, tiles, 0), 0)
    many = tl.sum(tl.where(e == expert, tiles, 0), 0)
    mine = some == expert
    place = first * BM + tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(slots + place, s, mask=mine)
    if PLACES:
        nowhere = (expert == 0) & (valid == 0) & (s < S)
        tl.store(places + s, tl.where(mine, place, -1), mask=mine | nowhere)
    filled = tl.sum(mine.to(tl.int32), 0)
    rest = filled + tl.arange(0, BM)
    tl.store(slots + first * BM + rest, tl.zeros((BM,), tl.int32) + S, mask=rest < many * BM)
    for b0 in range(0, many, 32):
        b = b0 + tl.arange(0, 32)
        tl.store(tile_expert + first + b, tl.zeros((32,), tl.int32) + expert, mask=b < many)
        tl.store(tile_group + (first + b) * 2, tl.zeros((32,), tl.int32) + first, mask=b < many)
        tl.store(tile_group + (first + b) * 2 + 1, tl.zeros((32,), tl.int32) + many, mask=b < many)
    if expert == 0:
        tl.store(tile_count, tl.sum(tiles, 0))


@jit(do_not_specialize=("S",))
def count_kernel(ids, counts, S, E, EP: tl.constexpr, CHUNK: tl.constexpr):
    """counts [EP] += how many of a program's CHUNK slots go to each expert."""
    s = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    some = tl.load(ids + s, mask=s < S, other=-1).to(tl.int32)
    valid = (some >= 0) & (some < E)
    count = tl.histogram(tl.where(valid, some, 0), EP, mask=valid)
    tl.atomic_add(counts + tl.arange(0, EP), count, mask=count > 0, sem="relaxed")


@jit(do_not_specialize=("S", "B"))
def plan_kernel(counts, start, slots, tile_expert, tile_group, tile_count, S, B, EP: tl.constexpr, BM: tl.constexpr,
                TILES: tl.constexpr, APART: tl.constexpr):  # fmt: skip
    """Each program plans TILES tiles; the first one also writes where each expert's slots begin: start [EP, APART]."""
    pid = tl.program_id(0)
    e = tl.arange(0, EP)
    tiles = tl.cdiv(tl.load(counts + e), BM)
    ends = tl.cumsum(tiles, 0)
    if pid == 0:
        tl.store(start + e * APART, (ends - tiles) * BM)
        tl.store(tile_count, tl.sum(tiles, 0))
    b = pid * TILES + tl.arange(0, TILES)
    before = ends[None, :] <= b[:, None]
    expert = tl.sum(before.to(tl.int32), 1)
    first = tl.sum(tl.where(before, tiles[None, :], 0), 1)
    many = tl.sum(tl.where(e[None, :] == expert[:, None], tiles[None, :], 0), 1)
    tl.store(tile_expert + b, expert, mask=b < B)
    tl.store(tile_group + b * 2, first, mask=b < B)
    tl.store(tile_group + b * 2 + 1, many, mask=b < B)
    none = tl.zeros((TILES, BM), tl.int32) + S
    tl.store(slots + b[:, None] * BM + tl.arange(0, BM)[None, :], none, mask=(b < B)[:, None])


@jit(do_not_specialize=("S",))
def place_kernel(ids, start, slots, places, S, E, CHUNK: tl.constexpr, APART: tl.constexpr, PLACES: tl.constexpr):
    """Each slot into the next free place of its expert. PLACES: as above."""
    s = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    some = tl.load(ids + s, mask=s < S, other=-1).to(tl.int32)
    valid = (some >= 0) & (some < E)
    place = tl.atomic_add(start + tl.where(valid, some, 0) * APART, 1, mask=valid, sem="relaxed")
    tl.store(slots + place, s, mask=valid)
    if PLACES:
        tl.store(places + s, tl.where(valid, place, -1), mask=s < S)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def route(ids: torch.Tensor, num_experts: int, block: int) -> Tiles:
    """Sort on the device; see the module.

    Args:
        ids: ``[T, K]`` of any integer dtype, contiguous; T * K > 0.
        num_experts: E. block: rows per tile, BM.

    Returns:
        slots int32 ``[B, BM]``, tile_expert int32 ``[B]``, tile_group int32 ``[B, 2]``, tile_count int32 ``[1]``; of
        the tiles from tile_count on nothing is said.
    """
    return _route(ids, num_experts, block, None)


def route_and_places(ids: torch.Tensor, num_experts: int, block: int) -> tuple[Tiles, torch.Tensor]:
    """The same, and int32 ``[T * K]``: where each slot is in ``slots``, or -1."""
    places = ids.new_empty((ids.numel(),), dtype=torch.int32)
    return _route(ids, num_experts, block, places), places


def _route(ids: torch.Tensor, num_experts: int, block: int, places: torch.Tensor | None) -> Tiles:
    num_slots = ids.numel()
    count = max_tiles(num_slots, num_experts, block)
    padded = max(_power_of_two(num_experts), 2)
    slots = ids.new_empty((count, block), dtype=torch.int32)
    tile_expert = ids.new_empty((count,), dtype=torch.int32)
    tile_group = ids.new_empty((count, 2), dtype=torch.int32)
    tile_count = ids.new_empty((1,), dtype=torch.int32)
    if num_slots <= ONE_KERNEL:
        overlapped(route_few_kernel)[(num_experts,)](
            ids, slots, ids if places is None else places, tile_expert, tile_group, tile_count,
            num_slots, num_experts, SP=max(_power_of_two(num_slots), 256), EP=padded, BM=block,
            PLACES=places is not None, OVERLAP=overlaps(), num_warps=8,
        )  # fmt: skip
        return slots, tile_expert, tile_group, tile_count
    apart = 1 if num_experts <= FEW_EXPERTS else APART
    start = ids.new_empty((padded, apart), dtype=torch.int32)
    counts = ids.new_zeros((padded,), dtype=torch.int32)
    chunk = 256 if num_slots <= 65536 else 1024
    chunks = -(-num_slots // chunk)
    wrapped(count_kernel)[(chunks,)](ids, counts, num_slots, num_experts, EP=padded, CHUNK=chunk, num_warps=4)
    wrapped(plan_kernel)[(-(-count // 16),)](
        counts, start, slots, tile_expert, tile_group, tile_count, num_slots, count,
        EP=padded, BM=block, TILES=16, APART=apart, num_warps=4,
    )  # fmt: skip
    wrapped(place_kernel)[(chunks,)](
        ids, start, slots, ids if places is None else places, num_slots, num_experts,
        CHUNK=chunk, APART=apart, PLACES=places is not None, num_warps=4,
    )  # fmt: skip
    return slots, tile_expert, tile_group, tile_count
