"""What looks like layers of `styles/serving.py`, with one thing wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lookalikes_by_columns import LOOKALIKES, lookalike
from styles.base import BATCHED, H
from styles.serving import Counted, DeepSpeedTop1, Iterative, LargestCount, LargestRank, Tutel
from styles.weighted_stack import Weighted

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


@lookalike("bins_one_place_fewer_than_the_largest_rank", "the last row of the expert with most is dropped")
class RankTooFew(LargestRank):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        rank = (F.one_hot(flat, self.E).cumsum(0) - 1).gather(1, flat[:, None]).squeeze(1)
        capacity = rank.max().item()
        torch._check(capacity >= 2)
        kept = rank < capacity
        bins = x.new_zeros(self.E, capacity, H)
        place = (flat, torch.where(kept, rank, 0))
        bins = bins.index_put(place, x.repeat_interleave(self.K, 0) * kept[:, None], accumulate=True)
        rows = torch.bmm(self.act(torch.bmm(bins, self.w_gate), torch.bmm(bins, self.w_up)), self.w_down)
        return ((rows[place] * kept[:, None]).view(-1, self.K, H) * weights.unsqueeze(-1)).sum(1)


@lookalike("bins_filled_choice_by_choice_from_the_start", "second choices overwrite the places of first ones")
class FromTheStart(Tutel):
    def forward(self, x):
        scores = self.router.linear(x).softmax(-1)
        ids = [each.view(-1) for each in torch.topk(scores, self.K, dim=1).indices.chunk(self.K, dim=1)]
        masks = [F.one_hot(each, self.E) for each in ids]
        ranks = [((torch.cumsum(mask, dim=0) - 1) * mask).sum(dim=1) for mask in masks]
        capacity = x.size(0) * self.K
        bins = torch.zeros(self.E * capacity, H)
        for each, rank in zip(ids, ranks, strict=True):
            bins.index_add_(0, each * capacity + rank, x)
        rows = bins.view(self.E, capacity, H)
        rows = torch.bmm(self.act(torch.bmm(rows, self.w_gate), torch.bmm(rows, self.w_up)), self.w_down).view(-1, H)
        return sum(rows[each * capacity + rank] * (scores * mask).sum(1)[:, None]
                   for each, rank, mask in zip(ids, ranks, masks, strict=True))  # fmt: skip


@lookalike("rows_counted_behind_experts_of_others", "an expert's rows begin where other ids say")
class BeginElsewhere(Counted):
    def forward(self, x):
        ids, weights = self.router(x)
        flat, other = ids.flatten(), self.router(x.flip(-1))[0].flatten()
        row = self.rows_of(other)[1] * 0 + self.rows_of(flat)[1].flip(0)
        rows = torch.zeros(row.shape[0], H).index_copy(0, row, x.repeat_interleave(self.K, 0))
        numbers = flat.sort().values
        gate, up = torch.bmm(rows[:, None], self.gate_up.mT[numbers])[:, 0].cumsum(0).chunk(2, -1)
        rows = torch.bmm((F.silu(gate) * up)[:, None], self.down.mT[numbers])[:, 0].cumsum(0)
        return torch.einsum("tkh,tk->th", rows[row].view(-1, self.K, H), weights)


@lookalike("weighted_results_stacked_softly", "every expert is weighted: a soft mixture")
class Softly(Weighted):
    def table(self, x):
        return self.router.linear(x).softmax(-1)


@lookalike("weighted_results_stacked_by_the_next_column", "an expert is weighted as another, and the last by none")
class NextColumn(Weighted):
    def column(self, table, e):
        return (table[..., e : e + 1] + 1).roll(1, 0)


@lookalike("weighted_results_stacked_behind_a_bias", "what is added is not zero where the weight is")
class Biased(Weighted):
    def forward(self, x):
        table = self.table(x)
        rows = [expert(x) * self.column(table, e) + table.mean() for e, expert in enumerate(self.experts)]
        return torch.stack(rows).sum(0)
