"""Stages, and the running of passes: each pass says which stage it takes and which it leaves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from torch.fx import GraphModule, Node

from moe_fx.config import Config
from moe_fx.errors import StageError
from moe_fx.formats import WeightFormat
from moe_fx.program import Program
from moe_fx.report import MissReport

__all__ = ["Layer", "OtherLinear", "Pass", "Stage", "Work", "run_passes"]


class Stage(IntEnum):
    """What holds for a graph; see docs/design.md."""

    EXPORTED = 0
    NORMAL = 1
    RAISED = 2
    PACKED = 3
    QUANTIZED = 4
    LOWERED = 5


@dataclass
class Layer:
    """One MoE layer on its way from raise to lower."""

    node: Node
    body: GraphModule
    fqn: str
    source_form: str
    num_experts: int
    top_k: int
    router: str
    in_range: bool
    distinct: bool
    error: float | None
    check_seconds: float
    #: the parameters as the model holds them
    originals: list[Node] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    lowering: str = ""
    why: str = ""
    storage: str = "stacked"
    formats: dict[str, WeightFormat] = field(default_factory=dict)
    #: by a parameter's name, those of the tensors that took its place
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: by a stacked parameter's name, those of the parameters that the model holds for it, one per expert
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: which experts were found to be visited, where a loop tells
    visits: list[tuple[int, ...]] = field(default_factory=list)
    #: the node of the ids; the node that yielded the layer's output, and the one that does now
    ids: str = ""
    output: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class OtherLinear:
    """A linear beside the experts that was quantized; see :class:`moe_fx.report.LinearReport`."""

    node: Node
    fqn: str
    form: WeightFormat
    names: tuple[str, ...]
    bytes_before: int
    bytes_after: int


@dataclass
class Work:
    """A program on its way through the stages, with what the passes found out about it."""

    program: Program
    config: Config
    stage: Stage = Stage.EXPORTED
    layers: list[Layer] = field(default_factory=list)
    linears: list[OtherLinear] = field(default_factory=list)
    misses: list[MissReport] = field(default_factory=list)
    #: memory that in-place ops still write: nothing that reads it may be moved
    written: set[Node] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    #: whether experts may be missing, as in a trace that leaves idle ones out: to be compared, and never run
    partial: bool = False


@dataclass(frozen=True)
class Pass:
    """A step from one stage to the next (or within one), and the property it leaves."""

    name: str
    takes: Stage
    leaves: Stage
    run: Callable[[Work], None]
    #: what is wrong with a node at the stage left, or None
    leftover: Callable[[Node], str | None] | None = None


def run_passes(passes: Sequence[Pass], work: Work) -> None:
    """Run passes in order, verifying each stage as it is reached.

    Raises:
        StageError: the order does not fit, or a pass does not leave what it promises.
    """
    for step in passes:
        if work.stage is not step.takes:
            raise StageError(f"pass {step.name} takes stage {step.takes.name}, but the graph is {work.stage.name}")
        started = time.perf_counter()
        step.run(work)
        for node in work.program.graph.nodes if step.leftover is not None else ():
            wrong = step.leftover(node) if step.leftover is not None else None
            if wrong is not None:
                raise StageError(f"pass {step.name} left {wrong} at {node.format_node()}")
        work.stage = step.leaves
        work.seconds[step.name] = time.perf_counter() - started
