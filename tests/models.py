"""Real transformers models with small random configurations: two layers, no download."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

TINY: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    use_cache=False,
)  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=8),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "deepseek_v3": dict(
        n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, moe_intermediate_size=48,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, num_key_value_heads=4,
    ),
    # Not what any rule was written for: no gate and relu^2, ids from two maxima, gelu, routers of other kinds.
    "nemotron_h": dict(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, n_group=1, topk_group=1, head_dim=8,
        layers_block_type=["attention", "moe"], moe_shared_expert_intermediate_size=48,
    ),
    "phimoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=48
    ),
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=48, moe_layer_start_index=0),
}  # fmt: skip

#: the layers of each model that are MoE layers
NUM_LAYERS = dict.fromkeys(FAMILIES, 2) | {"deepseek_v3": 1, "nemotron_h": 1}

MAIN = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")
FORMS = ("batched_mm", "grouped_mm")


@functools.cache
def build(family: str, form: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A causal language model in eval mode. ``form`` is how its experts are written."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[family](**{**TINY, **FAMILIES[family]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, experts_implementation=form, attn_implementation="eager")
        model = model.to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
                else:
                    parameter.uniform_(0.5, 1.5)
    return model


@functools.cache
def exported(family: str, form: str, dtype: torch.dtype = torch.float32, dynamic: bool = True) -> ExportedProgram:
    """The model as training IR, with batch and sequence dynamic or static."""
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}} if dynamic else None
    kwargs = dict(input_ids=token_ids((2, 5)))
    with torch.no_grad():
        return torch.export.export(build(family, form, dtype), (), kwargs, dynamic_shapes=shapes, strict=False)


def token_ids(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(seed))


def logits(callable_model: Any, shape: tuple[int, int]) -> torch.Tensor:
    """The model's logits on fixed token ids of a shape, in float32."""
    with torch.no_grad():
        result = callable_model(input_ids=token_ids(shape))
    if isinstance(result, dict):  # ModelOutput is one too
        result = result["logits"]
    return (result if isinstance(result, torch.Tensor) else result[0]).float()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def sqnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to quantization noise ratio, in dB."""
    actual, expected = actual.double(), expected.double()
    return float(10 * torch.log10(expected.pow(2).mean() / (actual - expected).pow(2).mean()))
