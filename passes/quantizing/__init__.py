"""PACKED -> QUANTIZED: expert weights become quantized tensors, and the linears that read them say so."""

from moe_fx.passes.quantizing.expert_weights import quantize_experts

__all__ = ["quantize_experts"]
