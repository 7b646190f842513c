"""export(model, args): torch.export for models that loop over the experts that were hit.

A loop such as ``for e in hits.nonzero(): ...`` cannot be exported: which experts are hit depends on the data. Here
``nonzero`` of a vector of fixed length answers with a few symbolic places instead, so that the loop's body is traced
that many times, however many experts there are. The program so traced means "for each expert", and is raised at once:
the loop is proven to do the same to every expert, and to do nothing where no token was routed. It is traced with two
places and with three, and must come out the same: nothing else may depend on how many experts were hit.

Where an expert cannot be a symbol, as in a list of modules, or a model asks each expert whether it has rows, every
expert is traced as if it had some. Traced again as if none had, the program must be the same but for the experts.

What cannot be proven is an error.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import traceback
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from moe_fx.config import Config
from moe_fx.constants import moved
from moe_fx.errors import ExportError
from moe_fx.matcher import arguments, op_name
from moe_fx.outline import WITHOUT_PARAMETERS, Outline, outline, same_graph
from moe_fx.pipeline import Layer, Work, run_passes
from moe_fx.program import ExportedWork
from moe_fx.questions import EveryExpert, NothingJoined
from moe_fx.report import source_line
from moe_fx.rewrite import drop_dead_code, erase_dead, only_asserted
from moe_fx.symbolic_int import ASKED_FOR, symbolic_int
from moe_fx.tracing import EachExpert
from moe_fx.transform import FIND, WRITE, work_report
from moe_fx.vmaps import without_vmaps

__all__ = ["export"]

aten = torch.ops.aten
#: up to how many experts are also traced all but one
FEW = 16
#: where statements are none of the model's
LIBRARIES = tuple(f"{os.path.dirname(os.path.abspath(file))}{os.sep}" for file in (torch.__file__, __file__))


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
    given = (model, args, kwargs, dynamic_shapes)
    errors: list[ExportError] = []
    for attempt in (_a_few_experts_and_masked_tokens, _a_few_experts, _every_expert):
        try:
            found = attempt(given)
        except ExportError as error:
            errors.append(error)
            continue
        if isinstance(found, ExportedProgram):
            return found
        run_passes(WRITE, found)
        assert isinstance(found.program, ExportedWork)
        return found.program.finish(None)
    with contextlib.suppress(Exception):
        # Not every vector is one of experts: what torch.export itself can trace needs no proof.
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    # What came as far as a proof says more than what could not be traced.
    masked, few, every = errors
    raise next((error for error in (few, masked, every) if error.__cause__ is None), every)


NOT_LEFT_OUT = "if it has none, does something else than leave it out: the program would be wrong for other routing"
NO_LAYER = (
    "no layer was found of which it could be proven that the answers do not matter: the program would be wrong for "
    "other routing"
)
#: what Python says of a sum that no expert has begun
NOTHING = "NoneType"
#: a model, its args and kwargs, and its dynamic shapes
Given = tuple[torch.nn.Module, tuple[Any, ...], Any, Any]


def _a_few_experts_and_masked_tokens(given: Given) -> ExportedProgram | Work:
    return _a_few_experts(given, last_apart=True)


def _a_few_experts(given: Given, last_apart: bool = False) -> ExportedProgram | Work:
    """The loops traced for three symbolic experts, and for two: nothing else may depend on how many were hit."""
    try:
        more = _raised(given, EachExpert(3, last_apart, last_too=last_apart))
    except ExportError as error:
        if not last_apart or not isinstance(error.__cause__, IndexError):
            raise
        # The model has no expert for the last class: an input that names it is an error of the model's own.
        more = _raised(given, EachExpert(3, last_apart, last_too=False))
    if isinstance(more, ExportedProgram):
        return more
    fewer = _raised(given, EachExpert(2, last_apart, last_too=False))
    if not isinstance(fewer, Work) or not _same(fewer, more):
        raise ExportError(
            f"{_name(given)} loops over the experts that were hit, and something but the sum depends on how many there "
            "are, or on whether the last class is among them: the program would be wrong for other routing"
        )
    return fewer


def _every_expert(given: Given) -> ExportedProgram | Work:
    """The loops traced as if every expert had rows, and as if none had: that must be the same without the experts."""
    mode = EveryExpert(hit=True, idle=lambda expert: False)
    every = _raised(given, mode)
    if isinstance(every, ExportedProgram):
        return every
    if not every.layers:
        raise ExportError("\n".join([f"{_name(given)} asks which experts have rows, and {NO_LAYER}", *_misses(every)]))
    if mode.asked and any("sorted_parts" in layer.source_form for layer in every.layers):
        # Rows are cut into parts, which must be there for the rest of the program to have a meaning.
        for length, idle in enumerate((_idle_but(range(0, MANY, 2)), _idle_but(range(1, MANY, 2))), MANY):
            _check_some(given, every, idle, length)
        return every
    if any(layer.num_experts < 3 and not layer.in_range for layer in every.layers):
        # Left after two experts of more, or has two: which of these, two steps do not tell.
        raise ExportError(f"{_name(given)} asks which of two experts have rows, and ids may name others")
    for length, idle in enumerate(_some_idle(every), MANY):
        _check_some(given, every, idle, length)
    others = [EveryExpert(hit=True, idle=lambda expert: True)] if mode.questions else []
    others += [EveryExpert(hit=False, idle=lambda expert: True)] if mode.lists else []
    # Some expert has rows wherever there are tokens: what the model could not do without is never asked of it.
    some_has = all(layer.in_range for layer in every.layers)
    for other in others:
        try:
            none = _raised(given, other)
        except ExportError as error:
            if some_has and (isinstance(error, NothingJoined) or NOTHING in str(error.__cause__)):
                continue
            raise
        assert isinstance(none, Work)
        if some_has and _yields_nothing(none) and not _yields_nothing(every):
            continue
        looked_at = _num_experts(every) - _num_experts(none)
        # A loop that ends at the first expert without rows asks fewer questions than there are experts.
        stops = other.hit and (looked_at == 0 or other.questions % looked_at > 0)
        # Without rows more is left in the program: the places of rows that nobody reads, and what is asserted of them.
        # Whatever number the model multiplies a layer's result with, nothing comes of a layer without rows.
        all_of_it = _outline(every, set(), _idle_but(()))
        rest = _outline(none, {all_of_it.numbers[moved(slot)] for layer in every.layers for slot in layer.node.args[2]})
        if stops or all_of_it.yielded != rest.yielded or all_of_it.asserted - rest.asserted:
            if every.misses:
                raise ExportError(_explanation([], every))
            raise ExportError(f"{_name(given)} asks whether an expert has rows, and {NOT_LEFT_OUT}")
    return every


def _yields_nothing(work: Work) -> bool:
    """Whether a program yields None, as where ``out = None`` is replaced by the first expert's result only."""
    return None in pytree.tree_leaves(work.program.graph.output_node().args)


Idle = Callable[[int], bool]
#: more experts than any model has
MANY = 10**6


def _idle_but(hit: Collection[int]) -> Idle:
    return lambda expert: expert not in hit


def _some_idle(every: Work) -> list[Idle]:
    """Which experts are left without rows, one trace after the other: what a model remembers of those before shows."""
    count = min(layer.num_experts for layer in every.layers)
    last = max(layer.num_experts for layer in every.layers)
    # What is remembered of experts before shows in a few steps: of many experts no more are traced, as each takes as
    # long as in the whole program.
    wide, start = (8, max(0, last - 5)) if count > FEW else (MANY, 0)
    # A loop that is left early visits later experts where the first are idle.
    ends = [range(2), range(count - 2, count), range(1, wide), range(start, last - 1)]
    hit = [range(0, wide, 2), range(1, wide, 2), *ends]
    # One step alone does not tell what differs from expert to expert.
    return [_idle_but(some) for some in dict.fromkeys(hit) if sum(expert < count for expert in some) > 1]


def _check_some(given: Given, every: Work, idle: Idle, length: int) -> None:
    """The program traced with some experts idle must be the one traced without, but for their steps.

    Raises:
        ExportError: it is another.
    """
    some = _raised(given, EveryExpert(hit=True, idle=idle, length=length), partial=True)
    assert isinstance(some, Work)
    one, other = _outline(every, idle=idle), _outline(some)
    layers = list(zip(every.layers, some.layers, strict=False))
    same = len(every.layers) == len(some.layers) and one.yielded == other.yielded
    if not same or not all(_same_but_for(idle, pair, (one, other)) for pair in layers):
        raise ExportError(
            "\n".join([f"{_name(given)} asks whether an expert has rows, and {NOT_LEFT_OUT}", *_misses(some)])
        )


def _same_but_for(idle: Idle, layers: tuple[Layer, Layer], outlines: tuple[Outline, Outline]) -> bool:
    """Whether two layers are the same but for the parameters of idle experts."""
    if layers[1].visits and layers[1].visits == layers[0].visits:
        idle = _idle_but(range(MANY))  # a layer that asks nothing: it must be the same

    experts = layers[0].num_experts

    def numbers(layer: Layer, outline: Outline) -> list[int]:
        operands: list[Node] = []
        for operand in pytree.tree_leaves(layer.node.args[:5]):
            if op_name(operand) == "aten::slice":
                operand = operand.args[0]  # which of a longer stack's experts are visited is compared below
            parts = arguments(operand)["tensors"] if op_name(operand) == "aten::stack" else [operand]
            apart = len(parts) == experts
            operands += [part for expert, part in enumerate(parts) if not (apart and idle(expert))]
        return [outline.numbers[operand] for operand in operands]

    there = tuple(expert for expert in range(experts) if not idle(expert))
    if any(visited != there for visited in layers[1].visits):
        return False
    one, other = (numbers(layer, outline) for layer, outline in zip(layers, outlines, strict=True))
    return one == other and same_graph(layers[0].body.graph, layers[1].body.graph)


def _num_experts(work: Work) -> int:
    """How many experts a program has, with those that have no parameters."""
    alone = sum(WITHOUT_PARAMETERS in node.meta for node in work.program.graph.nodes)
    return sum(layer.num_experts for layer in work.layers) + alone


def _outline(work: Work, weights: Collection[int] | None = None, idle: Idle = lambda expert: False) -> Outline:
    program = work.program
    assert isinstance(program, ExportedWork)
    constants = {node: weight.tensor for node, weight in program.weights.items() if weight.fqn in program.constants}
    return outline(program.graph, constants, weights, idle)


def _name(given: Given) -> str:
    return type(given[0]).__name__


def _raised(given: Given, mode: EachExpert | EveryExpert, partial: bool = False) -> ExportedProgram | Work:
    """The program traced under ``mode``; with its loops raised, if it has any. ``partial``: without some experts."""
    model, asked_nothing = given[0], copy.deepcopy(mode)
    try:
        try:
            traced = _traced(given, mode)
        except Exception as error:
            if ASKED_FOR not in str(error):
                raise
            vars(mode).update(vars(asked_nothing))
            with symbolic_int(model):
                traced = _traced(given, mode)
        mode.finish()
    except ExportError as error:
        raise type(error)(f"{_name(given)}: {error}: the program would be wrong for other routing") from None
    except Exception as error:
        what, *_ = str(error).strip().partition("\n\n")  # behind it torch tells of flags for those who mend torch
        raise ExportError(f"torch.export cannot trace {type(model).__name__}: {what}{_statement(error)}") from error
    if not mode.asked:
        return traced
    if not _all_visited(traced):
        raise ExportError(f"{_name(given)} loops over some of the experts that were hit, and not over all of them")
    work = Work(
        ExportedWork(without_vmaps(traced)), Config(experts="grouped_mm", validate=not partial), partial=partial
    )
    run_passes(FIND, work)
    # That bincount answers at least with what it was asked for, torch.export asserts even where nobody reads it.
    erase_dead(work.program.graph, work.program.graph.find_nodes(op="call_function", target=aten.bincount.default))
    drop_dead_code(work.program.graph)
    left = _unproven(work.program)
    if left:
        raise ExportError(_explanation(left, work))
    return work


def _all_visited(traced: ExportedProgram) -> bool:
    """Whether of the experts that stand for those that were hit each is read, if any is."""
    read: dict[Node, set[bool]] = {}
    for module in traced.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if node.target is torch.ops.moe_fx.each_expert.default:
                read.setdefault(node.args[0], set()).add(only_asserted(node))
    return all(len(kinds) == 1 for kinds in read.values())


def _traced(given: Given, mode: EachExpert | EveryExpert) -> ExportedProgram:
    model, args, kwargs, dynamic_shapes = given
    # An attempt that fails is followed by others: the graph that torch.export then prints helps nobody.
    with mode, contextlib.redirect_stderr(io.StringIO()) as said:
        traced = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    sys.stderr.write(said.getvalue())
    return traced


def _statement(error: BaseException) -> str:
    """The model's own statement at which an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*LIBRARIES, "<"))]
    return f"\n  at {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""


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
    return "\n".join(dict.fromkeys([*lines, *_misses(work)]))


def _misses(work: Work) -> list[str]:
    lines = []
    for miss in work_report(work).misses:
        lines += [f"  {miss}"] + ([f"    at {miss.source}"] if miss.source else [])
    return lines
