"""The tiles of moe_fx/kernels/fused_tiles.py: candidates timed on a GPU; the best of each cell, and the table's own.

    python benchmarks/tune_fused.py --formats plain dynamic --out tiles.json

Kernels are compiled by several processes first, then timed one by one: medians of replays of a CUDA graph in which
the routing varies, so that weights do not sit in L2.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict

import torch

import moe_fx.kernels.fused_launch as launch
from moe_fx.formats import Float8Dynamic, Int4WeightOnly, Int8WeightOnly, Unquantized
from moe_fx.kernels import triton_rows
from moe_fx.kernels.fused_launch import Projection, Routing, expert_gemm
from moe_fx.kernels.fused_tiles import FEW_SLOTS, TILES, Tile
from moe_fx.kernels.triton_routing import max_tiles, route

#: experts, experts per token, hidden size, inner size
LAYERS = {"mixtral": (8, 2, 4096, 14336), "qwen3": (128, 8, 2048, 768)}
#: layer, tokens, rows per tile to try
CASES = [
    ("mixtral", 1, (16,)), ("mixtral", 4, (16,)), ("mixtral", 16, (16,)), ("mixtral", 64, (16, 32, 64)),
    ("mixtral", 256, (64, 128)), ("mixtral", 1024, (128,)), ("mixtral", 4096, (128,)),
    ("qwen3", 1, (16,)), ("qwen3", 4, (16,)), ("qwen3", 64, (16,)), ("qwen3", 256, (16, 32)),
    ("qwen3", 1024, (64, 128)), ("qwen3", 4096, (128,)),
]  # fmt: skip
FORMATS = {
    "plain": Unquantized(), "widened": Int8WeightOnly(), "dynamic": Float8Dynamic(), "int4": Int4WeightOnly(128),
}  # fmt: skip

#: block_n, block_k in bytes of weights, stages, warps, swap
SMALL = [
    (64, 256, 4, 4, 0), (64, 256, 3, 4, 0), (32, 256, 5, 4, 0), (64, 256, 4, 4, 1), (64, 128, 6, 4, 0),
    (128, 128, 4, 4, 1), (32, 512, 3, 4, 0), (128, 256, 3, 8, 1), (64, 128, 6, 4, 1),
]  # fmt: skip
MIDDLE = [
    (64, 256, 3, 4, 0), (64, 256, 4, 4, 0), (64, 256, 4, 4, 1), (128, 128, 4, 4, 1), (128, 128, 4, 4, 0),
    (128, 256, 3, 8, 1), (64, 128, 5, 4, 1),
]  # fmt: skip
WIDE = [
    (128, 128, 4, 4, 0), (128, 128, 4, 8, 0), (64, 128, 5, 4, 0), (128, 128, 4, 4, 1), (128, 256, 3, 8, 0),
    (256, 128, 3, 8, 0), (64, 256, 4, 8, 0), (128, 128, 4, 8, 1),
]  # fmt: skip
WIDEST = [
    (256, 128, 3, 8, 0), (256, 128, 4, 8, 0), (128, 128, 4, 8, 0), (128, 128, 3, 8, 0), (128, 128, 4, 4, 0),
    (128, 128, 4, 8, 1), (128, 256, 3, 8, 0), (64, 128, 4, 8, 0),
]  # fmt: skip
CANDIDATES = {16: SMALL, 32: MIDDLE, 64: WIDE, 128: WIDEST}
INT4 = {
    16: [
        (64, 64, 4, 4, 0), (64, 64, 6, 4, 0), (32, 64, 6, 4, 0), (64, 64, 4, 4, 1), (128, 64, 4, 4, 1),
        (128, 64, 4, 8, 1), (128, 64, 4, 4, 0), (128, 64, 4, 8, 0),
    ],
    32: [(64, 64, 4, 4, 0), (64, 64, 4, 4, 1), (128, 64, 4, 4, 1), (128, 64, 4, 8, 1), (128, 64, 4, 8, 0)],
    64: [(128, 64, 3, 8, 0), (64, 64, 4, 4, 0), (128, 64, 3, 4, 1), (128, 64, 3, 8, 1), (64, 64, 4, 4, 1)],
    128: [(128, 64, 3, 8, 0), (64, 64, 3, 8, 0), (128, 64, 3, 8, 1), (256, 64, 3, 8, 1)],
}  # fmt: skip


def candidates(kind: str, two: bool, block: int, few: int | None) -> list[Tile]:
    group = 1 if block == 16 else 8
    listed = INT4[block] if kind == "int4" else CANDIDATES[block]
    found = [TILES[kind, two, block]]
    for n, k, stages, warps, swap in listed[:few]:
        if two and n == 256:
            continue
        wide = k if kind == "int4" else k // (2 if kind == "plain" else 1)
        # What is loaded ahead fits into 227 KiB of shared memory.
        left = 2 if kind != "dynamic" else 1
        rows = block * wide * left * (2 if kind == "int4" else 1)
        while stages > 2 and stages * (n * wide * (2 if kind == "plain" else 1) * (1 + two) + rows) > 220_000:
            stages -= 1
        tile = Tile(n, wide, stages, warps, bool(swap), group)
        if tile not in found:
            found.append(tile)
    return found


def projections(kind: str, layer: str, device: str) -> list[tuple[Projection, bool]]:
    """gate and up as halves, and down; weights of random bits where that is all the same."""
    experts, _, hidden, inner = LAYERS[layer]
    made = []
    for outputs, inputs, gated in ((2 * inner, hidden, "gate_up"), (hidden, inner, "none")):
        form = FORMATS[kind]
        with torch.device(device):
            if kind == "plain":
                tensors = [torch.empty(experts, outputs, inputs, dtype=torch.bfloat16)]
            elif kind == "int4":
                tensors = [
                    torch.empty(experts, outputs, inputs // 2, dtype=torch.uint8),
                    torch.full((experts, outputs, inputs // 128), 0.01, dtype=torch.bfloat16),
                ]
            else:
                tensors = [
                    torch.empty(experts, outputs, inputs, dtype=form.dtype),
                    torch.full((experts, outputs), 0.01, dtype=torch.float32),
                ]
        if device != "meta":
            if kind == "plain":
                tensors[0].normal_(0, 0.02)
            elif kind == "dynamic":
                for some in tensors[0]:
                    some.copy_(torch.randn(some.shape, device=device))
            else:
                tensors[0].random_(0, 256) if kind == "int4" else tensors[0].random_(-128, 128)
        made.append((Projection(tensors, form.name, gated=gated), gated != "none"))
    return made


def operands(layer: str, tokens: int, block: int, device: str, seed: int = 0):
    experts, top_k, hidden, inner = LAYERS[layer]
    if device == "meta":
        ids = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
        count = max_tiles(tokens * top_k, experts, block)
        tiles = tuple(torch.empty(size, dtype=torch.int32, device=device) for size in ((count, block), (count,), (1,)))
    else:
        generator = torch.Generator(device).manual_seed(seed)
        ids = torch.rand(tokens, experts, device=device, generator=generator).topk(top_k, 1).indices
        tiles = route(ids, experts, block)
    routing = Routing(ids, experts, block, None if tokens * top_k <= FEW_SLOTS else tiles)
    rows = [torch.empty(tokens, hidden), torch.empty(tokens * top_k, inner)]
    rows = [each.to(device, torch.bfloat16) for each in rows]
    slot = torch.empty(tokens, top_k, dtype=torch.bfloat16, device=device)
    if device != "meta":
        rows = [each.normal_() for each in rows]
        slot.uniform_()
    return rows, routing, slot


def call(which: int, rows, projection: Projection, routing: Routing, slot, tile: Tile) -> torch.Tensor:
    if which == 0:
        return expert_gemm(rows[0], projection, routing, routing.ids.shape[1], activation="silu", tile=tile)
    return expert_gemm(rows[1], projection, routing, 1, slot=slot, rows_are_apart=projection.kind == "int4", tile=tile)


class Warm:
    """In the place of a kernel: compiles it, and launches nothing."""

    def __init__(self, kernel, seen, share):
        self.kernel, self.seen, self.share = kernel, seen, share

    def __getitem__(self, grid):
        def warm(*args, **options):
            key = str([(str(getattr(a, "dtype", a % 16 == 0 if isinstance(a, int) else a))) for a in args]) + str(
                options
            )
            if key in self.seen:
                return
            mine = len(self.seen) % self.share[1] == self.share[0]
            self.seen[key] = True
            if mine:
                try:
                    self.kernel.warmup(*args, grid=(1,), **options)
                except Exception as error:
                    print("cannot compile", options, repr(error)[:200], flush=True)

        return warm


def each(formats, few, layers):
    for kind in formats:
        for layer, tokens, blocks in CASES:
            if layer in layers:
                for block in blocks:
                    yield kind, layer, tokens, block


def warm(share: tuple[int, int], formats, few, layers) -> None:
    seen: dict[str, bool] = {}
    launch.wrapped = triton_rows.wrapped = lambda kernel: Warm(kernel, seen, share)
    for kind, layer, tokens, block in each(formats, few, layers):
        rows, routing, slot = operands(layer, tokens, block, "meta")
        for which, (projection, two) in enumerate(projections(kind, layer, "meta")):
            for tile in candidates(kind, two, block, few):
                call(which, rows, projection, routing, slot, tile)


def seconds(calls) -> float:
    for one in calls[:2]:
        one()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in calls:
            one()
    times = []
    graph.replay()
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[2] / len(calls) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--few", type=int, help="only the first candidates of each list")
    parser.add_argument("--processes", type=int, default=14)
    parser.add_argument("--warm", nargs=2, type=int)
    parser.add_argument("--out", default="tiles.json")
    options = parser.parse_args()
    if options.warm:
        warm(tuple(options.warm), options.formats, options.few, options.layers)
        return
    started = time.time()
    given = ["--formats", *options.formats, "--layers", *options.layers]
    given += ["--few", str(options.few)] if options.few else []
    workers = [
        subprocess.Popen([sys.executable, __file__, *given, "--warm", str(i), str(options.processes)])
        for i in range(options.processes)
    ]
    for worker in workers:
        worker.wait()
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    results = []
    for kind in options.formats:
        for layer in options.layers:
            made = projections(kind, layer, "cuda")
            for _, name, tokens, block in each([kind], options.few, [layer]):
                inputs = [operands(name, tokens, block, "cuda", seed) for seed in range(4 if tokens < 1024 else 2)]
                for which, (projection, two) in enumerate(made):
                    row = []
                    for tile in candidates(kind, two, block, options.few):
                        calls = [
                            lambda i=i, t=tile, w=which, p=projection: call(w, i[0], p, i[1], i[2], t) for i in inputs
                        ]
                        try:
                            row.append((seconds(calls) * 1e6, tile))
                        except Exception as error:
                            print("cannot run", tile, repr(error)[:120], flush=True)
                    own, (best, tile) = row[0][0], min(row, key=lambda entry: entry[0])
                    results.append(dict(
                        kind=kind, layer=layer, tokens=tokens, block=block, which=which,
                        times=[(us, asdict(each_tile)) for us, each_tile in row],
                    ))  # fmt: skip
                    b = tile
                    shown = f"{b.block_n},{b.block_k},{b.stages},{b.warps},{'swap' if b.swap else '-'}"
                    ours = f"{kind:8} {layer:8} {tokens:5} bm{block:<4} {'down' if which else 'up':5}"
                    print(f"{ours} own {own:8.1f} best {best:8.1f} us  {shown}", flush=True)
                del inputs
            del made
            torch.cuda.empty_cache()
    with open(options.out, "w") as file:
        json.dump(results, file)
    print(f"done in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
