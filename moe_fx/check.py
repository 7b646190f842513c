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

from moe_fx.check_inputs import Routing, Sizes, random_ids, random_value
from moe_fx.check_run import Interpreter, filled, in_float64
from moe_fx.check_values import random_parameters, with_source
from moe_fx.experts import experts
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
    sizes = Sizes(ids, count, _affordable(params, ids, count), shrink=not views)
    generator = torch.Generator().manual_seed(0)
    env: dict[Node, Any] = {node: random_value(node, sizes, generator) for node in (tokens, *slots, *shared)}
    env.update(random_parameters(params, count, generator))
    if base is not None and base not in env:
        env[base] = random_value(base, sizes, generator)
    routing = Routing(count, in_range, distinct)
    env[ids] = random_ids(tuple(sizes.leading(ids.meta["val"].shape)), routing, generator)
    for view in views:
        env.update(with_source(view, env[view], env[ids], sizes, not_negative, generator))
    nodes = _between(root, [*env, *([each] if each is not None else [])])
    # What the layer reads beside its operands, such as the input that rows are written over, must be no matter.
    env.update((node, random_value(node, sizes, generator)) for node in nodes if node.op == "placeholder")
    nodes = [node for node in nodes if node not in env]
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
