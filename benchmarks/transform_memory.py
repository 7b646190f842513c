"""Peak memory of quantizing, against the number of layers.

    python benchmarks/transform_memory.py                    # 2 to 16 layers of 16 experts, int8

Each case runs in a process of its own. "peak" is the largest resident set during transform above what was resident
before, so the new weights are in it; with ``consume=True`` the original ones are given up on the way, and the peak is
about what one layer takes, however many there are.
"""

import argparse
import gc
import multiprocessing

import torch
from transform_cost import PeakMemory, model

import moe_fx

MIB = 2**20


def measure(layers: int, experts: int, hidden: int, inner: int, consume: bool, results: multiprocessing.Queue) -> None:
    torch.set_grad_enabled(False)
    original = model(layers, experts, hidden, inner)
    program = torch.export.export(original, (), {"input_ids": torch.randint(256, (2, 16))}, strict=False)
    del original
    gc.collect()
    with PeakMemory() as memory:
        result = moe_fx.transform(program, moe_fx.Config(quantize=moe_fx.Int8WeightOnly(), consume=consume))
    found = moe_fx.report(result).layers
    before, after = sum(layer.bytes_before for layer in found), sum(layer.bytes_after for layer in found)
    results.put((before, after, memory.peak - memory.start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=512)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{'layers':>6} {'experts MiB':>11} {'one layer':>9} {'new MiB':>7} {'peak':>6} {'peak, consume':>13}")
    for layers in options.layers:
        row = []
        for consume in (False, True):
            results = context.Queue()
            size = (layers, options.experts, options.hidden, options.inner)
            process = context.Process(target=measure, args=(*size, consume, results))
            process.start()
            row.append(results.get())
            process.join()
        (before, after, peak), (_, _, consumed) = row
        print(
            f"{layers:6} {before / MIB:11.0f} {before / layers / MIB:9.0f} {after / MIB:7.0f} {peak / MIB:6.0f} "
            f"{consumed / MIB:13.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
