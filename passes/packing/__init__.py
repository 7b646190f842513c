"""RAISED -> PACKED: decide how each layer is written back, and name the linears that read expert weights."""

from moe_fx.passes.packing.name_linears import name_linears
from moe_fx.passes.packing.plan import plan_layers

__all__ = ["name_linears", "plan_layers"]
