"""What looks like the layers of `styles/from_scratch.py`, with one thing wrong."""

from __future__ import annotations

import torch
from lookalikes_choices import BATCHED, LOOKALIKES, lookalike
from styles.base import H, Listed, MaxOfSoftmax, Sequence, Simple

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
