"""What looks like layers of `styles/serving.py`, with one thing wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lookalikes_by_columns import LOOKALIKES, lookalike
from styles.base import BATCHED, H
from styles.serving import DeepSpeedTop1, Iterative, LargestCount

__all__ = ["LOOKALIKES", "lookalike"]


@lookalike("bins_as_long_as_the_largest_count_of_others", "bins are as long as other ids ask for")
class LargestOfOthers(LargestCount):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        counts = torch.bincount(flat, minlength=self.E)
        capacity = torch.bincount(self.router(x.flip(-1))[0].view(-1), minlength=self.E).max().item()
        rank = (F.one_hot(flat, self.E).cumsum(0) - 1).gather(1, flat[:, None])[:, 0]
        place = torch.where(rank < capacity, flat * capacity + rank, self.E * capacity)
        bins = x.new_zeros(self.E * capacity + 1, H).index_copy(0, place, x.repeat_interleave(self.K, 0))
        rows = bins[:-1].view(self.E, capacity, H) + 0 * counts.sum()
        rows = torch.bmm(self.act(torch.bmm(rows, self.w_gate), torch.bmm(rows, self.w_up)), self.w_down)
        rows = torch.cat([rows.view(-1, H), x.new_zeros(1, H)])[place]
        return (rows.view(-1, self.K, H) * weights.unsqueeze(-1)).sum(1)


@lookalike("one_hot_sec_top1_one_place_fewer", "the last row of the expert with most is dropped", **BATCHED)
class OnePlaceFewer(DeepSpeedTop1):
    def gating(self, logits):
        gates = F.softmax(logits, dim=1)
        mask = F.one_hot(torch.argmax(gates, dim=1), num_classes=self.E)
        capacity = torch.max(torch.sum(mask, dim=0)).item()
        locations = torch.sum((torch.cumsum(mask, dim=0) - 1) * mask, dim=1)
        places = (locations.unsqueeze(-1) == torch.arange(1, capacity + 1)).float()
        return (gates * mask.float()).unsqueeze(2) * places.unsqueeze(1)


@lookalike("all_experts_weights_times_mask_of_others", "weights are those of other slots")
class OtherMask(Iterative):
    def forward(self, x):
        ids, weights = self.router(x)
        out, inner = 0, self.down.shape[-1]
        for e in range(self.E):
            share = (weights * (ids.flip(-1) == e)).sum(dim=-1, keepdim=True)
            h = F.linear(x, self.gate_up[e])
            out = out + F.linear(h[:, inner:] * F.silu(h[:, :inner]), self.down[(e + 1) % self.E]).cumsum(0) * share
        return out
