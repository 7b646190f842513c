"""Any technique for ``nn.Linear`` as a weight format: it is applied to one linear per expert and traced once per shape.

linear = nn.Linear(K, N);  technique(linear)     =>     linear(rows, *tensors): plain ops over plain tensors
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from moe_fx.errors import ProgramError
from moe_fx.formats.base import WeightFormat

__all__ = ["AnyLinear", "linear_of"]


@dataclass(frozen=True)
class AnyLinear(WeightFormat):
    """Weights as ``technique`` leaves those of an ``nn.Linear``; the expert linear does what that module then does.

    Read by the lowering ``linear`` only. The tensors are those of the module, stacked over the experts; tensor
    subclasses are taken apart, so that none enters the program.

    Attributes:
        technique: quantizes an ``nn.Linear`` in place, or returns the module that takes its place.
        title: what the report calls it.
    """

    technique: Callable[[nn.Linear], object]
    title: str
    _traced: dict[Any, tuple[GraphModule, tuple[str, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    user_facing = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.title

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Known once a weight was quantized; all weights of a technique have the same ones."""
        return next(iter(self._traced.values()))[1]

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        experts = []
        for matrix in weight:
            module = self._applied(matrix)
            if self._key(weight) not in self._traced:
                self._traced[self._key(weight)] = _trace(module, matrix, self.title)
            experts.append([tensor for _, tensor in _plain_tensors(module)])
        return tuple(torch.stack(same) for same in zip(*experts, strict=True))

    def dequantize(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The weights as the module sees them: what it makes of an identity matrix, ``[N, K]``."""
        graph_module = self.graph_of(tensors)
        rows = graph_module.meta["rows"]
        identity = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
        result: torch.Tensor = graph_module(identity, *tensors).t()
        return result

    def linear(self, rows: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.graph_of(tensors)(rows, *tensors)
        return result

    def graph_of(self, tensors: Any) -> GraphModule:
        """The linear as a graph: ``(rows [R, K], *tensors of one expert) -> [R, N]``."""
        shapes = [tuple(tensor.shape) for tensor in tensors]
        for graph_module, _ in self._traced.values():
            if graph_module.meta["shapes"] == shapes:
                return graph_module
        raise AssertionError(f"no linear with tensors of shapes {shapes} was traced")

    def _applied(self, matrix: torch.Tensor) -> nn.Module:
        linear = linear_of(matrix)
        try:
            replaced = self.technique(linear)
        except Exception as error:
            raise ProgramError(f"{self.title} cannot quantize a linear of {tuple(matrix.shape)}: {error}") from error
        module = (replaced if isinstance(replaced, nn.Module) else linear).eval()
        held = [tensor for _, tensor in _plain_tensors(module)]
        if module is linear and len(held) == 1 and held[0].dtype is matrix.dtype and torch.equal(held[0], matrix):
            raise ProgramError(f"{self.title} left a linear of {tuple(matrix.shape)} as it was: nothing was quantized")
        return module

    @staticmethod
    def _key(weight: torch.Tensor) -> Any:
        return (tuple(weight.shape[1:]), weight.dtype, weight.device)


def linear_of(matrix: torch.Tensor) -> nn.Linear:
    """A linear with the weight ``matrix [N, K]`` and no bias."""
    with torch.device("meta"):
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    linear.weight = nn.Parameter(matrix.detach().contiguous(), requires_grad=False)
    return linear


def _plain_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, tensor subclasses taken apart."""

    def parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        flatten = getattr(tensor, "__tensor_flatten__", None)
        if flatten is None:
            yield name, tensor.detach()
            return
        for inner in flatten()[0]:
            yield from parts(f"{name}_{inner}", getattr(tensor, inner))

    held = [*module.named_parameters(), *module.named_buffers()]
    # The quantized form of "up.weight" is called "up_qdata", as in the other formats.
    return [
        (part.replace(".", "_").removeprefix("weight_"), tensor) for name, t in held for part, tensor in parts(name, t)
    ]


def _trace(module: nn.Module, matrix: torch.Tensor, title: str) -> tuple[GraphModule, tuple[str, ...]]:
    """The module's forward with any number of rows, and the names of its tensors."""
    rows = torch.randn(8, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the technique's own, about its own future
            exported = torch.export.export(module, (rows,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            exported = exported.run_decompositions({})
    except Exception as error:
        raise ProgramError(f"a linear quantized by {title} cannot be exported: {error}") from error
    names, tensors = zip(*_plain_tensors(module), strict=True)
    held = {**exported.state_dict, **exported.constants}
    fqns = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.target is not None}
    graph = Graph()
    given = {"rows": graph.placeholder("rows")}
    given.update({name: graph.placeholder(f"tensor_{name}") for name in names})
    copied: dict[Node, Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            copied[node] = given[_name_of(held.get(fqns.get(node.name)), names, tensors, title)]
        elif node.op == "output":
            graph.output(copied[node.args[0][0]])
        elif "_assert" not in str(node.target):
            copied[node] = graph.node_copy(node, copied.__getitem__)
    traced = GraphModule({}, graph)
    traced.meta.update(rows=rows, shapes=[tuple(tensor.shape) for tensor in tensors])
    return traced, names


def _name_of(held: torch.Tensor | None, names: tuple[str, ...], tensors: tuple[torch.Tensor, ...], title: str) -> str:
    """Which of the module's tensors an input of its exported program is; ``rows`` for none."""
    if held is None:
        return "rows"
    for name, tensor in zip(names, tensors, strict=True):
        if held.dtype is tensor.dtype and held.shape == tensor.shape and held.data_ptr() == tensor.data_ptr():
            return name
    raise ProgramError(f"a linear quantized by {title} reads a tensor that is neither a parameter nor a buffer")
