"""The tables of moe_fx/kernels/fused_tiles.py beside what tuning finds for the layers of benchmarks/experts.py.

    python benchmarks/tune_fused.py --layers qwen3 --tokens 1 64 4096 --formats none int4 --out tiles.json

Prints, for each product that is tuned, the tile of the table and the best, with their times; what is written can be
given to moe_fx.kernels.tuning.use.
"""

import argparse

import torch
from experts import FORMATS, LAYERS, format_of

from moe_fx.kernels import tuning
from moe_fx.kernels.fused_tiles import Product, Tile


def shown(tile) -> str:
    parts = [tile.block_n, *([tile.block_k] if isinstance(tile, Tile) else []), tile.stages, tile.warps]
    words = [word for word in ("swap", "half", "unroll", "persistent") if getattr(tile, word, 0) not in (0, False)]
    return ",".join(map(str, parts)) + "".join(
        f" {word}" for word in words if getattr(tile, word) != 1 or word != "unroll"
    )


def told(product: Product, times: dict) -> None:
    table, best = next(iter(times)), min(times, key=times.__getitem__)
    print(
        f"{product.kind:8} {product.outputs:6}x{product.inputs:<6} {product.rows:4} rows"
        f"  table {shown(table):20} {times[table] * 1e6:8.1f} us  best {shown(best):20} {times[best] * 1e6:8.1f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["qwen3"], choices=LAYERS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256, 4096])
    parser.add_argument("--formats", nargs="+", default=["none"], choices=FORMATS)
    parser.add_argument("--out", default="tiles.json")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    found: tuning.Tiles = {}
    for layer in options.layers:
        experts, top_k, hidden, inner = LAYERS[layer]
        for label in options.formats:
            print(f"{layer} {label}", flush=True)
            found |= tuning.tune(
                num_experts=experts, top_k=top_k, hidden=hidden, inner=inner, tokens=options.tokens,
                quantize=format_of(layer, label), report=told,
            )  # fmt: skip
    tuning.save(found, options.out)


if __name__ == "__main__":
    main()
