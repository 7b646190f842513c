"""Experts of known models on a GPU: time over the physical floor, by token count, format and lowering, beside peers.

    python benchmarks/experts.py --out results                    # results.json, results.md
    python benchmarks/experts.py --layers qwen3 --tokens 1 64 --formats none int4

The floor of a cell is the larger of two times: that of reading the weights of the experts that are hit, and the tokens,
at 4.6 TB/s; and that of the multiplications at 807 (bfloat16) or 1500 (float8, int8) TFLOP/s: what an H200 reaches, not
what it is sold for. Times are medians of replays of a CUDA graph that holds several calls with different routing, so
that weights do not sit in the L2 cache. Every cell's result is compared with the layer in float32 on the weights that
its format stands for. Peers are transformers' own experts under torch.compile(fullgraph=True), all shapes fixed.

Programs are compiled by several processes beforehand; the timing finds them in Inductor's cache.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

import moe_fx

#: experts, experts per token, hidden size, inner size
LAYERS = {
    "mixtral": (8, 2, 4096, 14336),
    "qwen3": (128, 8, 2048, 768),
    "olmoe": (64, 8, 2048, 1024),
    "llama4": (16, 1, 5120, 8192),
    "deepseek": (256, 8, 7168, 2048),
}
FORMATS = {
    "none": None,
    "int8": moe_fx.Int8WeightOnly(),
    "float8": moe_fx.Float8Dynamic(),
    "int4": moe_fx.Int4WeightOnly(128),
}
BYTES = {"none": 2.0, "int8": 1.0, "float8": 1.0, "int4": 0.5 + 2 / 128}
#: operations per second; only float8 multiplies what it stores
FLOPS = {"none": 807e12, "int8": 807e12, "float8": 1500e12, "int4": 807e12}
BANDWIDTH = 4.6e12
#: least signal to noise against float32 on the format's weights, in dB; float8 also rounds activations
LEAST_SQNR = {"none": 40.0, "int8": 40.0, "float8": 22.0, "int4": 40.0}
#: slots up to which a copy of each slot's weights is worth measuring
GATHERED = 64


class Experts(nn.Module):
    """transformers' experts, one of its implementations; weights of small random numbers."""

    def __init__(self, layer: str, implementation: str) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        experts, top_k, hidden, inner = LAYERS[layer]
        config = MixtralConfig(
            hidden_size=hidden, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=top_k
        )
        config._experts_implementation = implementation
        self.experts = MixtralExperts(config)

    def forward(self, x: torch.Tensor, scores: torch.Tensor, top_k: int) -> torch.Tensor:
        weights, ids = scores.topk(top_k, dim=-1)
        return self.experts(x, ids, weights)


@dataclass
class Cell:
    layer: str
    tokens: int
    format: str
    floor_us: float
    #: by lowering or peer: time over floor
    ratio: dict[str, float]
    auto: str = ""


def inputs_of(layer: str, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    experts, top_k, hidden, _ = LAYERS[layer]
    generator = torch.Generator("cuda").manual_seed(tokens)
    made = []
    for _ in range(6 if tokens <= 256 else 2):
        x = torch.randn(tokens, hidden, device="cuda", generator=generator).bfloat16()
        scores = torch.rand(tokens, experts, device="cuda", generator=generator).bfloat16()
        made.append((x, scores, top_k))
    return made


def floor(layer: str, tokens: int, label: str, inputs: list) -> float:
    """Seconds."""
    _, top_k, hidden, inner = LAYERS[layer]
    hit = statistics.mean(len(scores.topk(top_k, -1).indices.unique()) for _, scores, _ in inputs)
    moved = hit * 3 * hidden * inner * BYTES[label] + 2 * 2 * tokens * hidden
    operations = 2 * tokens * top_k * 3 * hidden * inner
    return max(moved / BANDWIDTH, operations / FLOPS[label])


def reference(experts: nn.Module, form: moe_fx.formats.WeightFormat | None, inputs: tuple) -> torch.Tensor:
    """The layer in float32, expert by expert, on the weights a format stands for."""
    x, scores, top_k = inputs
    weights, ids = scores.topk(top_k, dim=-1)
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(experts.num_experts):
        token, slot = torch.where(ids == expert)
        if not len(token):
            continue
        up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
        if form is not None:
            up, down = (form.dequantize(*form.quantize(each.unsqueeze(0)))[0] for each in (up, down))
        gate, value = F.linear(x[token].float(), up.float()).chunk(2, -1)
        y = F.linear(F.silu(gate) * value, down.float()) * weights[token, slot].unsqueeze(-1)
        out.index_add_(0, token, y)
    return out


def seconds(call: Callable, inputs: list) -> float:
    """Median time of a call in a replayed graph of one call per input; NaN where no graph can be captured."""
    for each in inputs[:2]:
        call(*each)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for each in inputs:
                call(*each)
    except RuntimeError:
        torch.cuda.synchronize()
        return float("nan")
    times = []
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:]) / len(inputs) / 1e3


def calls(layer: str, tokens: int, label: str, peers: dict[str, nn.Module], inputs: list):
    """By name, what is timed."""
    slots = tokens * LAYERS[layer][1]
    if label == "none":
        for name, peer in peers.items():
            if name != "batched_mm" or slots <= GATHERED:
                yield f"transformers {name}", torch.compile(peer, fullgraph=True, dynamic=False)
    program = torch.export.export(peers["grouped_mm"], inputs[0])
    for lowering in ("fused", "grouped_mm", "gather"):
        if lowering != "gather" or slots <= GATHERED:
            config = moe_fx.Config(experts=lowering, quantize=FORMATS[label], validate=False, require="all")
            yield lowering, torch.compile(moe_fx.transform(program, config).module(), fullgraph=True)
    auto = moe_fx.explain(program, moe_fx.Config(quantize=FORMATS[label], validate=False))
    yield "auto", auto.layers[0].lowering


def measure(layer: str, tokens: int, formats: list[str], timed: bool) -> list[Cell]:
    with torch.device("cuda"):
        peers = {name: Experts(layer, name).bfloat16() for name in ("grouped_mm", "batched_mm")}
    for weight in peers["grouped_mm"].parameters():
        weight.data.normal_(0, 0.02)
    peers["batched_mm"].load_state_dict(peers["grouped_mm"].state_dict(), assign=True)
    inputs = inputs_of(layer, tokens)
    cells = []
    for label in formats:
        exact = reference(peers["grouped_mm"].experts, FORMATS[label], inputs[0]) if timed else None
        cell = Cell(layer, tokens, label, floor(layer, tokens, label, inputs) * 1e6, {})
        for name, call in calls(layer, tokens, label, peers, inputs):
            if name == "auto":
                cell.auto = call
                continue
            torch.compiler.reset()
            actual = call(*inputs[0])
            if exact is not None:
                noise = (actual.float() - exact).norm() / exact.norm()
                sqnr = float(-20 * noise.log10())
                assert sqnr > LEAST_SQNR[label], f"{layer} T={tokens} {label} {name}: {sqnr:.1f} dB"
                cell.ratio[name] = seconds(call, inputs) * 1e6 / cell.floor_us
        cells.append(cell)
    return cells


def table(cells: list[Cell]) -> str:
    names = list(dict.fromkeys(name for cell in cells for name in cell.ratio))
    lines = [
        "| layer | T | format | floor, us | " + " | ".join(names) + " | auto |",
        "|---|---|---|---|" + "---|" * (len(names) + 1),
    ]
    for cell in cells:
        ratios = [f"{cell.ratio[name]:.2f}" if name in cell.ratio else "-" for name in names]
        start = f"| {cell.layer} | {cell.tokens} | {cell.format} | {cell.floor_us:.0f} | "
        lines.append(start + " | ".join(ratios) + f" | {cell.auto} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 256, 1024, 4096, 16384])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--processes", type=int, default=12, help="that compile beforehand")
    parser.add_argument("--warm", action="store_true", help="compile only")
    parser.add_argument("--out", default="experts", help="path of the results, without a suffix")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    pairs = [(layer, tokens) for layer in options.layers for tokens in options.tokens]
    if options.warm:
        for layer, tokens in pairs:
            measure(layer, tokens, options.formats, timed=False)
        return
    waiting, running = list(pairs), []
    while waiting or running:
        while waiting and len(running) < options.processes:
            layer, tokens = waiting.pop()
            command = [sys.executable, __file__, "--warm", "--layers", layer, "--tokens", str(tokens)]
            running.append(subprocess.Popen([*command, "--formats", *options.formats], stderr=subprocess.DEVNULL))
        running.pop(0).wait()
    cells: list[Cell] = []
    for layer, tokens in pairs:
        cells += measure(layer, tokens, options.formats, timed=True)
        print(table(cells[-len(options.formats) :]).split("\n", 2)[-1], flush=True)
        torch.cuda.empty_cache()
        with open(f"{options.out}.json", "w") as file:
            json.dump([asdict(cell) for cell in cells], file, indent=1)
        with open(f"{options.out}.md", "w") as file:
            file.write(table(cells) + "\n")
    print(table(cells))


if __name__ == "__main__":
    main()
