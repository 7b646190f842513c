"""compare(original, transformed, inputs): what quantization did to the numbers, layer by layer and at the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from moe_fx.errors import ProgramError
from moe_fx.formats import Unquantized, format_from_record
from moe_fx.report import LayerReport, short_name, table
from moe_fx.transform import report

__all__ = ["Comparison", "LayerComparison", "compare"]


@dataclass(frozen=True)
class LayerComparison:
    """One layer, before and after. None stands for what could not be measured.

    Attributes:
        fqn: the module path of the experts.
        weight_sqnr: signal to quantization noise ratio in dB, by parameter; infinite where nothing changed.
        output_sqnr: that of the layer's output, in dB, with the errors of all layers before it.
        router_agreement: the mean fraction of a token's experts that are still chosen.
        idle_experts: experts that the original never chose on these inputs: what is said here does not hold for them.
    """

    fqn: str
    weight_sqnr: dict[str, float | None]
    output_sqnr: float | None
    router_agreement: float | None
    idle_experts: int | None


@dataclass(frozen=True)
class Comparison:
    """Two programs on the same inputs.

    Attributes:
        layers: by layer.
        linears: the SQNR in dB of every other linear that was quantized, by parameter; None if not measurable.
        output_sqnr: of the program's first floating point output (the logits of a language model), in dB.
        kl_divergence: mean over positions of KL(original || transformed) of the softmax of that output, in nats.
        top1_agreement: fraction of positions whose largest output is the same.
    """

    layers: tuple[LayerComparison, ...]
    linears: dict[str, float | None]
    output_sqnr: float
    kl_divergence: float
    top1_agreement: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [
            [
                layer.fqn,
                ", ".join(f"{short_name(name)} {_db(value)}" for name, value in layer.weight_sqnr.items()),
                _db(layer.output_sqnr),
                "?" if layer.router_agreement is None else f"{layer.router_agreement:.1%}",
                "?" if layer.idle_experts is None else str(layer.idle_experts),
            ]
            for layer in self.layers
        ]
        lines = table(["layer", "weights, dB", "output, dB", "router agrees", "idle experts"], rows)
        measured = [value for value in self.linears.values() if value is not None]
        if measured:
            lines.append(f"other linears: {len(measured)}, weights {min(measured):.1f} to {max(measured):.1f} dB")
        lines.append(
            f"output: SQNR {_db(self.output_sqnr)} dB, KL divergence {self.kl_divergence:.2e} nats, "
            f"same top entry {self.top1_agreement:.1%}"
        )
        return "\n".join(lines)


def compare(original: ExportedProgram, transformed: ExportedProgram, inputs: Any) -> Comparison:
    """Run both programs on the same inputs and measure what differs.

    Args:
        original: the program that was transformed.
        transformed: what :func:`moe_fx.transform` made of it (also after save and load).
        inputs: positional arguments as a tuple, keyword arguments as a dict, or a list of such, run one by one.

    Raises:
        ProgramError: one of the two is no ExportedProgram, or ``transformed`` is not a transformed one.
    """
    for name, given in (("original", original), ("transformed", transformed)):
        if not isinstance(given, ExportedProgram):
            raise ProgramError(f"moe_fx.compare: {name} is an ExportedProgram, not {type(given).__name__}")
    done = report(transformed)
    if done is None or not (done.layers or done.linears):
        raise ProgramError("moe_fx.compare: nothing of `transformed` was written by moe_fx.transform")
    batches = inputs if isinstance(inputs, list) else [inputs]
    before = _Recorder(original, [name for layer in done.layers for name in (layer.output[0], layer.ids)])
    after = _Recorder(transformed, [name for layer in done.layers for name in (layer.output[1], layer.ids)])
    for batch in batches:
        before.run(batch)
        after.run(batch)
    expected, actual = before.outputs(), after.outputs()
    log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
    return Comparison(
        tuple(_layer(layer, original, transformed, before, after) for layer in done.layers),
        {each.fqn: _weight_sqnr(each.fqn, each.record, each.names, original, transformed) for each in done.linears},
        sqnr(actual, expected),
        float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        float((expected.argmax(-1) == actual.argmax(-1)).double().mean()),
    )


def sqnr(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB: ``10 log10(sum expected^2 / sum (actual - expected)^2)``."""
    expected = expected.double()
    noise = (actual.double() - expected).square().sum()
    return float(10 * torch.log10(expected.square().sum() / noise)) if noise > 0 else float("inf")


class _Recorder:
    """Runs a program and keeps the values of some of its nodes, as well as its outputs."""

    def __init__(self, program: ExportedProgram, names: list[str]) -> None:
        self.module = program.module()
        self.values: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self.results: list[torch.Tensor] = []
        graph = self.module.graph
        for place, node in enumerate([node for node in graph.nodes if node.name in self.values]):
            probe = f"moe_fx_probe_{place}"
            self.module.add_submodule(probe, _Probe(self.values[node.name]))
            with graph.inserting_after(node):
                graph.call_module(probe, (node,))
        self.module.recompile()

    def run(self, batch: Any) -> None:
        args, kwargs = ((), batch) if isinstance(batch, Mapping) else (batch, {})
        with torch.no_grad():
            result = self.module(*args, **kwargs)
        floats = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        floats = [leaf for leaf in floats if leaf.is_floating_point() and leaf.dim() > 0]
        if not floats:
            raise ProgramError("moe_fx.compare: the program has no floating point output")
        self.results.append(floats[0].double().flatten(0, -2))

    def outputs(self) -> torch.Tensor:
        return torch.cat(self.results)

    def value(self, name: str) -> torch.Tensor | None:
        found = self.values[name]
        return torch.cat([each.flatten(0, -2) for each in found]) if found else None


class _Probe(nn.Module):
    def __init__(self, kept: list[torch.Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, value: torch.Tensor) -> None:
        self.kept.append(value.detach().clone())


def _layer(
    layer: LayerReport, original: ExportedProgram, transformed: ExportedProgram, before: _Recorder, after: _Recorder
) -> LayerComparison:
    expected, actual = before.value(layer.output[0]), after.value(layer.output[1])
    ids, new_ids = before.value(layer.ids), after.value(layer.ids)
    agreement = idle = None
    if ids is not None:
        idle = layer.num_experts - len({e for e in ids.flatten().tolist() if 0 <= e < layer.num_experts})
        if new_ids is not None:
            same = (ids.unsqueeze(-1) == new_ids.unsqueeze(-2)).any(-1)
            agreement = float(same.double().mean())
    measured = expected is not None and actual is not None
    return LayerComparison(
        layer.fqn,
        {
            name: _weight_sqnr(name, record, layer.names[name], original, transformed, layer.parts.get(name))
            if name in layer.names
            else float("inf")
            for name, record in layer.formats.items()
        },
        sqnr(actual, expected) if measured else None,
        agreement,
        idle,
    )


def _weight_sqnr(
    name: str,
    record: dict[str, Any],
    names: Sequence[str],
    original: ExportedProgram,
    transformed: ExportedProgram,
    parts: Sequence[str] | None = None,
) -> float | None:
    form = Unquantized() if record["format"] == Unquantized.__name__ else format_from_record(record)
    held = {**original.state_dict, **original.constants}
    if form is None or any(part not in held for part in parts or (name,)):
        return None
    weight = torch.stack([held[part] for part in parts]) if parts else held[name]
    tensors = [transformed.state_dict[new] for new in names]
    if len(tensors) > len(form.tensor_names):  # one of each kind per expert
        each = len(tensors) // len(form.tensor_names)
        tensors = [torch.stack(tensors[start : start + each]) for start in range(0, len(tensors), each)]
    stored = form.dequantize(*tensors)
    # A parameter's dimensions may stand in any order, and several orders may fit: it is the one that it was stored in.
    orders = (stored.permute(order) for order in permutations(range(stored.dim())))
    return max((sqnr(each, weight) for each in orders if each.shape == weight.shape), default=None)


def _db(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"
