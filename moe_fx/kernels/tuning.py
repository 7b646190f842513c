"""Tiles tuned for a layer's own sizes: asked for, timed, and kept in a file. Nothing is ever tuned unasked.

    tiles = tuning.tune(num_experts=64, top_k=8, hidden=2048, inner=1024, tokens=[1, 64], quantize=Int4WeightOnly(128))
    tuning.save(tiles, "tiles.json")
    ...
    tuning.use(tuning.load("tiles.json"))

Tiles that are in use go ahead of the tables in fused_tiles.py, for products of exactly these sizes. What was compiled
before keeps its own. A candidate takes one to three seconds to compile, and there are about ten for each of a layer's
two products and each number of tokens.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import torch

from moe_fx.errors import ConfigError
from moe_fx.formats import Unquantized, WeightFormat
from moe_fx.kernels.fused_large import as_read, large_gemm, product_of, rows_for, takes_descriptors
from moe_fx.kernels.fused_launch import expert_gemm, sum_block
from moe_fx.kernels.fused_projection import Projection, Routing, operands, widened
from moe_fx.kernels.fused_tiles import (
    TILES,
    TUNED,
    TUNED_LARGE,
    LargeTile,
    Product,
    Tile,
    large_product,
    widens_first,
)  # fmt: skip
from moe_fx.kernels.fused_token import takes_token
from moe_fx.kernels.triton_or_none import opaque, unavailable
from moe_fx.kernels.triton_rows import split_pairs

__all__ = ["candidates", "large_candidates", "load", "save", "tune", "use"]

Tiles = dict[Product, Tile | LargeTile]

#: block_n, bytes of weights along K, stages, warps; for few rows weights are the left operand
FEW_ROWS = [(32, 512, 3, 2), (32, 256, 4, 2), (64, 256, 3, 4), (64, 256, 4, 4), (128, 128, 4, 4), (128, 256, 3, 8),
            (16, 512, 4, 2), (64, 512, 2, 4)]  # fmt: skip
#: the same, and whether they are
MORE_ROWS = [(64, 256, 3, 4, 0), (64, 128, 4, 4, 0), (128, 128, 4, 4, 1), (128, 128, 3, 4, 0), (64, 128, 3, 4, 1),
             (128, 128, 4, 8, 0), (64, 64, 3, 4, 0), (128, 64, 3, 4, 0)]  # fmt: skip
#: int4: block_n, stages, warps, swap, unroll
INT4 = [(64, 3, 4, 1, 2), (64, 3, 2, 1, 2), (32, 4, 2, 1, 2), (128, 3, 4, 1, 2), (64, 3, 4, 0, 2), (64, 3, 4, 0, 1),
        (64, 3, 4, 1, 1), (128, 3, 8, 0, 1)]  # fmt: skip
LARGE_TWO = [LargeTile(128, 4, 8), LargeTile(128, 4, 8, swap=True), LargeTile(128, 4, 8, half=True),
             LargeTile(128, 4, 8, swap=True, half=True), LargeTile(64, 3, 4, half=True)]  # fmt: skip
LARGE_JOINED = [LargeTile(128, 4, 8), LargeTile(128, 4, 8, persistent=1), LargeTile(128, 4, 8, half=True),
                LargeTile(64, 3, 4, persistent=2), LargeTile(64, 3, 4, half=True)]  # fmt: skip
LARGE_ONE = [LargeTile(256, 4, 8), LargeTile(256, 4, 8, half=True), LargeTile(128, 3, 4, half=True),
             LargeTile(128, 3, 4, persistent=2), LargeTile(256, 4, 8, persistent=1)]  # fmt: skip

#: of weights that are widened in registers, which are the left operand
IN_REGISTERS_TWO = [LargeTile(64, stages, 4, swap=True, half=half) for stages in (3, 4) for half in (True, False)]
IN_REGISTERS_TWO += [LargeTile(128, 3, 4, swap=True)]
IN_REGISTERS_ONE = [LargeTile(128, stages, 4, swap=True, half=half) for stages in (3, 4) for half in (True, False)]


def candidates(product: Product) -> list[Tile]:
    """Tiles worth trying, the table's own first."""
    found = [TILES[product.kind, product.two, product.rows]]
    size = 2 if product.kind == "plain" else 1
    group = 1 if product.rows <= 16 else 8
    if product.kind == "int4":
        listed = [Tile(n, 64, s, w, bool(swap), group, u) for n, s, w, swap, u in INT4]
    elif product.rows <= 8:
        listed = [Tile(n, k // size, s, w, True, group) for n, k, s, w in FEW_ROWS]
    else:
        listed = [Tile(n, max(k // size, 32), s, w, bool(swap), group) for n, k, s, w, swap in MORE_ROWS]
    found += [tile for tile in listed if tile.swap or product.rows > 8]
    return list(dict.fromkeys(found))


def large_candidates(product: Product) -> list[LargeTile]:
    if product.kind in ("widened", "int4"):
        return IN_REGISTERS_TWO if product.two else IN_REGISTERS_ONE
    return LARGE_JOINED if product.joined else LARGE_TWO if product.two else LARGE_ONE


def seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Median time of one of the calls, in replays of a CUDA graph of them all."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[1:]) / len(calls) / 1e3


def tune(
    *, num_experts: int, top_k: int, hidden: int, inner: int, tokens: Sequence[int], gated: str = "gate_up",
    quantize: WeightFormat | None = None, dtype: torch.dtype = torch.bfloat16,
    report: Callable[[Product, dict[Any, float]], None] = lambda product, times: None,
) -> Tiles:  # fmt: skip
    """The fastest tiles for a layer of these sizes at these numbers of tokens, on random weights and routing.

    Args:
        gated: how gate and up lie, as ``moe_fx::fused_experts`` names it: "gate_up" or "none", for example.
        report: told the seconds of every candidate, the table's own first; infinite where it cannot be used.

    Raises:
        ConfigError: the kernels do not run here.
    """
    device = torch.device("cuda")
    reason = unavailable(device)
    if reason is not None:
        raise ConfigError(f"nothing can be tuned here: {reason}")
    form = quantize or Unquantized()

    def stored(*shape: int) -> list[torch.Tensor]:
        weight = torch.randn(*shape, dtype=dtype, device=device) * 0.02
        return list(form.quantize(weight)) if quantize is not None else [weight]

    up = Projection(stored(num_experts, inner * (1 if gated == "none" else 2), hidden), form.name, gated=gated)
    down = Projection(stored(num_experts, hidden, inner), form.name)
    found: Tiles = {}
    with opaque(), torch.no_grad():
        for count in tokens:
            for product, tiles, call in _trials(up, down, num_experts, top_k, count, dtype):
                times = {tile: _tried(call, tile) for tile in tiles}
                report(product, times)
                found[product] = min(times, key=times.__getitem__)
    return found


def _tried(call: Callable[[int, Any], Any], tile: Tile | LargeTile) -> float:
    """Seconds; infinite where a tile cannot be compiled for these sizes (too much shared memory, no layout)."""
    try:
        return seconds([lambda i=i: call(i, tile) for i in range(4)])  # type: ignore[misc]
    except Exception:  # whatever the compiler or the launch says, it is not a candidate here
        torch.cuda.synchronize()
        return inf


def _trials(
    up: Projection, down: Projection, num_experts: int, top_k: int, count: int, dtype: torch.dtype
) -> Iterator[tuple[Product, Sequence[Tile | LargeTile], Callable[[int, Any], Any]]]:
    """Of both projections: the product, its candidates, and what is timed, by the number of a routing and the tile.

    Nothing where few tokens have kernels of their own.
    """
    slots = count * top_k
    device = up.tensors[0].device
    ids = [torch.rand(count, num_experts, device=device).topk(top_k, 1).indices for _ in range(4)]
    if takes_token(ids[0], num_experts, (up, down), dtype):
        return
    hidden, inner = down.tensors[0].shape[1], operands(up, ids[0]).width
    rows = [torch.randn(count, hidden, device=device).to(dtype), torch.randn(slots, inner, device=device).to(dtype)]
    large = takes_descriptors(rows[0], (up, down), slots, num_experts)
    routings = [Routing.of(each, num_experts, (up, down), dtype, placed=large) for each in ids]
    kind = "plain" if widens_first(up.kind, slots, num_experts) else up.kind
    for place, stored in enumerate((up, down)):
        activation = "silu" if place == 0 and stored.gated != "none" else "none"
        row_div = top_k if place == 0 else 1
        if large:
            yield _large_trial(stored, rows[place], routings, row_div, activation)
            continue
        projection = widened(stored, dtype) if widens_first(stored.kind, slots, num_experts) else stored
        given = operands(projection, ids[0])
        inputs = rows[place].shape[1]
        product = Product(kind, projection.gated != "none", routings[0].block, given.width, inputs)
        sums, left = None, rows[place]
        if kind == "int4" and not routings[0].digits:
            left, sums = split_pairs(left, sum_block(projection, dtype, inputs, routings[0]))

        def call(i: int, tile: Tile, p: Any = projection, left: Any = left, sums: Any = sums, row_div: int = row_div,
                 activation: str = activation) -> torch.Tensor:  # fmt: skip
            return expert_gemm(left, p, routings[i], row_div, activation=activation, sums=sums, tile=tile)[0]

        yield product, candidates(product), call


def _large_trial(
    stored: Projection, rows: torch.Tensor, routings: Sequence[Routing], row_div: int, activation: str
) -> tuple[Product, Sequence[LargeTile], Callable[[int, Any], Any]]:
    """The same of a projection whose tiles are loaded by descriptors: rows are sorted, as all but small layers' are."""
    ids, dtype = routings[0].ids, rows.dtype
    projection = as_read(stored, dtype, routings[0])
    in_order = [rows_for(projection, rows, routing, gather=False) for routing in routings]
    left = in_order[0][0]
    product = large_product(product_of(projection, left, routings[0]), ids.numel() / routings[0].num_experts)

    def call(i: int, tile: LargeTile) -> torch.Tensor:
        return large_gemm(*in_order[i], projection, routings[i], row_div, gather=False, sorted_rows="",
                          dtype=dtype, activation=activation, tile=tile)  # fmt: skip

    return product, large_candidates(product), call


def save(tiles: Tiles, path: str | Path) -> None:
    """Write tiles as JSON."""
    entries = [
        {"product": asdict(product), "large": isinstance(tile, LargeTile), "tile": asdict(tile)}
        for product, tile in tiles.items()
    ]
    Path(path).write_text(json.dumps(entries, indent=1))


def load(path: str | Path) -> Tiles:
    """What :func:`save` wrote.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        return {
            Product(**entry["product"]): (LargeTile if entry["large"] else Tile)(**entry["tile"])
            for entry in json.loads(Path(path).read_text())
        }
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} holds no tiles as moe_fx.kernels.tuning.save writes them: {error!r}") from error


def use(tiles: Tiles) -> None:
    """From now on these tiles are taken; those in use before stay, where they are for other products."""
    for product, tile in tiles.items():
        if isinstance(tile, LargeTile):
            TUNED_LARGE[product] = tile
        else:
            TUNED[product] = tile
