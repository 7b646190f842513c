"""The quantized tensors of a program's weights: each made once, and the original let go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from moe_fx.errors import ProgramError
from moe_fx.formats import AnyLinear, Torchao, WeightFormat, stored_form
from moe_fx.program import Program
from moe_fx.weights import Weight

__all__ = ["Store"]


class Store:
    """Quantizes weights of a program.

    A weight without values (meta or fake) gives tensors without values, on the meta device, to be filled later.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[tuple[Node, WeightFormat | Torchao], list[Node]] = {}

    def check(self, weight: Weight, matrices: torch.Tensor, chosen: WeightFormat | Torchao) -> None:
        """Refuse what cannot be quantized.

        Raises:
            ProgramError: naming the weight: its values are not finite, the format does not fit its sizes, or it has
                no values and is to be quantized by a technique that needs them.
        """
        form = stored_form(chosen)
        if not weight.has_values and isinstance(form, AnyLinear):
            raise ProgramError(
                f"{weight.fqn} has no values (its tensor is on {weight.device} or fake), so {form.title} cannot "
                "quantize it; give the program its weights first, or use a format of moe_fx"
            )
        # NaN is passed on
        if weight.has_values and not all(bound.isfinite() for part in weight.parts for bound in part.aminmax()):
            raise ProgramError(f"{weight.fqn} holds NaN or infinite values, so it cannot be quantized")
        reason = form.unfit(matrices)
        if reason is not None:
            raise ProgramError(f"{weight.fqn} cannot be stored as {form!r}: {reason}")

    def nodes(
        self,
        source: Node,
        chosen: WeightFormat | Torchao,
        oriented: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> list[Node]:
        """The tensors that the values of ``source``, ``oriented`` to ``[..., N, K]``, become in the format."""
        if (source, chosen) not in self._known:
            weight, form = self.program.weights[source], stored_form(chosen)

            def make() -> tuple[torch.Tensor, ...]:
                return _quantized(weight, oriented, chosen)

            if isinstance(form, AnyLinear):
                tensors = make()  # which also traces the technique
            else:
                tensors = self.program.remembered(weight, chosen, make)
            names = [f"{weight.stored_as}_{name}" for name in form.tensor_names]
            self._known[source, chosen] = [
                self.program.add_weight(name, tensor, weight.device)
                for name, tensor in zip(names, tensors, strict=True)
            ]
        return self._known[source, chosen]

    def let_go(self, source: Node) -> None:
        """Drop a weight that nobody reads any longer."""
        if source in self.program.weights and not source.users:
            self.program.release(source)


def _quantized(
    weight: Weight, oriented: Callable[[torch.Tensor], torch.Tensor], chosen: WeightFormat | Torchao
) -> tuple[torch.Tensor, ...]:
    if weight.has_values:
        matrices = oriented(weight.values())
    else:
        matrices = oriented(weight.tensor)
        matrices = torch.empty(matrices.shape, dtype=matrices.dtype, device="meta")
        chosen = stored_form(chosen)
    if matrices.dim() == 3:
        return chosen.quantize(matrices)
    return tuple(tensor.squeeze(0) for tensor in chosen.quantize(matrices.unsqueeze(0)))
