"""The same passes under torch.compile: ``torch.compile(model, backend=moe_fx.backend(config))``.

Dynamo hands over a graph of Python-level calls. It is traced to ATen ops ahead of autograd, as torch.export does it,
rewritten, and given to Inductor.

Non-public torch API used here, tried on torch 2.11, 2.13 and 2.15:

* ``FakeTensor.fake_mode``: the mode in which Dynamo traced, which knows the inputs' symbolic sizes (the mode of the
  ambient tracing context is another one, made afresh for the backend);
* ``make_fx(..., pre_dispatch=True)``: the tracer that torch.export itself uses for training IR;
* ``torch._inductor.compile_fx.compile_fx``: what ``backend="inductor"`` calls;
* ``torch._inductor.lowering.register_lowering`` and ``constant_folding.add_dont_constant_fold``: that
  ``moe_fx::kept`` costs nothing and is not folded;
* ``Tensor._version``: whether a weight was written since it was quantized;
* ``node.meta["grapharg"]``: where Dynamo notes which attribute of the model an input is;
* ``GraphModule.meta["dynamo_compile_id"]``, ``GraphModule._param_name_to_source``, ``node._dynamo_source`` and
  ``node.meta["tensor_dict"]``: by these AOTAutograd knows which inputs stay where they are; CUDA graphs copy all others
  at every call. ``torch._dynamo.source.ConstantSource``: of tensors that Dynamo has not seen.
"""

from __future__ import annotations

import functools
import re
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from moe_fx.config import Config
from moe_fx.errors import ConfigError, ProgramError
from moe_fx.kernels import kept
from moe_fx.pipeline import Work, run_passes
from moe_fx.program import Program, check_inference
from moe_fx.report import Report
from moe_fx.transform import FIND, WRITE, check_requirement, work_report
from moe_fx.weights import Weight

__all__ = ["Backend", "backend", "named_backend"]


#: by name and format, the tensors that were quantized, which versions of them, and the result
Made = dict[Any, tuple[list[tuple[weakref.ref[torch.Tensor], int]], tuple[torch.Tensor, ...]]]


class CapturedWork(Program):
    """A Dynamo graph, traced to ATen. Its inputs stay as they are: the compiled code is called with all of them."""

    gives_up = False

    def __init__(self, graph_module: GraphModule, weights: dict[Node, Weight], made: Made, trains: bool) -> None:
        self.graph_module = graph_module
        self.weights = weights
        self.made = made
        self.trains = trains

    def remembered(
        self, weight: Weight, key: object, make: Callable[[], tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        """Dynamo compiles a model again for other shapes; its weights are quantized once, unless they change."""
        parts = weight.parts
        if any(part.is_inference() for part in parts):  # nobody counts its versions
            return make()
        known = self.made.get((weight.stored_as, key))
        if known is None or not _unchanged(known[0], parts):
            known = self.made[weight.stored_as, key] = ([(weakref.ref(part), part._version) for part in parts], make())
        return known[1]

    def add_weight(self, fqn: str, tensor: torch.Tensor, device: torch.device | None = None) -> Node:
        name = "moe_weight_" + re.sub(r"\W", "_", fqn)
        self.graph_module.register_buffer(name, tensor)
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(name)
        node.meta["val"] = self.fake_weight(tensor, device)
        self.weights[node] = Weight(fqn, tensor)
        return node

    def drop_weights(self, nodes: set[Node]) -> None:
        """Inputs cannot be dropped: Dynamo passes them on every call. The model keeps its tensors anyway."""


def _unchanged(known: list[tuple[weakref.ref[torch.Tensor], int]], parts: Sequence[torch.Tensor]) -> bool:
    return len(known) == len(parts) and all(
        ref() is part and version == part._version for (ref, version), part in zip(known, parts, strict=True)
    )


class Backend:
    """A torch.compile backend. ``reports`` holds one Report for every graph compiled, in order."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.reports: list[Report] = []
        self._made: Made = {}

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        rewritten, report = self.rewrite(graph_module, example_inputs)
        self.reports.append(report)
        compiled: Any = compile_fx(rewritten, list(example_inputs), **options)
        return compiled

    def rewrite(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> tuple[GraphModule, Report]:
        """The graph with its MoE layers rewritten; the same graph module where there are none."""
        check_quantizable(self.config, example_inputs)
        traced = to_aten(graph_module, example_inputs)
        check_inference(traced.graph)
        names = [parameter_name(node) for node in graph_module.graph.find_nodes(op="placeholder")]
        weights = {
            node: Weight(name, value)
            for node, name, value in zip(traced.graph.find_nodes(op="placeholder"), names, example_inputs, strict=True)
            if name and isinstance(value, torch.Tensor)
        }
        # Whatever is trained: a gradient of the tokens passes through experts that are frozen.
        needed = any(isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs)
        work = Work(CapturedWork(traced, weights, self._made, needed and torch.is_grad_enabled()), self.config)
        run_passes(FIND, work)
        check_requirement(work)
        if not work.layers and self.config.linears is None:
            return graph_module, work_report(work)
        run_passes(WRITE, work)
        for name in [name for name, _ in traced.named_children() if name.startswith("moe_body_")]:
            delattr(traced, name)
        traced.recompile()
        keep_origins(graph_module, traced)
        return traced, work_report(work)


@functools.cache
def _teach() -> None:
    from torch._inductor.constant_folding import add_dont_constant_fold
    from torch._inductor.lowering import register_lowering

    register_lowering(torch.ops.moe_fx.kept.default, type_promotion_kind=None)(lambda weight: weight)
    add_dont_constant_fold(torch.ops.moe_fx.kept.default)


def teach_inductor() -> None:
    """Say what ``moe_fx::kept`` means, once Inductor is there: importing it takes seconds."""
    if "torch._inductor.compile_fx" in sys.modules:
        _teach()


kept.ON_TRACE.append(teach_inductor)


def backend(config: Config | None = None) -> Backend:
    """A backend for ``torch.compile(model, backend=...)`` that rewrites MoE layers before Inductor compiles.

    Weights are quantized when the model is first called; later changes of the model's parameters are not seen.

    Raises:
        ConfigError: ``config`` is no :class:`moe_fx.Config`, or would consume the model.
    """
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"moe_fx.backend takes a moe_fx.Config, not {type(config).__name__}")
    if config is not None and config.consume:
        raise ConfigError("Config.consume=True is for moe_fx.transform: a model under torch.compile keeps its weights")
    return Backend(config if config is not None else Config())


def named_backend(graph_module: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="moe_fx")`` finds: :func:`backend` with the default configuration."""
    return Backend(Config())(graph_module, example_inputs, **options)


def check_quantizable(config: Config, example_inputs: Sequence[Any]) -> None:
    """Quantized weights take no gradient: refuse to drop one silently."""
    trained = any(isinstance(value, torch.nn.Parameter) and value.requires_grad for value in example_inputs)
    if config.quantizes and torch.is_grad_enabled() and trained:
        raise ProgramError(
            "Config.quantize under torch.compile with gradients enabled: quantized experts cannot be trained; "
            "call the model under torch.no_grad() or torch.inference_mode(), or freeze its parameters"
        )


def to_aten(graph_module: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Dynamo's graph as ATen ops, with the symbolic sizes Dynamo gave to its inputs."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    examples = [node.meta.get("example_value", value) for node, value in zip(placeholders, example_inputs, strict=True)]
    modes = [value.fake_mode for value in examples if isinstance(value, torch._subclasses.FakeTensor)]
    fake_mode = modes[0] if modes else torch._subclasses.FakeTensorMode()
    fakes = [
        fake_mode.from_tensor(value, static_shapes=True)
        if isinstance(value, torch.Tensor) and not isinstance(value, torch._subclasses.FakeTensor)
        else value
        for value in examples
    ]
    with fake_mode:
        return make_fx(graph_module, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)


def keep_origins(graph_module: GraphModule, traced: GraphModule) -> None:
    """Tell of the inputs of a graph what Dynamo told of the graph that it was traced from."""
    from torch._dynamo.source import ConstantSource

    pairs = list(zip(*(each.graph.find_nodes(op="placeholder") for each in (graph_module, traced)), strict=True))
    compile_id = graph_module.meta.get("dynamo_compile_id")
    if compile_id is None or not all(hasattr(node, "_dynamo_source") for node, _ in pairs):
        return  # not from Dynamo
    for known, node in pairs:
        node._dynamo_source = known._dynamo_source
        if "tensor_dict" in known.meta:
            node.meta["tensor_dict"] = known.meta["tensor_dict"]
    traced.meta["dynamo_compile_id"] = compile_id
    known_names: dict[str, Any] = getattr(graph_module, "_param_name_to_source", None) or {}
    own = [name for name, _ in [*traced.named_parameters(), *traced.named_buffers()]]
    sources = {name: known_names.get(name, ConstantSource(name)) for name in own}
    traced._param_name_to_source = sources  # type: ignore[assignment]


def parameter_name(node: Node) -> str:
    """The full name of the parameter that an input of Dynamo's graph is; empty for any other input."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    text = name() if callable(name) else name
    if not isinstance(text, str) or not re.search(r"_(parameters|buffers)\[|_modules\[", text):
        return ""
    parts = re.findall(r"\['([^']+)'\]|\.(\w+)", text)
    names = [quoted or plain for quoted, plain in parts]
    return ".".join(part for part in names if part not in ("self", "_modules", "_parameters", "_buffers"))
