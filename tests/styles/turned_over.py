"""Known layers with one thing in a way of its own: how a sum begins, a table is turned, a place is told."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import (
    ASKS,
    BATCHED,
    Apart,
    ArgmaxSigmoid,
    GroupLimited,
    H,
    Listed,
    MaxOfSoftmax,
    MoE,
    Simple,
    Stacked,
    normal,
    style,
)


@style("modulelist_continue_until_the_first_result", **ASKS)
class UntilTheFirst(Listed):
    """No sum to begin with: the first expert that has rows begins it, from the last one on."""

    def beside(self, x):
        return x

    def forward(self, x):
        ids, weights = self.router(x)
        out = None
        for e in reversed(range(self.E)):
            token, slot = torch.nonzero(ids == e, as_tuple=True)
            if token.numel() == 0:
                continue
            rows = self.experts[e](x.index_select(0, token)) * weights[token, slot].unsqueeze(1)
            part = torch.zeros_like(x).index_copy(0, token, rows)
            out = part if out is None else out + part
        return out + x


@style("modulelist_scattered_counts_split_deepseek")
class ScatteredCounts(Listed):
    """DeepSeek V3's inference: experts counted by a table of ones, results in a tensor like themselves."""

    E, K, route = 8, 3, GroupLimited

    def forward(self, x):
        ids, weights = self.router(x)
        counts = ids.new_zeros((ids.shape[0], self.E)).scatter_(1, ids, 1).sum(dim=0)
        order = ids.view(-1).argsort()
        chunks = x[order // self.K].split(counts.tolist())
        results = torch.cat([expert(chunk) for expert, chunk in zip(self.experts, chunks, strict=True)])
        slots = torch.empty_like(results)
        slots[order] = results
        return slots.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(dim=-1)).sum(dim=1).type(x.dtype)


@style("modulelist_weak_choices_are_no_class")
class WeakChoices(Listed):
    """A choice far weaker than the best is none: a class behind the experts', which is cut away."""

    def weigh(self, x):
        ids, weights = self.router(x)
        kept = weights >= 0.5 * weights[:, :1]
        return torch.where(kept, ids, torch.full_like(ids, self.E)), weights * kept

    def forward(self, x):
        ids, weights = self.weigh(x)
        out = torch.zeros_like(x)
        for mask, expert in zip(
            F.one_hot(ids, self.E + 1)[..., : self.E].permute(2, 0, 1).bool(), self.experts, strict=True
        ):
            token, slot = torch.where(mask)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@style("modulelist_hot_rows_added_slot_by_slot")
class HotRows(Listed):
    """InternLM: one mask for all slots, on what goes in and, weighed, on what comes out."""

    def forward(self, x):
        probs = self.router.linear(x).softmax(dim=1)
        ids = probs.topk(self.K, dim=1).indices
        hot = sum(F.one_hot(ids[:, slot], self.E) for slot in range(self.K)).to(x.dtype)
        table = probs * hot
        table = table / table.sum(1, keepdim=True)
        out = None
        for e, expert in enumerate(self.experts):
            part = expert(x * hot[:, e : e + 1]) * table[:, e : e + 1]
            out = part if out is None else out + part
        return out


@style("stacked_columns_unbound_addcmul", **BATCHED)
class Unbound(Stacked):
    """A column of weights for each expert, taken behind a dimension that was added."""

    def forward(self, x):
        rows = x.view(-1, H)
        ids, weights = self.router(rows)
        table = torch.sum(F.one_hot(ids, self.E) * weights.unsqueeze(-1), dim=-2)
        out = torch.zeros_like(rows)
        for column, gate_up, down in zip(table.unsqueeze(-2).unbind(-1), self.gate_up, self.down, strict=True):
            gate, up = torch.split(F.linear(rows, gate_up), gate_up.shape[0] // 2, dim=-1)
            out.addcmul_(column, F.linear(F.silu(gate) * up, down))
        return out.view(x.shape)


@style("all_experts_table_by_expert_scattered")
class TableByExpert(Simple):
    """All in columns: scores, choices and the table of weights are [E, T]."""

    def expert(self, rows, e):
        return F.linear(F.relu(F.linear(rows, self.up[e])), self.down[e])

    def forward(self, x):
        columns = x.t()
        scores = (self.router.linear.weight @ columns).softmax(0)
        weights, ids = torch.topk(scores, self.K, dim=0)
        weights = weights / weights.sum(0, keepdim=True)
        table = torch.zeros(self.E, columns.shape[1]).scatter(0, ids, weights)
        results = torch.matmul(self.down, F.relu(torch.matmul(self.up, columns)))
        return torch.einsum("et,eht->th", table, results)


@style("modulelist_rows_of_a_scattered_table_by_expert")
class RowsOfTable(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(self.E, x.shape[0]).scatter_(0, ids.t(), weights.t())
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = torch.nonzero(table[e]).flatten()
            out[token] = out[token] + expert(x[token]) * table[e][token][:, None]
        return out


@style("slot_loop_added_by_baddbmm")
class AddedByBaddbmm(Simple):
    """Each slot's product and the sum so far are one call; the weight is inside."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x).unsqueeze(-1)
        for slot in range(self.K):
            up, down = self.up.index_select(0, ids[:, slot]), self.down.index_select(0, ids[:, slot])
            inner = self.act(torch.bmm(up, x.unsqueeze(-1))) * weights[:, slot].view(-1, 1, 1)
            out = torch.baddbmm(out, down, inner)
        return out.squeeze(-1)


@style("sorted_bmm_ends_by_comparison_top1")
class EndsByComparison(Apart):
    """Where rows of an expert end is how many ids are no larger; the rows come back by a scattered inverse."""

    K, route = 1, ArgmaxSigmoid

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        order = flat.argsort()
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        ends = (flat.unsqueeze(1) <= torch.arange(self.E)).sum(0).int()
        rows = x[order]
        rows = self.act(self.product(rows, self.w_gate, ends), self.product(rows, self.w_up, ends))
        return self.product(rows, self.w_down, ends)[back] * weights

    def product(self, rows, matrices, ends):
        return torch.ops.moe_fx.grouped_mm(rows, matrices, ends)


@style("sorted_bmm_an_expert_of_every_token")
class ExpertOfEveryToken(Apart):
    """One more choice for every token, of the last expert, with a weight of one: a shared one among the others."""

    def __init__(self):
        super().__init__()
        self.router = self.route(self.E - 1, self.K)

    def weigh(self, x):
        ids, weights = self.router(x)
        ids = torch.cat([ids, torch.full_like(ids[:, :1], self.E - 1)], -1)
        return ids, torch.cat([weights, torch.ones_like(weights[:, :1])], -1)

    def forward(self, x):
        ids, weights = self.weigh(x)
        order = ids.view(-1).argsort()
        ends = torch.bincount(ids.view(-1), minlength=self.E).cumsum(0, dtype=torch.int32)
        token = order // (self.K + 1)
        rows, mm = x[token], torch.ops.moe_fx.grouped_mm
        rows = mm(self.act(mm(rows, self.w_gate, ends), mm(rows, self.w_up, ends)), self.w_down, ends)
        return torch.zeros_like(x).index_add_(0, token, rows * weights.view(-1)[order, None])


@style("modulelist_slots_copied_tokens_listed")
class TokensListed(Listed):
    """The token of each slot is looked up in a list, and so it is when the slots are added."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        token = torch.arange(x.shape[0]).repeat_interleave(self.K)
        slots = torch.zeros(flat.shape[0], H)
        for e, expert in enumerate(self.experts):
            at = torch.where(flat == e)[0]
            slots = slots.index_copy(0, at, expert(x[token[at]]))
        return torch.zeros_like(x).index_add(0, token, slots * weights.view(-1, 1))


@style("modulelist_unique_written_by_mask", **ASKS)
class Unique(Listed):
    """The experts that were chosen, each once: rows are read by its places, and written by its mask."""

    def forward(self, x):
        ids, weights = self.router(x)
        slots = x.new_zeros(x.shape[0], self.K, H)
        for e in ids.unique():
            mask = ids == e
            slots[mask] = self.experts[e.item()](x[mask.nonzero()[:, 0]])
        return torch.einsum("tkh,tk->th", slots, weights)


@style("parameterlist_low_rank_pairs_top1")
class LowRankPairs(MoE):
    """LoRA: pairs of narrow matrices in lists, both transposed where they are read, beside a linear for all."""

    E, K, route = 5, 1, MaxOfSoftmax

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(H, H)
        self.first = nn.ParameterList(normal(3, H) for _ in range(self.E))
        self.second = nn.ParameterList(normal(H, 3) for _ in range(self.E))

    def expert(self, rows, e):
        return rows @ self.first[e].T @ self.second[e].T * 2.0

    def beside(self, x):
        return self.base(x)

    def forward(self, x):
        out = self.base(x)
        ids, weights = self.router(x)
        for e, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            kept = (ids == e).to(x.dtype) * weights
            out = out + kept * ((x @ first.T) @ second.T) * 2.0
        return out


@style("modulelist_slot_found_by_argmax_indexed", **ASKS)
class SlotFound(Listed):
    """The slot in which a token's ids name the expert is found again; experts by name."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token = (ids == e).any(1).nonzero().flatten()
            slot = (ids[token] == e).int().argmax(1)
            out[token] += self.experts[e](x[token]) * weights[token, slot][:, None]
        return out


@style("modulelist_first_of_all_sorted_as_floats", **BATCHED)
class FirstAsFloats(Listed):
    """All experts sorted, of which the first is taken, and compared as a float; time before batch."""

    K, route = 1, MaxOfSoftmax

    def forward(self, x):
        x = x.transpose(0, 1)
        rows = x.contiguous().view(-1, H)
        probs, order = self.router.linear(rows).softmax(-1).sort(dim=-1, descending=True)
        first, weight = order[:, 0].float(), probs[:, 0]
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = first == float(e)
            out[mask, :] = expert(rows[mask, :]) * weight[mask][:, None]
        return out.view(x.shape).transpose(0, 1)


@style("dense_stack_read_by_numbers_of_rows")
class Numbered(Simple):
    """Results of all experts in one dimension, in which the rows of an expert are numbered by token."""

    def results(self, x):
        table = torch.bmm(self.act(torch.einsum("th,eih->eti", x, self.up)), self.down.mT)
        return table.reshape(self.E * x.shape[0], H)

    def forward(self, x):
        ids, weights = self.router(x)
        rows = ids * x.shape[0] + torch.arange(x.shape[0])[:, None]
        return (self.results(x)[rows] * weights.unsqueeze(-1)).sum(1)


@style("dense_stack_summed_by_embedding_bag")
class Bag(Numbered):
    """A token's results are a bag of rows, with weights."""

    def forward(self, x):
        ids, weights = self.router(x)
        rows = ids * x.shape[0] + torch.arange(x.shape[0])[:, None]
        return F.embedding_bag(rows, self.results(x), per_sample_weights=weights, mode="sum")
