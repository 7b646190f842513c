"""Which tiles the grouped GEMM works in, by kind of product and rows per expert: a table, not a search at run time.

Measured on an H200 with benchmarks/tune_fused.py. Any tile is right for any shape; the table is only about speed.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FEW_SLOTS", "TILES", "Tile", "block_of_rows", "tile_of", "widens_first"]

#: up to how many slots each tile finds its rows by itself, without a routing kernel
FEW_SLOTS = 128


@dataclass(frozen=True)
class Tile:
    """``block_n`` output columns (per accumulator) and ``block_k`` inputs (int4: bytes) at a time.

    Attributes:
        stages: how many steps of the loop are loaded ahead. warps: per program.
        swap: weights are the left operand. group_m: row tiles that share a column tile before the next one.
        unroll: int4: groups of inputs per step of the loop, where they divide K, so that longer runs are loaded.
    """

    block_n: int
    block_k: int
    stages: int
    warps: int
    swap: bool = False
    group_m: int = 1
    unroll: int = 1


#: by kind ("plain": 2 bytes per weight; "widened", "dynamic": 1; "int4"), by whether two products are made at once
#: (gate and up), and by rows per tile
TILES: dict[tuple[str, bool, int], Tile] = {
    ("plain", False, 16): Tile(64, 128, 4, 4, swap=True),
    ("plain", False, 32): Tile(64, 128, 3, 4, group_m=8),
    ("plain", False, 64): Tile(128, 64, 4, 4, group_m=8),
    ("plain", False, 128): Tile(256, 64, 4, 8, group_m=8),
    ("plain", True, 16): Tile(64, 128, 4, 4),
    ("plain", True, 32): Tile(64, 128, 3, 4, group_m=8),
    ("plain", True, 64): Tile(128, 64, 4, 4, group_m=8),
    ("plain", True, 128): Tile(128, 64, 4, 8, swap=True, group_m=8),
    ("widened", False, 16): Tile(64, 256, 3, 4),
    ("widened", False, 32): Tile(64, 128, 4, 4, group_m=8),
    ("widened", False, 64): Tile(128, 128, 4, 4, swap=True, group_m=8),
    ("widened", False, 128): Tile(256, 128, 3, 8, group_m=8),
    ("widened", True, 16): Tile(64, 256, 3, 4),
    ("widened", True, 32): Tile(64, 128, 4, 4, group_m=8),
    ("widened", True, 64): Tile(64, 128, 3, 4, group_m=8),
    ("widened", True, 128): Tile(128, 128, 3, 8, group_m=8),
    ("dynamic", False, 16): Tile(64, 256, 4, 4, swap=True),
    ("dynamic", False, 32): Tile(128, 128, 4, 4, swap=True, group_m=8),
    ("dynamic", False, 64): Tile(128, 128, 4, 4, group_m=8),
    ("dynamic", False, 128): Tile(256, 128, 4, 8, group_m=8),
    ("dynamic", True, 16): Tile(64, 256, 4, 4),
    ("dynamic", True, 32): Tile(128, 128, 4, 4, group_m=8),
    ("dynamic", True, 64): Tile(128, 128, 4, 4, group_m=8),
    ("dynamic", True, 128): Tile(128, 128, 4, 8, group_m=8),
    ("int4", False, 16): Tile(64, 64, 4, 4),
    ("int4", False, 32): Tile(64, 64, 4, 4, swap=True, group_m=8),
    ("int4", False, 64): Tile(128, 64, 3, 4, swap=True, group_m=8),
    ("int4", False, 128): Tile(64, 64, 3, 8, group_m=8),
    ("int4", True, 16): Tile(64, 64, 4, 4),
    ("int4", True, 32): Tile(64, 64, 4, 4, group_m=8),
    ("int4", True, 64): Tile(64, 64, 4, 4, group_m=8),
    ("int4", True, 128): Tile(128, 64, 3, 8, group_m=8),
}

#: rows per expert above which stored weights are widened once, and multiplied as 2-byte ones
WIDEN_ABOVE = {"widened": 256.0, "int4": 192.0}


def block_of_rows(num_slots: int, num_experts: int) -> int:
    """Rows per tile: about as many as an expert that is hit has, so that few are idle and weights are read once."""
    # Of E experts, E (1 - (1 - 1/E)^S) are hit by S slots that fall evenly. Few values, so that few kernels exist.
    hit = num_experts * (1 - (1 - 1 / num_experts) ** min(num_slots, 64 * num_experts))
    for block, most in ((16, 12), (32, 32), (64, 48)):
        if num_slots <= most * hit:
            return block
    return 128


def widens_first(kind: str, num_slots: int, num_experts: int) -> bool:
    """Whether weights are widened ahead of the product: where they are read by enough rows to pay for it."""
    return kind in WIDEN_ABOVE and num_slots > WIDEN_ABOVE[kind] * num_experts


def tile_of(kind: str, two: bool, block: int) -> Tile:
    return TILES[kind, two, block]
