"""What was found, what was done, what was missed and why: as data, text and JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moe_fx.matcher import Miss

__all__ = ["LayerReport", "LinearReport", "MissReport", "Report", "short_name", "table"]


@dataclass(frozen=True)
class LayerReport:
    """One MoE layer that was rewritten.

    Attributes:
        fqn: the module path of the experts.
        source_form: the disguise in which the layer was found.
        num_experts: E. top_k: K, experts per token.
        router: what is known of how ids and routing weights come about.
        lowering: the form it was written back in. why: why that one.
        format: the weight formats, by parameter where they differ.
        bytes_before, bytes_after: of the expert parameters.
        error: the numeric check's largest difference over the output's range; None if not validated.
        formats: by the original parameter's name, the format as data: its class and options.
        names: by the original parameter's name, the tensors of the state dict that took its place.
        parts: by the name of a parameter that was stacked of one per expert, theirs.
        ids: the node that yields the expert ids. output: the node that yielded the layer's output, and the one
            that does now.
    """

    fqn: str
    source_form: str
    num_experts: int
    top_k: int
    router: str
    lowering: str
    why: str
    format: str
    storage: str
    bytes_before: int
    bytes_after: int
    error: float | None
    check_seconds: float
    formats: dict[str, dict[str, Any]]
    names: dict[str, tuple[str, ...]]
    ids: str
    output: tuple[str, str]
    parts: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def short_name(fqn: str) -> str:
    """A parameter's name within its module: ``down_proj`` of ``experts.down_proj.weight``."""
    return fqn.removesuffix(".weight").rpartition(".")[2]


@dataclass(frozen=True)
class LinearReport:
    """A linear beside the experts that was quantized.

    Attributes:
        fqn: the parameter. format: its format in a word. record: the format as data: its class and options.
        bytes_before, bytes_after: of the parameter. names: the tensors of the state dict that took its place.
    """

    fqn: str
    format: str
    record: dict[str, Any]
    bytes_before: int
    bytes_after: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class MissReport:
    """Something that looks like an MoE layer and was left alone.

    Attributes:
        rule: the source form that came closest. node: where it stopped. wanted, found: there.
        source: the line of the model's code. module: the module path.
    """

    rule: str
    node: str
    wanted: str
    found: str
    source: str
    module: str

    def __str__(self) -> str:
        return f"{self.module or '?'}: {self.rule} stops at {self.node}: wanted {self.wanted}, found {self.found}"


@dataclass(frozen=True)
class Report:
    """Everything that a transform did, or (from ``explain``) would do.

    Attributes:
        layers: the layers rewritten. linears: the other linears quantized. misses: the near misses.
        seconds: time by pass. config: the configuration, as text.
    """

    layers: tuple[LayerReport, ...] = ()
    linears: tuple[LinearReport, ...] = ()
    misses: tuple[MissReport, ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    config: str = ""

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """By original name, the tensors of the state dict that took the place of a parameter."""
        experts: dict[str, tuple[str, ...]] = {}
        for layer in self.layers:
            for name, new in layer.names.items():
                parts = layer.parts.get(name, (name,))
                for expert, part in enumerate(parts):
                    # Stored per expert, each part has tensors of its own: the E of one kind stand side by side.
                    own = layer.storage == "per_expert" and len(parts) > 1
                    experts[part] = new[expert :: len(parts)] if own else new
        return experts | {linear.fqn: linear.names for linear in self.linears}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Report:
        data: dict[str, Any] = json.loads(text)
        for layer in data["layers"]:
            layer["names"] = {name: tuple(new) for name, new in layer["names"].items()}
            layer["parts"] = {name: tuple(held) for name, held in layer.get("parts", {}).items()}
            layer["output"] = tuple(layer["output"])
        for linear in data["linears"]:
            linear["names"] = tuple(linear["names"])
        return Report(
            tuple(LayerReport(**layer) for layer in data["layers"]),
            tuple(LinearReport(**linear) for linear in data["linears"]),
            tuple(MissReport(**miss) for miss in data["misses"]),
            data["seconds"],
            data["config"],
        )

    def __str__(self) -> str:
        lines = []
        if self.layers:
            lines += table(
                ["layer", "form", "E", "K", "router", "lowering", "format", "bytes", "after", "check error"],
                [
                    [layer.fqn, layer.source_form, str(layer.num_experts), str(layer.top_k), layer.router,
                     layer.lowering, layer.format, _bytes(layer.bytes_before), _bytes(layer.bytes_after),
                     "not run" if layer.error is None else f"{layer.error:.1e}"]
                    for layer in self.layers
                ],
            )  # fmt: skip
            for why in dict.fromkeys(f"{layer.lowering}: {layer.why}" for layer in self.layers):
                lines.append(f"why {why}")
        else:
            lines.append("no MoE layer was found")
        if self.linears:
            before, after = (
                sum(each.bytes_before for each in self.linears),
                sum(each.bytes_after for each in self.linears),
            )
            count, names = len(self.linears), ", ".join(dict.fromkeys(each.format for each in self.linears))
            lines.append(f"other linears: {count} as {names}, {_bytes(before)} -> {_bytes(after)}")
        if self.misses:
            lines.append(f"{len(self.misses)} near miss{'es' if len(self.misses) > 1 else ''}:")
            for miss in self.misses:
                lines.append(f"  {miss}")
                if miss.source:
                    lines.append(f"    at {miss.source}")
        return "\n".join(lines)


def _bytes(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.2f} GiB"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of text: a head, a rule, and the rows in columns."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return [
        text[0].rstrip(),
        "  ".join("-" * width for width in widths),
        *(line.rstrip() for line in text[1:]),
    ]


def describe_miss(rule: str, miss: Miss) -> MissReport:
    """A matcher's miss, with the place in the user's code."""
    node = miss.node
    return MissReport(
        rule,
        node.name if node is not None else "",
        miss.wanted,
        miss.found,
        source_line(node),
        module_of(node),
    )


def source_line(node: Node | None) -> str:
    """The line of the model's code that a node comes from: ``file:line: code``."""
    trace = (node.meta.get("stack_trace") if node is not None else None) or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    places = [place for place, line in enumerate(lines) if line.startswith("File ")]
    if not places:
        return ""
    place, code = lines[places[-1]], lines[places[-1] + 1 : places[-1] + 2]
    file, _, rest = place.removeprefix("File ").partition(", line ")
    return f"{file.strip(chr(34))}:{rest.partition(',')[0]}" + (f": {code[0]}" if code else "")


def module_of(node: Node | None) -> str:
    """The innermost module that a node was traced in."""
    stack = (node.meta.get("nn_module_stack") if node is not None else None) or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths and not paths[-1].startswith("_empty_nn_module_stack") else ""
