"""Experts on a CPU: one mid-size layer beside transformers' own, eager and compiled, in one run.

    python benchmarks/experts_cpu.py --out cpu          # cpu.json, cpu.md

Every cell is time over that of the fastest of transformers' ways in bfloat16 (their experts have no quantized form):
below 1 is ahead. The calls of a row take turns, so that a slow moment of the machine meets all of them; medians. Each
result is compared with the layer in float32 on the weights that its format stands for.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
from experts import LAYERS, LEAST_SQNR, Experts, reference

import moe_fx

FORMATS = {
    "none": None, "int8": moe_fx.Int8WeightOnly(), "int8 dynamic": moe_fx.Int8Dynamic(),
    "int4": moe_fx.Int4WeightOnly(128),
}  # fmt: skip
PEERS = ("eager", "grouped_mm", "batched_mm")
#: experts, experts per token, hidden size, inner size
LAYERS["middle"] = (16, 4, 1024, 1024)
#: slots up to which a copy of each slot's weights is worth waiting for
GATHERED = 64


def taking_turns(calls: dict[str, Callable], inputs: list, seconds: float) -> dict[str, float]:
    """Median seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    started, turn = time.perf_counter(), 0
    while turn < 5 or time.perf_counter() - started < seconds:
        given = inputs[turn % len(inputs)]
        for name, call in calls.items():
            begun = time.perf_counter()
            call(*given)
            times[name].append(time.perf_counter() - begun)
        turn += 1
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row")
    parser.add_argument("--out", default="experts_cpu", help="path of the results, without a suffix")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    models = {name: Experts("middle", name).bfloat16() for name in PEERS}
    for weight in models["eager"].parameters():
        weight.data.normal_(0, 0.02)
    for model in models.values():  # weights of their own: none finds them in cache because another has just read them
        model.load_state_dict(models["eager"].state_dict())
    _, top_k, hidden, _ = LAYERS["middle"]
    rows, lines = [], []
    for tokens in options.tokens:
        inputs = [
            (torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens, LAYERS["middle"][0]).bfloat16(), top_k)
            for _ in range(8)
        ]
        torch.compiler.reset()
        calls: dict[str, Callable] = {"transformers eager": models["eager"]}
        for name in PEERS[1:]:
            if name != "batched_mm" or tokens * top_k <= GATHERED:
                calls[f"transformers {name}, compiled"] = torch.compile(models[name], fullgraph=True, dynamic=False)
        program = torch.export.export(copy.deepcopy(models["grouped_mm"]), inputs[0])
        for label in options.formats:
            config = moe_fx.Config(quantize=FORMATS[label], validate=False, require="all")
            transformed = moe_fx.transform(program, config)
            calls[f"moe_fx {label}"] = torch.compile(transformed.module(), fullgraph=True)
        for name, call in calls.items():
            label = name.removeprefix("moe_fx ") if name.startswith("moe_fx") else "none"
            exact, actual = reference(models["eager"].experts, FORMATS[label], inputs[0]), call(*inputs[0])
            sqnr = float(-20 * ((actual.float() - exact).norm() / exact.norm()).log10())
            least = LEAST_SQNR.get(label, 22.0)
            assert sqnr > least, f"T={tokens} {name}: {sqnr:.1f} dB"
        times = taking_turns(calls, inputs, options.seconds)
        best = min(taken for name, taken in times.items() if name.startswith("transformers"))
        rows.append({"tokens": tokens, "best_peer_ms": best * 1e3, **{name: t / best for name, t in times.items()}})
        print(" | ".join([f"T={tokens}", *(f"{name} {taken / best:.2f}" for name, taken in times.items())]), flush=True)
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("tokens", "best_peer_ms")))
    lines = ["| T | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for row in rows:
        cells = [f"{row[name]:.2f}" if name in row else "-" for name in names]
        lines.append(f"| {row['tokens']} | " + " | ".join(cells) + " |")
    with open(f"{options.out}.json", "w") as file:
        json.dump(rows, file, indent=1)
    with open(f"{options.out}.md", "w") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
