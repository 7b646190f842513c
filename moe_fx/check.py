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
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.constants import filled_with
from moe_fx.experts import experts
from moe_fx.matcher import op_name
from moe_fx.shapes import depends_on_values, is_number, shape_of

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


@dataclass(frozen=True)
class _Routing:
    """What must be true of the random routing, because it is of the original."""

    num_experts: int
    in_range: bool
    distinct: bool


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
    routing = _Routing(count, in_range, distinct)
    parts = [part for node in params for part in _parts(node)]
    sources = [_source(node) for node in views]
    given_nodes = [tokens, ids, *slots, *params, *parts, *shared, *sources, *([base] if base is not None else [])]
    nodes = _between(root, [*given_nodes, *([each] if each is not None else [])])
    sizes = _Sizes(ids, count, _affordable(params, ids, count), shrink=not views)
    generator = torch.Generator().manual_seed(0)
    env: dict[Node, Any] = {}
    for node in (tokens, *slots, *shared):
        env[node] = _random(node, sizes, generator)
    for node in params:
        env[node] = _windows(node, generator)
        env.update(zip(_parts(node), env[node], strict=False))
    if base is not None and base not in env:
        env[base] = _random(base, sizes, generator)
    env[ids] = _random_ids(tuple(sizes.leading(ids.meta["val"].shape)), routing, generator)
    for view, source in zip(views, sources, strict=True):
        if op_name(view) == "aten::gather":
            # A table holds nothing for the experts that a token was not routed to.
            table = _random(source, sizes, generator)
            table = table.clamp_min(0) if source in not_negative else table
            env[source] = torch.zeros_like(table).scatter(-1, env[ids], table.gather(-1, env[ids]))
            env[view] = env[source].gather(-1, env[ids])
        else:
            env[source] = env[view].reshape(sizes.evaluate(source.meta["val"].shape))
    given = dict(zip(("slots", "params", "shared"), ([env[n] for n in g] for g in operands[2:]), strict=True))
    error, problem = math.inf, ""
    try:
        with torch.no_grad():
            if each is None:
                expected = _Interpreter(sizes, env).run(nodes, root)
            else:
                steps = [_Interpreter(sizes, {**env, each: expert}).run(nodes, root) for expert in range(count)]
                expected = torch.stack(steps).sum(0)
            actual = experts(env[tokens], env[ids], **given, body=_in_float64(body))
        if expected.numel() == actual.numel():
            actual = actual.reshape(expected.shape) + (env[base] if base is not None else 0)
        if expected.shape == actual.shape and not expected.isnan().any():
            error = float((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-30))
    except (RuntimeError, IndexError, TypeError, ValueError, KeyError) as failure:
        # What cannot be run cannot be proven: the layer stays as it is, and the report says why.
        problem = f"{type(failure).__name__}: {failure}".splitlines()[0]
    error = math.inf if math.isnan(error) else error
    return CheckResult(error, env[tokens].shape[0], time.perf_counter() - started, problem)


def _source(view: Node) -> Node:
    source = view.args[0]
    assert isinstance(source, Node)
    return source


def _parts(param: Node) -> list[Node]:
    """What a parameter was stacked of."""
    parts: Any = param.args[0] if op_name(param) == "aten::stack" else []
    return list(parts)


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
        if depends_on_values(value) or (not isinstance(value, torch.SymInt | int) and _filled(node) is None):
            pending.extend(node.all_input_nodes)
    return sorted(order)


def _filled(node: Node) -> float | None:
    """The one value of a tensor whose shape is known before anything is run; None for any other."""
    by_values = any(depends_on_values(size) for size in shape_of(node) or ())
    return None if by_values else filled_with(node)


class _Sizes:
    """Numbers for symbolic sizes; to ``shrink`` a large static token count, a smaller one."""

    def __init__(self, ids: Node, num_experts: int, wanted: int, shrink: bool) -> None:
        # Not of the value itself: a count that is fixed may still be written as a symbol.
        total, top_k = shape_of(ids) or ()
        assert isinstance(top_k, int)
        self.symbols: dict[Any, int] = {}
        self.rows: dict[int, int] = {}
        self.num_experts = num_experts
        if isinstance(total, int):
            if total > 4 * wanted and shrink:
                self.rows = {total * many: wanted * many for many in (num_experts, top_k, 1)}
        else:
            # The first symbol makes up the count, all others are 2: of 1, no exchange of dimensions would show.
            free = sorted(total.node.expr.free_symbols, key=str)
            self.symbols = {symbol: 2 if place else 1 for place, symbol in enumerate(free)}
            unit = int(total.node.expr.subs(self.symbols))
            self.symbols[free[0]] = max(min(2, len(free)), wanted // max(1, unit))

    def evaluate(self, value: Any) -> Any:
        """A size, or any nest of sizes and other literals, with its numbers filled in."""
        if isinstance(value, torch.SymInt):
            return int(value.node.expr.subs(self.symbols))
        if isinstance(value, torch.Size | tuple | list):
            return (
                type(value)(self.evaluate(element) for element in value)
                if not isinstance(value, torch.Size)
                else tuple(self.evaluate(element) for element in value)
            )
        return value

    def leading(self, shape: Any) -> Any:
        """A shape whose dimension 0, or the one behind the experts, may be a static number of rows."""
        shape = list(self.evaluate(shape))
        if shape and shape[0] in self.rows:
            shape[0] = self.rows[shape[0]]
        elif len(shape) > 1 and shape[0] == self.num_experts and shape[1] in self.rows:
            shape[1] = self.rows[shape[1]]
        return shape


def _random(node: Node, sizes: _Sizes, generator: torch.Generator) -> Any:
    value = node.meta["val"]
    if is_number(node):
        # A float's own value keeps limits and factors what they are in the model.
        return value.node.hint if isinstance(value, torch.SymFloat) else sizes.evaluate(value)
    shape = sizes.leading(value.shape)
    if value.dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if not value.is_floating_point():
        return torch.randint(0, 3, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _windows(node: Node, generator: torch.Generator) -> torch.Tensor:
    """``[E, ...]`` random parameters in the memory of little more than one expert's."""
    count, *shape = shape_of(node)  # type: ignore[misc]
    size, step = math.prod(shape), 7
    buffer = torch.randn(size + step * count, generator=generator, dtype=torch.float64)
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    # Small values keep exponentials and squares in the activation well inside float64.
    return buffer.mul_(shape[-1] ** -0.5 if shape else 1.0).as_strided((count, *shape), (step, *strides))


def _random_ids(shape: tuple[int, ...], routing: _Routing, generator: torch.Generator) -> torch.Tensor:
    """Ids ``[T, K]`` with an idle expert; repeated within a token, and out of range, where that can be."""
    total, top_k = shape
    count = routing.num_experts
    candidates = max(count - 1, top_k)  # the last expert stays idle
    keys = torch.rand(total, candidates, generator=generator)
    ids = keys.topk(top_k, dim=-1).indices if candidates >= top_k else torch.zeros(total, top_k, dtype=torch.int64)
    if not routing.distinct:
        ids[0] = ids[0, 0]
    if not routing.in_range:
        ids[-1, -1] = count
    return ids


class _Interpreter:
    """Runs graph nodes with given values, in float64."""

    def __init__(self, sizes: _Sizes, env: dict[Node, Any]) -> None:
        self.sizes, self.env = sizes, dict(env)

    def run(self, nodes: list[Node], root: Node) -> torch.Tensor:
        for node in nodes:
            self.env[node] = self.call(node)
        return self.env[root]

    def call(self, node: Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int) and not isinstance(value, bool) and not depends_on_values(value):
            number = self.sizes.evaluate(value)
            return self.sizes.rows.get(number, number)
        filled = _filled(node)
        if filled is not None:
            assert isinstance(value, torch.Tensor)
            return torch.full(self.sizes.leading(value.shape), filled, dtype=_widened(value.dtype))
        args: Any = map_arg(node.args, self.env.__getitem__)
        kwargs: Any = map_arg(node.kwargs, self.env.__getitem__)
        name = op_name(node) or ""
        whole = bool(args) and isinstance(args[0], torch.Tensor) and not args[0].is_floating_point()
        args = tuple(self.literal(name, place, arg, whole) for place, arg in enumerate(args))
        kwargs = {key: _widened(arg) for key, arg in kwargs.items() if key != "device"}
        if name in _GROUPED:
            return _grouped_mm(*args[:3])
        if name == "aten::histc" and not args[0].is_floating_point():
            return torch.histc(args[0].double(), *args[1:]).to(args[0].dtype)  # counts integers on a GPU only
        if name == "aten::index" and _is_gather_of_matrices(args):
            return _Gathered(args[0], args[1][0])
        if name == "aten::bmm" and any(isinstance(arg, _Gathered) for arg in args):
            return _gathered_bmm(*args)
        args = _materialized(args)
        if name in ("aten::bmm", "aten::matmul") and len(args[1].shape) == 3 and args[0].shape[0] == args[1].shape[0]:
            # Matrix by matrix: a batched product would first copy overlapping windows to memory of their own.
            return torch.stack([left @ right for left, right in zip(*args, strict=True)])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def literal(self, op: str, place: int, arg: Any, whole: bool) -> Any:
        if op in _SHAPED and place == _SHAPED[op] and isinstance(arg, list | tuple):
            return self.sizes.leading(arg)
        if (op == "aten::arange" or (whole and op in _NUMBERED)) and isinstance(arg, int):
            return self.sizes.rows.get(arg, arg)
        return _widened(self.sizes.evaluate(arg))


#: where an op takes a shape whose first element may be the number of rows
_SHAPED = {"aten::reshape": 1, "aten::expand": 1, "aten::empty_permuted": 0, "aten::empty": 0, "aten::full": 0,
           "aten::zeros": 0, "aten::ones": 0, "aten::new_empty": 1}  # fmt: skip
#: ops on whole numbers that may take the number of rows, such as a bin's capacity
_NUMBERED = frozenset({"aten::mul", "aten::one_hot", "aten::lt", "aten::less", "aten::ge"})
_GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback", "moe_fx::grouped_mm"})


def _widened(arg: Any) -> Any:
    return torch.float64 if isinstance(arg, torch.dtype) and arg.is_floating_point else arg


def _grouped_mm(rows: torch.Tensor, matrices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    out = rows.new_zeros(rows.shape[0], matrices.shape[2])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        out[start:end] = rows[start:end] @ matrices[expert]
        start = end
    return out


@dataclass(frozen=True)
class _Gathered:
    """``matrices[ids]``, not copied: what a gather followed by a batched multiply would be too large for."""

    matrices: torch.Tensor
    ids: torch.Tensor

    def materialize(self) -> torch.Tensor:
        return self.matrices[self.ids]


def _materialized(arg: Any) -> Any:
    if isinstance(arg, list | tuple):
        return [_materialized(each) for each in arg] if isinstance(arg, list) else tuple(map(_materialized, arg))
    return arg.materialize() if isinstance(arg, _Gathered) else arg


def _is_gather_of_matrices(args: tuple[Any, ...]) -> bool:
    source, indices = args[0], args[1]
    return isinstance(source, torch.Tensor) and source.dim() == 3 and len(indices) == 1 and indices[0].dim() == 1


def _gathered_bmm(left: Any, right: Any) -> torch.Tensor:
    def matrix(operand: Any, row: int) -> torch.Tensor:
        return operand.matrices[operand.ids[row]] if isinstance(operand, _Gathered) else operand[row]

    rows = len((left if isinstance(left, _Gathered) else right).ids)
    return torch.stack([matrix(left, row) @ matrix(right, row) for row in range(rows)])


def _in_float64(body: GraphModule) -> GraphModule:
    """The body with every float dtype widened."""
    graph = Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = tuple(_widened(arg) for arg in node.args)
            node.kwargs = {key: _widened(arg) for key, arg in node.kwargs.items() if key != "device"}
    return GraphModule({}, graph)
