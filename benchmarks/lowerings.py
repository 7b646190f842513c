"""The three lowerings side by side, by token count: what ``experts="auto"`` chooses, and what it costs beside the best.

    python benchmarks/lowerings.py                                   # CPU, one mid-size layer
    python benchmarks/lowerings.py --device cuda --layer mixtral qwen3

Each layer is exported with a static token count, transformed, and compiled by Inductor. Times are medians over inputs
that are routed differently, measured in one run; on a GPU they are replays of a CUDA graph or, marked with *, ordinary
calls where a lowering cannot be captured. "best" is the fastest's time; the lowerings' columns are ratios to it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import moe_fx

#: experts, experts per token, hidden size, inner size
LAYERS = {
    "middle": (16, 4, 1024, 1024),
    "mixtral": (8, 2, 4096, 14336),
    "qwen3": (128, 8, 2048, 768),
}
LOWERINGS = ("gather", "grouped_mm", "linear")
FORMATS = {"none": None, "int8": moe_fx.Int8WeightOnly()}
#: one linear per expert and projection: with many experts it takes minutes to compile
LINEAR_LIMIT = 16


class MoE(nn.Module):
    def __init__(self, experts: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Parameter(torch.randn(experts, hidden, dtype=dtype))
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden, dtype=dtype) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner, dtype=dtype) * inner**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = F.linear(x, self.router).float().softmax(-1).topk(self.top_k, dim=-1)
        slot = (weights / weights.sum(-1, keepdim=True)).to(x.dtype).reshape(-1, 1)
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(self.top_k, 0)
        gate, up = torch.bmm(self.gate_up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
        y = torch.bmm(self.down[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1) * slot
        return y.view(-1, self.top_k, y.shape[-1]).sum(1)


def on_cpu(call: Callable, inputs: list[torch.Tensor]) -> tuple[float, bool]:
    """Median seconds of a call, and that it is one."""
    for x in inputs[:2]:
        call(x)
    times = []
    while sum(times) < 0.4 or len(times) < 5:
        x = inputs[len(times) % len(inputs)]
        start = time.perf_counter()
        call(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times), True


def on_gpu(call: Callable, inputs: list[torch.Tensor]) -> tuple[float, bool]:
    """Median seconds of a CUDA graph's replay; False beside it where no graph can be captured."""
    fixed = inputs[0].clone()
    for _ in range(3):
        call(fixed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    captured = True
    try:
        with torch.cuda.graph(graph):
            call(fixed)
    except RuntimeError:
        captured = False
        torch.cuda.synchronize()
    times = []
    for i in range(25):
        fixed.copy_(inputs[i % len(inputs)])
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay() if captured else call(fixed)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times), captured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layer", nargs="+", default=["middle"], choices=LAYERS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 512])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    measure = on_gpu if options.device == "cuda" else on_cpu
    dtype = getattr(torch, options.dtype)
    print(
        f"{'layer':8} {'T':>5} {'format':6} {'best':>9}  " + "  ".join(f"{name:>10}" for name in LOWERINGS) + "  auto"
    )
    for name in options.layer:
        with torch.device(options.device):
            model = MoE(*LAYERS[name], dtype).eval()
        for count in options.tokens:
            hidden = LAYERS[name][2]
            inputs = [torch.randn(count, hidden, dtype=dtype, device=options.device) for _ in range(8)]
            program = torch.export.export(model, (inputs[0],))
            for label, weight_format in FORMATS.items():
                row: dict[str, tuple[float, bool]] = {}
                results = []
                for lowering in LOWERINGS:
                    if lowering == "linear" and LAYERS[name][0] > LINEAR_LIMIT:
                        continue
                    torch.compiler.reset()
                    config = moe_fx.Config(experts=lowering, quantize=weight_format, validate=False)
                    compiled = torch.compile(moe_fx.transform(program, config).module(), fullgraph=True)
                    results.append(compiled(inputs[0]).float())
                    row[lowering] = measure(compiled, inputs)
                error = max(float((r - results[0]).abs().max() / results[0].abs().max()) for r in results)
                assert error < 2**-6, f"the lowerings differ by {error:.1e}"
                auto = moe_fx.explain(program, moe_fx.Config(quantize=weight_format, validate=False)).layers[0].lowering
                best = min(seconds for seconds, _ in row.values())
                cells = [
                    f"{row[each][0] / best:9.2f}{' ' if row[each][1] else '*'}" if each in row else f"{'-':>10}"
                    for each in LOWERINGS
                ]
                start = f"{name:8} {count:5} {label:6} {best * 1e6:7.0f}us"
                print(start, *cells, f"{auto} ({row[auto][0] / best:.2f})", sep="  ", flush=True)


if __name__ == "__main__":
    main()
