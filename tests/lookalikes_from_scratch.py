"""What looks like the layers of `styles/from_scratch.py`, with one thing wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lookalikes_choices import BATCHED, LOOKALIKES, lookalike
from styles.base import H, Listed, MaxOfSoftmax, Sequence, Simple, TwoArgmaxes

__all__ = ["LOOKALIKES", "lookalike"]


@lookalike("table_slots_crossed", "each expert gets the weight of the token's other slot")
class SlotsCrossed(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E)
        for k in range(self.K):
            table = table.scatter(-1, ids[:, k : k + 1], weights[:, self.K - 1 - k : self.K - k])
        return (table.unsqueeze(-1) * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)


@lookalike("table_slot_left_out", "one of the token's slots never comes into the table")
class SlotLeftOut(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E)
        for k in (0, 0):
            table = table.scatter(-1, ids[:, k : k + 1], weights[:, k : k + 1])
        return (table.unsqueeze(-1) * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)


@lookalike("where_weight_of_first_slot", "both of a token's experts get the weight of its first slot")
class FirstWeight(Listed):
    kind = Sequence

    def forward(self, x):
        ids, weights = self.router(x)
        out = 0
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1, keepdim=True)
            out = out + torch.where(mask, expert(x) * weights[:, :1], torch.zeros_like(x))
        return out


@lookalike("mask_of_features", "as many slots as features: the mask is one of features")
class MaskOfFeatures(Simple):
    E = K = H

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            out = out + torch.where(ids == e, self.expert(x, e), torch.zeros_like(x)) * weights[:, :1]
        return out


@lookalike("where_next_expert", "a token's row comes from another expert where it is weighted", **BATCHED)
class NextExpert(Simple):
    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            rows = torch.where(ids == e, self.expert(x, e), torch.zeros_like(x))
            out = out + rows * (weights * (ids == (e + 1) % self.E))
        return out


@lookalike("parts_end_where_they_begin", "rows end where they begin: each expert takes those of the one before")
class EndsAreStarts(Simple):
    def forward(self, x):
        ids, weights = self.router(x)
        order = ids.flatten().argsort(stable=True)
        ends = torch.searchsorted(ids.flatten()[order], torch.arange(self.E)).tolist()
        out, start = torch.zeros_like(x), 0
        for e, end in enumerate(ends):
            places = order[start:end]
            token, start = places // self.K, end
            out.index_add_(0, token, self.expert(x[token], e) * weights.flatten()[places, None])
        return out


@lookalike("slot_of_a_smaller_id", "the weight is that of the token's smallest id", through="moe_fx.export")
class SlotOfSmallest(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if not mask.any():
                continue
            token = mask.any(dim=-1).nonzero().squeeze(-1)
            slot = (ids[token] <= e).int().argmax(dim=-1, keepdim=True)
            out.index_add_(0, token, expert(x[token]) * weights[token].gather(-1, slot))
        return out


@lookalike("mask_written_in_part", "no expert has the first token, as a part of the mask is written in place")
class MaskWrittenInPart(Simple):
    def forward(self, x):
        ids, weights = self.router(x)
        mask = F.one_hot(ids, self.E).permute(2, 1, 0)
        mask[:, :, 0] = 0
        out = torch.zeros_like(x)
        for e in range(self.E):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


@lookalike("dropped_mask_written_in_part", "no expert has the first token, whatever room there is")
class DroppedMaskWrittenInPart(Simple):
    def forward(self, x):
        ids, weights = self.router(x)
        hot = F.one_hot(ids, self.E)
        mask = hot * (hot.cumsum(0) < 4)
        mask[0].fill_(0)
        mask = mask.permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e in range(self.E):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


@lookalike("table_written_in_part", "of a table of routing weights, a column is halved in place")
class TableWrittenInPart(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
        table[:, 0].mul_(0.5)
        return (table.unsqueeze(-1) * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)


class InTurn(Listed):
    """The best expert, then the best of the others, as rows of a table."""

    route = TwoArgmaxes

    def masks(self, first, second):
        raise NotImplementedError

    def forward(self, x):
        ids, weights = self.router(x)
        first, second = self.masks(*ids.unbind(1))
        table = weights[:, :1] * first.to(x.dtype) + weights[:, 1:] * second.to(x.dtype)
        return (table.unsqueeze(-1) * torch.stack([expert(x) for expert in self.experts], 1)).sum(1)


@lookalike("in_turn_one_column", "the weight of tokens that chose the first expert is that of all experts")
class OneColumn(InTurn):
    def masks(self, first, second):
        return first.unsqueeze(-1) == torch.arange(1), second.unsqueeze(-1) == torch.arange(self.E)


@lookalike("in_turn_mask_written_in_part", "the first token has its second choice only")
class InTurnMaskWritten(InTurn):
    def masks(self, first, second):
        best = F.one_hot(first, self.E)
        best[0].fill_(0)
        return best, F.one_hot(second, self.E)
