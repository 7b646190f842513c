"""Export a Mixtral, quantize its experts to int8, compile it, and compare it with the original.

The model is `transformers`' own code with random weights; nothing is downloaded.
"""

import argparse
import statistics
import time

import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM, MixtralConfig

import moe_fx


def build(options: argparse.Namespace) -> torch.nn.Module:
    config = MixtralConfig(
        vocab_size=1000,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=options.experts,
        num_experts_per_tok=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    implementation = {"experts_implementation": options.implementation, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, **implementation).eval()


def seconds(calls: dict, ids: torch.Tensor, repeats: int = 9) -> dict[str, float]:
    """Median time of each call, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call(input_ids=ids)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--implementation", choices=["grouped_mm", "batched_mm"], default="grouped_mm")
    parser.add_argument("--lowering", choices=["auto", "grouped_mm", "linear", "gather"], default="auto")
    options = parser.parse_args()
    torch.set_grad_enabled(False)

    model = build(options)
    ids = torch.randint(1000, (1, options.tokens))
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    traced = torch.randint(1000, (2, options.tokens))
    program = torch.export.export(model, (), {"input_ids": traced}, dynamic_shapes=shapes, strict=False)

    config = moe_fx.Config(experts=options.lowering, quantize=moe_fx.Int8WeightOnly(), require="all")
    start = time.perf_counter()
    quantized = moe_fx.transform(program, config)
    print(f"transformed in {time.perf_counter() - start:.1f} s\n")
    print(moe_fx.report(quantized))

    def weights(ep: torch.export.ExportedProgram) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in ep.state_dict.values())

    print(f"\nweights of the whole model: {weights(program):,} bytes before, {weights(quantized):,} after")

    calls = {
        "original": torch.compile(program.module(), fullgraph=True),
        "quantized": torch.compile(quantized.module(), fullgraph=True),
    }
    for shape in ((2, options.tokens), (1, options.tokens), (3, 17)):
        given = torch.randint(1000, shape)
        expected = model(input_ids=given).logits
        actual = calls["quantized"](input_ids=given).logits
        calls["original"](input_ids=given)
        noise = (expected.pow(2).mean() / (actual - expected).pow(2).mean()).log10() * 10
        agree = (expected.argmax(-1) == actual.argmax(-1)).float().mean()
        print(f"ids {shape}: logits SQNR {noise:.1f} dB, same top token {agree:.1%}")

    taken = seconds(calls, ids)
    for name, value in taken.items():
        print(f"{name:>10} compiled: {value * 1e3:.1f} ms for {options.tokens} tokens")
    print(f"quantized takes {taken['quantized'] / taken['original']:.2f} of the original's time")


if __name__ == "__main__":
    main()
