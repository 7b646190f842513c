"""Our own graph text: short, stable across torch releases, and the same for graphs that mean the same."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from moe_fx.formats import WeightFormat

__all__ = ["format_graph"]

_SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16",
          torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
          torch.float8_e4m3fn: "f8"}  # fmt: skip


def format_graph(module: GraphModule | Graph, *, shapes: bool = True) -> str:
    """A graph as text: one line per node, ``name: dtype[shape] = op(args)``; unused inputs are left out.

    Names are numbered in order of appearance, so that a change elsewhere does not rename what follows; symbolic
    sizes are shown as ``s0``, ``s1``, ... likewise. Submodules that are called or passed follow the graph.
    """
    graph = module.graph if isinstance(module, GraphModule) else module
    text = _Text(shapes)
    lines = [text.line(node) for node in graph.nodes if node.op != "placeholder" or node.users]
    owner = module if isinstance(module, GraphModule) else graph.owning_module
    for target in text.submodules:
        inner = format_graph(owner.get_submodule(target), shapes=False) if owner is not None else ""
        lines += [f"{target}:", *("    " + line for line in inner.splitlines())]
    return "\n".join(lines) + "\n"


class _Text:
    def __init__(self, shapes: bool) -> None:
        self.shapes = shapes
        self.names: dict[Node, str] = {}
        self.symbols: dict[str, str] = {}
        self.counts: dict[str, int] = {}
        self.submodules: list[str] = []

    def name(self, node: Node) -> str:
        if node not in self.names:
            base = node.name if node.op == "placeholder" else self.op(node).rpartition(".")[2]
            seen = self.counts.get(base, 0)
            self.counts[base] = seen + 1
            self.names[node] = base if seen == 0 else f"{base}_{seen}"
        return self.names[node]

    def op(self, node: Node) -> str:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            return target._schema.name.replace("::", ".")
        if target is operator.getitem:
            return "getitem"
        return target if isinstance(target, str) else getattr(target, "__name__", str(target))

    def size(self, value: Any) -> str:
        if isinstance(value, int):
            return str(value)
        return re.sub(r"[su]\d+", lambda m: self.symbols.setdefault(m[0], f"s{len(self.symbols)}"), str(value))

    def type(self, node: Node) -> str:
        value = node.meta.get("val")
        if not self.shapes or not isinstance(value, torch.Tensor):
            return ""
        dims = ", ".join(self.size(dim) for dim in value.shape)
        return f": {_SHORT.get(value.dtype, str(value.dtype))}[{dims}]"

    def arg(self, value: Any) -> str:
        if isinstance(value, Node):
            return self.name(value)
        if isinstance(value, list | tuple):
            inner = ", ".join(self.arg(element) for element in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
        if isinstance(value, torch.dtype):
            return _SHORT.get(value, str(value))
        if isinstance(value, WeightFormat):
            return value.name
        return repr(value)

    def line(self, node: Node) -> str:
        if node.op == "placeholder":
            return f"{self.name(node)}{self.type(node)}"
        if node.op == "output":
            return f"return {self.arg(node.args[0])}"
        if node.op == "get_attr":
            self.submodules.append(str(node.target))
            self.names[node] = str(node.target)
            return f"{node.target} = attribute"
        kept = {key: value for key, value in node.kwargs.items() if key not in ("layout", "device", "pin_memory")}
        args = [self.arg(value) for value in node.args] + [f"{key}={self.arg(value)}" for key, value in kept.items()]
        return f"{self.name(node)}{self.type(node)} = {self.op(node)}({', '.join(args)})"
