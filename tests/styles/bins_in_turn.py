"""A mask for each choice: the second choices of an expert's bin stand behind all of its first ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import BATCHED, Interleaved, Simple, style
from styles.bins_of_groups import Grouped


class Apart(Simple):
    """Dispatch and combine [S, E, C]; a bin holds all tokens."""

    def in_bins(self, combine, x):
        rows = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        y = torch.bmm(F.relu(torch.bmm(rows, self.up.mT)), self.down.mT)
        return torch.einsum("sec,ecm->sm", combine.type_as(x), y)


@style("one_hot_sec_top2_deepspeed", dynamic=False)
class DeepSpeedTop2(Apart):
    """DeepSpeed, two experts per token: each choice has a mask and a combine of its own, second ones come behind."""

    def forward(self, x):
        gates = F.softmax(self.router.linear(x), dim=1)
        capacity = 2 * gates.shape[0]
        first = F.one_hot(gates.argmax(dim=1), self.E)
        second = F.one_hot(gates.masked_fill(first.bool(), float("-inf")).argmax(dim=1), self.E)
        locations1 = torch.cumsum(first, dim=0) - 1
        locations2 = torch.cumsum(second, dim=0) - 1 + torch.sum(first, dim=0, keepdim=True)
        combine = 0
        for mask, locations in ((first, locations1), (second, locations2)):
            gate = torch.einsum("se,se->s", gates, mask.float())
            place = F.one_hot(torch.sum(locations * mask, dim=1), num_classes=capacity).float()
            combine = combine + torch.einsum("se,sc->sec", torch.einsum("s,se->se", gate, mask.float()), place)
        return self.in_bins(combine, x)


@style("one_hot_sec_top2_deepspeed_kept_and_normalised", dynamic=False)
class DeepSpeedKept(Apart):
    """DeepSpeed with all it does: what is beyond the capacity (nothing is) is masked, gates add up to one."""

    def forward(self, x):
        gates = F.softmax(self.router.linear(x).float(), dim=1)
        capacity = gates.shape[0]
        mask1 = F.one_hot(torch.argmax(gates, dim=1), num_classes=self.E)
        mask2 = F.one_hot(torch.argmax(gates.masked_fill(mask1.bool(), float("-inf")), dim=1), num_classes=self.E)
        locations1 = torch.cumsum(mask1, dim=0) - 1
        locations2 = torch.cumsum(mask2, dim=0) - 1
        locations2 += torch.sum(mask1, dim=0, keepdim=True)
        mask1 *= torch.lt(locations1, capacity)
        mask2 *= torch.lt(locations2, capacity)
        locations1_s, locations2_s = torch.sum(locations1 * mask1, dim=1), torch.sum(locations2 * mask2, dim=1)
        gates1_s = torch.einsum("se,se->s", gates, mask1.float())
        gates2_s = torch.einsum("se,se->s", gates, mask2.float())
        denom_s = torch.clamp(gates1_s + gates2_s, min=torch.finfo(gates1_s.dtype).eps)
        gates1 = torch.einsum("s,se->se", gates1_s / denom_s, mask1.float())
        gates2 = torch.einsum("s,se->se", gates2_s / denom_s, mask2.float())
        places = [F.one_hot(each, num_classes=capacity).float() for each in (locations1_s, locations2_s)]
        combine = torch.einsum("se,sc->sec", gates1, places[0]) + torch.einsum("se,sc->sec", gates2, places[1])
        return self.in_bins(combine, x)


@style("one_hot_gsec_mask_for_each_choice_gshard", **BATCHED)
class GShardMasks(Grouped):
    """GShard: counted within groups; gates of both choices add up to one."""

    def forward(self, x):
        gates = self.router.linear(x).softmax(dim=-1)
        first = F.one_hot(gates.argmax(dim=-1), self.E)
        second = F.one_hot(gates.masked_fill(first.bool(), float("-inf")).argmax(dim=-1), self.E)
        gate1, gate2 = (gates * first).sum(dim=-1), (gates * second).sum(dim=-1)
        place1 = first.cumsum(dim=1) - 1
        place2 = second.cumsum(dim=1) - 1 + first.sum(dim=1, keepdim=True)
        combine, capacity = 0, torch.arange(x.shape[1])
        for gate, mask, place in ((gate1, first, place1), (gate2, second, place2)):
            bins = ((place * mask).sum(dim=-1).unsqueeze(-1) == capacity).to(x.dtype)
            combine = combine + torch.einsum("gs,gse,gsc->gsec", gate / (gate1 + gate2), mask.to(x.dtype), bins)
        return self.in_bins(combine, x)


@style("one_hot_sec_three_choices_in_a_loop")
class Loop(Interleaved):
    """Tutel's counting: what was chosen before is added up as the loop goes on; masks by comparison; biases."""

    K = 3

    def forward(self, x):
        scores = self.router.linear(x).softmax(dim=1)
        masks = [
            (ids == torch.arange(self.E)).long() for ids in scores.topk(self.K, dim=1).indices.chunk(self.K, dim=1)
        ]
        gates = [(scores * mask).sum(dim=1) for mask in masks]
        denominator = torch.clamp(sum(gates), min=torch.finfo(gates[0].dtype).eps)
        combine, before = 0, None
        for mask, gate in zip(masks, gates, strict=True):
            locations = torch.cumsum(mask, dim=0) - 1
            locations = locations if before is None else locations + before
            total = mask.sum(dim=0, keepdim=True)
            before = total if before is None else before + total
            place = (locations * mask).sum(dim=1, keepdim=True) == torch.arange(x.shape[0])
            combine = combine + (gate / denominator)[:, None, None] * mask[:, :, None] * place[:, None, :]
        rows = torch.einsum("sec,sm->ecm", (combine != 0).to(x.dtype), x)
        y = self.act(torch.bmm(rows, self.gate_up_proj) + self.gate_up_proj_bias[:, None])
        y = torch.bmm(y, self.down_proj) + self.down_proj_bias[:, None]
        return torch.einsum("sec,ecm->sm", combine, y)


@style("one_hot_sec_top2_exclusive_counts_bfloat16", dynamic=False)
class Exclusive(Apart):
    """Mesh tensorflow's counting, how many came before; combine by bmm as in fairseq; the second choice first."""

    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()

    def forward(self, x):
        gates = self.router.linear(x).softmax(dim=-1, dtype=torch.float32)
        top = gates.argmax(dim=-1)
        mask = F.one_hot(top, self.E)
        second = gates.masked_fill(mask.bool(), float("-inf")).argmax(dim=-1)
        mask2 = F.one_hot(second, self.E)
        rank = ((mask.cumsum(dim=0) - mask) * mask).sum(dim=-1)
        rank2 = ((mask.sum(dim=0, keepdim=True) + mask2.cumsum(dim=0) - mask2) * mask2).sum(dim=-1)

        def combine(ids, mask, rank):
            gate = gates.gather(1, ids.unsqueeze(-1)).to(x.dtype) * mask.to(x.dtype)
            place = F.one_hot(rank, x.shape[0]).to(x.dtype)
            return torch.bmm(gate.unsqueeze(-1), place.unsqueeze(1))

        return self.in_bins(combine(second, mask2, rank2) + combine(top, mask, rank), x)
