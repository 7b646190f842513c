"""Every family of transformers 5 that has MoE layers, with what it takes to make a tiny one.

``model`` is the class; where only a part of the family's model is built, its smallest part with the MoE layer. A family
whose model torch.export refuses for reasons that have nothing to do with experts has ``block`` instead: the class of
the MoE layer, built from ``of``, the class of its configuration, and ``args``.

``config`` is given on top of :data:`TINY`. ``layers`` is how many MoE layers there are, two by default. ``forms`` are
the forms the experts can be written in, if not all. ``missed`` is what the library says of forms in which it does not
find the layers; an empty text, if nothing. ``first_output``: what comes after it, torch.export cannot return.
``bfloat16``: false where transformers itself cannot run the model in it. ``one_batch``: torch.export fixes the batch.
"""

from __future__ import annotations

from typing import Any

#: for every configuration, as far as its class has the field
TINY: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    use_cache=False,
    # experts: all that routing may do is switched on
    num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8, num_experts_per_tok=2, moe_topk=2,
    moe_k=2, top_k_experts=2, moe_top_k=2, moe_intermediate_size=48, n_group=4, topk_group=2, n_shared_experts=1,
    num_shared_experts=1, moe_num_shared_experts=1, shared_expert_intermediate_size=48, shared_intermediate_size=48,
    norm_topk_prob=True, routed_scaling_factor=2.5, first_k_dense_replace=0, num_dense_layers=0,
    mlp_layer_types=["sparse", "sparse"],
    # latent attention, its indexer, and linear attention
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_topk=4,
    index_head_dim=16, index_n_heads=2, linear_head_dim=8, linear_num_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_conv_kernel_dim=4,
)  # fmt: skip

ROPE = dict(rope_type="default", rope_theta=10000.0)
EAGER = ("eager",)
FULL = ["full_attention", "full_attention"]

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": dict(model="AfmoeForCausalLM", config=dict(route_scale=1.5, layer_types=FULL)),
    "aria": dict(model="AriaTextForCausalLM"),
    "axk1": dict(model="AXK1ForCausalLM", config=dict(num_key_value_heads=4)),
    "axk2": dict(model="AXK2ForCausalLM", config=dict(num_key_value_heads=4)),
    "bailing_hybrid": dict(model="BailingHybridForCausalLM", config=dict(num_key_value_heads=4, layer_types=FULL)),
    "beam": dict(model="BeamForCausalLM"),
    "cohere2_moe": dict(model="Cohere2MoeForCausalLM", config=dict(layer_types=FULL)),
    "cohere2_moe_sigmoid": dict(
        model="Cohere2MoeForCausalLM",
        module="cohere2_moe",
        config=dict(layer_types=FULL, expert_selection_fn="sigmoid"),
    ),
    "dbrx": dict(
        model="DbrxForCausalLM",
        forms=EAGER,
        config=dict(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            ffn_config=dict(ffn_hidden_size=48, moe_num_experts=8, moe_top_k=2),
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
        ),
    ),
    "deepseek_ocr2": dict(model="DeepseekOcr2TextModel", config=dict(topk_method="group_limited_greedy")),
    "deepseek_v2": dict(
        model="DeepseekV2ForCausalLM", config=dict(topk_method="group_limited_greedy", num_key_value_heads=4)
    ),
    "deepseek_v3": dict(model="DeepseekV3ForCausalLM", config=dict(num_key_value_heads=4)),
    "deepseek_v32": dict(model="DeepseekV32ForCausalLM", config=dict(num_key_value_heads=4)),
    "deepseek_v4": dict(
        model="DeepseekV4ForCausalLM",
        config=dict(
            mlp_layer_types=["hash_moe", "moe"],
            layer_types=["sliding_attention", "sliding_attention"],
            partial_rotary_factor=0.5,
            num_key_value_heads=1,
            o_groups=2,
            o_lora_rank=8,
        ),
    ),
    "diffusion_gemma": dict(model="DiffusionGemmaEncoderTextModel", first_output=True),
    "doge": dict(
        model="DogeForCausalLM",
        forms=EAGER,
        one_batch=True,
        config=dict(is_moe=True, num_experts=16, num_experts_per_tok=4),
    ),
    "dots1": dict(model="Dots1ForCausalLM"),
    "dots3_note": dict(model="Dots3NoteForCausalLM", config=dict(num_key_value_heads=4)),
    "dots3_note_vision": dict(
        block="Dots3NoteVisionMoE",
        of="Dots3NoteVisionConfig",
        module="dots3_note",
        layers=1,
        args=(0,),
        config=dict(mlp_layer_types=["sparse", "sparse"], router_scaling_factor=2.5, adapter_in_dim=32),
    ),
    "ernie4_5_moe": dict(model="Ernie4_5_MoeForCausalLM", config=dict(moe_layer_start_index=0, use_bias=True)),
    "ernie4_5_vl_moe": dict(
        model="Ernie4_5_VLMoeTextModel",
        config=dict(
            use_bias=True, moe_intermediate_size=[48, 48], rope_parameters=ROPE | dict(mrope_section=[1, 1, 2])
        ),
    ),
    "exaone_moe": dict(model="ExaoneMoeForCausalLM", config=dict(layer_types=FULL)),
    "flex_olmo": dict(model="FlexOlmoForCausalLM"),
    "flint": dict(model="FlintForCausalLM", config=dict(layer_types=FULL, mlp_only_layers=[])),
    "gemma4": dict(model="Gemma4ForCausalLM", config=dict(enable_moe_block=True, layer_types=FULL)),
    "glm4_moe": dict(model="Glm4MoeForCausalLM"),
    "glm4_moe_lite": dict(model="Glm4MoeLiteForCausalLM", config=dict(num_key_value_heads=4)),
    "glm4v_moe": dict(
        model="Glm4vMoeTextModel",
        config=dict(head_dim=16, rope_parameters=ROPE | dict(mrope_section=[2, 1, 1], partial_rotary_factor=0.5)),
    ),
    "glm5_next": dict(
        model="Glm5NextTextModel", config=dict(num_key_value_heads=4, index_kpool=2, qk_rope_head_dim=0, hc_mult=2)
    ),
    "glm_moe_dsa": dict(model="GlmMoeDsaForCausalLM", config=dict(num_key_value_heads=4)),
    "gpt_oss": dict(model="GptOssForCausalLM"),
    "granitemoe": dict(model="GraniteMoeForCausalLM"),
    "granitemoe_swa": dict(model="GraniteMoeSWAForCausalLM", config=dict(layer_types=FULL)),
    "granitemoehybrid": dict(
        model="GraniteMoeHybridForCausalLM", config=dict(layer_types=["attention", "attention"], mamba_n_heads=8)
    ),
    "granitemoeshared": dict(model="GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": dict(model="HunYuanMoEV1ForCausalLM"),
    "hy_v3": dict(model="HYV3ForCausalLM"),
    "hy_v4": dict(model="HYV4ForCausalLM", config=dict(num_key_value_heads=4)),
    "hy_v4_vl": dict(
        model="HYV4VLTextModel",
        config=dict(num_key_value_heads=4, rope_parameters=ROPE | dict(mrope_section=[2, 1, 1])),
    ),
    "inkling": dict(model="InklingForCausalLM"),
    "inkling2": dict(model="Inkling2ForCausalLM", bfloat16=False, config=dict(unpadded_vocab_size=96)),
    "inkling2_loop": dict(model="Inkling2LoopForCausalLM", bfloat16=False, config=dict(unpadded_vocab_size=96)),
    "jamba": dict(
        model="JambaForCausalLM",
        config=dict(expert_layer_period=1, expert_layer_offset=0, attn_layer_period=1, attn_layer_offset=0),
    ),
    "jetmoe": dict(model="JetMoeForCausalLM", forms=EAGER, config=dict(kv_channels=8)),
    "kimi_linear": dict(model="KimiLinearForCausalLM", config=dict(num_key_value_heads=4, layer_types=FULL)),
    "kolibri1": dict(model="Kolibri1ForCausalLM", config=dict(layer_types=FULL)),
    "laguna": dict(
        model="LagunaForCausalLM",
        config=dict(layer_types=FULL, moe_router_logit_softcapping=5.0, moe_routed_scaling_factor=2.5),
    ),
    "lara_mini": dict(model="LaraMiniForCausalLM", config=dict(layer_types=FULL)),
    "lfm2_moe": dict(model="Lfm2MoeForCausalLM", config=dict(layer_types=FULL)),
    "llama4": dict(
        model="Llama4ForCausalLM", forms=EAGER, config=dict(intermediate_size_mlp=48, interleave_moe_layer_step=1)
    ),
    "longcat_flash": dict(
        model="LongcatFlashForCausalLM",
        forms=EAGER,
        config=dict(
            num_layers=2, num_key_value_heads=4, ffn_hidden_size=48, expert_ffn_hidden_size=48, zero_expert_num=2
        ),
    ),
    "mellum": dict(model="MellumForCausalLM", config=dict(layer_types=FULL)),
    "mimo_v2_flash": dict(model="MiMoV2FlashForCausalLM", config=dict(layer_types=FULL)),
    "minimax": dict(model="MiniMaxForCausalLM", config=dict(layer_types=FULL)),
    "minimax_m2": dict(model="MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": dict(model="MiniMaxM3VLForCausalLM", config=dict(layer_types=FULL, rotary_dim=4)),
    "mistral4": dict(model="Mistral4ForCausalLM", config=dict(num_key_value_heads=4)),
    "mistral_large4": dict(model="MistralLarge4TextModel", config=dict(num_key_value_heads=4)),
    "mixtral": dict(model="MixtralForCausalLM"),
    "muse_spark": dict(
        model="MuseSparkTextModel",
        config=dict(layer_types=FULL, moe_hidden_size=32),
    ),
    "nemotron_h": dict(
        model="NemotronHForCausalLM",
        layers=1,
        config=dict(layers_block_type=["attention", "moe"], moe_shared_expert_intermediate_size=48),
    ),
    "nemotron_h_latent": dict(
        model="NemotronHForCausalLM",
        module="nemotron_h",
        layers=1,
        config=dict(layers_block_type=["attention", "moe"], moe_shared_expert_intermediate_size=48, moe_latent_size=16),
    ),
    "nllb_moe": dict(
        block="NllbMoeSparseMLP",
        forms=EAGER,
        of="NllbMoeConfig",
        layers=1,
        config=dict(d_model=32),
        args=(48,),
    ),
    "olmoe": dict(model="OlmoeForCausalLM"),
    "openai_privacy_filter": dict(model="OpenAIPrivacyFilterForTokenClassification"),
    "phimoe": dict(model="PhimoeForCausalLM"),
    "qwen2_moe": dict(model="Qwen2MoeForCausalLM"),
    "qwen3_5_moe": dict(model="Qwen3_5MoeForCausalLM", config=dict(layer_types=FULL)),
    "qwen3_moe": dict(model="Qwen3MoeForCausalLM"),
    "qwen3_next": dict(model="Qwen3NextForCausalLM", config=dict(layer_types=FULL)),
    "qwen3_omni_moe": dict(model="Qwen3OmniMoeThinkerTextModel"),
    "qwen3_omni_moe_talker": dict(
        model="Qwen3OmniMoeTalkerModel",
        module="qwen3_omni_moe",
        embedded=True,
        config=dict(shared_expert_intermediate_size=48),
    ),
    "qwen3_vl_moe": dict(model="Qwen3VLMoeTextModel"),
    # its attention looks at values, which torch.export refuses
    "qwen4_exp": dict(block="Qwen4ExpTextSparseMoeBlock", of="Qwen4ExpTextConfig", layers=1),
    "solar_open": dict(model="SolarOpenForCausalLM"),
    "step3p7": dict(
        model="Step3p7TextModel",
        forms=EAGER,
        config=dict(share_expert_dim=48, layer_types=FULL, sliding_window=4, swiglu_limits=[0.0, 7.0]),
    ),
    "switch_transformers": dict(
        block="SwitchTransformersSparseMLP",
        forms=EAGER,
        of="SwitchTransformersConfig",
        layers=1,
        config=dict(d_model=32, d_ff=48, expert_capacity=1, router_bias=True),
    ),
    "unlimited_ocr": dict(
        model="UnlimitedOcrTextModel", config=dict(topk_method="group_limited_greedy", num_key_value_heads=4)
    ),
    "vitpose_backbone": dict(
        block="VitPoseNaiveMoe",
        missed=dict(eager="adapters that the caller names, which are no MoE layer"),
        forms=EAGER,
        of="VitPoseBackboneConfig",
        layers=1,
        config=dict(mlp_ratio=1, part_features=8),
    ),
    "zaya": dict(model="ZayaForCausalLM", config=dict(num_experts_per_tok=1)),
}
