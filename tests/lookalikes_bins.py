"""Layers with bins, or with one-hot rows, that drop tokens or mix them up; see `lookalikes.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lookalikes_from_scratch import LOOKALIKES, lookalike
from styles.base import H, Router, Simple, Stacked, swiglu
from styles.bins import Bins, ranks

__all__ = ["LOOKALIKES"]


class OneHotBins(Simple):
    """Dispatch and combine by one-hot rows; capacity of all tokens."""

    def capacity_of(self, x):
        return x.shape[0]

    def rank(self, ids):
        one_hot = F.one_hot(ids, self.E).reshape(-1, self.E)
        return ((one_hot.cumsum(0) - 1) * one_hot).sum(-1).view_as(ids)

    def read_rank(self, ids):
        return self.rank(ids)

    def hot(self, ids, rank, x):
        place = (rank.unsqueeze(-1) == torch.arange(self.capacity_of(x))).to(x.dtype)
        return F.one_hot(ids, self.E).to(x.dtype), place

    def in_bins(self, rows):
        return torch.einsum("eci,ehi->ech", F.relu(torch.einsum("ecm,eim->eci", rows, self.up)), self.down)

    def forward(self, x):
        ids, weights = self.router(x)
        dispatch = torch.einsum("tke,tkc->tec", *self.hot(ids, self.rank(ids), x))
        y = self.in_bins(torch.einsum("tec,tm->ecm", dispatch, x))
        return torch.einsum("tk,tke,tkc,ecm->tm", weights, *self.hot(ids, self.read_rank(ids), x), y)


@lookalike("one_hot_bins_by_capacity_factor", "a bin holds 1.25 times what an even share would be: others are dropped")
class CapacityFactor(OneHotBins):
    def capacity_of(self, x):
        return x.shape[0] * self.K * 5 // (4 * self.E)


@lookalike(
    "one_hot_bins_ranked_in_two_orders", "rows are put by token and read by choice: those of other tokens come back"
)
class TwoOrders(OneHotBins):
    def read_rank(self, ids):
        return self.rank(ids.t()).t()


@lookalike("one_hot_bins_ranked_apart", "ranks are counted for each choice apart: two rows of a bin have one place")
class RankedApart(OneHotBins):
    def rank(self, ids):
        one_hot = F.one_hot(ids, self.E)
        return ((one_hot.cumsum(0) - 1) * one_hot).sum(-1)


@lookalike("one_hot_bins_counted_in_bfloat16", "beyond 256 rows, a count in bfloat16 stands still")
class Rounded(OneHotBins):
    def rank(self, ids):
        one_hot = F.one_hot(ids, self.E).reshape(-1, self.E).bfloat16()
        return ((one_hot.cumsum(0) - 1) * one_hot).sum(-1).long().view_as(ids)


@lookalike("one_hot_bins_counted_past_other_experts", "what comes before in all rows of one-hot numbers is no rank")
class Flattened(OneHotBins):
    def read_rank(self, ids):
        one_hot = F.one_hot(ids, self.E)
        return ((one_hot.flatten().cumsum(0).view_as(one_hot) - 1) * one_hot).sum(-1)


@lookalike("one_hot_bins_from_one_up", "the first row of an expert goes to place 1, and its last one to none")
class FromOne(OneHotBins):
    def rank(self, ids):
        return super().rank(ids) + 1


@lookalike("one_hot_bins_of_all_pairs", "the expert of one choice and the place of another: sums over both")
class AllPairs(OneHotBins):
    def forward(self, x):
        ids, weights = self.router(x)
        expert, place = self.hot(ids, self.rank(ids), x)
        y = self.in_bins(torch.einsum("tke,tjc,tm->ecm", expert, place, x))
        return torch.einsum("tk,tke,tkc,ecm->tm", weights, expert, place, y)


@lookalike("one_hot_bins_weights_that_cancel", "a row is not dispatched if a slot's two weights add up to zero")
class Cancelling(OneHotBins):
    def forward(self, x):
        ids, weights = self.router(x)
        (hot, place), pairs = self.hot(ids, self.rank(ids), x), torch.stack([weights, weights - 0.5], -1)
        combine = pairs[:, :, None, None] * hot[:, :, :, None, None] * place[:, :, None, :, None]
        combine = combine.sum(-1).sum(1)
        return torch.einsum(
            "tec,ecm->tm", combine, self.in_bins(torch.einsum("tec,tm->ecm", (combine != 0).to(x.dtype), x))
        )


@lookalike("one_hot_bins_softmax_over_places", "the rows of a bin compete")
class OverPlaces(OneHotBins):
    def in_bins(self, rows):
        return super().in_bins(rows.softmax(dim=1))


@lookalike(
    "soft_moe", "every place of a bin is a mean of all tokens, and every token a mean of all places", dynamic=False
)
class SoftMoE(OneHotBins):
    def __init__(self) -> None:
        super().__init__()
        self.slots = torch.nn.Parameter(torch.randn(self.E, 3, H))

    def forward(self, x):
        logits = torch.einsum("tm,ecm->tec", x, self.slots)
        y = self.in_bins(torch.einsum("tec,tm->ecm", logits.softmax(dim=0), x))
        return torch.einsum("tec,ecm->tm", logits.flatten(1).softmax(dim=1).view_as(logits), y)


@lookalike("expert_choice_one_hot", "experts choose tokens, by one-hot rows [E, C, T]", dynamic=False)
class ExpertChoice(OneHotBins):
    def forward(self, x):
        weights, token = self.router.linear(x).softmax(dim=-1).t().topk(3, dim=-1)
        chosen = F.one_hot(token, x.shape[0]).to(x.dtype)
        y = self.in_bins(torch.einsum("ect,tm->ecm", chosen, x))
        return torch.einsum("ec,ect,ecm->tm", weights, chosen, y)


@lookalike("one_hot_weights_of_another_choice", "a slot's last weight is of another router's expert")
class OtherWeights(Stacked):
    def __init__(self) -> None:
        super().__init__()
        self.other = Router(self.E, self.K)

    def forward(self, x):
        (ids, weights), (others, _) = self.router(x), self.other(x)
        hot, other = F.one_hot(ids, self.E).to(x.dtype), F.one_hot(others, self.E).to(x.dtype)
        gate, up = torch.einsum("th,enh,tke->tkn", x, self.gate_up, hot).chunk(2, dim=-1)
        return torch.einsum("tki,ehi,tke,tk->th", swiglu(gate, up), self.down, other, weights)


@lookalike("binned_by_ids_of_others", "rows lie in the bins of one routing, at ranks of another")
class OtherIds(Bins):
    def __init__(self) -> None:
        super().__init__()
        self.other = Router(self.E, self.K)

    def forward(self, x):
        (ids, weights), (others, _) = self.router(x), self.other(x)
        tokens, flat = x.shape[0], ids.flatten()
        place = flat * tokens + ranks(others.flatten(), self.E)
        bins = x.new_zeros(self.E * tokens, H).index_copy(0, place, x.repeat_interleave(self.K, dim=0))
        return self.weighted(self.in_bins(bins.view(self.E, tokens, H)).view(-1, H)[place], weights)


class SortedBins(Bins):
    """Rows sorted by expert, in bins one behind the other."""

    def capacity_of(self, x):
        return x.shape[0]

    def begin(self, counts):
        return counts.cumsum(0) - counts

    def forward(self, x):
        ids, weights = self.router(x)
        flat, capacity = ids.reshape(-1), self.capacity_of(x)
        order = flat.argsort(stable=True)
        expert = flat[order]
        rank = torch.arange(flat.shape[0]) - self.begin(torch.bincount(flat, minlength=self.E))[expert]
        place = expert * capacity + rank
        bins = x.new_zeros(self.E * capacity + flat.shape[0], H).index_copy(0, place, x[order // self.K])
        y = self.in_bins(bins[: self.E * capacity].view(self.E, capacity, H)).view(-1, H)
        y = y[place.clamp(max=self.E * capacity - 1)] * weights.reshape(-1)[order].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, order // self.K, y)


@lookalike(
    "binned_sorted_into_the_next_bins", "rows beyond a capacity of half the tokens lie in the bin of the next expert"
)
class IntoTheNext(SortedBins):
    def capacity_of(self, x):
        return x.shape[0] // 2


@lookalike("binned_sorted_from_the_end", "ranks are counted back from where the next expert's rows begin")
class FromTheEnd(SortedBins):
    def begin(self, counts):
        return counts.cumsum(0)


@lookalike("binned_by_ranks_added_up", "both slots of a token have the sum of their ranks: rows of two tokens meet")
class RanksAddedUp(Bins):
    def forward(self, x):
        ids, weights = self.router(x)
        mask = torch.zeros(x.shape[0], self.E, dtype=torch.int64).scatter(1, ids, 1)
        counts = ((mask.cumsum(dim=0) - 1) * mask).unsqueeze(1).expand(-1, self.K, -1)
        rank = counts.sum(dim=-1)
        bins = x.new_zeros(self.E, self.K * x.shape[0], H)
        bins = bins.index_put((ids, rank), x.unsqueeze(1).expand(-1, self.K, -1))
        return (self.in_bins(bins)[ids, rank] * weights.unsqueeze(-1)).sum(dim=1)


@lookalike("binned_scatter_of_half_the_columns", "only the first half of each row is put into the bins")
class HalfRows(Bins):
    def forward(self, x):
        ids, weights = self.router(x)
        tokens, flat = x.shape[0], ids.flatten()
        place = flat * tokens + ranks(flat, self.E)
        wide = place.unsqueeze(1).expand(-1, H // 2)
        bins = x.new_zeros(self.E * tokens, H).scatter(0, wide, x.repeat_interleave(self.K, dim=0))
        return self.weighted(self.in_bins(bins.view(self.E, tokens, H)).view(-1, H)[place], weights)


@lookalike("binned_read_at_the_next_place", "a slot gets what the row behind its own has become")
class NextPlace(Bins):
    def forward(self, x):
        ids, weights = self.router(x)
        capacity, flat = x.shape[0] + 1, ids.flatten()
        place = flat * capacity + ranks(flat, self.E)
        bins = x.new_zeros(self.E * capacity, H).index_copy(0, place, x.repeat_interleave(self.K, dim=0))
        return self.weighted(self.in_bins(bins.view(self.E, capacity, H)).view(-1, H)[place + 1], weights)


@lookalike("binned_added_to_the_last_bins", "rows are added to what a learned buffer holds")
class NotEmpty(Bins):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.randn(self.E * 12, H))

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        place = flat * 12 + ranks(flat, self.E)
        bins = self.last.index_add(0, place, x.repeat_interleave(self.K, dim=0)).view(self.E, 12, H)
        return self.weighted(self.in_bins(bins).view(-1, H)[place], weights)


@lookalike("binned_mean_of_a_bin", "the mean over an expert's bin is taken from its rows")
class MeanOfBin(Bins):
    def in_bins(self, bins):
        return super().in_bins(bins - bins.mean(dim=1, keepdim=True))

    def forward(self, x):
        ids, weights = self.router(x)
        tokens, flat = x.shape[0], ids.flatten()
        place = flat * tokens + ranks(flat, self.E)
        bins = x.new_zeros(self.E * tokens, H).index_copy(0, place, x.repeat_interleave(self.K, dim=0))
        return self.weighted(self.in_bins(bins.view(self.E, tokens, H)).view(-1, H)[place], weights)
