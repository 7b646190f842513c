"""What is read of a value that is made of ids and ranks, and how values of all slots may stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moe_fx.passes.raising.axes import SLOT, SORTED_ROW, Place
from moe_fx.passes.raising.routes import Routes

from moe_fx.shapes import Dim, known_equal

__all__ = ["HOT", "Rank", "slot_places"]


@dataclass(frozen=True)
class Rank:
    """``ids * expert's number + rank * slot's rank + plus``; of a value by expert, at a slot's own expert.

    ``elsewhere`` is what such a value holds for all other experts, if it is one number. ``row`` counts where the slot
    stands in sorted order, and ``first`` where the first row of its expert does: one less the other is its rank.
    """

    ids: Dim = 0
    rank: int = 0
    plus: int = 0
    elsewhere: int | None = None
    row: int = 0
    first: int = 0

    @property
    def fixed(self) -> bool:
        return (self.rank, self.row, self.first) == (0, 0, 0) and isinstance(self.ids, int) and self.ids == 0

    @property
    def ranked(self) -> bool:
        """Whether it is a rank, from 0 up, perhaps behind the bins of the experts before."""
        return (self.rank, self.plus, self.row, self.first) == (1, 0, 0, 0)


HOT = Rank(plus=1, elsewhere=0)


def slot_places(walk: Routes) -> Iterator[Place]:
    """How rows of all slots may stand."""
    yield ((SORTED_ROW,),)
    yield ((*walk.tokens, SLOT),)
    yield from walk.slot_places
    yield ((SLOT, *walk.tokens),)
    yield (SLOT,), walk.tokens
    if known_equal(walk.sizes.get(SLOT, 0), 1):
        yield (walk.tokens,)
