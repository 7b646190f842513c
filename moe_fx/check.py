"""The numeric check: the original nodes and the new ``experts`` node, run side by side on random inputs.

Everything is float64 (a cast to bf16 in the graph casts to float64 here), so that a difference is a difference in
meaning and not in rounding. Parameters are random: overlapping windows of one buffer, so that a layer of 64 experts
costs the memory of one, weights without values (meta, fake) are no obstacle, and zero-initialised biases count.
Symbolic sizes are given small values; a static token count is used as it is unless it is large.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moe_fx.check_inputs import Routing, Sizes, random_ids, random_value, windows
from moe_fx.check_run import Interpreter, filled, in_float64
from moe_fx.experts import experts
from moe_fx.matcher import op_name
from moe_fx.rewrite import EXPERTS_FIRST
from moe_fx.shapes import depends_on_values, shape_of

__all__ = ["CheckResult", "check_layer"]

#: multiply-adds spent on one run of one layer; with them, how many token rows can be afforded
BUDGET = 2 * 10**8
#: the largest difference allowed, over the largest output. float64 rounding gives about 1e-15.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class CheckResult:
    """What the check found.

    Attributes:
        error: the largest difference over the output's range; infinite if one of the two could not be run.
        tokens: rows tried. seconds: the check's cost. problem: what kept it from running, in words.
    """

    error: float
    tokens: int
    seconds: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE


def check_layer(
    root: Node,
    operands: tuple[Node, Node, Sequence[Node], Sequence[Node], Sequence[Node]],
    body: GraphModule,
    in_range: bool,
    distinct: bool,
    each: Node | None = None,
    views: Sequence[Node] = (),
    base: Node | None = None,
    not_negative: Collection[Node] = (),
) -> CheckResult:
    """Compare ``root`` with ``experts(*operands, body)``.

    Args:
        root: the original layer's last node.
        operands: tokens, ids, slots, params and shared: nodes outside the layer.
        in_range: ids are certainly ``0..E-1``; otherwise ids that name no expert are tried as well.
        distinct: the ids of a token certainly differ; otherwise repeated ones are tried as well.
        each: a symbolic expert number: what ``root`` means is its sum over all experts.
        views: operands that are made of those that the original layer reads.
        base: what the original layer adds the experts' sum to.
        not_negative: tables that certainly hold no negative weight: zeros are tried instead.
    """
    started = time.perf_counter()
    tokens, ids, slots, params, shared = operands
    count = shape_of(params[0])[0]
    assert isinstance(count, int)
    routing = Routing(count, in_range, distinct)
    parts = [part for node in params for part in _parts(node)]
    sources = [_source(node) for node in views]
    parts += [part for node in params for part, _ in _moved_back(node, None)]
    longer = {param: _source(param) for param in params if _is_shortened(param)}
    given_nodes = [tokens, ids, *slots, *params, *parts, *longer.values(), *shared, *sources]
    given_nodes += [base] if base is not None else []
    nodes = _between(root, [*given_nodes, *([each] if each is not None else [])])
    sizes = Sizes(ids, count, _affordable(params, ids, count), shrink=not views)
    generator = torch.Generator().manual_seed(0)
    env: dict[Node, Any] = {}
    for node in (tokens, *slots, *shared):
        env[node] = random_value(node, sizes, generator)
    for node in params:
        env[node] = _tied(windows(node, generator), _parts(node))
        env.update(zip(_parts(node), env[node], strict=False))
        if node in longer:
            # What it holds for experts of no layer is not read; if it is, it shows.
            beyond = shape_of(longer[node])[0] - count
            env[longer[node]] = torch.cat([env[node], env[node].new_full((beyond, *env[node].shape[1:]), math.nan)])
        env.update(_moved_back(node, env[node]))
    if base is not None and base not in env:
        env[base] = random_value(base, sizes, generator)
    env[ids] = random_ids(tuple(sizes.leading(ids.meta["val"].shape)), routing, generator)
    for view, source in zip(views, sources, strict=True):
        if op_name(view) == "aten::gather":
            # A table holds nothing for the experts that a token was not routed to.
            table = random_value(source, sizes, generator)
            table = table.clamp_min(0) if source in not_negative else table
            env[source] = torch.zeros_like(table).scatter(-1, env[ids], table.gather(-1, env[ids]))
            env[view] = env[source].gather(-1, env[ids])
        elif op_name(view) == "aten::expand":  # a number for each token
            env[source] = env[view][:, :1].clone()
            env[view] = env[source].expand_as(env[view])
        else:
            env[source] = env[view].reshape(sizes.evaluate(source.meta["val"].shape))
    given = dict(zip(("slots", "params", "shared"), ([env[n] for n in g] for g in operands[2:]), strict=True))
    error, problem = math.inf, ""
    try:
        with torch.no_grad():
            if each is None:
                expected = Interpreter(sizes, env).run(nodes, root)
            else:
                steps = [Interpreter(sizes, {**env, each: expert}).run(nodes, root) for expert in range(count)]
                expected = torch.stack(steps).sum(0)
            actual = experts(env[tokens], env[ids], **given, body=in_float64(body))
            problem = _rows_astray(in_float64(body), env[tokens], **given)
        if expected.numel() == actual.numel():
            actual = actual.reshape(expected.shape) + (env[base] if base is not None else 0)
        if not problem and expected.shape == actual.shape and not expected.isnan().any():
            error = float((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-30))
    except (RuntimeError, IndexError, TypeError, ValueError, KeyError) as failure:
        # What cannot be run cannot be proven: the layer stays as it is, and the report says why.
        problem = f"{type(failure).__name__}: {failure}".splitlines()[0]
    error = math.inf if math.isnan(error) else error
    return CheckResult(error, env[tokens].shape[0], time.perf_counter() - started, problem)


def _rows_astray(
    body: GraphModule, tokens: torch.Tensor, slots: list[torch.Tensor], params: list[torch.Tensor], shared: list[Any]
) -> str:
    """What is wrong with what the body makes of several rows: of a single token, no expert is given two."""
    rows = []
    for values in (tokens, *(slot.flatten(0, 1) for slot in slots)):
        same = torch.stack([values[0]] * 3)
        factors = same.new_tensor([1.0, 0.5, 2.0]) if same.is_floating_point() else same.new_ones(3)
        rows.append(same * factors.view(-1, *[1] * (same.dim() - 1)))

    def made_of(given: list[torch.Tensor]) -> torch.Tensor:
        result: torch.Tensor = body(*given, *(param[0] for param in params), *shared)
        return result

    together, apart = made_of(rows), [made_of([each[row : row + 1] for each in rows]) for row in range(3)]
    wanted = (3, *apart[0].shape[1:])
    if together.shape != wanted:
        return f"the body makes {list(together.shape)} of three rows, and not {list(wanted)}"
    difference = (together - torch.cat(apart)).abs().max()
    return "" if difference <= TOLERANCE * together.abs().max() else "the body's rows depend on one another"


def _source(view: Node) -> Node:
    source = view.args[0]
    assert isinstance(source, Node)
    return source


def _parts(param: Node) -> list[Node]:
    """What a parameter was stacked of."""
    parts: Any = param.args[0] if op_name(param) == "aten::stack" else []
    return list(parts)


def _is_shortened(param: Node) -> bool:
    """Whether a parameter is the first part of what the model holds."""
    return op_name(param) == "aten::slice" and tuple(param.args[1:3]) == (0, 0)


def _moved_back(param: Node, value: Any) -> list[tuple[Node, Any]]:
    """What a parameter was made of by putting its experts first, and their values given that of the parameter."""
    found = []
    while EXPERTS_FIRST in param.meta:
        source, argument = _source(param), param.args[1]
        if value is not None and op_name(param) == "aten::permute":
            value = value.permute(sorted(range(len(argument)), key=argument.__getitem__))
        elif value is not None:
            value = value.reshape(shape_of(source))
        found.append((source, value))
        param = source
    return found


def _tied(stack: torch.Tensor, parts: Sequence[Node]) -> torch.Tensor:
    """Random parameters that are the same for experts of which the model holds one in several places."""
    first = [parts.index(part) for part in parts]
    return stack if first == list(range(len(parts))) else stack[first]


def _affordable(params: Sequence[Node], ids: Node, num_experts: int) -> int:
    """How many tokens: more than there are experts, if the budget allows, and never fewer than three."""
    weights = sum(math.prod(map(int, (shape_of(p) or ())[1:])) for p in params)
    top_k = shape_of(ids)[1]
    return int(max(3, min(num_experts + 3, BUDGET // (weights * top_k))))


def _between(root: Node, inputs: list[Node]) -> list[Node]:
    """The nodes that ``root`` is computed by, from ``inputs`` on, in the order of the graph."""
    found, pending = set(inputs), [root]
    order = []
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        order.append(node)
        # Sizes are given numbers directly, whatever they were computed from; constants their value.
        value = node.meta.get("val")
        if depends_on_values(value) or (not isinstance(value, torch.SymInt | int) and filled(node) is None):
            pending.extend(node.all_input_nodes)
    return sorted(order)
