"""export(model, args): torch.export for models that loop over the experts that were hit.

A loop such as ``for e in hits.nonzero(): ...`` cannot be exported: which experts are hit depends on the data. Here
``nonzero`` of a vector of fixed length answers with two symbolic places instead, so that the loop's body is traced
twice, however many experts there are. The program so traced means "for each expert", and is raised at once: the loop is
proven to do the same to every expert, and to do nothing where no token was routed. What cannot be proven is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from moe_fx.config import Config
from moe_fx.errors import ExportError
from moe_fx.kernels import each_expert
from moe_fx.pipeline import Work, run_passes
from moe_fx.program import ExportedWork
from moe_fx.report import source_line
from moe_fx.transform import FIND, WRITE, work_report

__all__ = ["export"]

assert each_expert is not None  # importing it registers the op


class _EachExpert(TorchFunctionMode):
    """Answers ``nonzero`` of a vector of fixed length with two symbolic places."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.Tensor.nonzero, torch.nonzero) or kwargs.get("as_tuple"):
            return func(*args, **kwargs)
        (vector,) = args
        if vector.dim() != 1 or not isinstance(vector.shape[0], int) or vector.dtype is not torch.bool:
            return func(*args, **kwargs)
        places = [torch.ops.moe_fx.each_expert(vector, step) for step in range(2)]
        for place in places:
            torch._check(place >= 0)
            torch._check(place < vector.shape[0])
        return [[place] for place in places]


def export(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """``torch.export.export``, also for a model that loops over the experts that were hit. The model is not touched.

    Takes and returns what ``torch.export.export`` (with ``strict=False``) does; the loops come back as experts in the
    ``grouped_mm`` form, which :func:`moe_fx.transform` rewrites as any other. The cost does not grow with the number of
    experts. A model without such loops is exported as it is.

    Raises:
        ExportError: torch.export refuses the model, or a loop cannot be proven to do the same to every expert; the
            message names the statement that stands in the way.
    """
    try:
        with _EachExpert():
            traced = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise ExportError(f"torch.export cannot trace {type(model).__name__}: {error}") from error
    if not _unproven(traced):
        return traced
    work = Work(ExportedWork(traced), Config(experts="grouped_mm"))
    run_passes(FIND, work)
    left = _unproven(work.program)
    if left:
        raise ExportError(_explanation(left, work))
    run_passes(WRITE, work)
    assert isinstance(work.program, ExportedWork)
    return work.program.finish(None)


def _unproven(program: Any) -> list[Node]:
    nodes: list[Node] = program.graph.find_nodes(op="call_function", target=torch.ops.moe_fx.each_expert.default)
    return nodes


def _explanation(left: list[Node], work: Work) -> str:
    lines = [
        f"{len({source_line(node) for node in left})} loops over the experts that were hit cannot be proven to do the "
        "same to every expert, so the program would be wrong for other routing:"
    ]
    lines += [f"  loop at {place}" for place in dict.fromkeys(source_line(node) for node in left)]
    for miss in work_report(work).misses:
        lines.append(f"  {miss}")
        if miss.source:
            lines.append(f"    at {miss.source}")
    return "\n".join(lines)
