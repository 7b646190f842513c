"""Experts of known models on a GPU: time over the physical floor, by token count, format and lowering, beside peers.

    python benchmarks/experts.py --out results --plot              # results.json, results.md, results.png
    python benchmarks/experts.py --layers qwen3 --tokens 1 64 --formats none int4

The floor of a cell is the larger of two times: that of reading the weights of the experts that are hit, and the tokens,
at 4.6 TB/s; and that of the multiplications at 807 (bfloat16) or 1500 (float8) TFLOP/s: what an H200 reaches, not what
it is sold for. On another card 4.6 TB/s is scaled by what a large copy reaches (on an H200, 4.3). Times are medians of
replays of a CUDA graph that holds several calls with different routing, so that weights do not sit in the L2 cache.
Every cell's result is compared with the layer in float32 on the weights that its format stands for.

Peers: transformers' own experts under torch.compile(fullgraph=True), all shapes fixed; and, in float8, torchao's float8
tensors under transformers' grouped_mm, compiled where that works (marked * where only eager does).

Programs are compiled by several processes beforehand; the timing finds them in Inductor's cache.
"""

import argparse
import copy
import gc
import importlib.util
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
    "gptoss": (32, 4, 2880, 2880),
}
FORMATS = ("none", "int8", "float8", "int4")
BYTES = {"none": 2.0, "int8": 1.0, "float8": 1.0}
#: operations per second; only float8 multiplies what it stores
FLOPS = {"none": 807e12, "int8": 807e12, "float8": 1500e12, "int4": 807e12}
BANDWIDTH, COPY = 4.6e12, 4.3e12
#: least signal to noise against float32 on the format's weights, in dB; float8 also rounds activations
LEAST_SQNR = {"none": 40.0, "int8": 40.0, "float8": 22.0, "int4": 40.0}
#: slots up to which a copy of each slot's weights is worth measuring
GATHERED = 64


def format_of(layer: str, label: str) -> moe_fx.formats.WeightFormat | None:
    """int4 groups are of 128 inputs, or of 64 where sizes are no multiple of that (gpt-oss)."""
    if label == "int4":
        return moe_fx.Int4WeightOnly(128 if all(size % 128 == 0 for size in LAYERS[layer][2:]) else 64)
    return {"none": None, "int8": moe_fx.Int8WeightOnly(), "float8": moe_fx.Float8Dynamic()}[label]


class Experts(nn.Module):
    """transformers' experts, one of its implementations; weights of small random numbers."""

    def __init__(self, layer: str, implementation: str) -> None:
        import transformers
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        experts, top_k, hidden, inner = LAYERS[layer]
        config, kind = (transformers.MixtralConfig, MixtralExperts)
        if layer == "gptoss":
            config, kind = (transformers.GptOssConfig, GptOssExperts)
        made = config(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=top_k)
        made._experts_implementation = implementation
        self.experts = kind(made)

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


def floor(layer: str, tokens: int, label: str, inputs: list, speed: float) -> float:
    """Seconds; ``speed``: of memory, in bytes per second."""
    _, top_k, hidden, inner = LAYERS[layer]
    hit = statistics.mean(len(scores.topk(top_k, -1).indices.unique()) for _, scores, _ in inputs)
    stored = 0.5 + 2 / format_of(layer, label).group_size if label == "int4" else BYTES[label]
    moved = hit * 3 * hidden * inner * stored + 2 * 2 * tokens * hidden
    operations = 2 * tokens * top_k * 3 * hidden * inner
    return max(moved / speed, operations / FLOPS[label])


def bandwidth() -> float:
    """Bytes per second: 4.6e12 on an H200, elsewhere as much less as a large copy is slower."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(12):  # not in a graph, where a copy is slower
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    copied = 2 * source.numel() / statistics.median(times[2:]) * 1e3
    return BANDWIDTH * min(1.0, copied / COPY)


def projections(experts: nn.Module, expert: int, form: moe_fx.formats.WeightFormat | None) -> list[torch.Tensor]:
    """The weights of gate and up, and of down, ``[N, K]`` float32, as a format stores them."""
    made = []
    for weight in (experts.gate_up_proj[expert], experts.down_proj[expert]):
        weight = weight.mT.contiguous() if hasattr(experts, "alpha") else weight  # gpt-oss stores [K, N]
        made.append((form.dequantize(*form.quantize(weight.unsqueeze(0)))[0] if form is not None else weight).float())
    return made


def reference(experts: nn.Module, form: moe_fx.formats.WeightFormat | None, inputs: tuple) -> torch.Tensor:
    """The layer in float32, expert by expert, on the weights a format stands for."""
    x, scores, top_k = inputs
    weights, ids = scores.topk(top_k, dim=-1)
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(experts.num_experts):
        token, slot = torch.where(ids == expert)
        if not len(token):
            continue
        up, down = projections(experts, expert, form)
        if hasattr(experts, "alpha"):
            gate_up = F.linear(x[token].float(), up, experts.gate_up_proj_bias[expert].float())
            hidden, bias = experts._apply_gate(gate_up), experts.down_proj_bias[expert].float()
        else:
            gate, value = F.linear(x[token].float(), up).chunk(2, -1)
            hidden, bias = F.silu(gate) * value, None
        out.index_add_(0, token, F.linear(hidden, down, bias) * weights[token, slot].unsqueeze(-1))
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
            config = moe_fx.Config(experts=lowering, quantize=format_of(layer, label), validate=False, require="all")
            yield lowering, torch.compile(moe_fx.transform(program, config).module(), fullgraph=True)
    if label == "float8":
        yield from torchao_calls(peers["grouped_mm"])
    auto = moe_fx.explain(program, moe_fx.Config(quantize=format_of(layer, label), validate=False))
    yield "auto", auto.layers[0].lowering


def torchao_calls(peer: nn.Module):
    """torchao's float8 tensors: dynamic, per row. Whatever it cannot do leaves no column, with the reason printed."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, FqnToConfig, PerRow, quantize_

        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        model = copy.copy(peer)
        model.experts = copy.copy(peer.experts)
        model.experts._parameters = dict(peer.experts._parameters)
        model._modules = dict(peer._modules, experts=model.experts)
        quantize_(model, FqnToConfig({"re:.*gate_up_proj": config, "re:.*down_proj": config}), filter_fn=None)
    except Exception as error:
        print(f"torchao: {error!r}"[:200], flush=True)
        return
    yield "torchao", torch.compile(model, fullgraph=True, dynamic=False)
    yield "torchao*", model


def measure(layer: str, tokens: int, formats: list[str], timed: bool, speed: float = BANDWIDTH) -> list[Cell]:
    with torch.device("cuda"):
        peers = {name: Experts(layer, name).bfloat16() for name in ("grouped_mm", "batched_mm")}
    for weight in peers["grouped_mm"].parameters():
        weight.data.normal_(0, 0.02)
        weight.requires_grad_(False)
    peers["batched_mm"].load_state_dict(peers["grouped_mm"].state_dict(), assign=True)
    inputs = inputs_of(layer, tokens)
    cells = []
    for label in formats:
        exact = reference(peers["grouped_mm"].experts, format_of(layer, label), inputs[0]) if timed else None
        cell = Cell(layer, tokens, label, floor(layer, tokens, label, inputs, speed) * 1e6, {})
        for name, call in calls(layer, tokens, label, peers, inputs):
            if name == "auto":
                cell.auto = call
                continue
            if name == "torchao*" and "torchao" in cell.ratio:
                continue
            torch.compiler.reset()
            try:
                actual = call(*inputs[0])
            except Exception as error:
                if not name.startswith("torchao"):
                    raise
                print(f"{layer} T={tokens} {name}: {error!r}"[:200], flush=True)
                continue
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
    parser.add_argument("--processes", type=int, default=12, help="that compile beforehand; 0: none do")
    parser.add_argument("--warm", action="store_true", help="compile only")
    parser.add_argument("--out", default="experts", help="path of the results, without a suffix")
    parser.add_argument("--plot", action="store_true", help="also draw time over floor against tokens (matplotlib)")
    options = parser.parse_args()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'moe_fx[benchmarks]'")
    torch.set_grad_enabled(False)
    pairs = [(layer, tokens) for layer in options.layers for tokens in options.tokens]
    if options.warm:
        for layer, tokens in pairs:
            measure(layer, tokens, options.formats, timed=False)
        return
    waiting, running = list(pairs) if options.processes else [], []
    while waiting or running:
        while waiting and len(running) < options.processes:
            layer, tokens = waiting.pop()
            command = [sys.executable, __file__, "--warm", "--layers", layer, "--tokens", str(tokens)]
            running.append(subprocess.Popen([*command, "--formats", *options.formats], stderr=subprocess.DEVNULL))
        running.pop(0).wait()
    cells: list[Cell] = []
    speed = bandwidth()
    print(f"{torch.cuda.get_device_name()}: floors at {speed / 1e12:.2f} TB/s", flush=True)
    for layer, tokens in pairs:
        cells += measure(layer, tokens, options.formats, timed=True, speed=speed)
        print(table(cells[-len(options.formats) :]).split("\n", 2)[-1], flush=True)
        # Compiled programs hold their weights in cycles: of the largest layer two cells' do not fit.
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        with open(f"{options.out}.json", "w") as file:
            json.dump([asdict(cell) for cell in cells], file, indent=1)
        with open(f"{options.out}.md", "w") as file:
            file.write(table(cells) + "\n")
    print(table(cells))
    if options.plot:
        plot(cells, f"{options.out}.png")


def plot(cells: list[Cell], path: str) -> None:
    """Time over floor against tokens: a row of axes for each format, a column for each layer."""
    import matplotlib.pyplot as plt

    layers, formats = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("layer", "format"))
    size = (3.2 * len(layers), 2.6 * len(formats))
    figure, axes = plt.subplots(len(formats), len(layers), figsize=size, squeeze=False, sharex=True, sharey="row")
    for row, label in zip(axes, formats, strict=True):
        for axis, layer in zip(row, layers, strict=True):
            own = [cell for cell in cells if (cell.layer, cell.format) == (layer, label)]
            for name in dict.fromkeys(name for cell in own for name in cell.ratio):
                points = [(cell.tokens, cell.ratio[name]) for cell in own if name in cell.ratio]
                axis.plot(*zip(*points, strict=True), marker=".", label=name)
            axis.set(xscale="log", yscale="log", title=f"{layer}, {label}", xlabel="tokens", ylabel="time / floor")
            axis.axhline(1, color="grey", linewidth=0.5)
            axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
