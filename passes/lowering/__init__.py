"""QUANTIZED -> LOWERED: each ``experts`` node is written as ops that run fast."""

from moe_fx.passes.lowering.lower import leftover, lower_layers

__all__ = ["leftover", "lower_layers"]
