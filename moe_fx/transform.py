"""transform(ep, config): the list of stages."""

from __future__ import annotations

from torch.export import ExportedProgram

from moe_fx.config import Config
from moe_fx.errors import ProgramError, RequirementError
from moe_fx.formats import format_record
from moe_fx.passes.lowering import leftover as not_lowered
from moe_fx.passes.lowering import lower_layers
from moe_fx.passes.normalize import normalize
from moe_fx.passes.normalize.spelling import leftover as not_normal
from moe_fx.passes.packing import name_linears, plan_layers
from moe_fx.passes.packing.plan import format_name
from moe_fx.passes.quantizing import quantize_experts, quantize_linears
from moe_fx.passes.raising import raise_layers, register
from moe_fx.pipeline import Layer, Pass, Stage, Work, run_passes
from moe_fx.program import META_KEY, ExportedWork, check_inference
from moe_fx.report import LayerReport, LinearReport, Report
from moe_fx.vmaps import without_vmaps

__all__ = ["FIND", "WRITE", "check_requirement", "explain", "register", "report", "transform", "work_report"]


FIND = (
    Pass("normalize", Stage.EXPORTED, Stage.NORMAL, normalize, not_normal),
    Pass("raise", Stage.NORMAL, Stage.RAISED, raise_layers),
)
WRITE = (
    Pass("plan", Stage.RAISED, Stage.RAISED, plan_layers),
    Pass("name linears", Stage.RAISED, Stage.PACKED, name_linears),
    Pass("quantize", Stage.PACKED, Stage.QUANTIZED, quantize_experts),
    Pass("quantize other linears", Stage.QUANTIZED, Stage.QUANTIZED, quantize_linears),
    Pass("lower", Stage.QUANTIZED, Stage.LOWERED, lower_layers, not_lowered),
)


def transform(ep: ExportedProgram, config: Config | None = None) -> ExportedProgram:
    """Find the MoE layers of a program, quantize their experts, and write them as the ops that run fastest.

    Args:
        ep: a program from ``torch.export.export``, decomposed or not. It is not changed.
        config: what to do; by default, only rewrite.

    Returns:
        A new program with the same inputs and outputs; :func:`report` tells what was done. Where no layer was
        found its graph is that of ``ep``, node for node.

    Raises:
        ProgramError: ``ep`` is not an inference ExportedProgram, or its weights have no values to quantize.
        ConfigError: ``config.quantize`` has a pattern that matches nothing.
        RequirementError: fewer layers than ``config.require``.
    """
    config = config if config is not None else Config()
    if not isinstance(config, Config):
        raise ProgramError(f"the configuration is a moe_fx.Config, not {type(config).__name__}")
    program = ExportedWork(without_vmaps(ep), config.consume)
    earlier = report(ep)
    if earlier is not None and (earlier.layers or earlier.linears):
        return _transformed_again(program, earlier, config)
    check_inference(program.graph)
    work = Work(program, config)
    run_passes(FIND, work)
    check_requirement(work)
    if not work.layers and config.linears is None:
        if config.quantizes:
            quantize_experts(work)  # a named pattern that matches nothing is an error here too
        return ExportedWork(ep).finish(work_report(work).to_json())
    run_passes(WRITE, work)
    return program.finish(work_report(work).to_json())


def explain(ep: ExportedProgram, config: Config | None = None) -> Report:
    """What :func:`transform` would find: the layers, the lowering planned for each, and the near misses.

    A dry run: nothing is quantized or written. For a program that was transformed, what was done to it.
    """
    earlier = report(ep)
    if earlier is not None and earlier.layers:
        return earlier
    work = Work(ExportedWork(without_vmaps(ep)), config if config is not None else Config())
    check_inference(work.program.graph)
    run_passes(FIND, work)
    plan_layers(work)
    return work_report(work)


def report(ep: ExportedProgram) -> Report | None:
    """What was done to a transformed program (also after save and load); None for any other program."""
    if not isinstance(ep, ExportedProgram):
        raise ProgramError(f"moe_fx.report takes an ExportedProgram, not {type(ep).__name__}")
    text = ep.graph_module.meta.get("custom", {}).get(META_KEY)
    return Report.from_json(text) if text else None


def check_requirement(work: Work) -> None:
    """Raise RequirementError if fewer layers were found than the configuration requires."""
    wanted, found = work.config.require, len(work.layers)
    if (
        wanted is None
        or (isinstance(wanted, int) and found >= wanted)
        or (wanted == "all" and found and not work.misses)
    ):
        return
    result = work_report(work)
    asked = "every MoE layer (and at least one)" if wanted == "all" else f"at least {wanted} MoE layers"
    raise RequirementError(f"Config.require={wanted!r} asks for {asked}; found {found}.\n{result}", result)


def _transformed_again(program: ExportedWork, earlier: Report, config: Config) -> ExportedProgram:
    if earlier.config != repr(config):
        raise ProgramError(
            f"this program was already transformed, with {earlier.config}; "
            "to apply another configuration, transform the program it was made from"
        )
    return program.finish(earlier.to_json())


def work_report(work: Work) -> Report:
    linears = [
        LinearReport(
            each.fqn, each.form.name, format_record(each.form), each.bytes_before, each.bytes_after, each.names
        )
        for each in work.linears
    ]
    layers, misses = tuple(map(_layer_report, work.layers)), tuple(work.misses)
    return Report(layers, tuple(linears), misses, dict(work.seconds), repr(work.config))


def _layer_report(layer: Layer) -> LayerReport:
    return LayerReport(
        layer.fqn, layer.source_form, layer.num_experts, layer.top_k, layer.router, layer.lowering, layer.why,
        format_name(layer.formats), layer.storage, layer.bytes_before, layer.bytes_after, layer.error,
        layer.check_seconds, {name: format_record(form) for name, form in layer.formats.items()}, dict(layer.names),
        layer.ids, layer.output, dict(layer.parts),
    )  # fmt: skip
