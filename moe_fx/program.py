"""The only code that edits ExportedPrograms: a working copy that passes rewrite, and a new program at the end.

Non-public torch API used here: the constructor of ``torch.export.ExportedProgram`` (public class, private
signature: nothing public builds a program from an edited graph and new parameters without tracing it again),
tried on torch 2.11, 2.13 and 2.15; and the name of ``torch._functorch.predispatch._add_batch_dim``, the call by which
torch.export keeps that a vmap is entered, tried on torch 2.13 (there is one of that name in 2.11 and 2.15). And where a
shape environment keeps what ``torch._check`` was told, tried on torch 2.13 and 2.15, and that it ignores guards within
``suppress_guards``, tried on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node

from moe_fx.errors import ProgramError
from moe_fx.matcher import arguments, op_name
from moe_fx.rewrite import GIVEN
from moe_fx.shapes import Dim, tensor_of
from moe_fx.weights import DerivedWeight, StackedWeight, Weight

__all__ = ["ExportedWork", "Program", "assuming", "check_inference", "enters_vmap", "without_guards"]

#: where a transformed program carries its report; survives save, load and run_decompositions
META_KEY = "moe_fx"

#: what a program may make of a weight before it reads it
DERIVING = frozenset({
    "aten::to", "aten::reshape", "aten::unsqueeze", "aten::squeeze", "aten::transpose", "aten::permute",
    "aten::slice", "aten::select",
})  # fmt: skip

#: outputs that are new values of the program's own tensors
MUTATIONS = tuple(kind for kind in OutputKind if kind.name in ("BUFFER_MUTATION", "PARAMETER_MUTATION"))
WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@contextlib.contextmanager
def assuming(equal: Iterable[tuple[torch.SymInt, Dim]]) -> Iterator[None]:
    """Let sizes count as equal that are so on every run, though nothing in the program says so.

    The program shares its symbols with the one that was given, of which no more is to be asserted than before.
    """
    sizes = list(equal)
    environments = {id(size.node.shape_env): size.node.shape_env for size, _ in sizes}.values()
    before = [{symbol: list(told) for symbol, told in each.deferred_runtime_asserts.items()} for each in environments]
    counts = [each.num_deferred_runtime_asserts for each in environments]
    try:
        for size, known in sizes:
            torch._check(size == known)
        yield
    finally:
        for environment, asserted, count in zip(environments, before, counts, strict=True):
            environment.deferred_runtime_asserts.clear()
            environment.deferred_runtime_asserts.update(asserted)
            environment.num_deferred_runtime_asserts = count


@contextlib.contextmanager
def without_guards(fake_mode: Any) -> Iterator[None]:
    """Let an op be evaluated for its dtype, and nothing be asserted of the sizes that it asks about."""
    environment = fake_mode.shape_env
    with environment.suppress_guards() if environment is not None else contextlib.nullcontext():
        yield


class Program(ABC):
    """A graph being rewritten, and its weights. Passes work on this and know nothing of its origin."""

    graph_module: GraphModule
    weights: dict[Node, Weight]
    #: every tensor of the program's own, those that it writes among them, where they are known
    held: Mapping[Node, Weight] = MappingProxyType({})
    #: whether gradients may be asked for: an exported program runs as a forward pass
    trains: bool = False
    #: whether the memory of weights that nobody reads any longer is given up
    gives_up: bool = True
    _apart: dict[Node, list[Node]] | None = None

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph

    @property
    def fake_mode(self) -> Any:
        """The mode in which the graph was traced: the one that knows its symbolic sizes."""
        for node in self.graph.nodes:
            mode = getattr(tensor_of(node), "fake_mode", None)
            if mode is not None:
                return mode
        return torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)

    def add_body(self, body: GraphModule) -> str:
        """Keep a body as a submodule; its name."""
        number = sum(name.startswith("moe_body_") for name, _ in self.graph_module.named_children())
        name = f"moe_body_{number}"
        self.graph_module.add_module(name, body)
        return name

    def apart(self, stack: Node, names: Sequence[str]) -> list[Node]:
        """A stacked weight as one for each expert; layers that share it share these, and experts that are one do."""
        self._apart = self._apart if self._apart is not None else {}
        if stack not in self._apart:
            tensor = self.weights[stack].tensor
            held = {name: self._part(name, tensor[names.index(name)]) for name in dict.fromkeys(names)}
            self._apart[stack] = [held[name] for name in names]
        return self._apart[stack]

    def _part(self, name: str, tensor: torch.Tensor) -> Node:
        """One expert's weight; an expert of several stacks is held once, if all store it alike."""
        for each in {part for parts in (self._apart or {}).values() for part in parts}:
            known = self.weights.get(each)
            if known is not None and known.fqn == name and known.has_values and Weight(name, tensor).has_values:
                alike = known.tensor.dtype == tensor.dtype and known.device == tensor.device
                if alike and torch.equal(known.tensor.double(), tensor.double()):
                    return each
        return self.add_weight(name, tensor)

    def derive(self, node: Node) -> None:
        """Name what the program casts or reshapes of a weight after it, so that it is quantized as the weight is."""
        source, value = node.args[0] if node.args else None, tensor_of(node)
        if node in self.weights or op_name(node) not in DERIVING or not isinstance(source, Node) or value is None:
            return
        self.derive(source)
        weight = self.weights.get(source)
        if weight is None or not all(isinstance(size, int) for size in value.shape):
            return
        target, rest = node.target, node.args[1:]

        def step(tensor: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = target(tensor, *rest)  # type: ignore[operator]
            return result

        like = torch.empty(value.shape, dtype=value.dtype, device="meta")
        bounds: tuple[Any, ...] = ()
        if op_name(node) == "aten::select":
            bounds = (rest[1],)
        elif op_name(node) == "aten::slice" and value.shape != weight.tensor.shape:
            begin, end, every = slice(*rest[1:]).indices(weight.tensor.shape[rest[0]])
            bounds = (begin, end) if every == 1 else (begin, end, every)
        part = "".join(f"_{bound}" for bound in bounds)
        self.weights[node] = DerivedWeight(weight.fqn, like, weight, step, part)

    @property
    def literals(self) -> Mapping[Node, float | int | bool]:
        """Constants of no dimensions that stand for a number in the source, such as ``torch.tensor(0.0)``."""
        return {}

    @abstractmethod
    def add_weight(self, fqn: str, tensor: torch.Tensor, device: torch.device | None = None) -> Node:
        """A new weight, readable from the whole graph; on ``device``, if its tensor has no values yet."""

    @abstractmethod
    def drop_weights(self, nodes: set[Node]) -> None:
        """Remove those of the weights that nobody reads any longer."""

    def release(self, node: Node) -> None:
        """Remove a weight that nobody reads any longer, because others were made of it; and what it was made of."""
        if isinstance(self.weights.get(node), StackedWeight):
            return self.unstack(node)
        made_of = node.all_input_nodes
        self.remove(node)
        for source in made_of:
            if source in self.weights and not source.users:
                self.release(source)

    def remove(self, node: Node) -> None:
        """Remove one weight."""
        self.drop_weights({node})

    def unstack(self, node: Node) -> None:
        """Remove a stack that nobody reads any longer, and those of its parts that nobody else reads."""
        weight = self.weights.pop(node)
        assert isinstance(weight, StackedWeight)
        if node.all_input_nodes:  # what became dead with its layer is erased already
            self.graph.erase_node(node)
        for part in dict.fromkeys(weight.nodes):
            if part in self.weights and not part.users:
                self.release(part)

    def remembered(
        self, weight: Weight, key: object, make: Callable[[], tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        """What ``make`` makes of a weight; a program that is rewritten more than once may know it already."""
        return make()

    def fake_weight(self, tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
        """A weight as the graph sees it: its sizes and dtype, on the device where the program runs."""
        if tensor.device.type != "meta" or device is None:
            fake: torch.Tensor = self.fake_mode.from_tensor(tensor, static_shapes=True)
            return fake
        with self.fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


class ExportedWork(Program):
    """The working copy of an ExportedProgram. The program itself is never changed."""

    def __init__(self, ep: object, consume: bool = False) -> None:
        if not isinstance(ep, ExportedProgram):
            raise ProgramError(
                f"moe_fx.transform takes a torch.export.ExportedProgram, not {type(ep).__name__}: "
                "call torch.export.export(model, args) first, or use torch.compile(model, backend=moe_fx.backend())"
            )
        self.source = ep
        self.consume = consume
        # A deepcopy of a graph copies its nodes and shares their (fake) values.
        self.graph_module = GraphModule(ep.graph_module, copy.deepcopy(ep.graph))
        for copied, original in zip(self.graph.nodes, ep.graph.nodes, strict=True):
            copied.name = original.name  # the copy renames what is also a Python builtin, such as "input"
        self.graph_module.meta.update(ep.graph_module.meta)
        self.state_dict = dict(ep.state_dict)
        self.constants = dict(ep.constants)
        placeholders = self.graph.find_nodes(op="placeholder")
        self.inputs = list(zip(placeholders, ep.graph_signature.input_specs, strict=True))
        self.held: dict[Node, Weight] = {}
        for node, spec in self.inputs:
            if spec.kind in WEIGHT_KINDS and spec.target is not None:
                tensors = self.state_dict if spec.target in self.state_dict else self.constants
                self.held[node] = Weight(spec.target, tensors[spec.target])
        # Of a program with weights of its own, what it is called with is none: a batch of rows is no stack of matrices.
        for node, spec in self.inputs:
            if self.held and spec.kind is InputKind.USER_INPUT:
                node.meta[GIVEN] = True
        # What the program itself writes is no constant to quantize, or to keep in other tensors.
        changed = {spec.target for spec in ep.graph_signature.output_specs if spec.kind in MUTATIONS}
        self.weights = {node: weight for node, weight in self.held.items() if weight.fqn not in changed}

    @property
    def literals(self) -> Mapping[Node, float | int | bool]:
        constants = [node for node, spec in self.inputs if spec.kind is InputKind.CONSTANT_TENSOR]
        known = {node: self.weights[node] for node in constants if node in self.weights}
        return {node: each.tensor.item() for node, each in known.items() if each.tensor.dim() == 0 and each.has_values}

    def add_weight(self, fqn: str, tensor: torch.Tensor, device: torch.device | None = None) -> Node:
        if fqn in self.state_dict or fqn in self.constants:
            raise ProgramError(f"the program already has a tensor named {fqn!r}, which its quantized form would take")
        # State comes before constants and user inputs.
        place = sum(spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) for _, spec in self.inputs)
        name = "b_" + fqn.replace(".", "_")
        if place < len(self.inputs):
            with self.graph.inserting_before(self.inputs[place][0]):
                node = self.graph.placeholder(name)
        else:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                node = self.graph.placeholder(name)
        node.meta["val"] = self.fake_weight(tensor, device)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(node.name), fqn, persistent=True)
        self.inputs.insert(place, (node, spec))
        self.state_dict[fqn] = tensor
        self.weights[node] = Weight(fqn, tensor)
        return node

    def drop_weights(self, nodes: set[Node]) -> None:
        gone = {node for node in nodes if not node.users}
        for node in [node for node in gone if isinstance(self.weights[node], StackedWeight)]:
            gone.remove(node)
            self.unstack(node)
        kept = [(node, spec) for node, spec in self.inputs if node not in gone]
        still_named = {spec.target for _, spec in kept}
        for node in gone:
            fqn = self.weights.pop(node).fqn
            self.graph.erase_node(node)
            if fqn not in still_named:
                self.state_dict.pop(fqn, None)
                self.constants.pop(fqn, None)
        self.inputs = kept

    def remove(self, node: Node) -> None:
        tensor = self.weights[node].tensor
        self.drop_weights({node})
        held = [*self.state_dict.values(), *self.constants.values()]
        if self.consume and not any(isinstance(each, torch.Tensor) and _share_memory(each, tensor) for each in held):
            tensor.data = tensor.new_empty(0)

    def output_specs(self) -> list[OutputSpec]:
        """The outputs as before, under the names of the nodes that yield them now."""
        (output,) = self.graph.find_nodes(op="output")
        specs = []
        for value, spec in zip(output.args[0], self.source.graph_signature.output_specs, strict=True):
            argument = spec.arg
            if isinstance(value, Node) and getattr(argument, "name", value.name) != value.name:
                argument = dataclasses.replace(argument, name=value.name)
            specs.append(dataclasses.replace(spec, arg=argument))
        return specs

    def finish(self, report: str | None) -> ExportedProgram:
        """The rewritten graph as a new program that carries ``report`` (text; None: what it carried before)."""
        graph_module = self.graph_module
        for name in [name for name, _ in graph_module.named_children() if name.startswith("moe_body_")]:
            delattr(graph_module, name)
        meta = dict(graph_module.meta)
        if report is not None:
            meta["custom"] = {**meta.get("custom", {}), META_KEY: report}
        signature = ExportGraphSignature([spec for _, spec in self.inputs], self.output_specs())
        program = ExportedProgram(
            root=graph_module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=self.state_dict,
            range_constraints=dict(self.source.range_constraints),
            module_call_graph=list(self.source.module_call_graph),
            example_inputs=self.source.example_inputs,
            constants=self.constants,
            verifiers=self.source.verifiers,
        )
        program.graph_module.meta.update(meta)
        return program


def _share_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def enters_vmap(node: Node) -> bool:
    """Whether a tensor of floating-point numbers enters a vmap, as torch.export keeps it."""
    target: object = node.target
    entered = getattr(target, "__module__", None) == "torch._functorch.predispatch"
    if not entered or getattr(target, "__name__", None) != "_add_batch_dim":
        return False
    value = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def check_inference(graph: Graph) -> None:
    """Refuse a graph that was traced in training mode: its dropout would be kept in every run.

    Raises:
        ProgramError: naming the first dropout that is active.
    """
    for node in graph.nodes:
        if op_name(node) not in ("aten::dropout", "aten::native_dropout", "aten::dropout_"):
            continue
        given = arguments(node)
        if given.get("train") and given["p"] > 0:
            raise ProgramError(
                f"the program was exported in training mode: {node.name} drops out with p={given['p']}; "
                "call model.eval() before torch.export.export"
            )
