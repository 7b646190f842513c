"""Graph nodes run with given values, in float64, on a CPU: whatever dtype and device the program is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.check_inputs import Sizes
from moe_fx.constants import filled_with
from moe_fx.matcher import op_name
from moe_fx.shapes import depends_on_values, shape_of

__all__ = ["Interpreter", "filled", "in_float64"]


def filled(node: Node) -> float | None:
    """The one value of a tensor whose shape is known before anything is run; None for any other."""
    by_values = any(depends_on_values(size) for size in shape_of(node) or ())
    return None if by_values else filled_with(node)


class Interpreter:
    """Runs graph nodes with given values, in float64."""

    def __init__(self, sizes: Sizes, env: dict[Node, Any]) -> None:
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
        same = filled(node)
        if same is not None:
            assert isinstance(value, torch.Tensor)
            return torch.full(self.sizes.leading(value.shape), same, dtype=_widened(value.dtype))
        args: Any = map_arg(node.args, self.env.__getitem__)
        kwargs: Any = map_arg(node.kwargs, self.env.__getitem__)
        name = op_name(node) or ""
        whole = bool(args) and isinstance(args[0], torch.Tensor) and not args[0].is_floating_point()
        args = tuple(self.literal(name, place, arg, whole) for place, arg in enumerate(args))
        kwargs = {key: _widened(arg) for key, arg in kwargs.items() if key != "device"}
        if name == "aten::empty":
            kwargs["dtype"] = _widened(value.dtype)  # also where it is torch's default
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


def in_float64(body: GraphModule) -> GraphModule:
    """The body with every float dtype widened."""
    graph = Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = tuple(_widened(arg) for arg in node.args)
            node.kwargs = {key: _widened(arg) for key, arg in node.kwargs.items() if key != "device"}
    return GraphModule({}, graph)
