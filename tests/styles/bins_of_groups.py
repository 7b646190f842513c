"""A bin of rows for each expert and group of tokens: ranks are counted within a batch's sequences, as GShard has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import BATCHED, H, Interleaved, MaxOfSoftmax, Simple, Unnormalised, style


class Grouped(Simple):
    """Dispatch and combine [G, S, E, C]; a bin holds all tokens of a group."""

    def in_bins(self, combine, x, rows="gsec,gsm->egcm"):
        dispatched = torch.einsum(rows, combine.bool().to(x.dtype), x)
        y = torch.einsum("egci,ehi->egch", F.relu(torch.einsum("egcm,eim->egci", dispatched, self.up)), self.down)
        return torch.einsum("gsec,egcm->gsm", combine, y)


@style("one_hot_gsec_choice_by_choice_gshard", **BATCHED)
class GShardGroups(Grouped):
    """The second choices of a group come behind all of its first ones; capacity of a sequence, however long."""

    route = Unnormalised

    def forward(self, x):
        ids, weights = self.router(x)
        groups, tokens = x.shape[:2]
        one_hot = F.one_hot(ids, self.E).transpose(1, 2).reshape(groups, -1, self.E)
        rank = ((one_hot.cumsum(dim=1) - 1) * one_hot).sum(-1).view(groups, self.K, tokens).transpose(1, 2)
        bins = (rank.unsqueeze(-1) == torch.arange(tokens)).to(x.dtype)
        combine = torch.einsum("gsk,gske,gskc->gsec", weights, F.one_hot(ids, self.E).to(x.dtype), bins)
        return self.in_bins(combine, x)


@style("one_hot_gsec_top1_by_comparison", **BATCHED)
class ComparedGroups(Grouped):
    """One expert per token; masks and places by comparison."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        ids, gate = self.router(x)
        mask = (ids == torch.arange(self.E)).to(torch.int64)
        rank = (mask.cumsum(dim=1) * mask).sum(dim=-1, keepdim=True) - 1
        place = (rank == torch.arange(x.shape[1])).to(x.dtype)
        return self.in_bins(torch.einsum("gs,gse,gsc->gsec", gate[..., 0], mask.to(x.dtype), place), x)


@style("one_hot_bsec_switch_mesh_capacity", dynamic=False, **BATCHED)
class SwitchGroups(Simple):
    """Switch in mesh tensorflow, a group for each sequence; the batch stands before the experts in the bins."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        ids, gate = self.router(x)
        capacity = x.shape[1]
        mask = F.one_hot(ids[..., 0], self.E)
        position = (torch.cumsum(mask, dim=1) - 1) * mask
        mask = mask * torch.less(position, capacity)
        flat_mask = mask.sum(dim=-1)
        combine = gate[..., None] * flat_mask[..., None, None] * F.one_hot(ids[..., 0], self.E)[..., None]
        combine = combine * F.one_hot(position, capacity)
        rows = torch.einsum("bsh,bsec->bech", x, (combine != 0).to(x.dtype))
        h = F.relu(torch.einsum("bech,eih->beci", rows, self.up))
        return torch.einsum("bech,bsec->bsh", torch.einsum("beci,ehi->bech", h, self.down), combine)


@style("one_hot_bsec_bins_of_all_groups_in_a_bmm", dynamic=False, **BATCHED)
class MergedGroups(Interleaved):
    """The bins of all groups are merged for each expert; ranks token by token; biases."""

    route = Unnormalised

    def forward(self, x):
        ids, weights = self.router(x)
        hot = F.one_hot(ids, self.E)
        rank = ((hot.flatten(1, 2).cumsum(1) - 1).view_as(hot) * hot).sum(-1)
        place, hot = F.one_hot(rank, x.shape[1]).to(x.dtype), hot.to(x.dtype)
        rows = torch.einsum("bsd,bsec->ebcd", x, torch.einsum("bske,bskc->bsec", hot, place))
        h = torch.bmm(rows.flatten(1, 2), self.gate_up_proj) + self.gate_up_proj_bias.unsqueeze(1)
        y = (torch.bmm(self.act(h), self.down_proj) + self.down_proj_bias.unsqueeze(1)).view_as(rows)
        return torch.einsum("ebcd,bsec->bsd", y, torch.einsum("bsk,bske,bskc->bsec", weights, hot, place))


@style("one_hot_gsec_ranks_of_a_token_mask", dynamic=False, **BATCHED)
class MaskGroups(Grouped):
    """Ranks are looked up in the running counts of a mask [G, S, E]."""

    route = Unnormalised

    def forward(self, x):
        ids, weights = self.router(x)
        hot = F.one_hot(ids, self.E)
        rank = (hot.sum(dim=2).cumsum(dim=1) - 1).gather(2, ids)
        place = F.one_hot(rank, x.shape[1]).to(x.dtype)
        return self.in_bins(torch.einsum("gsk,gske,gskc->gsec", weights, hot.to(x.dtype), place), x)


@style("one_hot_gsec_groups_of_tokens", dynamic=False)
class TokenGroups(ComparedGroups):
    """Tokens without a batch, taken three at a time."""

    def forward(self, x):
        return super().forward(x.view(-1, 3 if x.shape[0] % 3 == 0 else 1, H)).view(x.shape)
