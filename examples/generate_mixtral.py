"""Generate with a Mixtral whose experts are quantized, and compare it with the same model in bf16.

Prefill and decode are one compiled graph each, over one static KV cache. The model is `transformers`' own code, with
the weights of `--checkpoint DIR`, or random ones: nothing is downloaded.

Compiled, bf16 is rounded where a kernel ends, and the two models are cut into kernels in different ways.
`--format none` shows what that alone does to the logits.
"""

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.export import ExportedProgram
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

import moe_fx

FORMATS = {
    "none": None,
    "int8": moe_fx.Int8WeightOnly(),
    "int8-dynamic": moe_fx.Int8Dynamic(),
    "float8": moe_fx.Float8WeightOnly(),
    "float8-dynamic": moe_fx.Float8Dynamic(),
    "int4": moe_fx.Int4WeightOnly(group_size=128),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="directory of a Mixtral; without it, weights are random")
    parser.add_argument("--format", choices=FORMATS, default="int8", help="of the experts' weights")
    lowerings = ["auto", "grouped_mm", "linear", "gather"]
    parser.add_argument("--prefill-lowering", choices=lowerings, default="auto")
    parser.add_argument("--decode-lowering", choices=lowerings, default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt", default="A mixture of experts is", help="used if the checkpoint has a tokenizer")
    parser.add_argument("--prompt-length", type=int, default=128, help="of a random prompt, in tokens")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median is shown")
    sizes = parser.add_argument_group("sizes of the random model")
    sizes.add_argument("--hidden", type=int, default=512)
    sizes.add_argument("--intermediate", type=int, default=1536)
    sizes.add_argument("--layers", type=int, default=2)
    sizes.add_argument("--heads", type=int, default=8)
    sizes.add_argument("--kv-heads", type=int, default=4)
    sizes.add_argument("--experts", type=int, default=8)
    sizes.add_argument("--vocabulary", type=int, default=4000)
    options = parser.parse_args()
    if options.checkpoint and not (options.checkpoint / "config.json").is_file():
        parser.error(f"--checkpoint {options.checkpoint}: no config.json there; give the directory of a model")
    for name, least in (("prompt_length", 2), ("new_tokens", 2), ("repeats", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {least}")
    return options


def load(options: argparse.Namespace) -> torch.nn.Module:
    if options.checkpoint:
        model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.bfloat16)
    else:
        model = random_model(options)
    # What transformers asks for before it makes a static cache. Mixtral's head_dim may be None: hidden / heads.
    model.generation_config.use_cache = True
    model.generation_config.cache_implementation = "static"
    config = model.config
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return model.to(options.device).eval()


def random_model(options: argparse.Namespace) -> torch.nn.Module:
    config = MixtralConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        num_local_experts=options.experts,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # As they come, random weights are so small that a layer adds next to nothing, and one token is repeated for
    # ever. These keep the size of what they are given.
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0, 1 if "embed" in name else weight.shape[-1] ** -0.5)
    return model


@dataclass
class Generator:
    """Prefill and decode over one KV cache; both take tokens [1, T] and their positions [T], and give logits."""

    name: str
    prefill: torch.nn.Module
    decode: torch.nn.Module
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)

    def compile(self) -> "Generator":
        prefill = torch.compile(self.prefill, fullgraph=True)
        return Generator(self.name, prefill, torch.compile(self.decode, fullgraph=True))

    def generate(self, prompt: torch.Tensor, count: int, given: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """`count` greedy tokens after a prompt [1, T], and the logits [count, V] that chose them.

        With `given` tokens, those are what the model goes on from, whatever it would have chosen (teacher forcing).
        """
        length = prompt.shape[1]
        positions = torch.arange(length + count, device=prompt.device)
        start = clock(prompt.device)
        logits = [self.prefill(input_ids=prompt, cache_position=positions[:length])[0, -1]]
        filled = clock(prompt.device)
        for place in range(count - 1):
            token = logits[-1].argmax() if given is None else given[place]
            step = positions[length + place : length + place + 1]
            logits.append(self.decode(input_ids=token.view(1, 1), cache_position=step)[0, -1])
        self.prefill_seconds.append(filled - start)
        self.decode_seconds.append(clock(prompt.device) - filled)
        stacked = torch.stack(logits).float()
        return stacked.argmax(-1), stacked

    def weight_bytes(self) -> int:
        """Of both programs; what they share counts once. The KV cache is no part of a state dict."""
        tensors = [*self.prefill.state_dict().values(), *self.decode.state_dict().values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def export(model: torch.nn.Module, prompt: torch.Tensor, cache_length: int) -> dict[str, ExportedProgram]:
    """The programs of prefill and decode. Their weights and their KV cache are the same tensors."""
    cached = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=cache_length)
    programs = {}
    # The original is exported in the form that suits it: of one token, only the chosen experts' weights are read.
    for name, length, experts in (("prefill", prompt.shape[1], "grouped_mm"), ("decode", 1, "batched_mm")):
        model.set_experts_implementation(experts)
        inputs = {"input_ids": prompt[:, :length], "cache_position": torch.arange(length, device=prompt.device)}
        programs[name] = torch.export.export(cached, (), inputs, strict=False)
    return programs


def transform(programs: dict[str, ExportedProgram], options: argparse.Namespace) -> Generator:
    """Both programs with their experts quantized, over one copy of the weights."""
    lowerings = {"prefill": options.prefill_lowering, "decode": options.decode_lowering}
    modules = {}
    for step, program in programs.items():
        start = time.perf_counter()
        config = moe_fx.Config(experts=lowerings[step], quantize=FORMATS[options.format], require="all")
        transformed = moe_fx.transform(program, config)
        layers = moe_fx.report(transformed).layers
        print(f"{step}: {len(layers)} MoE layers transformed in {time.perf_counter() - start:.1f} s")
        for why in dict.fromkeys(f"{layer.lowering}: {layer.why}" for layer in layers):
            print(f"  {why}")
        modules[step] = transformed.module()
    # Each transform quantized the weights anew, to equal tensors under equal names: keep one of each. All else,
    # the KV cache too, still is what the two programs shared.
    modules["decode"].load_state_dict(modules["prefill"].state_dict(), assign=True)
    return Generator(f"moe_fx, {options.format}", **modules)


def prompt_tokens(options: argparse.Namespace, model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    if tokenizer:
        return tokenizer(options.prompt, return_tensors="pt").input_ids.to(options.device)
    return torch.randint(model.config.vocab_size, (1, options.prompt_length), device=options.device)


def sqnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to quantization noise ratio, in dB."""
    return float(10 * (expected.square().sum() / (actual - expected).square().sum()).log10())


def main() -> None:
    options = arguments()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model = load(options)
    has_tokenizer = options.checkpoint and any(options.checkpoint.glob("tokenizer*"))
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint) if has_tokenizer else None
    prompt = prompt_tokens(options, model, tokenizer)
    length, count = prompt.shape[1], options.new_tokens

    programs = export(model, prompt, length + count)
    original = Generator("original, bf16", programs["prefill"].module(), programs["decode"].module())
    quantized = transform(programs, options)
    sizes = [original.weight_bytes(), quantized.weight_bytes()]

    start = time.perf_counter()
    generators = [original.compile(), quantized.compile()]
    tokens, expected = generators[0].generate(prompt, count)
    own, _ = generators[1].generate(prompt, count)
    _, actual = generators[1].generate(prompt, count, given=tokens)
    print(f"compiled, and generated for the first time, in {time.perf_counter() - start:.1f} s\n")

    for generator in generators:
        generator.prefill_seconds.clear()
        generator.decode_seconds.clear()
    for _ in range(options.repeats):
        for generator in generators:  # in turns, so that what else the machine does meets both
            generator.generate(prompt, count)

    agreement = f"{(actual.argmax(-1) == tokens).float().mean():.1%}"
    print(f"prompt of {length} tokens, {count} new tokens, {options.device}, {torch.get_num_threads()} threads")
    row = "{:<24} {:>15} {:>14} {:>17} {:>14} {:>12}".format
    print(row("", "prefill tok/s", "decode tok/s", "weights, bytes", "same token", "SQNR, dB"))
    for generator, size, same, noise in zip(
        generators, sizes, ("", agreement), ("", f"{sqnr(actual, expected):.1f}"), strict=True
    ):
        prefill = length / statistics.median(generator.prefill_seconds)
        decode = (count - 1) / statistics.median(generator.decode_seconds)
        print(row(generator.name, f"{prefill:.1f}", f"{decode:.1f}", f"{size:,}", same, noise))

    split = next((place for place in range(count) if own[place] != tokens[place]), count)
    print(
        f"\ngenerated freely: {split} of {count} tokens until the two part; {len(set(tokens.tolist()))} different ones"
    )
    for generator, ids in zip(generators, (tokens, own), strict=True):
        print(f"{generator.name}: {tokenizer.decode(ids) if tokenizer else ids[:16].tolist()}")


if __name__ == "__main__":
    main()
