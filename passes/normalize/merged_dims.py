"""Which dimensions of a value are merged in those of its view: through permutations and reshapes, back to the value.

reshape(permute(w, [2, 0, 1]), [H, E*I]), w [E, I, H]       =>      w, ((H,), (E, I))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from moe_fx.matcher import arguments, op_name
from moe_fx.shapes import Dim, known_equal, shape_of

__all__ = ["MERGED", "VIEWS", "Group", "Seen", "is_end", "regrouped", "seen_through", "sights", "step_of"]

#: in the meta of an einsum: the calls that it stands for
MERGED = "moe_fx_merged_product"

#: ops that show the elements of a value in another shape or order
VIEWS = frozenset({
    "aten::reshape", "aten::permute", "aten::transpose", "aten::unsqueeze", "aten::squeeze", "aten::clone",
})  # fmt: skip

#: a dimension of what a view is of, with its size; those merged in one dimension of the view
Group = tuple[tuple[int, Dim], ...]


@dataclass(frozen=True)
class Seen:
    """A value as it is seen through ``views``, the last one first: ``groups`` for each of its dimensions."""

    source: Node
    groups: tuple[Group, ...]
    views: tuple[Node, ...]

    def sizes(self, dim: int) -> list[Dim]:
        return [size for _, size in self.groups[dim]]


def sights(value: Node) -> Iterator[Seen]:
    """A value seen through its views, as :func:`seen_through` does, and then through so few that less is merged."""
    seen = seen_through(value)
    yield seen
    least = sum(map(len, seen.groups))
    while seen.views:
        seen = seen_through(value, len(seen.views) - 1)
        if sum(map(len, seen.groups)) < least:
            least = sum(map(len, seen.groups))
            yield seen


def seen_through(value: Node, most: int | None = None) -> Seen:
    """A value seen through as many views (at most ``most``) as only order, merge, or add dimensions of size 1."""
    views: list[Node] = []
    source, steps = value, list[Callable[[tuple[Group, ...]], tuple[Group, ...] | None]]()
    while len(views) != most and (step := step_of(source)) is not None and not is_end(source):
        steps.append(step)
        views.append(source)
        source = source.args[0]  # type: ignore[assignment]
    # From the source on: a view further in may cut what one further out merges.
    while True:
        groups: tuple[Group, ...] | None = tuple(
            () if known_equal(size, 1) else ((dim, size),) for dim, size in enumerate(shape_of(source) or ())
        )
        for step in reversed(steps):
            groups = step(groups) if groups is not None else None
        if groups is not None:
            return Seen(source, groups, tuple(views))
        steps.pop()
        source = views.pop()


def is_end(view: Node) -> bool:
    """Whether a reshape gives an einsum the dimensions of size 1 that the product had for which it stands."""
    merged = view.args[0].meta.get(MERGED)
    return merged is not None and merged.end is view


def step_of(view: Node) -> Callable[[tuple[Group, ...]], tuple[Group, ...] | None] | None:
    """What a view makes of the dimensions of its source; None for any other op."""
    name, source, shape = op_name(view), shape_of(view.args[0]) if view.args else None, shape_of(view)
    if name not in VIEWS or source is None or shape is None:
        return None
    given = arguments(view)
    if name == "aten::clone":
        return lambda groups: groups
    if name in ("aten::permute", "aten::transpose"):
        order = _order(view, len(shape))
        return lambda groups: tuple(groups[dim] for dim in order)
    if name == "aten::squeeze" and not isinstance(given.get("dim"), int):
        return None
    return lambda groups: regrouped([each for group in groups for each in group], shape)


def _order(view: Node, rank: int) -> list[int]:
    given = arguments(view)
    if op_name(view) == "aten::permute":
        return [dim % rank for dim in given["dims"]]
    order, one, other = list(range(rank)), given["dim0"] % rank, given["dim1"] % rank
    order[one], order[other] = other, one
    return order


def regrouped(dims: list[tuple[int, Dim]], shape: Sequence[Dim]) -> tuple[Group, ...] | None:
    """Dimensions, none of size 1, as those of the same elements in another shape; None where that cuts one of them."""
    groups: list[Group] = []
    rest = list(dims)
    for size in shape:
        group: list[tuple[int, Dim]] = []
        count: Dim = 1
        while not known_equal(count, size):
            if not rest:
                return None
            group.append(rest.pop(0))
            count = count * group[-1][1]
        groups.append(tuple(group))
    return tuple(groups) if not rest else None
