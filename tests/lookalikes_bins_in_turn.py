"""A mask for each choice, and second choices that do not stand behind the first ones; see `lookalikes.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lookalikes_bins_of_groups import LOOKALIKES, lookalike
from styles.base import BATCHED, Simple

__all__ = ["LOOKALIKES", "lookalike"]


class InTurn(Simple):
    """Ranks of each choice behind ``before``, the rows of earlier ones; capacity of all slots."""

    tokens = 0

    def capacity_of(self, x):
        return self.K * x.shape[self.tokens]

    def hots(self, gates):
        hots = []
        for _ in range(self.K):
            hots.append(F.one_hot(self.left(gates, hots).argmax(dim=-1), self.E))
        return hots

    def left(self, gates, hots):
        for hot in hots:
            gates = gates.masked_fill(hot.bool(), float("-inf"))
        return gates

    def count(self, hot):
        return hot.cumsum(dim=self.tokens) - 1

    def total(self, hot):
        return hot.sum(dim=self.tokens, keepdim=True)

    def before(self, number, hots):
        return sum(self.total(hot) for hot in hots[:number])

    def in_bins(self, rows):
        return torch.einsum("eci,ehi->ech", F.relu(torch.einsum("ecm,eim->eci", rows, self.up)), self.down)

    def combine(self, gates, hots, ranks, capacity):
        combine = 0
        for hot, rank in zip(hots, ranks, strict=True):
            place = (rank.unsqueeze(-1) == torch.arange(capacity)).to(gates.dtype)
            combine = combine + self.term((gates * hot).sum(dim=-1), hot.to(gates.dtype), place)
        return combine

    def term(self, gate, hot, place):
        return torch.einsum("s,se,sc->sec", gate, hot, place)

    def forward(self, x):
        gates = self.router.linear(x).softmax(dim=-1)
        hots = self.hots(gates)
        ranks = [((self.count(hot) + self.before(number, hots)) * hot).sum(-1) for number, hot in enumerate(hots)]
        combine = self.combine(gates, hots, ranks, self.capacity_of(x))
        return torch.einsum(
            "sec,ecm->sm", combine, self.in_bins(torch.einsum("sec,sm->ecm", combine.bool().to(x.dtype), x))
        )


@lookalike("one_hot_in_turn_none_before", "each choice is counted for itself: two rows of a bin have one place")
class NoneBefore(InTurn):
    def before(self, number, hots):
        return 0


@lookalike("one_hot_in_turn_behind_their_own", "second choices are counted behind all second ones")
class BehindTheirOwn(InTurn):
    def before(self, number, hots):
        return self.total(hots[number]) if number else 0


@lookalike(
    "one_hot_in_turn_behind_them_twice", "places between first and second choices are left free: more than there are"
)
class BehindTwice(InTurn):
    def before(self, number, hots):
        return 2 * super().before(number, hots)


@lookalike(
    "one_hot_in_turn_sums_added_twice", "the rows of the first choices are added to the second ones, and once more"
)
class SumsAddedTwice(InTurn):
    def before(self, number, hots):
        return super().before(number, hots) + super().before(number, hots)


@lookalike(
    "one_hot_in_turn_behind_each_other", "first choices stand behind the second ones, and these behind the first"
)
class BehindEachOther(InTurn):
    def before(self, number, hots):
        return self.total(hots[1 - number])


@lookalike("one_hot_in_turn_of_another_axis", "what is added is the number of a token's experts: one, always")
class AnotherAxis(InTurn):
    def total(self, hot):
        return hot.sum(dim=1, keepdim=True)


@lookalike("one_hot_in_turn_behind_running_counts", "behind the first choices up to the token, not behind all of them")
class BehindRunning(InTurn):
    def total(self, hot):
        return hot.cumsum(dim=0)


@lookalike("one_hot_in_turn_third_behind_the_second", "third choices are not behind the first ones", dynamic=False)
class BehindLast(InTurn):
    K = 3

    def before(self, number, hots):
        return self.total(hots[number - 1]) if number else 0


@lookalike("one_hot_in_turn_half_the_tokens", "a bin holds half of the tokens: others are dropped")
class HalfTheTokens(InTurn):
    def capacity_of(self, x):
        return (x.shape[0] + 1) // 2


@lookalike("one_hot_in_turn_second_may_be_first", "a token's two rows may be in one bin, which holds one of each token")
class MayBeFirst(InTurn):
    def capacity_of(self, x):
        return x.shape[0]

    def left(self, gates, hots):
        return gates * (1 - hots[0]) if hots else gates


@lookalike("one_hot_in_turn_counted_in_bfloat16", "beyond 256 rows, a count in bfloat16 stands still")
class CountedInBfloat16(InTurn):
    def count(self, hot):
        return (hot.bfloat16().cumsum(dim=0) - 1).long()


@lookalike("one_hot_in_turn_summed_in_bfloat16", "beyond 256 rows, a sum in bfloat16 is rounded")
class SummedInBfloat16(InTurn):
    def total(self, hot):
        return super().total(hot.bfloat16()).long()


@lookalike("one_hot_in_turn_places_exchanged", "the expert of one choice and the place of the other")
class PlacesExchanged(InTurn):
    def combine(self, gates, hots, ranks, capacity):
        return super().combine(gates, hots, ranks[::-1], capacity)


@lookalike("one_hot_in_turn_first_choice_twice", "first choices count twice")
class FirstTwice(InTurn):
    def combine(self, gates, hots, ranks, capacity):
        return super().combine(gates, [*hots, hots[0]], [*ranks, ranks[0]], capacity)


class InTurnOfGroups(InTurn):
    """Ranks within the sequences of a batch, each of which has its own bins."""

    tokens = 1

    def term(self, gate, hot, place):
        return torch.einsum("gs,gse,gsc->gsec", gate, hot, place)

    def in_bins(self, rows):
        return torch.einsum("egci,ehi->egch", F.relu(torch.einsum("egcm,eim->egci", rows, self.up)), self.down)

    def forward(self, x):
        gates = self.router.linear(x).softmax(dim=-1)
        hots = self.hots(gates)
        ranks = [((self.count(hot) + self.before(number, hots)) * hot).sum(-1) for number, hot in enumerate(hots)]
        combine = self.combine(gates, hots, ranks, self.capacity_of(x))
        y = self.in_bins(torch.einsum("gsec,gsm->egcm", combine.bool().to(x.dtype), x))
        return torch.einsum("gsec,egcm->gsm", combine, y)


@lookalike("one_hot_in_turn_behind_other_groups", "second choices of a group stand behind the first ones of another",
           **BATCHED)  # fmt: skip
class BehindOthers(InTurnOfGroups):
    def total(self, hot):
        return super().total(hot).flip(0)


@lookalike("one_hot_in_turn_behind_all_groups", "second choices of a group stand behind the first ones of all",
           **BATCHED)  # fmt: skip
class BehindAll(InTurnOfGroups):
    def total(self, hot):
        return hot.sum(dim=(0, 1), keepdim=True)


@lookalike("one_hot_in_turn_group_scaled", "each group has a scale of its own", dynamic=False, **BATCHED)
class GroupScaled(InTurnOfGroups):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(2, 1, 1))

    def in_bins(self, rows):
        return super().in_bins(rows) * self.scale


@lookalike("one_hot_in_turn_groups_exchanged", "a group gets what became of another one's rows", **BATCHED)
class GroupsExchanged(InTurnOfGroups):
    def in_bins(self, rows):
        return super().in_bins(rows).flip(1)
