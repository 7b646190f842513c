"""Every Mixture-of-Experts family of transformers 4.57: a tiny random model of each, and what is expected of it.

The experts of these models are written as they were before transformers had one interface for them: lists of modules,
rows split by counts, every expert on every token, and what else their authors came upon.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, field
from typing import Any

import torch

TINY: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    use_cache=False,
)  # fmt: skip
#: multi-head latent attention
LATENT: dict[str, Any] = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4
)
#: a router that chooses groups of experts first
GROUPS: dict[str, Any] = dict(
    n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, n_shared_experts=1, moe_intermediate_size=24,
    first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=2.5,
)  # fmt: skip
QWEN: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
ROPE_3D: dict[str, Any] = dict(rope_type="default", mrope_section=[2, 1, 1])


@dataclass(frozen=True)
class Family:
    """A model, and the Mixture-of-Experts layers in it.

    Attributes:
        moe: the class of the modules that are such layers. layers: how many there are.
        config: what its configuration is made of.
        model: its class, if it is not what AutoModelForCausalLM takes. module: where that is, if not called as the
            family. config_class: its configuration's class, if the model does not say.
        inputs: "ids"; "masked" with an attention mask, without which the model fails; "embeds" where a model is part
            of another and is given features; "hidden" for a layer; "seq2seq" for encoders and decoders; "images".
    """

    moe: str
    config: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    model: str = ""
    module: str = ""
    config_class: str = ""
    inputs: str = "ids"


FAMILIES: dict[str, Family] = {
    "mixtral": Family("MixtralSparseMoeBlock", dict(TINY, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": Family("Qwen2MoeSparseMoeBlock", dict(TINY, **QWEN, shared_expert_intermediate_size=48)),
    "qwen3_moe": Family("Qwen3MoeSparseMoeBlock", dict(TINY, **QWEN, head_dim=8)),
    "qwen3_next": Family(
        "Qwen3NextSparseMoeBlock",
        dict(
            TINY, **QWEN, shared_expert_intermediate_size=24, head_dim=8, partial_rotary_factor=0.5,
            linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeTextSparseMoeBlock",
        dict(TINY, **QWEN, head_dim=8, rope_scaling=ROPE_3D),
        model="Qwen3VLMoeTextModel",
    ),
    "qwen3_omni_moe_thinker": Family(
        "Qwen3OmniMoeThinkerTextSparseMoeBlock",
        dict(TINY, **QWEN, head_dim=8, rope_scaling=ROPE_3D),
        model="Qwen3OmniMoeThinkerTextModel", module="qwen3_omni_moe", config_class="Qwen3OmniMoeTextConfig",
    ),
    "qwen3_omni_moe_talker": Family(
        "Qwen3OmniMoeTalkerTextSparseMoeBlock",
        dict(TINY, **QWEN, shared_expert_intermediate_size=24, head_dim=8, rope_scaling=ROPE_3D),
        model="Qwen3OmniMoeTalkerModel", module="qwen3_omni_moe", config_class="Qwen3OmniMoeTalkerTextConfig",
        inputs="embeds",
    ),
    "olmoe": Family("OlmoeSparseMoeBlock", dict(TINY, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)),
    "flex_olmo": Family("FlexOlmoSparseMoeBlock", dict(TINY, num_experts=4, num_experts_per_tok=2)),
    "phimoe": Family("PhimoeSparseMoeBlock", dict(TINY, num_local_experts=4, num_experts_per_tok=2)),
    "jamba": Family(
        "JambaSparseMoeBlock",
        dict(
            TINY, num_experts=4, num_experts_per_tok=2, expert_layer_period=1, expert_layer_offset=0,
            attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8, mamba_dt_rank=4,
        ),
    ),
    "dbrx": Family(
        "DbrxFFN",
        dict(
            vocab_size=96, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, use_cache=False, pad_token_id=0,
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0),
            ffn_config=dict(
                ffn_act_fn=dict(name="silu"), ffn_hidden_size=24, moe_num_experts=4, moe_top_k=2,
                moe_normalize_expert_weights=1.0,
            ),
        ),
    ),
    "deepseek_v2": Family(
        "DeepseekV2MoE",
        dict(TINY, **GROUPS | LATENT, topk_method="greedy"),
        layers=1,
    ),
    "deepseek_v2_groups": Family(
        "DeepseekV2MoE",
        dict(TINY | GROUPS | LATENT, topk_method="group_limited_greedy"),
        layers=1, model="DeepseekV2ForCausalLM", module="deepseek_v2",
    ),
    "deepseek_v3": Family("DeepseekV3MoE", TINY | GROUPS | LATENT, layers=1),
    "glm4_moe": Family("Glm4MoeMoE", dict(TINY | GROUPS, head_dim=8, use_qk_norm=True), layers=1),
    "glm4v_moe": Family(
        "Glm4vMoeTextMoE",
        dict(TINY | GROUPS, head_dim=8, rope_scaling=dict(rope_type="default", mrope_section=[1, 1, 0])),
        layers=1, model="Glm4vMoeTextModel", inputs="masked",
    ),
    "dots1": Family("Dots1MoE", dict(TINY | GROUPS, head_dim=8), layers=1),
    "ernie4_5_moe": Family(
        "Ernie4_5_MoeSparseMoeBlock",
        dict(
            TINY, moe_num_experts=4, moe_k=2, moe_intermediate_size=24, moe_layer_start_index=0,
            moe_num_shared_experts=1,
        ),
    ),
    "gpt_oss": Family("GptOssMLP", dict(TINY, num_local_experts=4, num_experts_per_tok=2, head_dim=8)),
    "llama4": Family(
        "Llama4TextMoe",
        dict(
            TINY, num_local_experts=4, num_experts_per_tok=2, intermediate_size_mlp=48, head_dim=8,
            attention_chunk_size=16,
        ),
        model="Llama4ForCausalLM",
    ),
    "granitemoe": Family("GraniteMoeMoE", dict(TINY, num_local_experts=4, num_experts_per_tok=2)),
    "granitemoeshared": Family(
        "GraniteMoeSharedMoE",
        dict(TINY, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24),
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridMoE",
        dict(
            TINY, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=24, mamba_n_heads=8,
            mamba_d_state=8, mamba_chunk_size=16, layer_types=["mamba", "attention"],
        ),
    ),
    "jetmoe": Family(
        "JetMoeMoE",
        dict(TINY, num_local_experts=4, num_experts_per_tok=2, kv_channels=8, activation_function="silu"),
    ),
    "aria": Family(
        "AriaTextMoELayer",
        dict(TINY, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        model="AriaTextForCausalLM",
    ),
    "minimax": Family(
        "MiniMaxSparseMoeBlock",
        dict(
            TINY, num_local_experts=4, num_experts_per_tok=2, head_dim=8, block_size=16,
            layer_types=["linear_attention", "full_attention"],
        ),
    ),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Moe", dict(TINY, num_experts=4, moe_topk=2, head_dim=8)),
    "longcat_flash": Family(
        "LongcatFlashMoE",
        dict(
            TINY | LATENT, num_layers=2, num_hidden_layers=4, ffn_hidden_size=48, expert_ffn_hidden_size=24,
            moe_topk=2, n_routed_experts=4, zero_expert_num=2, head_dim=8,
        ),
    ),
    "longcat_flash_no_zero": Family(
        "LongcatFlashMoE",
        dict(
            TINY | LATENT, num_layers=2, num_hidden_layers=4, ffn_hidden_size=48, expert_ffn_hidden_size=24,
            moe_topk=2, n_routed_experts=4, zero_expert_num=0, head_dim=8,
        ),
        model="LongcatFlashForCausalLM", module="longcat_flash",
    ),
    # The layer only: the model hands on the tuple that the layer answers with as if it were a tensor, and fails.
    "doge": Family(
        "DogeCDMoE",
        dict(TINY, is_moe=True, num_experts=16, num_experts_per_tok=2, norm_topk_prob=True),
        layers=1, model="DogeCDMoE", config_class="DogeConfig", inputs="hidden",
    ),
    "switch_transformers": Family(
        "SwitchTransformersSparseMLP",
        dict(
            vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, expert_capacity=2,
            use_cache=False,
        ),
        model="SwitchTransformersForConditionalGeneration", inputs="seq2seq",
    ),
    "nllb_moe": Family(
        "NllbMoeSparseMLP",
        dict(
            vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_sparse_step=2, decoder_sparse_step=2,
            num_experts=4, max_position_embeddings=64, use_cache=False,
        ),
        model="NllbMoeForConditionalGeneration", inputs="seq2seq",
    ),
    "vitpose": Family(
        "VitPoseBackboneMoeMLP",
        dict(
            image_size=[32, 32], patch_size=[8, 8], hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            mlp_ratio=2, num_experts=4, part_features=8,
        ),
        model="VitPoseBackbone", module="vitpose_backbone", inputs="images",
    ),
}  # fmt: skip


@functools.cache
def build(family: str) -> torch.nn.Module:
    """The family's model in eval mode, in float32."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    entry = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if entry.model:
            name = entry.module or family
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            cls = getattr(module, entry.model)
            config_class = getattr(module, entry.config_class) if entry.config_class else cls.config_class
            config = config_class(**entry.config, attn_implementation="eager")
            model = cls(config)
        else:
            config = CONFIG_MAPPING[family](**entry.config)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
                else:
                    parameter.uniform_(0.5, 1.5)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.uniform_(0, 0.2)
    without_obstacles(model)
    return model


def without_obstacles(model: torch.nn.Module) -> None:
    """Takes out what torch.export cannot trace and has nothing to do with experts, nor with the result."""
    # To the dtype that it has; and questions whether a mask that is not there is all ones.
    for name in ("_cast_classifier", "_update_mamba_mask", "_update_linear_attn_mask"):
        for module in model.modules():
            if hasattr(module, name):
                setattr(module, name, lambda mask=None, position=None: mask)


def inputs(family: str, shape: tuple[int, int] = (2, 5), seed: int = 0) -> dict[str, torch.Tensor]:
    """What the family's model is called with."""
    generator = torch.Generator().manual_seed(seed)
    kind = FAMILIES[family].inputs
    ids = torch.randint(3, 90, shape, generator=generator)
    if kind in ("embeds", "hidden"):
        name = "inputs_embeds" if kind == "embeds" else "hidden_states"
        return {name: torch.randn(*shape, 32, generator=generator)}
    if kind == "masked":
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    if kind == "seq2seq":
        decoder_ids = torch.randint(3, 90, (shape[0], shape[1] - 1), generator=generator)
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=decoder_ids)
    if kind == "images":
        images = torch.randn(shape[0], 3, 32, 32, generator=generator)
        return dict(pixel_values=images, dataset_index=torch.randint(0, 4, (shape[0],), generator=generator))
    return dict(input_ids=ids)


def output(callable_model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The first tensor that the model answers with: logits, or the last hidden state."""
    with torch.no_grad():
        result = callable_model(**given)
    while not isinstance(result, torch.Tensor):
        result = next(iter(result.values())) if isinstance(result, dict) else result[0]
    return result
