"""Which tiles the grouped GEMMs work in, by kind of product and rows per expert: a table, not a search at run time.

Measured on an H200 and an H100 with benchmarks/tune_fused.py, but for "columns" (one layer's sizes) and most of those
for up to 32 rows of int8, float8 and int4 (five layers'), which were timed by themselves. Any tile is right for any
shape; the table is only about speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, log2

__all__ = [
    "FEW_SLOTS", "HALF_STEPS_FROM", "JOINED", "JOINED_SORTED", "LARGE", "TILES", "TUNED", "TUNED_LARGE",
    "LargeTile", "Product", "Tile", "block_of_digits", "block_of_rows", "large_product", "large_tile_of",
    "loads_by_descriptor", "parts_of", "reads_apart", "reads_together", "sorts", "tile_of", "widens_first",
]  # fmt: skip

#: up to how many slots each tile finds its rows by itself, without a routing kernel
FEW_SLOTS = 32


@dataclass(frozen=True)
class Tile:
    """``block_n`` output columns (per accumulator) and ``block_k`` inputs (int4: bytes) at a time.

    Attributes:
        stages: how many steps of the loop are loaded ahead. warps: per program.
        swap: weights are the left operand. group_m: most row tiles that share a column tile before the next one.
        unroll: int4: groups of inputs per step of the loop, where they divide K, so that longer runs are loaded.
    """

    block_n: int
    block_k: int
    stages: int
    warps: int
    swap: bool = False
    group_m: int = 1
    unroll: int = 1


@dataclass(frozen=True)
class LargeTile:
    """A tile that is loaded by descriptors, 128 bytes of inputs at a time; otherwise as :class:`Tile`.

    Attributes:
        half: an expert's last tile is computed by half where it holds no more.
        persistent: programs per multiprocessor that take one tile after the other; 0: a program for each tile.
    """

    block_n: int
    stages: int
    warps: int
    swap: bool = False
    group_m: int = 8
    half: bool = False
    persistent: int = 0


#: by kind ("plain": 2 bytes per weight; "columns": the same, of weights [E, K, N]; "widened", "dynamic": 1; "int4"),
#: by whether two products are made at once (gate and up), and by rows per tile
TILES: dict[tuple[str, bool, int], Tile] = {
    ("plain", False, 8): Tile(32, 256, 3, 2, swap=True),
    ("plain", False, 16): Tile(64, 128, 4, 4, swap=True),
    ("plain", False, 32): Tile(64, 128, 3, 4, group_m=8),
    ("plain", False, 64): Tile(128, 64, 3, 4, group_m=8),
    ("plain", False, 128): Tile(256, 64, 4, 8, group_m=8),
    ("plain", True, 8): Tile(32, 256, 3, 2, swap=True),
    ("plain", True, 16): Tile(64, 128, 4, 4),
    ("plain", True, 32): Tile(64, 128, 3, 4, group_m=8),
    ("plain", True, 64): Tile(128, 64, 4, 4, group_m=8),
    ("plain", True, 128): Tile(128, 64, 4, 8, swap=True, group_m=8),
    ("columns", False, 8): Tile(64, 128, 3, 4, swap=True),
    ("columns", False, 16): Tile(64, 128, 4, 4, swap=True),
    ("columns", False, 32): Tile(64, 64, 3, 4, swap=True, group_m=8),
    ("columns", False, 64): Tile(128, 64, 3, 4, group_m=8),
    ("columns", False, 128): Tile(256, 64, 4, 8, group_m=8),
    ("columns", True, 8): Tile(64, 128, 3, 4, swap=True),
    ("columns", True, 16): Tile(64, 64, 3, 4, swap=True, group_m=8),
    ("columns", True, 32): Tile(64, 64, 3, 4, swap=True, group_m=8),
    ("columns", True, 64): Tile(64, 64, 3, 4, swap=True, group_m=8),
    ("columns", True, 128): Tile(128, 64, 4, 8, group_m=8),
    ("widened", False, 1): Tile(32, 512, 3, 2, swap=True),
    ("widened", False, 4): Tile(64, 256, 3, 2, swap=True),
    ("widened", False, 8): Tile(64, 256, 3, 4, swap=True),
    ("widened", False, 16): Tile(64, 256, 3, 4),
    ("widened", False, 32): Tile(128, 128, 3, 4, group_m=8),
    ("widened", False, 64): Tile(128, 64, 3, 4, group_m=8),
    ("widened", False, 128): Tile(128, 64, 3, 4, group_m=8),
    ("widened", True, 1): Tile(32, 512, 3, 2, swap=True),
    ("widened", True, 4): Tile(32, 256, 4, 2, swap=True),
    ("widened", True, 8): Tile(64, 256, 4, 4, swap=True),
    ("widened", True, 16): Tile(64, 256, 3, 4),
    ("widened", True, 32): Tile(128, 128, 3, 4, group_m=8),
    ("widened", True, 64): Tile(64, 64, 3, 4, group_m=8),
    ("widened", True, 128): Tile(64, 64, 3, 4, group_m=8),
    ("dynamic", False, 8): Tile(64, 256, 4, 4, swap=True),
    ("dynamic", False, 16): Tile(64, 256, 3, 4, swap=True),
    ("dynamic", False, 32): Tile(128, 128, 4, 4, swap=True, group_m=8),
    ("dynamic", False, 64): Tile(128, 128, 3, 4, group_m=8),
    ("dynamic", False, 128): Tile(256, 128, 4, 8, group_m=8),
    ("dynamic", True, 8): Tile(64, 256, 4, 4, swap=True),
    ("dynamic", True, 16): Tile(64, 256, 3, 4, swap=True),
    ("dynamic", True, 32): Tile(64, 256, 3, 4, group_m=8),
    ("dynamic", True, 64): Tile(64, 128, 3, 4, group_m=8),
    ("dynamic", True, 128): Tile(128, 128, 4, 8, group_m=8),
    ("int4", False, 1): Tile(64, 64, 3, 4, swap=True, unroll=2),
    ("int4", False, 4): Tile(128, 64, 3, 4, swap=True, unroll=2),
    ("int4", False, 8): Tile(64, 64, 3, 2, swap=True, unroll=2),
    ("int4", False, 16): Tile(64, 64, 3, 2, swap=True),
    ("int4", False, 32): Tile(128, 64, 3, 4, swap=True, group_m=8),
    ("int4", False, 64): Tile(128, 32, 4, 4, swap=True, group_m=8),
    ("int4", False, 128): Tile(128, 32, 3, 4, group_m=8),
    ("int4", True, 1): Tile(32, 64, 4, 2, swap=True, unroll=2),
    ("int4", True, 4): Tile(64, 64, 3, 4, swap=True, unroll=2),
    ("int4", True, 8): Tile(64, 64, 3, 4, swap=True, unroll=2),
    ("int4", True, 16): Tile(32, 64, 3, 2, swap=True, unroll=2),
    ("int4", True, 32): Tile(64, 64, 3, 4, swap=True, group_m=8),
    ("int4", True, 64): Tile(64, 64, 3, 4, group_m=8),
    ("int4", True, 128): Tile(128, 64, 3, 8, group_m=8),
}

#: where those would be fewer than the multiprocessors of a GPU take at once
NARROW: dict[tuple[str, bool, int], Tile] = {
    ("plain", True, 8): Tile(64, 128, 3, 4, swap=True),
    ("plain", False, 8): Tile(64, 128, 3, 4, swap=True),
    ("widened", True, 8): Tile(32, 256, 4, 2, swap=True),
    ("widened", False, 8): Tile(32, 256, 4, 2, swap=True),
    ("dynamic", True, 8): Tile(32, 256, 4, 2, swap=True),
    ("dynamic", False, 8): Tile(32, 256, 4, 2, swap=True),
    ("int4", True, 8): Tile(32, 64, 4, 2, swap=True, unroll=2),
    ("int4", False, 8): Tile(64, 64, 3, 4, swap=True, unroll=2),
    ("int4", False, 32): Tile(64, 64, 3, 2, swap=True, group_m=8),
}
FEW_WARPS = 1056

#: tiles of 128 rows, by kind ("widened" and "int4": in registers), and by whether two products are made at once; with
#: the most rows per expert for which they are taken
LARGE: dict[tuple[str, bool], tuple[tuple[float, LargeTile], ...]] = {
    ("plain", False): (
        (96, LargeTile(128, 3, 4, half=True)), (320, LargeTile(256, 4, 8, half=True)), (inf, LargeTile(256, 4, 8)),
    ),
    ("plain", True): (
        (96, LargeTile(64, 3, 4, half=True)), (640, LargeTile(128, 4, 8, half=True)),
        (inf, LargeTile(128, 4, 8, swap=True)),
    ),
    ("dynamic", False): (
        (96, LargeTile(128, 3, 4, half=True)), (320, LargeTile(256, 4, 8, half=True)), (inf, LargeTile(256, 4, 8)),
    ),
    ("dynamic", True): (
        (96, LargeTile(64, 3, 4, half=True)), (640, LargeTile(128, 4, 8, half=True)),
        (inf, LargeTile(128, 4, 8, swap=True)),
    ),
    ("widened", False): ((640, LargeTile(128, 3, 4, swap=True, half=True)), (inf, LargeTile(128, 3, 4, swap=True))),
    ("widened", True): ((640, LargeTile(64, 4, 4, swap=True, half=True)), (inf, LargeTile(64, 4, 4, swap=True))),
    ("int4", False): ((640, LargeTile(128, 3, 4, swap=True, half=True)), (inf, LargeTile(128, 3, 4, swap=True))),
    ("int4", True): ((640, LargeTile(64, 3, 4, swap=True, half=True)), (inf, LargeTile(64, 3, 4, swap=True))),
}  # fmt: skip
#: the same of gate and up that are multiplied as one
JOINED: dict[str, tuple[tuple[float, LargeTile], ...]] = {
    "plain": (
        (96, LargeTile(64, 3, 4, half=True)), (640, LargeTile(128, 4, 8, half=True)),
        (inf, LargeTile(128, 4, 8, persistent=1)),
    ),
    "dynamic": ((96, LargeTile(64, 3, 4, half=True)), (inf, LargeTile(128, 4, 8, persistent=1))),
}  # fmt: skip
#: and "dynamic", above so many rows per expert, if they are sorted
JOINED_SORTED = LargeTile(64, 3, 4, persistent=2)
JOINED_SORTED_ABOVE = 96
#: tiles of fewer rows, of weights that are widened in registers
IN_REGISTERS: dict[tuple[str, bool, int], LargeTile] = {
    ("widened", False, 32): LargeTile(128, 3, 4, swap=True),
    ("widened", False, 64): LargeTile(128, 3, 4, swap=True),
    ("widened", True, 32): LargeTile(128, 3, 4, swap=True),
    ("widened", True, 64): LargeTile(128, 3, 4, swap=True),
    ("int4", False, 16): LargeTile(128, 3, 4, swap=True),
    ("int4", False, 32): LargeTile(128, 3, 4, swap=True),
    ("int4", False, 64): LargeTile(128, 3, 4, swap=True),
    ("int4", True, 16): LargeTile(64, 3, 4, swap=True),
    ("int4", True, 32): LargeTile(128, 3, 4, swap=True),
    ("int4", True, 64): LargeTile(64, 3, 4, swap=True),
}
#: the fewest rows per tile for which weights are
REGISTERS_FROM = {"widened": 32, "int4": 16}
#: the same where a step of the loop is 64 bytes of rows: of int8, an odd multiple of 64 inputs; of int4, groups of 64
HALF_STEPS_FROM = 64
#: for a single product of few steps along K, of which the beginning and the end overlap with other tiles' steps; and
#: above so many rows per expert, if they are sorted
SHORT = LargeTile(128, 3, 4, persistent=2)
SHORT_STEPS, SHORT_ABOVE = 16, 320
#: inner size from which on rows are copied into the order of the tiles, to be loaded by descriptors as well; and rows
#: per expert above which "dynamic" ones are, as they are quantized, whatever the size
SORT_ABOVE, SORT_DYNAMIC_ABOVE = 4096, 448

#: rows per expert above which stored weights are widened once, and multiplied as 2-byte ones: float8, and int4 that is
#: asymmetric or in groups of 32
WIDEN_ABOVE = {"widened": 250.0, "int4": 120.0}
#: the same where tiles that are loaded by descriptors can widen them in registers; and where int4 is read there in half
#: steps
WIDEN_ABOVE_IN_REGISTERS = {"widened": 1400.0, "int4": 900.0}
WIDEN_ABOVE_HALF_STEPS = 500.0

#: rows per tile, and up to how many rows of an expert that is hit they are taken
BLOCKS = {
    "plain": ((8, 5), (16, 12), (32, 32), (64, 48)),
    "dynamic": ((8, 5), (16, 12), (32, 32), (64, 48)),
    "widened": ((8, 5), (16, 12), (32, 32), (64, 80)),
    "int4": ((8, 5), (16, 12), (32, 32), (64, 80)),
}
#: the same where weights can be widened in registers, by tiles that are loaded by descriptors
BLOCKS_IN_REGISTERS = {
    "widened": ((8, 5), (16, 12), (32, 24), (64, 48)), "int4": ((8, 5), (16, 10), (32, 24), (64, 48)),
}  # fmt: skip
#: up to how many rows of an expert that is hit they are multiplied in digits
DIGITS_BELOW = 2.5

#: up to how many bytes, or int4 slots for each expert that is hit, the experts' weights are read for each slot anew
REPEATED_BYTES, REPEATED_INT4 = 60e6, 1.4
#: from how many of these bytes on the slots take the same columns one after the other, so that L2 has what they share
TOGETHER_ABOVE, TOGETHER_ABOVE_INT4 = 16e6, 24e6

#: up to how many programs a product is parted, a tile among how many, and how many steps of the loop are left to each
PARTED_BELOW, MOST_PARTS, LEAST_STEPS = 528, 8, 4


def _hit(num_slots: int, num_experts: int) -> float:
    """Of E experts, E (1 - (1 - 1/E)^S) are hit by S slots that fall evenly."""
    return num_experts * (1 - (1 - 1 / num_experts) ** min(num_slots, 64 * num_experts))


def block_of_digits(tokens: int, num_slots: int, num_experts: int) -> int | None:
    """Rows per tile where they are multiplied in digits; None where that is slower."""
    if tokens == 1:
        return 1
    return 4 if num_slots <= DIGITS_BELOW * _hit(num_slots, num_experts) else None


def _hit_by_tokens(tokens: int, top_k: int, num_experts: int) -> float:
    """How many experts are hit by tokens that choose evenly. Those of one token are distinct."""
    return num_experts * (1 - (1 - min(top_k / num_experts, 1)) ** tokens)


def reads_apart(kind: str, stored: float, tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether it is faster to read an expert's weights, of ``stored`` bytes, for each slot than to gather its slots."""
    hit, slots = _hit_by_tokens(tokens, top_k, num_experts), tokens * top_k
    return slots <= REPEATED_INT4 * hit if kind == "int4" else (slots - hit) * stored <= REPEATED_BYTES


def reads_together(kind: str, stored: float, tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether slots that read weights for themselves share so many that they had better do so at the same time."""
    again = (tokens * top_k - _hit_by_tokens(tokens, top_k, num_experts)) * stored
    return again > (TOGETHER_ABOVE_INT4 if kind == "int4" else TOGETHER_ABOVE)


def parts_of(programs: int, steps: int) -> int:
    """Among how many programs the inputs of a tile are parted, where there are so few tiles, of so many steps."""
    parts = 1
    while parts < MOST_PARTS and 2 * parts * programs <= PARTED_BELOW and 2 * parts * LEAST_STEPS <= steps:
        parts *= 2
    return parts


def block_of_rows(kind: str, num_slots: int, num_experts: int, in_registers: bool = False) -> int:
    """Rows per tile: about as many as an expert that is hit has, so that few are idle and weights are read once.

    in_registers: tiles that are loaded by descriptors can widen the weights in registers, as they read them.
    """
    # Few values, so that few kernels exist.
    hit = _hit(num_slots, num_experts)
    for block, most in (BLOCKS_IN_REGISTERS if in_registers else BLOCKS)[kind]:
        if num_slots <= most * hit:
            return block
    return 128


def loads_by_descriptor(kind: str, num_slots: int, num_experts: int, in_registers: bool = False) -> bool:
    """Whether there are rows enough for tiles that are loaded by descriptors, which only opaque ops can make."""
    block = block_of_rows(kind, num_slots, num_experts, in_registers)
    if num_slots <= FEW_SLOTS or block < (REGISTERS_FROM[kind] if in_registers else 128):
        return False
    return kind in ("plain", "dynamic") or in_registers or widens_first(kind, num_slots, num_experts)


def widens_first(
    kind: str, num_slots: int, num_experts: int, in_registers: bool = False, half_steps: bool = False
) -> bool:
    """Whether weights are widened ahead of the product: where they are read by enough rows to pay for it.

    half_steps: in registers, they are read in half steps of the loop.
    """
    above = (WIDEN_ABOVE_IN_REGISTERS if in_registers else WIDEN_ABOVE).get(kind, inf)
    if in_registers and half_steps and kind == "int4":
        above = WIDEN_ABOVE_HALF_STEPS
    return num_slots > above * num_experts


def sorts(kind: str, inner: int, rows: float) -> bool:
    """Whether rows are copied into the order of tiles that are loaded by descriptors, with so many rows per expert."""
    return inner >= SORT_ABOVE or (kind == "dynamic" and rows > SORT_DYNAMIC_ABOVE)


@dataclass(frozen=True)
class Product:
    """What a tile was tuned for.

    Attributes:
        kind, two: as in TILES. rows: per tile; of large tiles, per expert, rounded to a power of two.
        outputs, inputs: of one expert's weight (of gate or of up).
        joined: large tiles multiply gate and up, halves of one weight, as one.
    """

    kind: str
    two: bool
    rows: int
    outputs: int
    inputs: int
    joined: bool = False


#: what moe_fx.kernels.tuning found, ahead of the tables
TUNED: dict[Product, Tile] = {}
TUNED_LARGE: dict[Product, LargeTile] = {}


def tile_of(product: Product, hit: int) -> Tile:
    """The tile of a product, of which at most ``hit`` experts' weights are read."""
    if product in TUNED:
        return TUNED[product]
    key = product.kind, product.two, product.rows
    tile = TILES[key]
    few = product.outputs * hit * tile.warps < FEW_WARPS * tile.block_n
    return NARROW.get(key, tile) if few else tile


def large_product(product: Product, rows: float) -> Product:
    """The same for so many rows per expert."""
    return replace(product, rows=1 << max(round(log2(rows)), 0))


def large_tile_of(product: Product, rows: float, gathered: bool = False) -> LargeTile:
    """The large tile of a product with so many rows per expert; ``gathered``: these are not sorted."""
    known = TUNED_LARGE.get(large_product(product, rows))
    if known is not None:
        return known
    if (product.kind, product.two, product.rows) in IN_REGISTERS:
        return IN_REGISTERS[product.kind, product.two, product.rows]
    sizes = {"plain": 2, "dynamic": 1}
    if not product.two and product.kind in sizes:
        short = product.inputs * sizes[product.kind] <= SHORT_STEPS * 128
        if short or (rows > SHORT_ABOVE and not gathered):
            return SHORT
    if product.joined and product.kind == "dynamic" and rows > JOINED_SORTED_ABOVE and not gathered:
        return JOINED_SORTED
    table = JOINED[product.kind] if product.joined else LARGE[product.kind, product.two]
    return next(tile for most, tile in table if rows <= most)
