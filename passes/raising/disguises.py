"""How each of the disguises known ends. What they are made of is declared in files of their own (`registry.py`)."""

from __future__ import annotations

from collections.abc import Iterator

from moe_fx.passes.raising import grouped, loops, routing_map, slot_major
from moe_fx.passes.raising.added_terms import stacked, sum_of_terms
from moe_fx.passes.raising.anchors import anchors_behind, is_cut_linear, leads_to_experts
from moe_fx.passes.raising.axes import SLOT, SORTED_ROW, Place, features, size_of
from moe_fx.passes.raising.bins_of_each import bins_of_each
from moe_fx.passes.raising.dispatched import drop_tests
from moe_fx.passes.raising.endings import Ending, endings, token_axes
from moe_fx.passes.raising.loop_layers import loop_of_steps
from moe_fx.passes.raising.parts import joined
from moe_fx.passes.raising.parts_added import parts_added
from moe_fx.passes.raising.parts_put import parts_put
from moe_fx.passes.raising.region import Region, misfit
from moe_fx.passes.raising.registry import known_pieces
from moe_fx.passes.raising.routing import CHOOSING
from moe_fx.passes.raising.selected import ids_selected, selected
from moe_fx.passes.raising.slot_by_slot import slot_number
from moe_fx.passes.raising.walk import Walk
from moe_fx.passes.raising.writer import ROWS, Value
from moe_fx.passes.raising.written import ids_written, written
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.kernels import each_expert
from moe_fx.matcher import Match, Miss, arguments, match, op_name
from moe_fx.pattern import either
from moe_fx.rewrite import GIVEN
from moe_fx.shapes import depends_on_values, known_equal, shape_of

__all__ = ["one_slot_at", "region_at"]

#: rows sorted by expert are added to their tokens; or brought back to the slots
COMBINE = either(*map(grouped.added_to, (slot_major.token_of_row, grouped.token_of_row, routing_map.token_of_row)))
PUT_BACK = either(*map(grouped.put_back, (slot_major.perm, grouped.perm)))
#: how deep a walk must have come from a product, of which there are many, to be worth a report
FAR = 400
#: what makes scores, by which experts are chosen and their results weighted
SCORES = frozenset({"aten::softmax", "aten::log_softmax", "aten::sigmoid"})


def region_at(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """The layer that ends in a node, or why it is none; and the multiplications that suggest one, if there are any.

    None for a node in which no disguise ends.
    """
    near: Miss | None = None
    misses: list[Miss] = []
    for loop in loops.LOOPS:
        step = match(loop.step, root)
        if isinstance(step, Match):
            if _goes_on(root, loop):  # the steps of a loop are found from its last one
                return None
            layer = loop_of_steps(root, loop)
            if isinstance(layer, Region):
                return layer, {root}
            if not any(map(_meets_parameters, _added(root, loop))):
                return None  # such as the sum of a token's routing weights
            misses.append(layer)
        elif near is None or step.depth > near.depth:
            near = step
    if misses:
        sorted_by_map = _rows_added(root)
        if sorted_by_map is not None and isinstance(sorted_by_map[0], Region):
            return sorted_by_map
        return max(misses, key=lambda miss: miss.depth), {root}
    found = (
        _rows_added(root)
        or _parts_added(root)
        or _rows_put_back(root)
        or _rows_written(root)
        or sum_of_terms(root)
        or _sum(root)
    )
    if found is None and near is not None and near.depth > 1 and _adds_rows_of_an_expert(root):
        return near, {root}
    return found


def _added(root: Node, loop: loops.Loop) -> Iterator[Node]:
    """What the steps of a loop add, from the last to the first."""
    while isinstance(step := match(loop.step, root), Match):
        yield step["summed"]
        root = step["base"]


def _meets_parameters(value: Node) -> bool:
    """Whether parameters have a part in a value, other than in the scores and the choices that it is made of."""
    seen, pending = set[Node](), [value]
    while pending:
        node = pending.pop()
        if node in seen or op_name(node) in CHOOSING | SCORES:
            continue
        if node.op in ("placeholder", "get_attr") and GIVEN not in node.meta:
            return True
        seen.add(node)
        pending += node.all_input_nodes
    return False


def _goes_on(step: Node, loop: loops.Loop) -> bool:
    """Whether another step follows, and nothing else reads what there is so far."""
    for user in step.users:
        found = match(loop.step, user)
        numbered = isinstance(found, Match) and isinstance(found["expert"], int)
        if isinstance(found, Match) and (not numbered or set(step.users) <= {user, *found.nodes}):
            return True
    return False


def _adds_rows_of_an_expert(root: Node) -> bool:
    """Whether a value ends a loop that adds or writes rows, of which only values tell how many there are."""

    def step(node: Node) -> bool:
        if op_name(node) not in ("aten::index_add", "aten::index_put"):
            return False
        given = arguments(node)
        rows = next(given[name] for name in ("source", "values", "src") if name in given)
        return isinstance(rows, Node) and depends_on_values((shape_of(rows) or (0,))[0])

    before = root.args[0] if step(root) else None
    return isinstance(before, Node) and step(before) and not any(step(user) for user in root.users)


def _rows_added(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """Rows sorted by expert, each added to its token."""
    found = match(COMBINE, root)
    if not isinstance(found, Match):
        return None
    summed, axes = found["summed"], token_axes(shape_of(root) or ())
    if axes is None or "ids" not in found.bindings:
        return None
    sizes, tokens, place = axes
    slots = (shape_of(found["ids"]) or (0,))[-1]
    sizes |= {SLOT: slots, SORTED_ROW: (shape_of(summed) or (0,))[0]}
    bindings = {name: bound for name, bound in found.bindings.items() if name not in ("summed", "base")}
    walk = Walk(root, sizes, tokens, known_pieces(), bindings, ending=found.nodes)
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


def _parts_added(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """Rows sorted by expert, added to their tokens part by part."""
    found = parts_added(root)
    return (found, {root}) if found is not None else None


def one_slot_at(root: Node) -> Region | Miss | None:
    """The layer with one expert per token that ends in a value nobody sums; None where no rows of tokens stand."""
    axes = token_axes(shape_of(root) or ())
    if axes is None:
        return None
    sizes, tokens, place = axes
    sizes |= {SLOT: 1, SORTED_ROW: size_of(tokens, sizes)}
    walk = Walk(root, sizes, tokens, known_pieces(), {}, ending=root.users)
    output = walk.value(root, place)
    region = walk.region(output) if isinstance(output, Value) else output
    wrong = misfit(region) if isinstance(region, Region) else None
    return region if wrong is None else wrong


def _rows_put_back(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """One expert per token: rows sorted by expert, brought back to the tokens."""
    found = match(PUT_BACK, root)
    if not isinstance(found, Match):
        return None
    shape = shape_of(found["ids"]) or ()
    region = one_slot_at(root) if len(shape) == 1 or known_equal(shape[-1], 1) else None
    return (region, {root}) if isinstance(region, Region) else None


def _rows_written(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """One expert per token, each of which writes the rows of its tokens, or whose rows they take."""
    ids, axes = ids_written(root) or ids_selected(root), token_axes(shape_of(root) or ())
    if ids is None or axes is None:
        return None
    sizes, tokens, place = axes
    column = slot_number(ids)
    if column is not None and (len(column[1].users) > 1 or op_name(next(iter(column[1].users))) != "aten::select"):
        return None  # rows of one of several slots per token, which are summed somewhere
    if Walk(root, {**sizes, SLOT: 1}, tokens, (), {}).ids_of(ids, place[:-1]) is None:
        return None
    region = one_slot_at(root)
    return (region, {root}) if region is not None else None


def _sum(root: Node) -> tuple[Region | Miss, set[Node]] | None:
    """A sum over slots or experts."""
    near: dict[bool, Miss] = {}
    looked = False
    for ending in endings(root):
        if (
            not looked
            and not leads_to_experts(root, through=True)
            and not any(map(is_cut_linear, root.all_input_nodes))
        ):
            return None
        looked = True
        found = _walk(root, ending)
        if isinstance(found, Region):
            return found, found.interior
        by_slot = SLOT in ending.sizes
        near[by_slot] = found if by_slot not in near or found.depth > near[by_slot].depth else near[by_slot]
    if not near:
        return None
    if op_name(root) != "aten::sum" and max(miss.depth for miss in near.values()) < FAR:
        return max(near.values(), key=lambda miss: miss.depth), set()
    # Weights that are chosen by row speak of slots.
    chosen = anchors_behind(root, chosen=True)
    if not chosen and True in near and "ids" in near[True].bindings:
        return near[True], {root}
    # A product may have been read in one of the two ways only.
    miss = near[bool(chosen)] if bool(chosen) in near else next(iter(near.values()))
    return miss, chosen or anchors_behind(root, chosen=False)


def _walk(root: Node, ending: Ending) -> Region | Miss:
    walk = Walk(root, ending.sizes, ending.tokens, known_pieces(), {})
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
    if isinstance(region, Region):
        region.base = ending.base
    wrong = misfit(region) if isinstance(region, Region) else None
    return region if wrong is None else wrong


def _put_together(walk: Walk, node: Node, place: Place) -> Value | Miss | None:
    """The results of all experts, each computed by itself: of its bin, or of every token."""
    together = bins_of_each(walk, node, place)
    return stacked(walk, node, place) if together is None else together


def _put_by_experts(walk: Walk, node: Node, place: Place) -> Value | Miss | None:
    """What the experts wrote, where masks are true or at parts of sorted places."""
    rows = written(walk, node, place)
    return parts_put(walk, node, place) if rows is None else rows


Walk.stacked = staticmethod(_put_together)
Walk.joined = staticmethod(joined)
Walk.written = staticmethod(_put_by_experts)
Walk.selected = staticmethod(selected)
assert each_expert is not None  # importing it registers the op
