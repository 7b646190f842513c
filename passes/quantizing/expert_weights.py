"""Quantize the expert weights that the configuration names.

y = experts(x, ids, (s,), (w [E, N, K],), ...)     =>    y = experts(x, ids, (s,), (qdata, scale), ...)
body: expert_linear(x, (p0,), none)                      body: expert_linear(x, (p0, p1), int8_weight_only)
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from moe_fx.config import FormatRules
from moe_fx.errors import ProgramError
from moe_fx.experts import expert_linear
from moe_fx.formats import Torchao, Unquantized, WeightFormat
from moe_fx.pipeline import Layer, Work
from moe_fx.program import Program, Weight

__all__ = ["quantize_experts"]


def quantize_experts(work: Work) -> None:
    """Quantize, layer by layer.

    Raises:
        ConfigError: a name pattern matches nothing.
        ProgramError: a weight to be quantized has no values (meta, fake), or is computed by the program.
    """
    program, rules = work.program, FormatRules(work.config)
    plans = [(layer, _plan(layer, program, rules)) for layer in work.layers]
    rules.check_all_used([weight.fqn for _, plan in plans for _, weight, _ in plan])
    quantized: dict[tuple[Node, WeightFormat | Torchao], list[Node]] = {}
    for layer, plan in plans:
        for linear, weight, chosen in plan:
            layer.formats[weight.fqn] = _stored_form(chosen)
            if chosen is not None:
                _check_values(weight)
                _check_fit(linear, weight, _stored_form(chosen))
                _quantize(program, layer, linear, weight, chosen, quantized)
        params = [program.weights[p] for p in layer.node.args[3] if p in program.weights]
        layer.bytes_after = sum(weight.tensor.numel() * weight.tensor.element_size() for weight in params)


def _stored_form(chosen: WeightFormat | Torchao | None) -> WeightFormat:
    if chosen is None:
        return Unquantized()
    return chosen.form if isinstance(chosen, Torchao) else chosen


def _plan(
    layer: Layer, program: Program, rules: FormatRules
) -> list[tuple[Node, Weight, WeightFormat | Torchao | None]]:
    """The body's linears, each with its weight and the format it shall have."""
    plan = []
    for linear in layer.body.graph.find_nodes(op="call_function", target=expert_linear):
        source = _operand(layer, linear.args[1][0])
        weight = program.weights.get(source)
        if weight is None:
            # Nothing named can be meant; a format for all experts cannot be applied to it.
            chosen = rules.format_of("", layer.fqn)
            if chosen is not None:
                raise ProgramError(
                    f"the expert weight {source.name} of {layer.fqn} is computed by the program "
                    f"({source.format_node()}), so it cannot be stored as {_stored_form(chosen).name}; "
                    f"leave it out: Config(quantize={{..., {layer.fqn!r}: None}})"
                )
            continue
        plan.append((linear, weight, rules.format_of(weight.fqn, layer.fqn)))
    return plan


def _operand(layer: Layer, placeholder: Node) -> Node:
    """The node of the program that a body's placeholder stands for."""
    operands: Any = layer.node.args
    tokens, _, slots, params, shared, _ = operands
    given = [tokens, *slots, *params, *shared]
    return given[layer.body.graph.find_nodes(op="placeholder").index(placeholder)]


def _check_values(weight: Weight) -> None:
    if not weight.has_values:
        raise ProgramError(
            f"{weight.fqn} has no values (its tensor is on {weight.tensor.device} or fake), so it cannot be "
            "quantized; export a model with real weights, or use quantize=None"
        )
    if not all(bound.isfinite() for bound in weight.tensor.aminmax()):  # NaN is passed on
        raise ProgramError(f"{weight.fqn} holds NaN or infinite values, so it cannot be quantized")


def _check_fit(linear: Node, weight: Weight, form: WeightFormat) -> None:
    call: Any = linear.args
    (stacked,) = call[2].quantize(weight.tensor)
    reason = form.unfit(stacked)
    if reason is not None:
        raise ProgramError(f"{weight.fqn} cannot be stored as {form!r}: {reason}")


def _quantize(
    program: Program, layer: Layer, linear: Node, weight: Weight, chosen: WeightFormat | Torchao,
    known: dict[tuple[Node, WeightFormat | Torchao], list[Node]],
) -> None:  # fmt: skip
    call: Any = linear.args
    rows, (placeholder,), stored = call
    source, form = _operand(layer, placeholder), _stored_form(chosen)
    if (source, chosen) not in known:
        (stacked,) = stored.quantize(weight.tensor)
        tensors = chosen.quantize(stacked)
        names = [f"{weight.fqn}_{name}" for name in form.tensor_names]
        known[source, chosen] = [program.add_weight(n, t) for n, t in zip(names, tensors, strict=True)]
    nodes = known[source, chosen]
    layer.names[weight.fqn] = tuple(program.weights[node].fqn for node in nodes)
    graph = layer.body.graph
    with graph.inserting_before(placeholder):
        inputs = [graph.placeholder(f"{placeholder.name}_{name}") for name in form.tensor_names]
    linear.args = (rows, tuple(inputs), form)  # type: ignore[assignment]
    args = list(layer.node.args)
    params = list(args[3])
    place = params.index(source)
    if placeholder.users:
        # Another linear reads this weight too, and is quantized in its own turn.
        params[place:place] = nodes
    else:
        params[place : place + 1] = nodes
        graph.erase_node(placeholder)
    args[3] = tuple(params)
    layer.node.args = tuple(args)
