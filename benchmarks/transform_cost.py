"""What transform costs beside export: time, and peak memory above the model's.

    python benchmarks/transform_cost.py            # 24 layers of 64 experts, and half of each

The peer is torch.export of the same model in the same process. Memory is the process's resident set, sampled during
transform, above what it was before and without the new weights; the yardstick is the expert weights of one layer.
The lowering linear writes a few nodes for each expert: their time and memory are those of torch.fx.
"""

import argparse
import gc
import os
import threading
import time

import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM, MixtralConfig

import moe_fx


def model(layers: int, experts: int, hidden: int, inner: int) -> torch.nn.Module:
    config = MixtralConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=4, use_cache=False,
    )  # fmt: skip
    result = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm", attn_implementation="eager")
    for parameter in result.parameters():
        parameter.normal_(0, 0.02)  # memory that nobody wrote yet is not resident
    return result.eval()


def resident() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """The largest resident set while the block runs, above what it was at its start and what is kept at its end."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = resident()
        self.running = True
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--inner", type=int, default=128)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    sizes = [
        (options.layers, options.experts),
        (options.layers // 2, options.experts),
        (options.layers, options.experts // 2),
    ]
    print(f"{'layers':>6} {'experts':>7} {'lowering':>10} {'format':>16} {'export':>8} {'transform':>9} "
          f"{'ratio':>6} {'new MiB':>8} {'peak MiB':>8} {'layer MiB':>9}")  # fmt: skip
    for layers, experts in sizes:
        original = model(layers, experts, options.hidden, options.inner)
        start = time.perf_counter()
        ids = {"input_ids": torch.randint(256, (2, 16))}
        program = torch.export.export(original, (), ids, dynamic_shapes=shapes, strict=False)
        exporting = time.perf_counter() - start
        for lowering in ("grouped_mm", "gather", "linear"):
            for form in (None, moe_fx.Int8WeightOnly()):
                config = moe_fx.Config(experts=lowering, quantize=form, require=layers)
                gc.collect()
                with PeakMemory() as memory:
                    start = time.perf_counter()
                    result = moe_fx.transform(program, config)
                    taken = time.perf_counter() - start
                report = moe_fx.report(result)
                del result
                layer = report.layers[0]
                new = sum(each.bytes_after for each in report.layers) if form else 0
                above = memory.peak - memory.start - new
                print(f"{layers:6} {experts:7} {lowering:>10} {layer.format:>16} {exporting:7.1f}s {taken:8.2f}s "
                      f"{taken / exporting:6.1%} {new / 2**20:8.1f} {above / 2**20:8.1f} "
                      f"{layer.bytes_before / 2**20:9.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
