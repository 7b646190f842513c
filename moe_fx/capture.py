"""export(model, args): torch.export for models that loop over the experts that were hit.

A loop such as ``for e in hits.nonzero(): ...`` cannot be exported: which experts are hit depends on the data. Here
``nonzero`` of a vector of fixed length answers with a few symbolic places instead, so that the loop's body is traced
that many times, however many experts there are. The program so traced means "for each expert", and is raised at once:
the loop is proven to do the same to every expert, and to do nothing where no token was routed. It is traced with two
places and with three, and must come out the same: nothing else may depend on how many experts were hit. What cannot
be proven is an error.
"""

from __future__ import annotations

import contextlib
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
from moe_fx.rewrite import same_graph
from moe_fx.transform import FIND, WRITE, work_report

__all__ = ["export"]

assert each_expert is not None  # importing it registers the op


class _Last(int):
    """The number of the last class, where a model expects a tensor that holds one."""

    def item(self) -> int:
        return self

    def tolist(self) -> int:
        return self


class _Place(torch.SymInt):
    """The number of an expert, where a model expects a tensor that holds one."""

    def item(self) -> _Place:
        return self

    def tolist(self) -> _Place:
        return self


class _Places(list[Any]):
    """What ``nonzero`` of a vector answers: rows of one column, ``[[e], [e]]``; or, flattened, the column."""

    def squeeze(self, dim: int = -1) -> _Places:
        return self.flatten() if dim in (-1, 1) else self

    def flatten(self) -> _Places:
        return _Places(place[0] if isinstance(place, list) else place for place in self)

    def tolist(self) -> _Places:
        return self

    def cpu(self) -> _Places:
        return self


class _EachExpert(TorchFunctionMode):
    """Answers ``nonzero`` of a vector of fixed length with ``steps`` symbolic places.

    With ``last_apart``, the last place is no expert but a class of its own, such as that of tokens masked out: the
    symbolic places lie before it, and with ``last_too`` it follows them as the number it is.
    """

    def __init__(self, steps: int, last_apart: bool, last_too: bool) -> None:
        super().__init__()
        self.steps, self.last_apart, self.last_too = steps, last_apart, last_too
        self.places: list[int | torch.SymInt] = []
        #: what was read at one of the places: of an expert that was hit, so some row of it is not zero
        self.chosen: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.nonzero, torch.nonzero) and _is_vector(args[0]):
            rows = _Places([place] for place in self.places_of(args[0]))
            return (rows.flatten(),) if kwargs.get("as_tuple") else rows
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and any(arg is place for arg in args for place in self.places):
            self.chosen.append(result)
        elif func is torch.where and len(args) == 1 and any(args[0] is tensor for tensor in self.chosen):
            # Models ask whether an expert has rows, and skip it otherwise. One that was hit has.
            torch._check(result[0].shape[0] > 0)
        return result

    def places_of(self, hits: torch.Tensor) -> list[int | torch.SymInt]:
        count = hits.shape[0] - self.last_apart
        found: list[int | torch.SymInt] = []
        for step in range(self.steps):
            place = _Place(torch.ops.moe_fx.each_expert(hits, step, count).node)
            torch._check(place >= 0)
            torch._check(place < count)
            found.append(place)
        self.places += found
        return [*found, _Last(count)] if self.last_too else found


def _is_vector(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 1 and isinstance(tensor.shape[0], int) and tensor.dtype is torch.bool


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
    errors: list[ExportError] = []
    for last_apart in (True, False):
        try:
            given = (model, args, kwargs, dynamic_shapes)
            more = _raised(*given, _EachExpert(3, last_apart, last_too=last_apart))
            if isinstance(more, ExportedProgram):
                return more
            fewer = _raised(*given, _EachExpert(2, last_apart, last_too=False))
            if not isinstance(fewer, Work) or not _same(fewer, more):
                raise ExportError(
                    f"{type(model).__name__} loops over the experts that were hit, and something but the sum depends "
                    "on how many there are, or on whether the last class is among them: the program would be wrong "
                    "for other routing"
                )
            run_passes(WRITE, fewer)
            assert isinstance(fewer.program, ExportedWork)
            return fewer.program.finish(None)
        except ExportError as error:
            errors.append(error)
    with contextlib.suppress(Exception):
        # Not every vector is one of experts: what torch.export itself can trace needs no proof.
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    # What came as far as a proof says more than what could not be traced.
    raise next((error for error in reversed(errors) if error.__cause__ is None), errors[-1])


def _raised(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Any, dynamic_shapes: Any, mode: _EachExpert
) -> ExportedProgram | Work:
    """The program traced under ``mode``; with its loops raised, if it has any."""
    try:
        with mode:
            traced = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise ExportError(f"torch.export cannot trace {type(model).__name__}: {error}") from error
    if not mode.places:
        return traced
    work = Work(ExportedWork(traced), Config(experts="grouped_mm"))
    run_passes(FIND, work)
    work.program.graph.eliminate_dead_code()
    left = _unproven(work.program)
    if left:
        raise ExportError(_explanation(left, work))
    return work


def _same(one: Work, other: Work) -> bool:
    """Whether two programs are the same but for how often their loops were traced."""
    bodies = zip(one.layers, other.layers, strict=False)
    return same_graph(one.program.graph, other.program.graph) and all(
        same_graph(mine.body.graph, theirs.body.graph) for mine, theirs in bodies
    )


def _unproven(program: Any) -> list[Node]:
    nodes: list[Node] = program.graph.find_nodes(op="call_function", target=torch.ops.moe_fx.each_expert.default)
    return nodes


def _explanation(left: list[Node], work: Work) -> str:
    lines = [
        "a loop over the experts that were hit cannot be proven to do the same to every expert, so the program would "
        "be wrong for other routing:"
    ]
    lines += [f"  loop at {place}" for place in dict.fromkeys(source_line(node) for node in left)]
    for miss in work_report(work).misses:
        lines += [f"  {miss}"] + ([f"    at {miss.source}"] if miss.source else [])
    return "\n".join(dict.fromkeys(lines))
