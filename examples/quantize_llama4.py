"""Quantize a Llama 4, whose every expert runs on every token: compare, save, load, compile.

The model is `transformers`' own code with random weights, or a checkpoint that is on this machine:

    python examples/quantize_llama4.py --format int4 --linears int8
    python examples/quantize_llama4.py --checkpoint path/to/Llama-4-Scout
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram
from transformers import Llama4ForCausalLM, Llama4TextConfig

import moe_fx

FORMATS = {
    "none": None,
    "int8": moe_fx.Int8WeightOnly(),
    "int8-dynamic": moe_fx.Int8Dynamic(),
    "float8": moe_fx.Float8WeightOnly(),
    "float8-dynamic": moe_fx.Float8Dynamic(),
    "int4": moe_fx.Int4WeightOnly(group_size=32),
}


def build(options: argparse.Namespace) -> torch.nn.Module:
    if options.checkpoint is not None:
        if not Path(options.checkpoint).is_dir():
            raise SystemExit(f"--checkpoint {options.checkpoint}: no such directory")
        return Llama4ForCausalLM.from_pretrained(
            options.checkpoint, dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()
    config = Llama4TextConfig(
        vocab_size=1000,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        intermediate_size_mlp=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=options.hidden // 8,
        num_local_experts=options.experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        pad_token_id=0,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # the class leaves its experts zero or unset
            parameter.normal_(0, 0.05)
    return model


def seconds(call: torch.nn.Module, ids: torch.Tensor, repeats: int = 7) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call(input_ids=ids)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def weights(program: ExportedProgram) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a directory that holds a Llama 4 for causal language modelling")
    parser.add_argument("--format", choices=FORMATS, default="int8", help="of the experts")
    parser.add_argument("--linears", choices=FORMATS, default="none", help="of attention and shared experts")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    torch.set_grad_enabled(False)

    model = build(options)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (2, options.tokens))
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "use_cache": None}
    given = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)

    config = moe_fx.Config(quantize=FORMATS[options.format], linears=FORMATS[options.linears], require="all")
    quantized = moe_fx.transform(program, config)
    print(moe_fx.report(quantized))
    print(f"\nweights of the whole model: {weights(program):,} bytes before, {weights(quantized):,} after\n")
    print(moe_fx.compare(program, quantized, given))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama4.pt2"
        torch.export.save(quantized, path)
        print(f"\nsaved as {path.stat().st_size:,} bytes")
        quantized = torch.export.load(path)

    taken = {}
    for name, each in {"original": program, "quantized": quantized}.items():
        compiled = torch.compile(each.module(), fullgraph=True)
        taken[name] = seconds(lambda input_ids, call=compiled: call(input_ids=input_ids, use_cache=False), ids)
        print(f"{name:>10} compiled: {taken[name] * 1e3:.1f} ms for {ids.numel()} tokens")
    print(f"quantized takes {taken['quantized'] / taken['original']:.2f} of the original's time")


if __name__ == "__main__":
    main()
