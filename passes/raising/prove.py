"""What must hold for a layer beside its sizes: where its ids and weights come from, and that the numbers are the same.

Every condition is a function of its own; the first that fails is the reason why the layer stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from moe_fx.passes.raising.ancestors import ancestors
from moe_fx.passes.raising.memory import written_in_place
from moe_fx.passes.raising.negatives import may_be_negative
from moe_fx.passes.raising.region import Region
from moe_fx.passes.raising.router import foreign_slot
from moe_fx.passes.raising.routing import CHOOSING, Selection, selection_of
from moe_fx.passes.raising.rows_of_linears import several_rows_at_once
from torch.fx import Node

from moe_fx.check import CheckResult, check_layer
from moe_fx.matcher import Miss, arguments, op_name
from moe_fx.pipeline import Work
from moe_fx.program import Program
from moe_fx.shapes import same_shape, shape_of, tensor_of

__all__ = ["Proof", "prove"]


@dataclass(frozen=True)
class Proof:
    """What was found out about a layer.

    Attributes:
        in_range: whether every id names an expert, as far as the equation goes: a gather with another is an error.
        clamps: whether the program clamped ids that may name none.
    """

    selection: Selection
    in_range: bool
    clamps: bool
    result: CheckResult


def prove(work: Work, region: Region) -> Proof | Miss:
    """Whether a region may become an experts node."""
    ids = region.ids.args[0] if region.ids in region.views else region.ids
    assert isinstance(ids, Node)
    selection = selection_of(ids, region.num_experts)
    if region.distinct and not selection.distinct:
        selection.distinct = _distinct_in_table(work, ids)
    in_range = selection.in_range or not _skips(region) or "looked_up" in region.bindings
    conditions = (
        lambda: written_in_place(region, work.written),
        lambda: _unlike_ids(work, region, ids, selection),
        lambda: _foreign(region, ids, selection),
        lambda: _beyond(work, region, ids, selection),
        lambda: _not_visited(work, region),
        lambda: _not_in_table(work, region, ids, in_range),
        lambda: several_rows_at_once(region),
    )
    wrong = next((miss for condition in conditions if (miss := condition()) is not None), None)
    if wrong is not None:
        return wrong
    result = CheckResult(float("nan"), 0, 0.0)
    if work.config.validate:
        result = _checked(region, in_range, selection)
        if not result.passed:
            found = result.problem or f"a difference of {result.error:.1e} of the output's range"
            return Miss("the same numbers from the layer and its experts node", found, region.root)
    clamps = "last_expert" in region.bindings and not region.sorts_away
    return Proof(selection, in_range, clamps and not selection.in_range, result)


def _skips(region: Region) -> bool:
    """Whether rows of ids that name no expert are left out: by sorting, and by a loop whose mask has a class for them.

    Gathering with such an id is an error, unless ids are clamped first.
    """
    loops = "expert" in region.bindings
    skips = region.sorts_away or "rows_skipped" in region.bindings
    return skips or (loops and region.bindings.get("num_classes") != region.num_experts)


def _unlike_ids(work: Work, region: Region, ids: Node, selection: Selection) -> Miss | None:
    # What some of the experts are traced for is compared, and never run: fewer experts than ids may name.
    if region.distinct and region.top_k > 1 and not selection.distinct and not work.partial:
        return Miss("ids that are certainly distinct for each token", f"{ids.name}, which may repeat", ids)
    if not region.slots and region.top_k == 1 and selection.chooser is None and not _chosen(ids):
        # Adapters that requests name are the same equation, and no experts.
        return Miss("an expert chosen by scores, or a routing weight", f"{ids.name}, which is given", ids)
    return None


def _distinct_in_table(work: Work, ids: Node) -> bool:
    """Whether ids are a row of one of the model's own tables, each of which holds different ones."""
    node: Any = ids
    while op_name(node) in ("aten::to", "aten::reshape", "aten::unflatten", "aten::clone"):
        before = node.args[0]
        if not same_shape((shape_of(before) or ())[-1:], (shape_of(node) or ("",))[-1:]):
            return False
        node = before
    rows: Any = arguments(node)["indices"] if op_name(node) == "aten::index" else ()
    table = _values(work.program, node.args[0]) if len(rows) == 1 and isinstance(node.args[0], Node) else None
    if table is None or table.dim() != 2 or table.is_floating_point() or (tensor_of(rows[0]).dtype is torch.bool):
        return False
    return all(len(set(row)) == len(row) for row in table.tolist())


def _chosen(ids: Node) -> bool:
    """Whether ids are computed from what scores chose, such as that of a group and that within it."""
    choices = [each for each in ancestors(ids) if op_name(each) in CHOOSING | {"aten::argmin"}]
    return any((value := tensor_of(each.args[0])) is not None and value.is_floating_point() for each in choices)


def _foreign(region: Region, ids: Node, selection: Selection) -> Miss | None:
    for slot in region.slots:
        foreign = foreign_slot(slot, ids, selection)
        if foreign is not None:
            chooser = selection.chooser.name if selection.chooser is not None else ""
            wanted = f"routing weights chosen by {chooser}, like the ids"
            return Miss(wanted, f"{slot.name}, chosen by {foreign.name}", slot)
    return None


def _beyond(work: Work, region: Region, ids: Node, selection: Selection) -> Miss | None:
    """Ids that name no expert, where the program would make something else of them than nothing."""
    if "counts_beyond" in region.bindings and not selection.in_range and not work.partial:
        return Miss("ids that certainly name an expert", f"{ids.name}, which may be counted beyond", ids)
    indexed = "indexed" in region.bindings or "looked_up" in region.bindings
    if indexed and region.bindings.get("lowest_expert") != 0 and not selection.in_range:
        # An index counts from the end where it is negative.
        computed = may_be_negative(ids, lambda node: _values(work.program, node))
        if computed is not None:
            wanted = "ids that are certainly not negative"
            return Miss(wanted, f"{computed.name} ({op_name(computed) or computed.op})", ids)
    return None


def _not_visited(work: Work, region: Region) -> Miss | None:
    every = tuple(range(region.num_experts))
    for visited in region.visits:
        if visited != every and not work.partial:
            return Miss(f"every expert of {len(every)} once", f"experts {', '.join(map(str, visited))}", region.root)
    return None


def _not_in_table(work: Work, region: Region, ids: Node, in_range: bool) -> Miss | None:
    if region.tables and not in_range and not work.partial:
        return Miss("ids that certainly name an expert", f"{ids.name}, looked up in a table", ids)
    return None


def _checked(region: Region, in_range: bool, selection: Selection) -> CheckResult:
    operands = (region.tokens, region.ids, region.slots, region.params, region.shared)
    each = region.bindings["expert"] if region.step is not None else None
    return check_layer(
        region.step or region.root, operands, region.body, in_range, selection.distinct, each, region.views,
        region.base, region.not_negative,
    )  # fmt: skip


def _values(program: Program, node: Node) -> torch.Tensor | None:
    """The values of one of the model's own tensors, if it has any."""
    weight = program.weights.get(node)
    return weight.values() if weight is not None and weight.has_values else None
