"""Bins for each group of tokens that drop tokens or mix them up; see `lookalikes.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lookalikes_bins import LOOKALIKES, OneHotBins, lookalike
from styles.base import BATCHED, H, Unnormalised

__all__ = ["LOOKALIKES", "lookalike"]


class GroupedBins(OneHotBins):
    """Ranks within the sequences of a batch, each of which has its own bins."""

    route = Unnormalised
    put, read = "gsec,gsm->egcm", "gsec,egcm->gsm"

    def capacity_of(self, x):
        return x.shape[1]

    def rank(self, ids):
        one_hot = F.one_hot(ids, self.E).flatten(1, 2)
        return ((one_hot.cumsum(1) - 1) * one_hot).sum(-1).view_as(ids)

    def in_bins(self, rows):
        return torch.einsum("egci,ehi->egch", F.relu(torch.einsum("egcm,eim->egci", rows, self.up)), self.down)

    def forward(self, x):
        ids, weights = self.router(x)
        hot, place = self.hot(ids, self.rank(ids), x)
        y = self.in_bins(torch.einsum(self.put, torch.einsum("gske,gskc->gsec", hot, place), x))
        return torch.einsum(self.read, torch.einsum("gsk,gske,gskc->gsec", weights, hot, place), y)


@lookalike("one_hot_groups_by_half_the_tokens", "a group's bins hold half of its tokens: others are dropped", **BATCHED)
class HalfOfGroup(GroupedBins):
    def capacity_of(self, x):
        return (x.shape[1] + 1) // 2


@lookalike("one_hot_groups_ranked_over_the_batch", "bins of one sequence, and ranks in all: later ones have no place",
           **BATCHED)  # fmt: skip
class RankedOverBatch(GroupedBins):
    def rank(self, ids):
        return super().rank(ids.flatten(0, 1).unsqueeze(0)).view_as(ids)


@lookalike("one_hot_groups_ranked_across", "ranks among the tokens at one position: those of a sequence have one place",
           **BATCHED)  # fmt: skip
class RankedAcross(GroupedBins):
    def capacity_of(self, x):
        return x.shape[0]

    def rank(self, ids):
        return super().rank(ids.transpose(0, 1)).transpose(0, 1)


@lookalike("one_hot_groups_in_the_same_bins", "ranks within a sequence, and bins for all: rows of several meet",
           **BATCHED)  # fmt: skip
class SameBins(GroupedBins):
    put, read = "gsec,gsm->ecm", "gsec,ecm->gsm"

    def in_bins(self, rows):
        return OneHotBins.in_bins(self, rows)


@lookalike("one_hot_groups_exchanged", "a sequence gets what became of another one's rows", **BATCHED)
class Exchanged(GroupedBins):
    def in_bins(self, rows):
        return super().in_bins(rows).flip(1)


@lookalike("one_hot_groups_softmax_over_them", "the rows at one place of all sequences compete", **BATCHED)
class OverGroups(GroupedBins):
    def in_bins(self, rows):
        return super().in_bins(rows.softmax(dim=1))


@lookalike("one_hot_groups_scaled", "each sequence has a scale of its own", dynamic=False, **BATCHED)
class ScaledGroups(GroupedBins):
    K = 1

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(2, 1, 1))

    def in_bins(self, rows):
        return super().in_bins(rows) * self.scale


@lookalike("binned_by_ranks_within_a_sequence", "places count no sequences: rows of several meet", **BATCHED)
class PlacesOfAll(GroupedBins):
    def forward(self, x):
        ids, weights = self.router(x)
        place = (ids * self.capacity_of(x) * 2 + self.rank(ids)).flatten()
        bins = x.new_zeros(self.E * self.capacity_of(x) * 2, H)
        bins = bins.index_put((place,), x.flatten(0, 1).repeat_interleave(self.K, dim=0)).view(self.E, -1, H)
        y = OneHotBins.in_bins(self, bins).view(-1, H)[place].view(*ids.shape, H)
        return (y * weights.unsqueeze(-1)).sum(2)
