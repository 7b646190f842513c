"""Quantize the program's other linears, where ``Config.linears`` asks for it.

linear = aten.linear(x, w, b)     =>     expert_linear = expert_linear(x, (qdata, scale), int8_weight_only)
                                         add = aten.add(expert_linear, b)

A linear that every row passes is an expert that every token chose: it is written back by the same table.
"""

from __future__ import annotations

from typing import Any

import torch
from moe_fx.passes.quantizing.store import Store
from torch.fx import Node

from moe_fx.config import FormatRules
from moe_fx.experts import expert_linear
from moe_fx.formats import Torchao, WeightFormat, stored_form
from moe_fx.matcher import op_name
from moe_fx.pipeline import OtherLinear, Work
from moe_fx.report import module_of
from moe_fx.weights import Weight

__all__ = ["quantize_linears"]

aten = torch.ops.aten
VIEWS = frozenset({"aten::reshape", "aten::slice", "aten::select", "aten::to", "aten::unsqueeze", "aten::squeeze"})


def quantize_linears(work: Work) -> None:
    """Quantize every linear that the configuration names, once all of it is known to be possible.

    Raises:
        ConfigError: a name pattern matches nothing.
        ProgramError: a weight cannot be quantized.
    """
    if work.config.linears is None:
        return
    program, rules, store = work.program, FormatRules(work.config, "linears"), Store(work.program)
    apart = _routing(work) | _heads(work)
    plan: list[tuple[Node, Weight, WeightFormat | Torchao]] = []
    seen: list[str] = []
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        weight = program.weights.get(node.args[1])
        if weight is None or weight.tensor.dim() != 2 or not weight.tensor.is_floating_point():
            continue
        seen.append(weight.fqn)
        chosen = rules.format_of(weight.fqn, weight.fqn.rpartition(".")[0] or module_of(node), node in apart)
        if chosen is not None:
            plan.append((node, weight, chosen))
    rules.check_all_used("linear", seen)
    for _, weight, chosen in plan:
        store.check(weight, weight.tensor, chosen)
    for node, weight, chosen in plan:
        work.linears.append(_quantize(node, weight, chosen, store))


def _quantize(node: Node, weight: Weight, chosen: WeightFormat | Torchao, store: Store) -> OtherLinear:
    graph, form = node.graph, stored_form(chosen)
    rows, source, *bias = node.args
    tensors = store.nodes(source, chosen)
    stored = [store.program.weights[tensor] for tensor in tensors]
    given: Any = (rows, tuple(tensors), form)
    node.target, node.args = expert_linear, given
    if bias and bias[0] is not None:
        with graph.inserting_after(node):
            added = graph.call_function(aten.add.Tensor, (node, bias[0]))
        added.meta.update(node.meta)
        node.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    store.let_go(source)
    before = weight.tensor.numel() * weight.tensor.element_size()
    after = sum(each.tensor.numel() * each.tensor.element_size() for each in stored)
    return OtherLinear(node, weight.fqn, form, tuple(each.fqn for each in stored), before, after)


def _routing(work: Work) -> set[Node]:
    """The nodes that serve to decide on ids and routing weights, and nothing that a layer's tokens come from."""
    routing: set[Node] = set()
    for layer in work.layers:
        operands: Any = layer.node.args
        tokens, ids, slots, *_ = operands
        routing |= _ancestors([ids, *slots]) - _ancestors([tokens])
    return routing


def _ancestors(nodes: list[Node]) -> set[Node]:
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _heads(work: Work) -> set[Node]:
    """The linears whose result is an output of the program, seen through views."""
    (output,) = work.program.graph.find_nodes(op="output")
    pending, heads = list(output.all_input_nodes), set()
    while pending:
        node = pending.pop()
        if op_name(node) == "aten::linear":
            heads.add(node)
        elif op_name(node) in VIEWS:
            pending.extend(node.all_input_nodes[:1])
    return heads
