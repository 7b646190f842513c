"""The disguises known: how each ends, and the pieces it is made of.

To add one: declare its pieces in a file of its own, and name it here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from moe_fx.passes.raising import each_expert as each_expert_loop
from moe_fx.passes.raising import gathered, grouped, loops
from moe_fx.passes.raising.anchors import anchors_behind, leads_to_experts
from moe_fx.passes.raising.axes import EXPERT, HIT, ONE, SLOT, SORTED_ROW, TOKEN, Place, axes_of, features
from moe_fx.passes.raising.each_expert import terms
from moe_fx.passes.raising.endings import Ending, endings, token_axes
from moe_fx.passes.raising.parts import joined
from moe_fx.passes.raising.pieces import Piece
from moe_fx.passes.raising.region import Region, misfit
from moe_fx.passes.raising.steps import merge_steps
from moe_fx.passes.raising.walk import Walk
from moe_fx.passes.raising.writer import ROWS, Value
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.errors import ConfigError
from moe_fx.kernels import each_expert
from moe_fx.matcher import Match, Miss, arguments, match, op_name
from moe_fx.shapes import shape_of, tensor_of

__all__ = ["region_at", "register"]

aten = torch.ops.aten

#: the pieces between a sum over slots, or over all experts, and the tokens
PIECES: tuple[Piece, ...] = (*grouped.PIECES, *gathered.PIECES)
#: pieces from outside this package
REGISTERED: list[Piece] = []


def register(*pieces: Piece) -> None:
    """Declare pieces of a disguise that the library does not know, from outside it.

    Args:
        pieces: of :mod:`moe_fx.passes.raising.pieces`, tried after the library's own between a sum and the tokens. A
            piece says what a value in one layout may be; the layer it helps to find is proven and checked as any other.

    Raises:
        ConfigError: something that is no piece.
    """
    for piece in pieces:
        if not isinstance(piece, Piece) or type(piece) is Piece:
            kinds = "Dispatch, Slot, ExpertLinear, ExpertRow, Mask or View"
            raise ConfigError(f"moe_fx.register takes pieces ({kinds} of moe_fx.passes.raising.pieces), not {piece!r}")
    REGISTERED.extend(piece for piece in pieces if piece not in REGISTERED)


#: how deep a walk must have come from a product, of which there are many, to be worth a report
FAR = 400


def region_at(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """The layer that ends in a node, or why it is none; and the multiplications that suggest one.

    None for a node in which no disguise ends.
    """
    near: Miss | None = None
    for loop in loops.LOOPS:
        found = match(loop.step, root)
        if isinstance(found, Match):
            # The steps of a loop are found from its last one.
            last = not any(isinstance(match(loop.step, user), Match) for user in root.users)
            return (_loop(root, loop), {root}) if last else None
        near = found if near is None or found.depth > near.depth else near
    # A step that adds the rows of some expert, whose loop is not over those that were hit.
    each = root.graph.find_nodes(op="call_function", target=torch.ops.moe_fx.each_expert.default)
    steps = op_name(root) in ("aten::index_add", "aten::index_put") and near is not None and near.depth > 2
    if near is not None and steps and each:
        return near, {root}
    return _rows_added(root) or _sum_of_terms(root) or _sum(root)


def _rows_added(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """Rows sorted by expert, each added to its token."""
    found = match(grouped.COMBINE, root)
    if not isinstance(found, Match):
        return None
    summed, axes = found["summed"], token_axes(shape_of(root) or ())
    if axes is None or "ids" not in found.bindings:
        return None
    sizes, tokens, place = axes
    slots = (shape_of(found["ids"]) or (0,))[-1]
    sizes |= {SLOT: slots, SORTED_ROW: (shape_of(summed) or (0,))[0]}
    bindings = {name: bound for name, bound in found.bindings.items() if name not in ("summed", "base")}
    walk = Walk(root, sizes, tokens, (*PIECES, *REGISTERED), bindings, ending=found.nodes)
    output = walk.value(summed, ((SORTED_ROW,), place[-1]))
    anchors = anchors_behind(summed) or {root}
    if isinstance(output, Miss):
        return output if walk.deepest is None else walk.deepest, anchors
    region = walk.region(output)
    if isinstance(region, Region):
        region.base = None if filled_with(found["base"]) == 0 else found["base"]
        wrong = misfit(region)
        return (region if wrong is None else wrong), anchors
    return region, anchors


def _sum_of_terms(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """A chain of additions, each of what one expert makes of every token."""
    if op_name(root) != "aten::add" or any(op_name(user) == "aten::add" and terms(user) for user in root.users):
        return None  # the terms are found from the last addition
    found = terms(root)
    if found is None or len({number for number, _ in found[0]}) < 2:
        return None
    numbered, base, chain = found
    merged = each_expert_on(root, numbered)
    if isinstance(merged, Miss):
        return merged, {root}
    for inner in chain - {root}:
        if any(user not in chain for user in inner.users):
            users = ", ".join(user.name for user in inner.users)
            return Miss("a sum that nothing else reads", f"{inner.name}, read by {users}", inner), {root}
    merged = dataclasses.replace(merged, interior=merged.interior | (chain - {root}), distinct=True, base=base)
    wrong = misfit(merged)
    return (merged if wrong is None else wrong), {root}


def _stacked(walk: Walk, node: Node, place: Place) -> Value | Miss | None:
    """``stack`` of every expert's results, written into the body as those of one expert. None for any other op."""
    given = arguments(node) if op_name(node) == "aten::stack" else {}
    if not given or place[given["dim"] % len(place)] != (EXPERT,) or set(walk.tokens) - axes_of(place):
        return None
    merged = each_expert_on(node, list(enumerate(given["tensors"])))
    if isinstance(merged, Miss):
        return walk.note(merged)
    return walk.inlined(merged, node, place)


def each_expert_on(root: Node, numbered: Sequence[tuple[int, Node]]) -> Region | Miss:
    """The steps that compute one expert's result each, for every token, as one layer."""
    numbers = [number for number, _ in numbered]
    if sorted(numbers) != list(range(len(numbers))):
        return Miss(f"every expert of {len(numbers)} once", f"experts {', '.join(map(str, numbers))}", root)
    regions = []
    own = each_expert_loop.specific([value for _, value in numbered])
    for (number, value), nodes in sorted(zip(numbered, own, strict=True), key=lambda each: each[0][0]):
        axes = token_axes(shape_of(value) or ())
        if axes is None:
            return Miss("rows of fixed size for each token", value.name, value)
        sizes, tokens, place = axes
        bindings = {"expert": number}
        walk = Walk(root, sizes, tokens, each_expert_loop.PIECES, bindings, each_expert_loop.OWN, root.users, nodes)
        output = walk.value(value, place)
        if isinstance(output, Miss):
            return output if walk.deepest is None else walk.deepest
        summed, mine = tensor_of(root), tensor_of(value)
        if summed is not None and mine is not None and summed.dtype != mine.dtype:
            # The sum is of a wider dtype than its terms.
            widened = walk.body.write(aten.to.dtype, output.node, summed.dtype)
            output = Value(widened, output.kind, output.shape)
        walk.ending = _between(root, value)
        region = walk.region(output)
        if isinstance(region, Miss):
            return region
        regions.append(region)
    merged = merge_steps(regions)
    if isinstance(merged, Miss):
        return merged
    interior = set().union(*(region.interior for region in regions))
    return dataclasses.replace(merged, root=root, interior=interior)


def _between(root: Node, value: Node) -> set[Node]:
    """The additions by which a root reads a term."""
    return {root, *(user for user in value.users if op_name(user) == "aten::add")}


Walk.stacked = staticmethod(_stacked)
Walk.joined = staticmethod(joined)


def _sum(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """A sum over slots or experts."""
    near: dict[bool, Miss] = {}
    looked = False
    for ending in endings(root):
        if not looked and not leads_to_experts(root, through=True):
            return None
        looked = True
        found = _walk(root, ending)
        if isinstance(found, Region):
            return found, found.interior
        near[SLOT in ending.sizes] = found
    if not near or (op_name(root) != "aten::sum" and max(miss.depth for miss in near.values()) < FAR):
        return None
    # Weights that are chosen by row speak of slots.
    chosen = anchors_behind(root, chosen=True)
    miss = near[bool(chosen)]
    if not chosen and "ids" in near[True].bindings:
        return near[True], {root}
    return miss, chosen or anchors_behind(root, chosen=False)


def _walk(root: Node, ending: Ending) -> Region | Miss:
    walk = Walk(root, ending.sizes, ending.tokens, (*PIECES, *REGISTERED), {})
    values: list[Value] = []
    for node, place in ending.factors:
        found = walk.value(node, place)
        if isinstance(found, Miss):
            return found if walk.deepest is None else walk.deepest
        values.append(found)
    shape = tuple(features(ending.place))
    # The factors of a product may lack dimensions of the result, or have them in another order.
    if len(values) > 1:
        wide = [size for size in shape if size > 1]
        values = [
            walk.body.reshaped(each, [size for size in each.shape if size > 1] or [1] * len(wide)) for each in values
        ]
        shape = tuple(wide)
    output = values[0]
    for other in values[1:]:
        left, right = (walk.body.beside_rows(each, len(shape)) for each in (output, other))
        output = Value(walk.body.write(aten.mul.Tensor, left, right), ROWS, shape)
    if output.kind != ROWS:
        return walk.miss("rows of the experts", root, "a value that is the same for every token")
    region = walk.region(walk.body.reshaped(output, [size for size in shape if size > 1]))
    wrong = misfit(region) if isinstance(region, Region) else None
    return region if wrong is None else wrong


def _loop(root: Node, loop: loops.Loop) -> Region | Miss:
    """A loop, traced as a few of its steps: it is a sum over all experts if each does the same to its expert.

    Whatever a loop carries along, in a tensor or in Python, makes its second step differ from its first.
    """
    steps: list[tuple[Node, Match]] = []
    node = root
    while isinstance(found := match(loop.step, node), Match):
        steps.insert(0, (node, found))
        node = found["base"]
    if filled_with(node) != 0:
        return Miss("a sum that starts with zeros", f"{node.name}, which need not be zero", node)
    reads = {root, *(step for step, _ in steps), *(each for _, found in steps for each in found.nodes)}
    for inner in [node, *(step for step, _ in steps[:-1])]:
        if any(user not in reads for user in inner.users):
            users = ", ".join(user.name for user in inner.users)
            return Miss("a sum that nothing in the loop reads", f"{inner.name}, read by {users}", inner)
    regions: list[Region] = []
    for last, found in steps:
        region = _step(last, found, loop)
        if isinstance(region, Miss):
            return region
        regions.append(region)
    experts = [found["expert"] for _, found in steps]
    merged = merge_steps(regions)
    if isinstance(merged, Miss):
        return merged
    wrong = misfit(merged)
    if wrong is not None:
        return wrong
    if len(steps) < 2:
        return Miss("a loop over experts", "a single step", root)
    numbers = [expert for expert in experts if isinstance(expert, int)]
    every = list(range(merged.num_experts))
    if sorted(numbers) != every if numbers else len(set(experts)) < len(experts):
        return Miss(f"every expert of {len(every)} once", f"experts {', '.join(map(str, experts))}", root)
    interior = set().union(*(region.interior for region in regions), (step for step, _ in steps[:-1]))
    step = None if numbers else steps[0][0]
    distinct = merged.distinct or loop.once
    return dataclasses.replace(merged, root=root, interior=interior, step=step, distinct=distinct)


def _step(root: Node, found: Match, loop: loops.Loop) -> Region | Miss:
    """One step of a loop, as a layer of one expert."""
    summed = found["summed"]
    shape = shape_of(summed) or ()
    tokens, slots = (*(shape_of(found["ids"]) or ()), 1)[:2]
    sizes = {ONE: 1, HIT: shape[0], TOKEN: tokens, SLOT: slots}
    bindings = {name: bound for name, bound in found.bindings.items() if name not in ("summed", "base")}
    walk = Walk(root, sizes, (TOKEN,), loop.pieces, bindings, loop.own, ending=found.nodes)
    output = walk.value(summed, ((HIT,), (shape[1],)))
    if isinstance(output, Miss):
        return output if walk.deepest is None else walk.deepest
    return walk.region(output)


assert each_expert is not None  # importing it registers the op
