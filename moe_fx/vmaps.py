"""Programs that call ``torch.vmap``: what is mapped over is written out as a dimension of its own.

torch.export keeps a vmap as calls that enter and leave it, around what is done to one element.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from moe_fx.errors import ProgramError
from moe_fx.program import enters_vmap

__all__ = ["without_vmaps"]


def without_vmaps(program: ExportedProgram) -> ExportedProgram:
    """The same program, traced again without any vmap; itself if it has none over numbers that experts could be.

    Raises:
        ProgramError: torch cannot trace it so.

    Tracing again costs as much as the export; masks of attention, which are mapped over places, are not worth that.
    """
    if not isinstance(program, ExportedProgram):
        return program  # which is said where it is opened
    modules = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    if not any(enters_vmap(node) for module in modules for node in module.graph.nodes):
        return program
    try:
        with torch.no_grad():
            return program.run_decompositions({})
    except RuntimeError as error:  # of dtypes, if a region of autocast is around it
        told = "torch cannot trace this program again without torch.vmap: cast inside what is mapped, not by autocast"
        raise ProgramError(f"{told} ({str(error).splitlines()[0]})") from error
