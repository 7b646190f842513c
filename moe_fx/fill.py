"""fill(program, state_dict): values for a program that was transformed without any."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from moe_fx.errors import ProgramError
from moe_fx.program import ExportedWork
from moe_fx.weights import Weight

__all__ = ["fill"]


def fill(program: ExportedProgram, tensors: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """Give a program the values of its weights.

    A model on the meta device, or made under a ``FakeTensorMode``, can be exported and transformed without memory for
    its weights; a quantized state dict, saved from a program that was transformed in the same way, fills it.

    Args:
        program: an exported program, transformed or not. It is not changed.
        tensors: by the names of ``program.state_dict`` (and ``program.constants``), on the device where the program
            shall run. All that have no values must be there.

    Returns:
        A new program that holds the given tensors themselves, not copies.

    Raises:
        ProgramError: a name that the program does not have or that is missing, or another shape or dtype.
    """
    work = ExportedWork(program)
    filled: set[str] = set()
    meta = False
    for weight in {weight.fqn: weight for weight in work.held.values()}.values():
        if weight.fqn not in tensors:
            if not weight.has_values:
                raise ProgramError(f"moe_fx.fill: {weight.fqn} has no values, and none are given")
            continue
        tensor = tensors[weight.fqn]
        _check(weight, tensor)
        meta = meta or weight.tensor.device.type == "meta"
        held = work.state_dict if weight.fqn in work.state_dict else work.constants
        parameter = isinstance(weight.tensor, torch.nn.Parameter) and not isinstance(tensor, torch.nn.Parameter)
        held[weight.fqn] = torch.nn.Parameter(tensor, requires_grad=False) if parameter else tensor
        filled.add(weight.fqn)
    unknown = sorted(set(tensors) - filled)
    if unknown:
        names = ", ".join(list(work.state_dict)[:8])
        raise ProgramError(f"moe_fx.fill: the program has no weight {unknown[0]!r}; its weights are {names}, ...")
    result = work.finish(None)
    devices = {tensor.device for tensor in tensors.values()}
    if meta and devices:
        if len(devices) > 1:
            raise ProgramError(f"moe_fx.fill: the tensors are on several devices: {', '.join(map(str, devices))}")
        device = devices.pop()
        # The pass moves the example inputs too, but cannot take them from the meta device.
        result.example_inputs = pytree.tree_map_only(
            torch.Tensor, lambda x: torch.zeros_like(x, device=device), program.example_inputs
        )
        result = move_to_device_pass(result, device)
    return result


def _check(weight: Weight, tensor: torch.Tensor) -> None:
    wanted, found = (f"{each.dtype} {tuple(each.shape)}" for each in (weight.tensor, tensor))
    if wanted != found:
        raise ProgramError(f"moe_fx.fill: {weight.fqn} is {wanted}, the given tensor {found}")
