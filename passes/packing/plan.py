"""Which lowering and which storage each layer gets, and why."""

from __future__ import annotations

import torch
from moe_fx.passes.packing.parameters import parameters
from torch.fx import Node

from moe_fx.config import Config, FormatRules
from moe_fx.formats import (
    AnyLinear,
    Int4WeightOnly,
    Int8Dynamic,
    Int8WeightOnly,
    Unquantized,
    WeightFormat,
    stored_form,
)
from moe_fx.kernels import grouped_amx
from moe_fx.kernels.triton_or_none import unavailable
from moe_fx.matcher import op_name
from moe_fx.pipeline import Layer, Work
from moe_fx.report import short_name
from moe_fx.shapes import Dim, shape_of, tensor_of, upper_bound

__all__ = ["choose_lowering", "plan_layers"]


#: what the CPU kernel reads
AMX_FORMATS = (Unquantized, Int8WeightOnly, Int8Dynamic, Int4WeightOnly)
#: up to how many routed slots per expert gather is the fastest, by device and format (the widest of a layer's); on a
#: GPU, where the fused kernels are not for a layer.
#: Measured with benchmarks/lowerings.py: a GPU on an H200 (others are taken to be alike), a CPU of two cores.
GATHER_LIMIT: dict[str, dict[type, float]] = {
    "cuda": {Unquantized: 0.5},
    "cpu": {Unquantized: 1.0},
}
#: the same for all other formats
GATHER_LIMIT_QUANTIZED = {"cuda": 4.0, "cpu": 0.25}


def plan_layers(work: Work) -> None:
    rules = FormatRules(work.config)
    for layer in work.layers:
        weights = [work.program.weights[node] for node in layer.originals]
        layer.formats = {
            each.fqn: stored_form(rules.format_of(each.fqn, layer.fqn)) for each in weights if each.tensor.dim() == 3
        }
        formats = list(layer.formats.values())
        techniques = [form.name for form in formats if isinstance(form, AnyLinear)]
        layer.lowering, layer.why = choose_lowering(layer, work.config, formats, work.program.trains)
        if techniques and layer.lowering != "linear":
            layer.lowering, layer.why = "linear", f"{techniques[0]} is a technique for linears"
        per_expert = work.config.storage == "per_expert"
        layer.storage = "per_expert" if per_expert else "stacked"


def choose_lowering(layer: Layer, config: Config, formats: list[WeightFormat], trains: bool = False) -> tuple[str, str]:
    """The lowering of a layer, and the reason in words; ``trains``: gradients may be asked for."""
    if config.experts != "auto":
        return config.experts, "as configured"
    if config.storage == "per_expert":
        return "linear", "storage='per_expert' is read by linears"
    tokens = layer.node.args[0]
    assert isinstance(tokens, Node)
    value = tensor_of(tokens)
    assert value is not None
    count: Dim = (shape_of(tokens) or (0,))[0]
    most = upper_bound(count)
    how_many = f"{count}" if isinstance(count, int) else ("any number of" if most is None else f"up to {most}")
    if value.device.type == "cuda":
        unfit = _fused_unfit(value, trains)
        if unfit is None:
            # Ahead of the others at every number of tokens: benchmarks/experts.py.
            return "fused", f"{how_many} tokens: rows are gathered, multiplied and weighed by the fused kernels"
        lowering, why = _by_slots(layer, formats, most, how_many, "cuda")
        return lowering, f"{unfit}; {why}"
    few_bytes = all(isinstance(form, Int8WeightOnly) for form in formats) and _gathers(layer, formats, most, "cpu")
    if value.device.type == "cpu" and not (trains or few_bytes) and _amx_takes(layer, value.dtype, formats):
        return "grouped_mm", f"{how_many} tokens: moe_fx::grouped_mm reads the chosen experts' weights once, as stored"
    return _by_slots(layer, formats, most, how_many, value.device.type if value.device.type == "cpu" else "cuda")


def _fused_unfit(tokens: torch.Tensor, trains: bool) -> str | None:
    """Why the fused kernels are not for a layer; what else they refuse, they hand on to grouped_mm."""
    if trains:
        return "the fused kernels have no gradient"
    if tokens.dtype not in (torch.bfloat16, torch.float16):
        return f"the fused kernels multiply in bfloat16 and float16, not {str(tokens.dtype).removeprefix('torch.')}"
    return unavailable(tokens.device)


def _amx_takes(layer: Layer, dtype: torch.dtype, formats: list[WeightFormat]) -> bool:
    """Whether the CPU kernel takes all of a layer's linears: it wins at every number of tokens."""
    if dtype is not torch.bfloat16 or not all(isinstance(form, AMX_FORMATS) for form in formats):
        return False
    groups = {form.group_size if isinstance(form, Int4WeightOnly) else None for form in formats}
    params, given = parameters(layer), layer.node.args[3]
    for linear in layer.body.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        weight = linear.args[1]
        transposed = op_name(weight) == "aten::transpose"
        param = weight.args[0] if transposed else weight
        if param not in params or (transposed and any(isinstance(form, Unquantized) for form in formats)):
            return False
        *_, outputs, inputs = tensor_of(given[params.index(param)]).shape
        if transposed:
            outputs, inputs = inputs, outputs
        if any(grouped_amx.unfit_sizes(outputs, inputs, group) for group in groups):
            return False
    return grouped_amx.unavailable() is None


def _by_slots(
    layer: Layer, formats: list[WeightFormat], most: int | None, how_many: str, device: str
) -> tuple[str, str]:
    """gather or grouped_mm, by routed slots per expert."""
    if most is not None and _gathers(layer, formats, most, device):
        slots = f"{how_many} tokens are {most * layer.top_k} slots for {layer.num_experts} experts"
        return "gather", f"{slots}: only the chosen experts' weights are read"
    return "grouped_mm", f"{how_many} tokens: rows that share an expert read its weight once"


def _gathers(layer: Layer, formats: list[WeightFormat], most: int | None, device: str) -> bool:
    """Whether there are so few slots for each expert that gather is faster than rows in order."""
    limits = [GATHER_LIMIT[device].get(type(form), GATHER_LIMIT_QUANTIZED[device]) for form in formats]
    return most is not None and most * layer.top_k <= min(limits, default=0.0) * layer.num_experts


def format_name(formats: dict[str, WeightFormat]) -> str:
    """The formats of a layer's parameters in a word, or by parameter where they differ."""
    names = {fqn: chosen.name for fqn, chosen in formats.items()}
    if len(set(names.values())) <= 1:
        return next(iter(names.values()), "none")
    return ", ".join(f"{short_name(fqn)}: {name}" for fqn, name in names.items())
