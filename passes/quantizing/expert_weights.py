"""Quantize the expert weights that the configuration names.

y = experts(x, ids, (s,), (w [E, N, K],), ...)     =>    y = experts(x, ids, (s,), (qdata, scale), ...)
body: expert_linear(x, (p0,), none)                      body: expert_linear(x, (p0, p1), int8_weight_only)
"""

from __future__ import annotations

from typing import Any

import torch
from moe_fx.passes.quantizing.store import Store
from torch.fx import Node

from moe_fx.config import FormatRules
from moe_fx.errors import ProgramError
from moe_fx.experts import expert_linear
from moe_fx.formats import Torchao, WeightFormat, stored_form
from moe_fx.pipeline import Layer, Work
from moe_fx.program import Program
from moe_fx.shapes import tensor_of
from moe_fx.weights import DerivedWeight, StackedWeight, Weight

__all__ = ["quantize_experts"]

#: a linear of a body, its weight, and the format it shall have
Planned = tuple[Node, Weight, WeightFormat | Torchao | None]


def quantize_experts(work: Work) -> None:
    """Quantize, layer by layer, once all of it is known to be possible.

    Raises:
        ConfigError: a name pattern matches nothing.
        ProgramError: a weight cannot be quantized, or is computed by the program.
    """
    program, rules, store = work.program, FormatRules(work.config), Store(work.program)
    plans = [(layer, _plan(layer, program, rules)) for layer in work.layers]
    rules.check_all_used("expert parameter", [weight.fqn for _, plan in plans for _, weight, _ in plan])
    oriented: dict[str, bool] = {}
    for _, plan in plans:
        for linear, weight, chosen in plan:
            if chosen is not None:
                store.check(weight, _matrices(linear, weight.tensor), chosen)
                _check_orientation(linear, weight, oriented)
    whole: dict[Node, Node] = {}
    for layer, plan in plans:
        layer.formats = {}  # what was planned may name weights that no linear reads
        for linear, weight, chosen in plan:
            layer.formats[weight.fqn] = stored_form(chosen)
            if chosen is not None:
                _quantize(layer, linear, weight, chosen, store)
        if layer.storage != "per_expert":
            _stack(layer, program, whole)
        params = [program.weights[p] for p in layer.node.args[3] if p in program.weights]
        layer.bytes_after = sum(weight.tensor.numel() * weight.tensor.element_size() for weight in params)


def _stack(layer: Layer, program: Program, whole: dict[Node, Node]) -> None:
    """What is still one weight per expert becomes one tensor, and so does what holds the experts side by side in
    memory, ``[H, I, E]``; ``whole`` are those of other layers.
    """
    for source in dict.fromkeys(layer.node.args[3]):
        weight = program.weights.get(source)
        stacked = isinstance(weight, StackedWeight) or (isinstance(weight, DerivedWeight) and weight.is_stacked)
        if weight is None or not (stacked or (isinstance(weight, DerivedWeight) and _scattered(source, program))):
            continue
        name = weight.fqn if stacked else f"{weight.stored_as}_experts_first"  # the program has one of its own name
        if stacked and _stay_beneath(name, source, program):
            name = f"{name}_stacked"

        def make(weight: Weight = weight) -> tuple[torch.Tensor, ...]:
            return (weight.values().contiguous(),) if weight.has_values else (weight.tensor,)

        if source not in whole:
            (tensor,) = program.remembered(weight, "stack", make)
            whole[source] = program.add_weight(name, tensor, weight.device)
        node = whole[source]
        layer.names[weight.fqn] = (name,)
        layer.node.replace_input_with(source, node)
        if not source.users:
            program.release(source)


def _stay_beneath(name: str, stack: Node, program: Program) -> bool:
    """Whether some of a stack's parts are read elsewhere, and lie beneath its name as in a module."""
    weight = program.weights[stack]
    parts = weight.nodes if isinstance(weight, StackedWeight) else stack.all_input_nodes
    beneath = [part for part in parts if part in program.weights and program.weights[part].fqn.startswith(f"{name}.")]
    return any(user is not stack for part in beneath for user in part.users)


def _scattered(source: Node, program: Program) -> bool:
    """Whether neither the rows nor the columns of an expert's matrix lie together, as every multiplication wants it."""
    value = tensor_of(source)
    matrices = value is not None and value.dim() == 3 and min(value.shape) > 1
    return matrices and 1 not in value.stride()[-2:] and program.gives_up


def _plan(layer: Layer, program: Program, rules: FormatRules) -> list[Planned]:
    plan: list[Planned] = []
    for linear in layer.body.graph.find_nodes(op="call_function", target=expert_linear):
        source = _operand(layer, linear.args[1][0])
        weight = program.weights.get(source)
        if weight is None:
            _refuse_computed(source, layer, program, rules)
            continue
        plan.append((linear, weight, rules.format_of(weight.fqn, layer.fqn)))
    return plan


def _refuse_computed(source: Node, layer: Layer, program: Program, rules: FormatRules) -> None:
    """Refuse a format for what is no weight, but made of weights: it goes by their names, or by that of its layer."""
    made_of = _made_of(source, program)
    formats = [rules.format_of(fqn, layer.fqn) for fqn in made_of or [""]]
    chosen = next((each for each in formats if each is not None), None)
    if chosen is None:
        return
    where = f"of {layer.fqn}" if layer.fqn else "of the model itself"
    names = made_of or [layer.fqn]
    told = "computed or written by the program" + (f", from {', '.join(made_of)}" if made_of else "")
    raise ProgramError(
        f"the expert weight {source.name} {where} is {told} ({source.format_node()}), so it cannot be stored as "
        f"{stored_form(chosen).name}; hold what is computed in a parameter, or leave it out: "
        f"Config(quantize={{..., {', '.join(f'{name!r}: None' for name in names)}}})"
    )


def _made_of(source: Node, program: Program) -> list[str]:
    """The weights that a value is computed from, by their names."""
    pending, seen, found = [source], set[Node](), dict[str, None]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        weight = program.weights.get(node) or program.held.get(node)
        if weight is not None:
            found[weight.fqn] = None
        else:
            pending.extend(reversed(node.all_input_nodes))
    return list(found)


def _check_orientation(linear: Node, weight: Weight, known: dict[str, bool]) -> None:
    """Refuse a weight whose rows are outputs of one linear, and inputs of another: scales belong to outputs."""
    call: Any = linear.args
    if known.setdefault(weight.fqn, call[2].transposed) != call[2].transposed:
        raise ProgramError(
            f"{weight.fqn} is multiplied as it is by one linear and transposed by another, and cannot be quantized for "
            f"both; leave it out: Config(quantize={{..., {weight.fqn!r}: None}})"
        )


def _operand(layer: Layer, placeholder: Node) -> Node:
    """The node of the program that a body's placeholder stands for."""
    operands: Any = layer.node.args
    tokens, _, slots, params, shared, _ = operands
    given = [tokens, *slots, *params, *shared]
    return given[layer.body.graph.find_nodes(op="placeholder").index(placeholder)]


def _matrices(linear: Node, weight: torch.Tensor) -> torch.Tensor:
    """A stacked weight as ``[E, N, K]``."""
    call: Any = linear.args
    (stacked,) = call[2].quantize(weight)
    return stacked


def _quantize(layer: Layer, linear: Node, weight: Weight, chosen: WeightFormat | Torchao, store: Store) -> None:
    call: Any = linear.args
    rows, (placeholder,), _ = call
    source, form = _operand(layer, placeholder), stored_form(chosen)
    unquantized = call[2]
    nodes = store.nodes(source, chosen, lambda tensor: unquantized.quantize(tensor)[0])
    layer.names[weight.fqn] = tuple(store.program.weights[node].fqn for node in nodes)
    graph = layer.body.graph
    with graph.inserting_before(placeholder):
        inputs = [graph.placeholder(f"{placeholder.name}_{name}") for name in form.tensor_names]
    given: Any = (rows, tuple(inputs), form)
    linear.args = given
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
    store.let_go(source)
