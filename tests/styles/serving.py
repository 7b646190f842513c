"""As libraries that serve and train models write it, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import (
    ASKS,
    BATCHED,
    Apart,
    ArgmaxSigmoid,
    H,
    I,
    Listed,
    MaxOfSoftmax,
    MoE,
    ReLU2,
    Router,
    SigmoidWithBias,
    Stacked,
    SwiGLU,
    Unnormalised,
    normal,
    style,
)


@style("all_experts_weights_times_mask_vllm")
class Iterative(Stacked):
    """vLLM's reference: every expert on all tokens, halves by slices, weights by a mask; no sum to begin with."""

    def forward(self, x):
        ids, weights = self.router(x)
        out, inner = None, self.down.shape[-1]
        for e in range(self.E):
            share = (weights * (ids == e)).sum(dim=-1, keepdim=True)
            h = F.linear(x, self.gate_up[e])
            h = F.linear(h[:, inner:] * F.silu(h[:, :inner]), self.down[e]) * share
            out = h if out is None else out + h
        return out


@style("gathered_weights_cut_in_halves_sglang")
class GatheredHalves(Stacked):
    """SGLang: gate and up are cut out of the weights that ids gather."""

    def forward(self, x):
        ids, weights = self.router(x)
        gate, up = torch.chunk(self.gate_up[ids], 2, dim=2)
        h = F.silu(torch.einsum("ti,taoi->tao", x, gate)) * torch.einsum("ti,taoi->tao", x, up)
        rows = torch.einsum("tao,taio->tai", h, self.down[ids])
        return torch.einsum("tai,ta->ti", rows, weights.to(rows.dtype))


@style("gathered_halves_of_weights")
class HalvesGathered(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        inner = self.down.shape[-1]
        gate, up = self.gate_up[:, :inner][ids], self.gate_up[:, inner:][ids]
        h = F.silu(torch.einsum("ti,taoi->tao", x, gate)) * torch.einsum("ti,taoi->tao", x, up)
        return (torch.einsum("tao,taio->tai", h, self.down[ids]) * weights[..., None]).sum(1)


@style("sorted_int32_ids_counts_of_a_table_sglang", **ASKS)
class Int32Ids(Stacked):
    """SGLang: ids are 32-bit, and 64-bit where torch wants them so."""

    route = SigmoidWithBias

    def forward(self, x):
        ids, weights = self.router(x)
        ids = ids.to(torch.int32)
        table = ids.new_zeros((x.shape[0], self.E))
        table.scatter_(1, ids.to(torch.int64), 1)
        order = ids.view(-1).argsort()
        rows, results, start = x[order // ids.shape[1]], [], 0
        for e, count in enumerate(table.sum(dim=0).cpu().numpy()):
            if count == 0:
                continue
            results.append(self.expert(rows[start : start + count], e))
            start += count
        joined = torch.cat(results) if results else rows.new_empty(0)
        out = torch.empty_like(joined)
        out[order] = joined
        return (out.view(*ids.shape, -1) * weights.unsqueeze(-1)).sum(1)


@style("sorted_int32_ids_grouped_mm", **ASKS)
class Int32Grouped(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        numbers, order = ids.int().view(-1).sort(stable=True)
        ends = torch.searchsorted(numbers, torch.arange(self.E, dtype=torch.int32), right=True)
        offs = ends.to(torch.int32)
        gate, up = torch._grouped_mm(x[order // self.K], self.gate_up.mT, offs=offs).chunk(2, -1)
        rows = torch._grouped_mm(F.silu(gate) * up, self.down.mT, offs=offs)
        out = torch.empty_like(rows)
        out[order] = rows
        return (out.view(-1, self.K, H) * weights.unsqueeze(-1)).sum(1)


@style("all_experts_added_to_the_shared_one_llama4")
class Llama4(Apart):
    """Meta: scores by expert and token; results are added to what the shared expert returned."""

    route, K, before = ArgmaxSigmoid, 1, True

    def __init__(self):
        super().__init__()
        self.shared = SwiGLU()

    def beside(self, x):
        return self.shared(x)

    def forward(self, x):
        tokens = x.shape[0]
        logits = self.router.linear(x).transpose(0, 1)
        best, ids = torch.topk(logits.transpose(0, 1), self.K, dim=1)
        scores = torch.full_like(logits.transpose(0, 1), float("-inf")).scatter_(1, ids, best).transpose(0, 1)
        token = torch.arange(tokens).view(1, -1).expand(scores.size(0), -1).reshape(-1, 1).expand(-1, H)
        rows = torch.gather(x, dim=0, index=token) * torch.sigmoid(scores).reshape(-1, 1)
        out = self.shared(x)
        rows = rows.view(self.E, -1, H)
        rows = torch.bmm(self.act(torch.bmm(rows, self.w_gate), torch.bmm(rows, self.w_up)), self.w_down)
        return out.scatter_add_(dim=0, index=token, src=rows.view(-1, H))


class DeepSpeed(Listed):
    """Groups of experts, each given its bins; as many places as the expert with most rows has."""

    def bins(self, x, dispatch):
        e, c = dispatch.shape[1:]
        bins = (dispatch.reshape(x.shape[0], -1).t() @ x).reshape(1, e, c, H)
        parts = [expert(part) for expert, part in zip(self.experts, bins.chunk(self.E, dim=1), strict=True)]
        return torch.cat(parts, dim=1).reshape(e, c, H)

    def forward(self, x):
        tokens = x.reshape(-1, H)
        combine = self.gating(self.router.linear(tokens))
        results = self.bins(tokens, combine.bool().type_as(x))
        return torch.einsum("sec,ecm->sm", combine, results).reshape(x.shape)


@style("one_hot_sec_top1_largest_count_item_deepspeed", **BATCHED, **ASKS)
class DeepSpeedTop1(DeepSpeed):
    route, K = MaxOfSoftmax, 1

    def gating(self, logits):
        gates = F.softmax(logits, dim=1)
        mask = F.one_hot(torch.argmax(gates, dim=1), num_classes=self.E)
        capacity = torch.max(torch.sum(mask, dim=0)).item()
        locations = torch.sum((torch.cumsum(mask, dim=0) - 1) * mask, dim=1)
        places = F.one_hot(locations, num_classes=capacity).float()
        return (gates * mask.float()).unsqueeze(2) * places.unsqueeze(1)


class Top2OfSoftmax(Router):
    def forward(self, x):
        weights, ids = self.linear(x).softmax(-1).topk(2, -1)
        return ids, weights / weights.sum(-1, keepdim=True)


@style("one_hot_sec_top2_largest_count_int_deepspeed", **BATCHED, **ASKS)
class DeepSpeedTop2(DeepSpeed):
    route = Top2OfSoftmax

    def gating(self, logits):
        gates = F.softmax(logits, dim=1)
        mask1 = F.one_hot(torch.argmax(gates, dim=1), num_classes=self.E)
        mask2 = F.one_hot(torch.argmax(logits.masked_fill(mask1.bool(), float("-inf")), dim=1), num_classes=self.E)
        locations1, locations2 = torch.cumsum(mask1, dim=0) - 1, torch.cumsum(mask2, dim=0) - 1
        locations2 += torch.sum(mask1, dim=0, keepdim=True)
        capacity = int(torch.max(torch.sum(mask1 + mask2, dim=0)))
        gates1, gates2 = (gates * mask1).sum(1), (gates * mask2).sum(1)
        total = gates1 + gates2
        combine = 0
        for gate, mask, locations in ((gates1, mask1, locations1), (gates2, mask2, locations2)):
            places = F.one_hot(torch.sum(locations * mask, dim=1), num_classes=capacity).float()
            combine = combine + ((gate / total).unsqueeze(-1) * mask).unsqueeze(2) * places.unsqueeze(1)
        return combine


@style("bins_as_long_as_the_largest_count_int", **ASKS)
class LargestCount(Apart):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        counts = torch.bincount(flat, minlength=self.E)
        capacity = int(counts.max())
        order = flat.argsort(stable=True)
        expert = flat[order]
        place = expert * capacity + torch.arange(flat.shape[0]) - (counts.cumsum(0) - counts)[expert]
        bins = x.new_zeros(self.E * capacity, H).index_copy(0, place, x[order // self.K]).view(self.E, capacity, H)
        rows = torch.bmm(self.act(torch.bmm(bins, self.w_gate), torch.bmm(bins, self.w_up)), self.w_down)
        rows = rows.view(-1, H)[place] * weights.view(-1)[order, None]
        return torch.zeros_like(x).index_add_(0, order // self.K, rows)


@style("written_at_parts_of_sorted_places", **ASKS)
class PutAtParts(Stacked):
    """The places of each expert's rows are cut out of the order."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        order, counts, start = flat.argsort(stable=True), torch.bincount(flat, minlength=self.E), 0
        y = torch.zeros(flat.shape[0], H)
        for e, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            at = order[start : start + count]
            y[at] = self.expert(x[torch.div(at, self.K, rounding_mode="floor")], e)
            start += count
        return torch.einsum("tkh,tk->th", y.view(-1, self.K, H), weights)


@style("grouped_by_search_of_ends_vllm_pallas")
class GroupedBySearch(Stacked):
    """vLLM on TPUs: a row's expert is the first whose rows end behind it."""

    def product(self, rows, weights, sizes):
        group = torch.searchsorted(sizes.cumsum(0), torch.arange(rows.shape[0]), right=True)
        return torch.bmm(rows.unsqueeze(1), weights.transpose(-2, -1)[group]).squeeze(1)

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        order = flat.argsort()
        token = torch.arange(x.shape[0]).repeat_interleave(self.K)[order]
        sizes = torch.zeros(self.E, dtype=torch.int64).scatter_add(0, flat, torch.ones_like(flat))
        gate, up = self.product(x[token], self.gate_up, sizes).chunk(2, -1)
        rows = self.product(F.silu(gate) * up, self.down, sizes)[order.argsort()]
        return (rows.reshape(-1, self.K, H) * weights.unsqueeze(dim=-1)).sum(dim=-2)


@style("grouped_if_the_count_is_above_zero_unsloth", **ASKS)
class IfCounted(Stacked):
    """Unsloth's reference: counts stay tensors, and are asked one by one."""

    def product(self, rows, weights, counts):
        out, start = torch.zeros(rows.shape[0], weights.shape[1]), 0
        for e in range(self.E):
            count = counts[e]
            if count > 0:
                end = start + count
                out[start:end] = rows[start:end] @ weights[e].T
                start = end
        return out

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        counts = torch.histc(flat.float(), bins=self.E, min=0, max=self.E).int()
        order = torch.argsort(flat, stable=True)
        gate, up = self.product(x.repeat_interleave(self.K, dim=0)[order], self.gate_up, counts).chunk(2, -1)
        rows = self.product(F.silu(gate) * up, self.down, counts)
        out = torch.empty_like(rows).index_copy_(0, order, rows)
        return (out.view(-1, self.K, H) * weights[..., None]).sum(dim=1)


@style("bins_filled_choice_by_choice_tutel")
class Tutel(Apart):
    """Tutel: places of each choice in a list, counted behind all choices before."""

    route = Unnormalised

    def forward(self, x):
        scores = self.router.linear(x).softmax(-1)
        ids = [each.view(-1) for each in torch.topk(scores, self.K, dim=1).indices.chunk(self.K, dim=1)]
        masks = [F.one_hot(each, self.E) for each in ids]
        weights = [(scores * mask).sum(dim=1) for mask in masks]
        ranks, before = [], torch.zeros(1, self.E, dtype=torch.int64)
        for mask in masks:
            ranks.append(((torch.cumsum(mask, dim=0) - 1 + before) * mask).sum(dim=1))
            before = before + mask.sum(dim=0, keepdim=True)
        capacity = x.size(0) * self.K
        bins = torch.zeros(self.E * capacity, H)
        for each, rank in zip(ids, ranks, strict=True):
            bins.index_add_(0, each * capacity + rank, x)
        rows = bins.view(self.E, capacity, H)
        rows = torch.bmm(self.act(torch.bmm(rows, self.w_gate), torch.bmm(rows, self.w_up)), self.w_down).view(-1, H)
        out = 0
        for each, rank, weight in zip(ids, ranks, weights, strict=True):
            out = out + rows[each * capacity + rank] * weight.unsqueeze(1)
        return out


class Counted(Stacked):
    """Where a slot stands among those sorted by expert is counted: nothing is sorted."""

    def rows_of(self, flat):
        hot = F.one_hot(flat, self.E)
        counts = hot.sum(0)
        return counts, (counts.cumsum(0) - counts)[flat] + ((hot.cumsum(0) - 1) * hot).sum(-1)

    def forward(self, x):
        ids, weights = self.router(x)
        counts, row = self.rows_of(ids.flatten())
        rows = torch.zeros(row.shape[0], H).index_copy(0, row, x.repeat_interleave(self.K, 0))
        offs = counts.cumsum(0).to(torch.int32)
        gate, up = torch._grouped_mm(rows, self.gate_up.mT, offs=offs).chunk(2, -1)
        rows = torch._grouped_mm(F.silu(gate) * up, self.down.mT, offs=offs)
        return torch.einsum("tkh,tk->th", rows[row].view(-1, self.K, H), weights)


style("rows_counted_not_sorted_grouped_mm", **ASKS)(Counted)


@style("rows_counted_not_sorted_weights_put_beside", **ASKS)
class CountedBeside(Counted):
    """Weights are put where their rows are; parts are cut by counts."""

    def forward(self, x):
        ids, weights = self.router(x)
        counts, row = self.rows_of(ids.reshape(-1))
        rows, beside = torch.zeros(row.shape[0], H), torch.zeros(row.shape[0])
        rows[row] = x[:, None].expand(-1, self.K, -1).reshape(-1, H)
        beside[row] = weights.reshape(-1)
        results, start = [], 0
        for e, count in enumerate(counts.tolist()):
            results.append(self.expert(rows[start : start + count], e) * beside[start : start + count, None])
            start += count
        return torch.cat(results)[row].view(-1, self.K, H).sum(1)


@style("bins_as_long_as_the_largest_rank", **ASKS)
class LargestRank(Apart):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        rank = (F.one_hot(flat, self.E).cumsum(0) - 1).gather(1, flat[:, None]).squeeze(1)
        bins = x.new_zeros(self.E, self.capacity(flat, rank), H)
        bins[flat, rank] = x.repeat_interleave(self.K, 0)
        rows = torch.bmm(self.act(torch.bmm(bins, self.w_gate), torch.bmm(bins, self.w_up)), self.w_down)
        return (rows[flat, rank].view(-1, self.K, H) * weights.unsqueeze(-1)).sum(1)

    def capacity(self, flat, rank):
        return int(rank.max()) + 1


@style("mask_scattered_choice_by_choice")
class Scattered(Stacked):
    """The best expert is crossed out before the next one is chosen, and marked in a mask."""

    def forward(self, x):
        left = logits = self.router.linear(x)
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        for _ in range(self.K):
            best = left.argmax(dim=-1, keepdim=True)
            chosen.scatter_(-1, best, True)
            left = left.scatter(-1, best, float("-inf"))
        weights = torch.where(chosen, logits, float("-inf")).softmax(-1)
        out = torch.zeros_like(x)
        for e in range(self.E):
            rows = chosen[..., e]
            out[rows] = out[rows] + weights[..., e][rows].unsqueeze(-1) * self.expert(x[rows], e)
        return out


@style("experts_without_rows_are_given_a_row_of_zeros_latent_nemotron", **ASKS)
class Latent(MoE):
    """Nemotron-H: experts between two projections; one without rows sees a row of zeros, of which zeros come."""

    route, latent = SigmoidWithBias, 8

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(H, self.latent, bias=False), nn.Linear(self.latent, H, bias=False)
        self.experts = nn.ModuleList(ReLU2(self.latent) for _ in range(self.E))

    def forward(self, x):
        ids, weights = self.router(x)
        rows = self.into(x)
        total = torch.zeros_like(rows)
        masks = F.one_hot(ids, num_classes=self.E).permute(2, 0, 1)
        for mask, expert in zip(masks, self.experts, strict=True):
            token, slot = torch.where(mask)
            if token.numel() > 0:
                total.index_add_(0, token, expert(rows[token]) * weights[token, slot].unsqueeze(-1))
            else:
                total = total + expert(torch.zeros_like(rows[0]).unsqueeze(0))
        return self.out(total)


@style("rows_cut_at_running_counts_of_floats_torchao", **BATCHED, **ASKS)
class OrderedTokens(MoE):
    """torchao's prototype: places are divided as floats, counts are floats, tensors bound the parts."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = normal(self.E, I, H), normal(self.E, H, I), normal(self.E, I, H)

    def forward(self, x):
        tokens = x.view(-1, H)
        ids, weights = self.router(tokens)
        order = ids.view(-1).argsort(stable=True)
        token = order.div(self.K).floor().to(torch.int64)
        counts = torch.histc(ids.view(-1).to(torch.float32), bins=self.E, min=0, max=self.E)
        ends = torch.cat((counts.new_zeros(1), counts)).cumsum(0).to(torch.int64)
        results = []
        for e, places in enumerate([token[ends[e] : ends[e + 1]] for e in range(self.E)]):
            rows = tokens[places]
            hidden = F.silu(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e])
            results.append(F.linear(hidden, self.w2[e]))
        rows = torch.cat(results, dim=0) * weights.view(-1, 1)[order]
        out = torch.zeros_like(tokens).scatter_add(0, token.unsqueeze(-1).expand(-1, H), rows)
        return out.reshape(x.shape)


@style("rows_of_experts_found_by_bucketize")
class Bucketized(Stacked):
    """SonicMoE: a row's expert is the bucket between ends that it is in."""

    def forward(self, x):
        ids, weights = self.router(x)
        order = ids.flatten().sort(stable=True).indices
        ends = ids.flatten().bincount(minlength=self.E).cumsum(0)
        expert = torch.bucketize(torch.arange(order.shape[0]), ends, right=True)
        gate, up = torch.einsum("th,tnh->tn", x[order // self.K], self.gate_up[expert]).chunk(2, -1)
        rows = torch.einsum("ti,thi->th", F.silu(gate) * up, self.down[expert])
        return torch.einsum("tkh,tk->th", rows[torch.argsort(order)].view(-1, self.K, H), weights)
