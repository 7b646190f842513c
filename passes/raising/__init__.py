"""NORMAL -> RAISED: every MoE layer that can be proven equal becomes one ``experts`` node."""

from moe_fx.passes.raising.raise_layers import raise_layers
from moe_fx.passes.raising.registry import register

__all__ = ["raise_layers", "register"]
