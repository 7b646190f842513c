"""The bodies that one fused op can compute, as patterns.

    up (one weight that holds gate and up, or two, or no gate) | activation | down | times the routing weight

with a bias behind any of the linears, and the routing weight on the token's row instead, if so written. A new
activation is one line here, and one branch in the kernel's epilogue (moe_fx/kernels/triton_gemm.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moe_fx.experts import expert_linear, per_row
from moe_fx.formats import WeightFormat
from moe_fx.matcher import Miss, match
from moe_fx.pattern import ANY, OneOfValues, Pattern, Var, aten, either, item, optional

__all__ = ["KnownBody", "Linear", "known_body"]

COLUMNS = OneOfValues(-1, 1)
INNER = Var("inner")


def half(place: int) -> Pattern:
    return item(aten.split_with_sizes(INNER, Var("sizes"), COLUMNS), place)


def every_other(start: int) -> Pattern:
    return aten.slice(INNER, COLUMNS, start, ANY, 2)


#: how gate and up come out of the up projection
LAYOUTS: dict[str, tuple[Pattern, Pattern]] = {
    "gate_up": (half(0), half(1)),
    "up_gate": (half(1), half(0)),
    "interleaved": (every_other(0), every_other(1)),
    "two": (Var("gate"), Var("up")),
}


def clamped_swiglu(gate: Any, up: Any) -> Pattern:
    low = aten.clamp(gate, None, Var("limit"))
    high = aten.add(aten.clamp(up, Var("lower"), Var("limit")), 1)
    switch = aten.sigmoid(aten.mul(low, Var("alpha")))
    product = aten.mul
    return either(
        product(high, product(low, switch)), product(product(high, low), switch), product(product(high, switch), low)
    )


#: of gate and up
GATED: dict[str, Callable[[Any, Any], Pattern]] = {
    "silu": lambda gate, up: aten.mul(aten.silu(gate), up),
    "gelu": lambda gate, up: aten.mul(aten.gelu(gate), up),
    "gelu_tanh": lambda gate, up: aten.mul(aten.gelu(gate, approximate="tanh"), up),
    "relu": lambda gate, up: aten.mul(aten.relu(gate), up),
    "relu_squared": lambda gate, up: aten.mul(squared(aten.relu(gate)), up),
    "clamped_swiglu": clamped_swiglu,
}


def squared(x: Pattern) -> Pattern:
    return either(aten.square(x), aten.pow(x, OneOfValues(2, 2.0)), aten.mul(x, x))


#: where nothing is gated
PLAIN: dict[str, Pattern] = {
    "relu_squared": squared(aten.relu(INNER)),
    "silu": aten.silu(INNER),
    "gelu": aten.gelu(INNER),
    "gelu_tanh": aten.gelu(INNER, approximate="tanh"),
    "relu": aten.relu(INNER),
}

SLOT = aten.reshape(Var("slot"), [-1, 1])
#: the routing weight times the result, perhaps wide, and narrowed again
WEIGHTED = optional(lambda x: aten.to(x, ANY), aten.mul(Var("result"), SLOT))
WEIGHTED_ROW = optional(lambda x: aten.to(x, ANY), aten.mul(Var("rows"), SLOT))


@dataclass(frozen=True)
class Linear:
    """An expert linear of a body: placeholders of the body, and what it reads."""

    rows: Node
    tensors: tuple[Node, ...]
    form: WeightFormat
    bias: Node | None


@dataclass(frozen=True)
class KnownBody:
    """Placeholders are those of the body; ``gated`` and ``activation`` as ``moe_fx::fused_experts`` names them."""

    up: tuple[Linear, ...]
    down: Linear
    gated: str
    activation: str
    alpha: float = 0.0
    limit: float = 0.0
    slot: Node | None = None
    slot_before: bool = False


def known_body(body: GraphModule) -> KnownBody | Miss:
    """The body as the arguments of the fused op, or what stands where something else was expected."""
    (output,) = body.graph.find_nodes(op="output")
    result: Any = output.args[0]
    slot, before = None, False
    weighted = match(WEIGHTED, result)
    if weighted:
        slot, result = weighted["slot"], weighted["result"]
    down = _linear(result)
    if down is None:
        return Miss("an expert linear, or one times the routing weight", _shown(result), result)
    activation = _activation(down.rows)
    if isinstance(activation, Miss):
        return activation
    gated, name, found = activation
    projections = [_linear(found[key]) for key in (("gate", "up") if gated == "two" else ("inner",))]
    up = tuple(linear for linear in projections if linear is not None)
    if len(up) < len(projections):
        return Miss("the up projection as an expert linear", _shown(down.rows), down.rows)
    rows = up[0].rows
    if any(linear.rows is not rows or linear.form != up[0].form for linear in up):
        return Miss("gate and up of the same rows, in the same format", _shown(down.rows), down.rows)
    if slot is None:
        weighted = match(WEIGHTED_ROW, rows)
        if weighted:
            slot, rows, before = weighted["slot"], weighted["rows"], True
    if rows.op != "placeholder" or rows is not body.graph.find_nodes(op="placeholder")[0]:
        return Miss("the tokens' rows", _shown(rows), rows)
    if slot is not None and slot.op != "placeholder":
        return Miss("a routing weight that comes with the slot", _shown(slot), slot)
    if len({linear.bias is None for linear in up}) > 1:
        return Miss("a bias behind both gate and up, or none", _shown(down.rows), down.rows)
    alpha, limit = found.get("alpha") or 0.0, found.get("limit") or 0.0
    return KnownBody(up, down, gated, name, alpha, limit, slot, before)


def _activation(node: Node) -> tuple[str, str, Any] | Miss:
    """How gate and up lie, the activation's name, and what the pattern captured."""
    misses: list[Miss] = []
    for layout, (gate, up) in LAYOUTS.items():
        for name, pattern in GATED.items():
            found = match(pattern(gate, up), node)
            if isinstance(found, Miss):
                misses.append(found)
            elif _sizes_fit(found) and (layout != "two" or (_linear(found["gate"]) and _linear(found["up"]))):
                return layout, name, found
    for name, plain in PLAIN.items():
        found = match(plain, node)
        if isinstance(found, Miss):
            misses.append(found)
        elif _linear(found["inner"]):
            return "none", name, found
    return max(misses, key=lambda miss: miss.depth, default=Miss("a known activation", _shown(node), node))


def _sizes_fit(found: Any) -> bool:
    sizes, limit, alpha = found.get("sizes"), found.get("limit"), found.get("alpha")
    if sizes is not None and (len(sizes) != 2 or sizes[0] != sizes[1]):
        return False
    if limit is None:
        return True
    return isinstance(limit, int | float) and isinstance(alpha, int | float) and found.get("lower") == -limit


def _linear(node: Any) -> Linear | None:
    """An expert linear, with what is added to every row of an expert."""
    if not isinstance(node, Node):
        return None
    bias: Any = None
    if node.target is torch.ops.aten.add.Tensor and not node.kwargs:
        sides: Any = node.args
        for left, right in (sides, reversed(sides)):
            if isinstance(right, Node) and right.target is per_row and isinstance(left, Node):
                node, bias = left, right.args[0]
                break
    if node.target is not expert_linear:
        return None
    rows, tensors, form = node.args
    given: Any = (rows, tuple(tensors), form, bias)
    return Linear(*given)


def _shown(node: Any) -> str:
    return node.format_node() or str(node) if isinstance(node, Node) else repr(node)
