"""The disguises known: how each ends, and the pieces it is made of.

To add one: declare its pieces in a file of its own, and name it here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence

import torch
from moe_fx.passes.raising import each_expert as each_expert_loop
from moe_fx.passes.raising import every_token, gathered, grouped, loops
from moe_fx.passes.raising.anchors import anchors_behind, leads_to_experts
from moe_fx.passes.raising.axes import EXPERT, HIT, ONE, SLOT, SORTED_ROW, TOKEN, Place, axes_of, features, size_of
from moe_fx.passes.raising.dispatched import drop_tests
from moe_fx.passes.raising.each_expert import terms
from moe_fx.passes.raising.endings import Ending, endings, token_axes
from moe_fx.passes.raising.parts import joined
from moe_fx.passes.raising.pieces import Piece
from moe_fx.passes.raising.region import Region, misfit, read_outside
from moe_fx.passes.raising.slot_by_slot import merge_slots, slot_number
from moe_fx.passes.raising.steps import merge_steps
from moe_fx.passes.raising.walk import Walk
from moe_fx.passes.raising.writer import ROWS, Value
from moe_fx.passes.raising.written import ids_written, written
from torch.fx import Node

from moe_fx.constants import filled_with, is_zero
from moe_fx.errors import ConfigError
from moe_fx.kernels import each_expert
from moe_fx.matcher import Match, Miss, arguments, match, op_name
from moe_fx.shapes import depends_on_values, shape_of, tensor_of

__all__ = ["one_slot_at", "region_at", "register"]

aten = torch.ops.aten

#: the pieces between a sum over slots, or over all experts, and the tokens
PIECES: tuple[Piece, ...] = (*grouped.PIECES, *gathered.PIECES, *every_token.PIECES)
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
    misses: list[Miss] = []
    for loop in loops.LOOPS:
        step = match(loop.step, root)
        if isinstance(step, Match):
            # The steps of a loop are found from its last one.
            if any(isinstance(match(loop.step, user), Match) for user in root.users):
                return None
            layer = _loop(root, loop)
            if isinstance(layer, Region):
                return layer, {root}
            misses.append(layer)
        elif near is None or step.depth > near.depth:
            near = step
    if misses:
        return max(misses, key=lambda miss: miss.depth), {root}
    found = _rows_added(root) or _rows_written(root) or _sum_of_terms(root) or _sum(root)
    if found is None and near is not None and near.depth > 1 and _adds_rows_of_an_expert(root):
        return near, {root}
    return found


def _adds_rows_of_an_expert(root: Node) -> bool:
    """Whether a value ends a loop that adds or writes rows, of which only values tell how many there are."""

    def step(node: Node) -> bool:
        if op_name(node) not in ("aten::index_add", "aten::index_put", "aten::scatter_add"):
            return False
        given = arguments(node)
        rows = next(given[name] for name in ("source", "values", "src") if name in given)
        return isinstance(rows, Node) and depends_on_values((shape_of(rows) or (0,))[0])

    before = root.args[0] if step(root) else None
    return isinstance(before, Node) and step(before) and not any(step(user) for user in root.users)


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


def one_slot_at(root: Node) -> Region | Miss | None:
    """The layer with one expert per token that ends in a value nobody sums; None where no rows of tokens stand."""
    axes = token_axes(shape_of(root) or ())
    if axes is None:
        return None
    sizes, tokens, place = axes
    sizes |= {SLOT: 1, SORTED_ROW: size_of(tokens, sizes)}
    walk = Walk(root, sizes, tokens, (*PIECES, *REGISTERED), {}, ending=root.users)
    output = walk.value(root, place)
    region = walk.region(output) if isinstance(output, Value) else walk.deepest or output
    wrong = misfit(region) if isinstance(region, Region) else None
    return region if wrong is None else wrong


def _rows_written(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """One expert per token, each of which writes the rows of its tokens."""
    ids, axes = ids_written(root), token_axes(shape_of(root) or ())
    if ids is None or axes is None:
        return None
    sizes, tokens, place = axes
    if Walk(root, {**sizes, SLOT: 1}, tokens, (), {}).ids_of(ids, place[:1]) is None:
        return None  # rows of several slots per token, which are summed somewhere
    region = one_slot_at(root)
    return (region, {root}) if region is not None else None


def _sum_of_terms(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """A chain of additions, each of what one expert makes of every token; or of one slot of each token."""
    if op_name(root) != "aten::add":
        return None
    near: Miss | None = None
    for key_of, merge in ((each_expert_loop.expert_number, _experts_added), (slot_number, _slots_added)):
        if any(op_name(user) == "aten::add" and terms(user, key_of) for user in root.users):
            continue  # the terms are found from the last addition
        found = terms(root, key_of)
        if found is None or len({key for key, _ in found[0]}) < 2:
            continue
        numbered, base, chain = found
        merged = merge(root, numbered)
        if isinstance(merged, Miss):
            near = merged if near is None or merged.depth > near.depth else near
            continue
        for inner in chain - {root}:
            if any(user not in chain for user in inner.users):
                users = ", ".join(user.name for user in inner.users)
                return Miss("a sum that nothing else reads", f"{inner.name}, read by {users}", inner), {root}
        merged = dataclasses.replace(merged, interior=merged.interior | (chain - {root}), base=base)
        wrong = misfit(merged)
        return (merged if wrong is None else wrong), {root}
    return (near, {root}) if near is not None else None


def _experts_added(root: Node, numbered: Sequence[tuple[tuple[int, Node | None], Node]]) -> Region | Miss:
    """Terms of one expert each; where they look at one slot only, of one expert and slot."""
    slots: dict[Node | None, list[tuple[int, Node]]] = {}
    for (expert, ids), term in numbered:
        slots.setdefault(ids, []).append((expert, term))
    # What an expert makes of a token may be computed once for all slots.
    behind = set().union(*each_expert_loop.computed_by([term for _, term in numbered]), {root})
    regions = []
    for of_slot in slots.values():
        merged = each_expert_on(root, of_slot, shared=behind if len(slots) > 1 else set())
        if isinstance(merged, Miss):
            return merged
        regions.append(dataclasses.replace(merged, distinct=len(slots) == 1))
    whole = regions[0] if len(regions) == 1 else merge_slots(regions, root)
    return (read_outside(whole.interior, {root}) or whole) if isinstance(whole, Region) else whole


def _slots_added(root: Node, numbered: Sequence[tuple[tuple[int, Node], Node]]) -> Region | Miss:
    """Terms of one slot each, which gather their experts' weights."""
    regions = []
    for _, term in numbered:
        axes = token_axes(shape_of(term) or ())
        if axes is None:
            return Miss("rows of fixed size for each token", term.name, term)
        sizes, tokens, place = axes
        sizes |= {SLOT: 1, SORTED_ROW: size_of(tokens, sizes)}
        walk = Walk(root, sizes, tokens, (*PIECES, *REGISTERED), {}, ending=_between(root, term))
        output = walk.value(term, place)
        region = walk.region(output) if isinstance(output, Value) else walk.deepest or output
        if isinstance(region, Miss):
            return region
        regions.append(region)
    return merge_slots(regions, root)


def _stacked(walk: Walk, node: Node, place: Place) -> Value | Miss | None:
    """``stack`` of every expert's results, written into the body as those of one expert. None for any other op."""
    given = arguments(node) if op_name(node) == "aten::stack" else {}
    if not given or place[given["dim"] % len(place)] != (EXPERT,) or set(walk.tokens) - axes_of(place):
        return None
    merged = each_expert_on(node, list(enumerate(given["tensors"])))
    if isinstance(merged, Miss):
        return walk.note(merged)
    return walk.inlined(merged, node, place)


def each_expert_on(root: Node, numbered: Sequence[tuple[int, Node]], shared: Collection[Node] = ()) -> Region | Miss:
    """The steps that compute one expert's result each, for every token, as one layer.

    ``shared`` are nodes that may read what is inside: the caller looks after them.
    """
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
        walk.ending = {*_between(root, value), *shared}
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
Walk.written = staticmethod(written)


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
        by_slot = SLOT in ending.sizes
        near[by_slot] = found if by_slot not in near or found.depth > near[by_slot].depth else near[by_slot]
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
    if isinstance(ending.summed, Node):
        output = walk.value(ending.summed, ending.place)
    else:
        output = walk.multiplied(root, ending.place, ending.summed)
        walk.interior.discard(root)
    if isinstance(output, Miss):
        return output if walk.deepest is None else walk.deepest
    if output.kind != ROWS:
        return walk.miss("rows of the experts", root, "a value that is the same for every token")
    output = walk.body.reshaped(output, [size for size in features(ending.result) if size > 1])
    drop_tests(walk.body, output.node)
    region = walk.region(output)
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
    if not is_zero(node):
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
    # Experts without parameters, which return the token or zeros, are none of the layer's: their steps follow it.
    while len(steps) > 1 and not regions[-1].params and not regions[-1].shared:
        regions.pop()
        steps.pop()
        root = steps[-1][0]
    if len(steps) < 2:
        return Miss("a loop over experts", "a single step", root)
    # Where another loop goes over the slots, the steps of one slot look at the same column of ids.
    slots: dict[Node, list[int]] = {}
    for number, (_, found) in enumerate(steps):
        slots.setdefault(found["ids"], []).append(number)
    of_slots: list[Region] = []
    for own in slots.values():
        merged = _all_experts([regions[place] for place in own], [steps[place][1]["expert"] for place in own], root)
        if isinstance(merged, Miss):
            return merged
        # A token is routed to an expert by one slot only.
        of_slots.append(dataclasses.replace(merged, distinct=len(slots) == 1 and (merged.distinct or loop.once)))
    whole = of_slots[0] if len(of_slots) == 1 else merge_slots(of_slots, root)
    if isinstance(whole, Miss):
        return whole
    interior = set().union(*(region.interior for region in regions), (step for step, _ in steps[:-1]))
    step = None if isinstance(steps[0][1]["expert"], int) else steps[0][0]
    return dataclasses.replace(whole, root=root, interior=interior, step=step)


def _all_experts(regions: list[Region], experts: list[int | Node], root: Node) -> Region | Miss:
    """The steps of a loop, one expert each, as one layer."""
    merged = merge_steps(regions)
    if isinstance(merged, Miss):
        return merged
    wrong = misfit(merged)
    if wrong is not None:
        return wrong
    numbers = [expert for expert in experts if isinstance(expert, int)]
    every = list(range(merged.num_experts))
    if sorted(numbers) != every if numbers else len(set(experts)) < len(experts):
        return Miss(f"every expert of {len(every)} once", f"experts {', '.join(map(str, experts))}", root)
    return merged


def _step(root: Node, found: Match, loop: loops.Loop) -> Region | Miss:
    """One step of a loop, as a layer of one expert."""
    summed = found["summed"]
    shape = shape_of(summed) or ()
    rows = shape_of(found["ids"]) or ()
    *tokens, slots = rows if len(rows) > 1 else (*rows, 1)  # one slot needs no dimension
    sizes = {ONE: 1, HIT: shape[0], TOKEN: math.prod(tokens), SLOT: slots}
    bindings = {name: bound for name, bound in found.bindings.items() if name not in ("summed", "base")}
    walk = Walk(root, sizes, (TOKEN,), loop.pieces, bindings, loop.own, ending=found.nodes)
    output = walk.value(summed, ((HIT,), (shape[1],)))
    if isinstance(output, Miss):
        return output if walk.deepest is None else walk.deepest
    return walk.region(output)


assert each_expert is not None  # importing it registers the op
