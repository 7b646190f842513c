"""PACKED -> QUANTIZED: the weights named become quantized tensors, and the linears that read them say so."""

from moe_fx.passes.quantizing.expert_weights import quantize_experts
from moe_fx.passes.quantizing.other_linears import quantize_linears

__all__ = ["quantize_experts", "quantize_linears"]
