"""A whole decoder on a GPU: tokens per second of prefill and decode, with moe_fx's backend and plain torch.compile.

    python benchmarks/model.py --model qwen3 --layers 4
    python benchmarks/model.py --model mixtral --layers 2 --formats none int8 int4

The sizes are those of the real configurations, the weights random, the layers as many as are asked for. Both sides are
the same model of transformers (experts: grouped_mm) under torch.compile with CUDA graphs, as mode="reduce-overhead"
sets them. Prefill is one forward pass over a prompt; decode is one token for each sequence of a batch, over a static
cache that holds the prompt. Calls follow one another without waiting, as in serving; medians over blocks of ten. (What
Python does for a call that is waited for took 0.3 to 0.7 ms, the more the older the process: as long as two layers.)
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import moe_fx

FORMATS = {
    "none": None,
    "int8": moe_fx.Int8WeightOnly(),
    "float8": moe_fx.Float8Dynamic(),
    "int4": moe_fx.Int4WeightOnly(128),
}


#: calls between two that are waited for
BLOCK = 10


def configuration(name: str, layers: int):
    import transformers

    if name == "mixtral":  # its defaults are those of Mixtral-8x7B
        return transformers.MixtralConfig(num_hidden_layers=layers)
    if name == "olmoe":
        return transformers.OlmoeConfig(num_hidden_layers=layers)
    return transformers.Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, vocab_size=151936,
    )  # fmt: skip


def model_of(name: str, layers: int) -> torch.nn.Module:
    import transformers

    config = configuration(name, layers)
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device("cuda"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = transformers.AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(default)
    return model.eval()


def seconds(call: Callable[[], object], repeats: int) -> float:
    for _ in range(4):
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(BLOCK):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / BLOCK)
    return statistics.median(times)


def measure(model: torch.nn.Module, backend, prompt: int, batches: list[int], repeats: int) -> dict[str, float]:
    """Tokens per second, by what is measured."""
    import transformers

    found = {}
    torch.compiler.reset()
    run = torch.compile(model, backend=backend, dynamic=False)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, prompt), device="cuda")

    def prefill() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return run(input_ids=ids, use_cache=False, logits_to_keep=1)

    found[f"prefill {prompt}"] = prompt / seconds(prefill, repeats)
    for batch in batches:
        torch.compiler.reset()
        run = torch.compile(model, backend=backend, dynamic=False)
        cache = transformers.StaticCache(config=model.config, max_cache_len=256 + BLOCK * (repeats + 1))
        ids = torch.randint(0, vocabulary, (batch, 256), device="cuda")
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        token, place = ids[:, :1].contiguous(), torch.tensor([256], device="cuda")

        def decode(token=token, place=place, cache=cache, run=run) -> object:
            torch.compiler.cudagraph_mark_step_begin()
            return run(
                input_ids=token, position_ids=place.expand(token.shape[0], 1), past_key_values=cache, use_cache=True
            )

        found[f"decode {batch}"] = batch / seconds(decode, repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3", choices=["qwen3", "mixtral", "olmoe"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--formats", nargs="+", default=["none"], choices=FORMATS)
    parser.add_argument("--repeats", type=int, default=7, help="blocks of ten calls")
    parser.add_argument("--out", help="path of a JSON file")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch._inductor.config.triton.cudagraphs = True
    model = model_of(options.model, options.layers)
    results = {"torch.compile": measure(model, "inductor", options.prompt, options.batches, options.repeats)}
    for label in options.formats:
        backend = moe_fx.backend(moe_fx.Config(quantize=FORMATS[label], require="all", validate=False))
        name = f"moe_fx {label}"
        results[name] = measure(model, backend, options.prompt, options.batches, options.repeats)
        chosen = {layer.lowering for report in backend.reports for layer in report.layers}
        print(f"{name}: lowered to {', '.join(sorted(chosen))}", flush=True)
    plain = results["torch.compile"]
    print(f"{options.model}, {options.layers} layers, {torch.cuda.get_device_name()}: tokens per second")
    for name, row in results.items():
        print(f"{name:16}" + "".join(f"  {what} {rate:9.0f} ({rate / plain[what]:.2f})" for what, rate in row.items()))
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
