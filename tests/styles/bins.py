"""A bin of rows for each expert, large enough that no token is dropped."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import Apart, H, Interleaved, MaxOfSoftmax, SigmoidWithBias, Simple, Stacked, style, swiglu


def ranks(flat, experts):
    """How many rows of its expert come before each."""
    one_hot = F.one_hot(flat, experts)
    return ((one_hot.cumsum(dim=0) - 1) * one_hot).sum(dim=-1)


class Bins(Apart):
    """Rows are put into bins and read back; weights at the end."""

    act = staticmethod(swiglu)

    def in_bins(self, bins):
        return torch.bmm(F.silu(torch.bmm(bins, self.w_gate)) * torch.bmm(bins, self.w_up), self.w_down)

    def weighted(self, y, weights):
        return (y.view(-1, self.K, H) * weights.unsqueeze(-1)).sum(dim=1)


@style("binned_bmm_capacity_of_all_tokens")
class Binned(Bins):
    """A bin of T rows per expert, filled by rank, so that nothing can be dropped."""

    def forward(self, x):
        ids, weights = self.router(x)
        tokens, flat = x.shape[0], ids.flatten()
        place = flat * tokens + ranks(flat, self.E)
        bins = x.new_zeros(self.E * tokens, H)
        bins[place] = x.repeat_interleave(self.K, dim=0)
        y = self.in_bins(bins.view(self.E, tokens, H)).view(-1, H)[place]
        return self.weighted(y, weights)


@style("binned_by_expert_and_rank")
class TwoIndices(Bins):
    """Bins are indexed by expert and rank; ranks are looked up among the running counts."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        counts = F.one_hot(flat, self.E).cumsum(dim=0)
        rank = counts.gather(1, flat.unsqueeze(1)).squeeze(1) - 1
        bins = x.new_zeros(self.E, x.shape[0], H)
        bins[flat, rank] = x[torch.arange(flat.shape[0]) // self.K]
        return self.weighted(self.in_bins(bins)[flat, rank], weights)


@style("binned_with_masks_of_what_is_kept")
class Masked(Bins):
    """Capacity for every slot; what does not fit would go to a last row and count nothing."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        capacity = flat.shape[0]
        rank = ranks(flat, self.E)
        kept = rank < capacity
        place = torch.where(kept, flat * capacity + rank, self.E * capacity)
        bins = x.new_zeros(self.E * capacity + 1, H).index_copy(0, place, x.repeat_interleave(self.K, dim=0))
        y = self.in_bins(bins[:-1].view(self.E, capacity, H)).view(-1, H)
        y = y[place.clamp(max=self.E * capacity - 1)] * (weights.flatten() * kept).unsqueeze(-1)
        return y.view(-1, self.K, H).sum(dim=1)


@style("binned_choice_by_choice_index_add_tutel")
class Tutel(Interleaved):
    """First choices come before second ones; locations, added into zeros, read back choice by choice; biases."""

    def forward(self, x):
        ids, weights = self.router(x)
        tokens = x.shape[0]
        flat = ids.t().reshape(-1)
        one_hot = torch.zeros(flat.shape[0], self.E, dtype=torch.int64).scatter(1, flat.unsqueeze(1), 1)
        location = torch.sum((torch.cumsum(one_hot, dim=0) - 1) * one_hot, dim=1)
        place = flat * tokens + location
        bins = torch.zeros(self.E * tokens, H, dtype=x.dtype).index_add(0, place, x.repeat(self.K, 1))
        h = torch.bmm(bins.view(self.E, tokens, H), self.gate_up_proj) + self.gate_up_proj_bias[:, None]
        y = torch.bmm(self.act(h), self.down_proj) + self.down_proj_bias[:, None]
        y = y.view(-1, H)[place].view(self.K, tokens, H)
        return (y * weights.t().unsqueeze(-1)).sum(dim=0)


@style("binned_sorted_rows_starts_by_counts")
class SortedBins(Bins):
    """Rows sorted by expert lie in bins one behind the other: a row's rank is how far behind the first it is."""

    def forward(self, x):
        ids, weights = self.router(x)
        tokens, flat = x.shape[0], ids.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.E)
        starts = counts.cumsum(0) - counts
        expert = flat[order]
        place = expert * tokens + torch.arange(flat.shape[0]) - starts[expert]
        bins = x.new_zeros(self.E * tokens, H)
        bins[place] = x[order // self.K]
        y = self.in_bins(bins.view(self.E, tokens, H)).view(-1, H)[place]
        y = y * weights.reshape(-1)[order].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, order // self.K, y)


@style("binned_double_argsort_searchsorted")
class DoubleSortedBins(Bins):
    """Ranks by the order of the order; bins by expert and rank."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        starts = torch.searchsorted(flat[order], torch.arange(self.E))
        rank = order.argsort() - starts[flat]
        bins = x.new_zeros(self.E, flat.shape[0], H)
        bins[flat, rank] = x.repeat_interleave(self.K, dim=0)
        return self.weighted(self.in_bins(bins)[flat, rank], weights)


@style("one_hot_dispatch_combine_tec_gshard")
class GShard(Simple):
    """GShard with bins that hold every token: the second slot's ranks come after the first's."""

    def forward(self, x):
        ids, weights = self.router(x)
        tokens = x.shape[0]
        one_hot = F.one_hot(ids, self.E).transpose(0, 1).reshape(-1, self.E)
        rank = ((one_hot.cumsum(0) - 1) * one_hot).sum(-1).view(self.K, tokens).transpose(0, 1)
        bins = (rank.unsqueeze(-1) == torch.arange(tokens)).to(x.dtype)
        combine = torch.einsum("tk,tke,tkc->tec", weights, F.one_hot(ids, self.E).to(x.dtype), bins)
        dispatch = combine.bool().to(x.dtype)
        rows = torch.einsum("tec,tm->ecm", dispatch, x)
        y = torch.einsum("eci,ehi->ech", F.relu(torch.einsum("ecm,eim->eci", rows, self.up)), self.down)
        return torch.einsum("tec,ecm->tm", combine, y)


@style("one_hot_dispatch_without_weights_tec", dynamic=False)
class Dispatch(Interleaved):
    """Dispatch and combine are made apart; biases."""

    def forward(self, x):
        ids, weights = self.router(x)
        hot = F.one_hot(ids, self.E)
        rank = ((hot.view(-1, self.E).cumsum(0) - 1).view_as(hot) * hot).sum(-1)
        place, hot = F.one_hot(rank, x.shape[0]).to(x.dtype), hot.to(x.dtype)
        dispatch = torch.einsum("ske,skc->sec", hot, place)
        rows = torch.einsum("sec,sm->ecm", dispatch, x)
        h = torch.einsum("ecm,emi->eci", rows, self.gate_up_proj) + self.gate_up_proj_bias.unsqueeze(1)
        y = torch.einsum("eci,eim->ecm", self.act(h), self.down_proj) + self.down_proj_bias.unsqueeze(1)
        return torch.einsum("sk,ske,skc,ecm->sm", weights, hot, place, y)


@style("one_hot_sec_top1_deepspeed", dynamic=False)
class DeepSpeedTop1(Simple):
    """DeepSpeed, one expert per token: a mask of what fits, gates from the masked scores, capacity of all tokens."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        gates = F.softmax(self.router.linear(x), dim=1)
        capacity = gates.shape[0]
        mask = F.one_hot(torch.argmax(gates, dim=1), num_classes=self.E)
        locations = torch.cumsum(mask, dim=0) - 1
        mask = mask * torch.lt(locations, capacity)
        locations_s = torch.sum(locations * mask, dim=1)
        gates = gates * mask.float()
        locations_sc = F.one_hot(locations_s, num_classes=capacity).float()
        combine = torch.einsum("se,sc->sec", gates, locations_sc)
        dispatch = combine.bool()
        rows = torch.einsum("sec,sm->ecm", dispatch.type_as(x), x)
        y = torch.bmm(F.relu(torch.bmm(rows, self.up.mT)), self.down.mT)
        return torch.einsum("sec,ecm->sm", combine.type_as(x), y)


@style("one_hot_switch_mesh_capacity", dynamic=False)
class SwitchCapacity(Simple):
    """Switch in mesh tensorflow: places by expert, of which those beyond the capacity count nothing."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        ids, gate = self.router(x)
        capacity = x.shape[0]
        mask = F.one_hot(ids[:, 0], self.E)
        position = (torch.cumsum(mask, dim=0) - 1) * mask
        mask = mask * torch.less(position, capacity)
        flat_mask = mask.sum(dim=-1)
        combine = gate[:, :, None] * flat_mask[:, None, None] * F.one_hot(ids[:, 0], self.E)[:, :, None]
        combine = combine * F.one_hot(position, capacity)
        dispatch = (combine != 0).to(x.dtype)
        rows = torch.einsum("th,tec->ech", x, dispatch)
        h = F.relu(torch.einsum("ech,eih->eci", rows, self.up))
        return torch.einsum("ech,tec->th", torch.einsum("eci,ehi->ech", h, self.down), combine)


@style("one_hot_weights_per_slot_matmul")
class ChosenWeights(Stacked):
    """Each slot's weights are the product of its one-hot row with the stack."""

    route = SigmoidWithBias

    def forward(self, x):
        ids, weights = self.router(x)
        one_hot = F.one_hot(ids, self.E).to(x.dtype)
        gate_up = torch.einsum("tke,enh->tknh", one_hot, self.gate_up)
        down = torch.einsum("tke,ehi->tkhi", one_hot, self.down)
        gate, up = torch.einsum("th,tknh->tkn", x, gate_up).chunk(2, dim=-1)
        return torch.einsum("tkhi,tki,tk->th", down, swiglu(gate, up), weights)


@style("binned_by_running_counts_of_a_token_mask")
class TokenMask(Bins):
    """Ranks are looked up in the running counts of a mask [T, E]."""

    def forward(self, x):
        ids, weights = self.router(x)
        mask = torch.zeros(x.shape[0], self.E, dtype=torch.int64).scatter(1, ids, 1)
        rank = (mask.cumsum(dim=0) - 1).gather(1, ids)
        bins = x.new_zeros(self.E, x.shape[0], H)
        bins[ids, rank] = x.unsqueeze(1).expand(-1, self.K, -1)
        y = self.in_bins(bins)[ids, rank]
        return (y * weights.unsqueeze(-1)).sum(dim=1)


@style("binned_scatter_and_gather")
class Scattered(Bins):
    """Places as wide as rows."""

    def forward(self, x):
        ids, weights = self.router(x)
        tokens, flat = x.shape[0], ids.flatten()
        wide = (flat * tokens + ranks(flat, self.E)).unsqueeze(1).expand(-1, H)
        bins = x.new_zeros(self.E * tokens, H).scatter(0, wide, x.repeat_interleave(self.K, dim=0))
        return self.weighted(self.in_bins(bins.view(self.E, tokens, H)).view(-1, H).gather(0, wide), weights)
