"""Programs that call ``torch.vmap``: what is mapped over is written out as a dimension of its own.

torch.export keeps a vmap as calls that enter and leave it, around what is done to one element.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

__all__ = ["without_vmaps"]

#: where the calls are defined by which torch.export enters and leaves a vmap (torch 2.13)
ENTERED = "torch._functorch.predispatch"


def without_vmaps(program: ExportedProgram) -> ExportedProgram:
    """The same program, traced again without any vmap; itself if it has none over numbers that experts could be.

    Tracing again costs as much as the export; masks of attention, which are mapped over places, are not worth that.
    """
    if not isinstance(program, ExportedProgram):
        return program  # which is said where it is opened
    modules = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    if not any(_is_entered(node) for module in modules for node in module.graph.nodes):
        return program
    with torch.no_grad():
        return program.run_decompositions({})


def _is_entered(node: torch.fx.Node) -> bool:
    """Whether a tensor of floating-point numbers enters a vmap."""
    target: object = node.target
    if getattr(target, "__module__", None) != ENTERED or getattr(target, "__name__", None) != "_add_batch_dim":
        return False
    value = node.args[0].meta.get("val") if isinstance(node.args[0], torch.fx.Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point()
