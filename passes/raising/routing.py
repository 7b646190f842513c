"""What can be known of a layer's ids: the op that chose them, and whether they are valid and distinct."""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any

import torch
from moe_fx.passes.raising.ancestors import ancestors
from torch.fx import Node

from moe_fx.constants import filled_with
from moe_fx.matcher import Match, arguments, match, op_name
from moe_fx.pattern import ANY, WHOLE, Last, Var, aten, either, optional
from moe_fx.shapes import known_equal, shape_of, tensor_of

__all__ = ["CHOOSING", "Selection", "chosen_once", "selection_of"]

#: ops that choose experts by score
CHOOSING = frozenset({"aten::topk", "aten::sort", "aten::argsort", "aten::argmax", "aten::max"})
#: ops that move integers about without making new ones
MOVING = frozenset({
    "aten::reshape", "aten::slice", "aten::to", "aten::clone", "aten::unsqueeze", "aten::squeeze", "aten::select",
    "aten::contiguous", "aten::transpose", "aten::unflatten", "aten::expand", "aten::narrow",
})  # fmt: skip


#: one-hot rows as a mask: scores that were set to minus infinity by it
_numbers = either(aten.arange(ANY, dtype=WHOLE), aten.arange(0, ANY, dtype=WHOLE))
_hot = either(aten.one_hot(Var("ids"), ANY), aten.eq(aten.unsqueeze(Var("ids"), Last(-1)), _numbers))
_mask = _hot
for _ in range(3):  # of truth values, a cast to any dtype and back is the same
    _mask = optional(lambda each: aten.to(each, ANY), _mask)
_least = either(-math.inf, aten.scalar_tensor(-math.inf), aten.full(ANY, -math.inf), aten.full_like(ANY, -math.inf))
MASKED = either(
    aten.masked_fill(Var("scores"), either(_mask, aten.ne(_mask, 0), aten.gt(_mask, 0)), _least),
    aten.where(either(_mask, aten.ne(_mask, 0), aten.gt(_mask, 0)), _least, Var("scores")),
)


class Selection:
    """How the ids of a layer were chosen.

    Attributes:
        chooser: the op that made them (a ``topk``, ...), or None if that is not known.
        in_range: every id is certainly one of ``0..E-1``.
        distinct: the ids of one token are certainly different experts.
    """

    def __init__(self, chooser: Node | None, in_range: bool, distinct: bool) -> None:
        self.chooser, self.in_range, self.distinct = chooser, in_range, distinct


def selection_of(ids: Node, num_experts: int) -> Selection:
    """Follow ids back to the op that chose them."""
    node, clamped, moved, dropped, turned = ids, False, False, False, False
    element: object = None  # which of several results the ids are
    while True:
        name = op_name(node)
        if name == "aten::clamp":
            given = arguments(node)
            clamped |= given["min"] == 0 and given["max"] == num_experts - 1
            moved = True
        elif name == "aten::to" and not _holds(node, num_experts):
            return Selection(None, clamped, False)
        elif name == "aten::transpose" and len(shape_of(node) or ()) == 2:
            turned = not turned
        elif name in MOVING:
            # Slicing, casting and adding dimensions of size 1 keep a token's ids together.
            before, after = shape_of(node.args[0]) or (0,), shape_of(node) or (0,)
            # Batch and sequence may be taken apart.
            apart = name in ("aten::reshape", "aten::unflatten") and known_equal(before[-1], after[-1])
            moved |= name not in ("aten::to", "aten::slice", "aten::clone", "aten::contiguous") and not apart
        elif name == "aten::where" and isinstance((*node.args, None, None)[2], int):
            # Some ids give way to a number, which need not be an expert's.
            if not isinstance(node.args[1], Node):
                break
            dropped, node = True, node.args[1]
            continue
        elif node.target is operator.getitem and isinstance(node.args[0], Node):
            element = node.args[1]
        else:
            break
        if not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    if op_name(node) in ("aten::cat", "aten::stack") and not dropped:
        parts = _of_columns(node, num_experts) or _of_parts(node, num_experts)
        parts = parts or _maxima(node, num_experts, clamped) or _of_rows(node, num_experts)
        if parts is None:
            return Selection(None, clamped, False)
        # Reshaped, a row may hold the ids of several.
        as_joined = known_equal((shape_of(ids) or (0,))[-1], (shape_of(node) or (1,))[-1]) and not turned
        return Selection(parts.chooser, parts.in_range, parts.distinct and as_joined)
    if op_name(node) not in CHOOSING:
        of_groups = _of_groups(node, num_experts) if not dropped and not moved and not turned else None
        return of_groups or Selection(None, clamped, False)
    if element != (None if op_name(node) in ("aten::argsort", "aten::argmax") else 1):
        return Selection(None, clamped, False)  # the values, not the places
    given = arguments(node)
    scores = shape_of(given["self"])
    dim = given.get("dim", -1)
    over_experts = scores is not None and isinstance(dim, int) and known_equal(scores[dim], num_experts)
    if over_experts:  # they must be chosen along the dimension that holds a token's ids
        moved |= dim % len(scores) != len(scores) - (2 if turned and len(scores) == 2 else 1)
    several = op_name(node) in ("aten::topk", "aten::sort", "aten::argsort")
    k = shape_of(ids)
    one = k is not None and known_equal(k[-1], 1)
    if dropped:
        return Selection(node, False, one)
    return Selection(node, clamped or over_experts, over_experts and ((several and not moved) or one))


def chosen_once(ids: Node) -> bool:
    """Whether an expert was chosen once for each row of scores."""
    chooser = selection_of(ids, 0).chooser
    scores = shape_of(arguments(chooser)["self"]) if chooser is not None else None
    return bool(scores) and known_equal(math.prod(shape_of(ids) or (0,)), math.prod((scores or ())[:-1]))


def _of_groups(ids: Node, num_experts: int) -> Selection | None:
    """Ids ``group * size + within``: experts chosen within a group that was chosen for the token."""
    operands: Any = ids.args[:2] if op_name(ids) == "aten::add" and not ids.kwargs and len(ids.args) == 2 else ()
    for first, within in (operands, operands[::-1]) if operands else ():
        size = _chosen_among(within)
        among = selection_of(within, size) if size is not None else None
        shape = shape_of(first) or ()
        if (
            among is None
            or not among.in_range
            or len(shape) != len(shape_of(ids) or ())
            or not known_equal(shape[-1], 1)
        ):
            continue
        group: Any = first
        while op_name(group) in ("aten::unsqueeze", "aten::reshape"):
            group = group.args[0]
        group, factor = group.args[:2] if op_name(group) == "aten::mul" else (group, 1)
        groups = _chosen_among(group) if type(factor) is int and factor >= 0 else None
        inside = groups is not None and size is not None and (groups - 1) * factor + size <= num_experts
        return Selection(None, inside and selection_of(group, groups or 0).in_range, among.distinct)
    return None


def _chosen_among(ids: Any) -> int | None:
    """Among how many ids were chosen."""
    chooser = selection_of(ids, 0).chooser if isinstance(ids, Node) else None
    given = arguments(chooser) if chooser is not None else {}
    count = (shape_of(given["self"]) or (0,))[given.get("dim", -1)] if given else None
    return count if isinstance(count, int) else None


def _of_columns(joined: Node, num_experts: int) -> Selection | None:
    """Columns of ids one by one, and beside one another again."""
    parts, rank = arguments(joined)["tensors"], len(shape_of(joined) or ())
    columns = [_column(part, op_name(joined) == "aten::stack") for part in parts]
    if arguments(joined)["dim"] not in (-1, rank - 1) or None in columns or len({*columns}) < len(columns):
        return None
    sources = {column[0] for column in columns if column is not None}
    found = selection_of(sources.pop(), num_experts) if len(sources) == 1 else None
    return found if found is not None and found.chooser is not None else None


def _column(part: Node, single: bool) -> tuple[Node, int] | None:
    """Which column a value is of what: ``single``, without a dimension of its own."""
    if op_name(part) != ("aten::select" if single else "aten::slice"):
        return None
    given = arguments(part)
    rank = len(shape_of(given["self"]) or ())
    place: Any = given["index"] if single else given["start"]
    if not isinstance(place, int) or place < 0 or given["dim"] not in (-1, rank - 1):
        return None
    return (given["self"], place) if single or given["end"] == place + 1 else None


def _of_parts(joined: Node, num_experts: int) -> Selection | None:
    """Ids joined that were chosen among different experts each: of the first half, say, and of the second."""
    parts, rank = arguments(joined)["tensors"], len(shape_of(joined) or ())
    if arguments(joined)["dim"] not in (-1, rank - 1):
        return None
    spans: list[tuple[int, int]] = []
    distinct, chooser = True, None
    for part in parts:
        node: Any = part
        first = 0
        if len(shape_of(part) or ()) < rank and op_name(joined) == "aten::cat":
            return None
        always = filled_with(part)
        if type(always) is int and 0 <= always < num_experts:  # an expert of every token, such as a shared one
            distinct &= op_name(joined) == "aten::stack" or known_equal((shape_of(part) or (0,))[-1], 1)
            spans.append((always, always + 1))
            continue
        while op_name(node) == "aten::add" and isinstance(node.args[0], Node) and type(node.args[1]) is int:
            node, first = node.args[0], first + node.args[1]
        chooser = selection_of(node, 0).chooser
        if chooser is None:
            return None
        given = arguments(chooser)
        count = (shape_of(given["self"]) or (0,))[given.get("dim", -1)]
        among = selection_of(node, count) if isinstance(count, int) else None
        if among is None or not among.in_range or not 0 <= first <= num_experts - count:
            return None
        distinct &= among.distinct or op_name(joined) == "aten::stack"
        spans.append((first, first + int(count)))
    spans.sort()
    distinct &= all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    return Selection(chooser, True, distinct) if distinct else None


def _maxima(joined: Node, num_experts: int, clamped: bool) -> Selection | None:
    """Ids joined of the best expert, the best of the others, and so on; None for anything else."""
    parts = arguments(joined)["tensors"]
    shape = shape_of(joined) or ()
    one_wide = op_name(joined) == "aten::stack" or all((shape_of(part) or (0,))[-1] == 1 for part in parts)
    if arguments(joined)["dim"] not in (-1, len(shape) - 1) or not one_wide:
        return None
    selections = [selection_of(part, num_experts) for part in parts]
    if any(each.chooser is None or not each.in_range for each in selections):
        return None
    distinct = True
    for place, each in enumerate(selections):
        assert each.chooser is not None
        left_out, scores = _left_out(arguments(each.chooser)["self"])
        distinct &= {_bare(part) for part in parts[:place]} <= {_bare(ids) for ids in left_out}
        distinct &= place == 0 or not _may_be_least(scores)
    return Selection(selections[-1].chooser, True, distinct)


def _of_rows(joined: Node, num_experts: int) -> Selection | None:
    """Ids joined of different rows, such as the first choices of all tokens and then the second ones."""
    parts, shape = arguments(joined)["tensors"], shape_of(joined) or ()
    if op_name(joined) != "aten::cat" or arguments(joined)["dim"] != 0 or not all(map(shape_of, parts)):
        return None
    selections = [selection_of(part, num_experts) for part in parts]
    if not all(each.in_range for each in selections):
        return None
    distinct = len(shape) > 1 and all(each.distinct for each in selections)
    return Selection(selections[-1].chooser, True, distinct)


def _bare(ids: Node) -> Node:
    """Ids of one slot, without a dimension for it."""
    wide = op_name(ids) == "aten::unsqueeze" and arguments(ids)["dim"] in (-1, len(shape_of(ids) or ()) - 1)
    return arguments(ids)["self"] if wide else ids


def _left_out(scores: Node) -> tuple[set[Node], Node]:
    """Ids whose scores were set to minus infinity, so that they are not chosen again; and the scores before."""
    found: set[Node] = set()
    while True:
        masked = match(MASKED, scores)
        if isinstance(masked, Match):
            found.add(masked["ids"])
            scores = masked["scores"]
            continue
        given = arguments(scores) if op_name(scores) == "aten::scatter" else {}
        if given.get("value") != -math.inf or given["dim"] not in (-1, len(shape_of(scores) or ()) - 1):
            return found, scores  # what was left out before may have been put back
        found.add(given["index"])
        scores = given["self"]


def _may_be_least(scores: Node) -> bool:
    """Whether scores of other experts may be minus infinity, too: then one that was left out may be the best again."""
    if scores.op == "placeholder":
        return True
    for node in ancestors(scores):
        given = [*node.args, *node.kwargs.values()]
        if op_name(node) == "aten::log" or any(isinstance(each, float) and math.isinf(each) for each in given):
            return True
    return False


def _holds(cast: Node, num_experts: int) -> bool:
    """Whether a dtype has every expert's number: others would become one."""
    value = tensor_of(cast)
    if value is None or value.dtype is torch.bool:
        return value is not None and num_experts <= 2
    exact = 2 / torch.finfo(value.dtype).eps if value.is_floating_point() else torch.iinfo(value.dtype).max
    return num_experts - 1 <= exact
