"""Layers that look like an MoE layer and are not ``y[t] = sum over k of body(x[t], s[t, k]; P[ids[t, k]])``.

Each differs from one of the styles by little, and would give other numbers if it were taken for it. Some near relatives
are not here because they are the equation after all:

* adapters (LoRA) gathered by an id per row or per sequence: K = 1, where a "row" may be a whole sequence;
* a mixture of embeddings summed over its slots: the body does not read the token;
* a loop that never comes to the last expert: the equation of the experts before it, an id beyond them being nobody's;
* an expert that subtracts the mean of the rows it gets: a parameter ``[E, H]`` made ahead of the experts from data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from styles.base import Apart, H, I, Interleaved, Listed, MoE, Router, Simple, Stacked, normal, swiglu
from torch import nn


@dataclass(frozen=True)
class LookAlike:
    """How to build it and what to trace it with.

    Attributes:
        build: makes the module. why: why it is not the equation. through: what traces it; where that is
            ``moe_fx.export``, Python asks for data, and an ExportError is what is wanted.
        dynamic: whether any number of tokens is reasonable. shape: of the input.
    """

    build: Callable[[], nn.Module]
    why: str
    through: Literal["export", "moe_fx.export"] = "export"
    dynamic: bool = True
    shape: tuple[int, ...] = (6, H)


LOOKALIKES: dict[str, LookAlike] = {}


def lookalike(name: str, why: str, **options) -> Callable:
    """Registers a module under a name, with the reason why it must be left alone."""

    def register(build: type[nn.Module]) -> type[nn.Module]:
        LOOKALIKES[name] = LookAlike(build, why, **options)
        return build

    return register


ASKS = dict(through="moe_fx.export")
BATCHED = dict(shape=(2, 5, H))


# Batched products and top-k without experts.


@lookalike("attention_heads_bmm", "heads read other tokens; nothing is routed", **BATCHED)
class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = normal(3, 4, H, 8), normal(4, 8, H)

    def forward(self, x):
        b, s, _ = x.shape
        rows = x.reshape(1, -1, H).expand(4, -1, -1)
        q, k, v = (torch.bmm(rows, w).view(4 * b, s, 8) for w in self.qkv)
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return torch.bmm(y.view(4, -1, 8), self.out).sum(dim=0).view(b, s, H)


@lookalike("top_k_sparse_attention", "what is gathered by the ids is other tokens, not parameters")
class SparseAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x):
        scores, ids = (self.q(x) @ self.k(x).t()).topk(2, dim=-1)
        return torch.einsum("tk,tkh->th", scores.softmax(-1), self.v(x)[ids])


@lookalike("mixture_of_depths", "top-k chooses tokens for one block, not experts for a token")
class MixtureOfDepths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.score, self.up, self.down = nn.Linear(H, 1), nn.Linear(H, I), nn.Linear(I, H)

    def forward(self, x):
        weights, token = self.score(x).squeeze(-1).topk(3)
        y = self.down(F.silu(self.up(x[token]))) * weights.sigmoid().unsqueeze(-1)
        return x.index_add(0, token, y)


@lookalike("block_diagonal_bmm", "every block has its own part of the token, and all blocks count")
class BlockDiagonal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = normal(4, H // 4, I), normal(4, I, H)

    def forward(self, x):
        rows = x.view(-1, 4, H // 4).transpose(0, 1)
        return torch.bmm(F.relu(torch.bmm(rows, self.up)), self.down).sum(dim=0)


@lookalike(
    "adapters_merged_before_use", "the sum over slots is of parameters: a product of sums, not a sum of products"
)
class MergedAdapters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.a, self.b = Router(4, 2), normal(4, 8, H), normal(4, H, 8)

    def forward(self, x):
        ids, weights = self.router(x)
        a = (self.a[ids] * weights[..., None, None]).sum(dim=1)
        b = (self.b[ids] * weights[..., None, None]).sum(dim=1)
        return torch.bmm(b, torch.bmm(a, x.unsqueeze(-1))).squeeze(-1)


@lookalike("embeddings_pooled_by_max", "slots are pooled by their maximum, not by a sum")
class PooledEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.table = Router(8, 2), normal(8, H)

    def forward(self, x):
        ids, weights = self.router(x)
        return x * (self.table[ids] * weights.unsqueeze(-1)).amax(dim=1)


# Routing that is not K experts per token.


@lookalike("soft_moe_slots", "a slot's input mixes all tokens")
class SoftSlots(Apart):
    def forward(self, x):
        logits = self.router.linear(x)
        rows = torch.einsum("te,th->eh", logits.softmax(dim=0), x).unsqueeze(1)
        y = torch.bmm(F.gelu(torch.bmm(rows, self.w_gate)) * torch.bmm(rows, self.w_up), self.w_down)
        return torch.einsum("te,eh->th", logits.softmax(dim=1), y.squeeze(1))


@lookalike("dense_softmax_gate", "every expert counts for every token: nothing is chosen")
class SoftGate(Apart):
    def forward(self, x):
        gates = self.router.linear(x).softmax(dim=-1)
        h = F.gelu(torch.einsum("th,ehi->tei", x, self.w_gate)) * torch.einsum("th,ehi->tei", x, self.w_up)
        return torch.einsum("te,teh->th", gates, torch.einsum("tei,eih->teh", h, self.w_down))


@lookalike("expert_choice", "experts choose tokens: a token has any number of experts, and none if nobody took it")
class ExpertChoice(Simple):
    def forward(self, x):
        weights, token = self.router.linear(x).softmax(dim=-1).topk(3, dim=0)
        token = token.t()
        h = F.relu(torch.bmm(x[token], self.up.transpose(1, 2)))
        y = torch.bmm(h, self.down.transpose(1, 2)) * weights.t().unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token.flatten(), y.flatten(0, 1))


@lookalike("gshard_with_capacity", "a token that comes late at a full expert is dropped", dynamic=False)
class Capacity(Simple):
    capacity = 2

    def forward(self, x):
        ids, weights = self.router(x)
        tokens = x.shape[0]
        one_hot = F.one_hot(ids, self.E).transpose(0, 1).reshape(-1, self.E)
        rank = ((one_hot.cumsum(0) - 1) * one_hot).sum(-1).view(self.K, tokens).transpose(0, 1)
        bins = (rank.unsqueeze(-1) == torch.arange(self.capacity)).to(x.dtype)
        combine = torch.einsum("tk,tke,tkc->tec", weights, F.one_hot(ids, self.E).to(x.dtype), bins)
        rows = torch.einsum("tec,tm->ecm", (combine > 0).to(x.dtype), x)
        h = F.relu(torch.bmm(rows, self.up.transpose(1, 2)))
        return torch.einsum("tec,ecm->tm", combine, torch.bmm(h, self.down.transpose(1, 2)))


@lookalike("binned_with_capacity", "rows beyond an expert's capacity are overwritten and weighted with zero")
class BinnedCapacity(Simple):
    capacity = 2

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        one_hot = F.one_hot(flat, self.E)
        rank = ((one_hot.cumsum(dim=0) - 1) * one_hot).sum(dim=-1)
        kept = rank < self.capacity
        place = torch.where(kept, flat * self.capacity + rank, self.E * self.capacity)
        bins = x.new_zeros(self.E * self.capacity + 1, H).index_copy(0, place, x.repeat_interleave(self.K, dim=0))
        rows = bins[:-1].view(self.E, self.capacity, H)
        y = torch.bmm(F.relu(torch.bmm(rows, self.up.mT)), self.down.mT).view(-1, H)
        y = y[place.clamp(max=self.E * self.capacity - 1)] * (weights.flatten() * kept).unsqueeze(-1)
        return y.view(-1, self.K, H).sum(dim=1)


@lookalike("threshold_of_the_last_chosen", "experts that tie with the last one chosen count too: not K of them")
class Threshold(Apart):
    def forward(self, x):
        probs = self.router.linear(x).softmax(dim=-1)
        least = probs.topk(self.K, dim=-1).values[:, -1:]
        gates = torch.where(probs >= least, probs, 0.0)
        return sum(gates[:, e : e + 1] * self.expert(x, e) for e in range(self.E))


@lookalike("weights_of_another_top_k", "ids and routing weights come from two choices")
class TwoChoices(Stacked):
    """Arithmetically these weights could travel with the ids; a layer's must come from the op that chose the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Router(self.E, self.K)

    def forward(self, x):
        ids, _ = self.router(x)
        _, weights = self.other(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


@lookalike("two_ids_in_one_expert", "a slot's projection down is of the other slot's expert")
class TwoIds(Apart):
    def forward(self, x):
        ids, weights = self.router(x)
        rows, other = x[:, None, None, :], ids.flip(1)
        h = swiglu(rows @ self.w_gate[ids], rows @ self.w_up[ids])
        return ((h @ self.w_down[other]).squeeze(2) * weights[..., None]).sum(dim=1)


# Loops that do not do the same to every expert.


class Loop(Listed):
    """A faithful loop; what differs is what ``step`` gives, and which experts are visited."""

    def visited(self):
        return range(self.E)

    def step(self, rows, e):
        return self.experts[e](rows)

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.E).permute(2, 1, 0)
        for e in self.visited():
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.step(x[token], e) * weights[token, slot, None])
        return out


@lookalike("loop_skips_expert_3", "no layer of E experts: tokens of expert 3 get nothing, those of later ones do")
class Skips(Loop):
    E = 6

    def visited(self):
        return [e for e in range(self.E) if e != 3]


@lookalike("dense_loop_misses_one", "the expert left out of a dense loop counts zero, whatever its routing weight")
class DenseMisses(Simple):
    def forward(self, x):
        ids, weights = self.router(x)
        gates = x.new_zeros(x.shape[0], self.E).scatter(1, ids, weights)
        return sum(gates[:, e : e + 1] * self.expert(x, e) for e in range(self.E) if e != 1)


@lookalike("loop_visits_one_twice", "expert 0 counts twice")
class Twice(Loop):
    def visited(self):
        return [*range(self.E), 0]


@lookalike("loop_factor_by_number", "expert e counts 0.5 ** e: a number of the loop, not a parameter")
class Fading(Loop):
    def step(self, rows, e):
        return self.experts[e](rows) * 0.5**e


@lookalike("loop_hit_factor_by_number", "the i-th expert that was hit counts 0.5 ** i", **ASKS)
class FadingHits(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.E).permute(2, 1, 0)
        for i, e in enumerate(torch.greater(mask.sum((-1, -2)), 0).nonzero()):
            slot, token = torch.where(mask[e[0]])
            out.index_add_(0, token, self.expert(x[token], e[0]) * weights[token, slot, None] * 0.5**i)
        return out


@lookalike("loop_activation_by_number", "one expert's activation differs from the others'")
class OneDiffers(Simple):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            h = F.linear(x[token], self.up[e])
            h = F.gelu(h) if e == 2 else F.relu(h)
            out.index_add_(0, token, F.linear(h, self.down[e]) * weights[token, slot, None])
        return out


@lookalike("loop_carries_state", "an expert's rows depend on what the expert before it gave")
class Carried(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        out, carried = torch.zeros_like(x), x.new_zeros(H)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            y = self.expert(x[token] + carried, e)
            carried = carried + y.sum(dim=0)
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


@lookalike("loop_reads_its_sum", "experts take the rows of the sum so far, which starts with the tokens: a chain")
class ReadsSum(Loop):
    def forward(self, x):
        ids, weights = self.router(x)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(out[token]) * weights[token, slot, None])
        return out


@lookalike("loop_overwrites", "a token's later expert replaces the earlier one: nothing is summed")
class Overwrites(Loop):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out[token] = expert(x[token]) * weights[token, slot, None]
        return out


@lookalike("loop_stops_at_an_idle_expert", "the first expert without rows ends the loop", **ASKS)
class Stops(Loop):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if not mask.any():
                break
            token, slot = torch.where(mask)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@lookalike("loop_idle_experts_count", "an expert without rows adds to every token", **ASKS)
class IdleCounts(Loop):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                out = out + 0.1
                continue
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


# Bodies that are not local to a row.


@lookalike("loop_statistics_over_rows", "an expert normalises over the rows it got (batch norm in training)")
class OverRows(Simple):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            h = F.relu(F.linear(x[token], self.up[e]))
            # The sum over the rows, not their mean, which is not a number where there are none.
            h = h - h.sum(dim=0) / (h.shape[0] + 1)
            h = h * torch.rsqrt(h.square().sum(dim=0) / (h.shape[0] + 1) + 1e-5)
            out.index_add_(0, token, F.linear(h, self.down[e]) * weights[token, slot, None])
        return out


@lookalike("loop_softmax_over_rows", "the rows of an expert compete: a softmax over them")
class SoftmaxOverRows(Loop):
    def step(self, rows, e):
        return self.experts[e](rows).softmax(dim=0)


@lookalike("dense_statistics_over_tokens", "all tokens go into the statistics of an expert's activations")
class OverTokens(Apart):
    def forward(self, x):
        ids, weights = self.router(x)
        gates = x.new_zeros(x.shape[0], self.E).scatter(1, ids, weights)
        h = F.silu(torch.bmm(x.expand(self.E, -1, -1), self.w_gate))
        h = (h - h.mean(dim=1, keepdim=True)) * torch.rsqrt(h.var(dim=1, keepdim=True) + 1e-5)
        return (torch.bmm(h, self.w_down) * gates.t().unsqueeze(-1)).sum(dim=0)


@lookalike("slots_normalised_together", "a slot's result is divided by the norm over all slots")
class SlotNorm(Apart):
    def forward(self, x):
        ids, weights = self.router(x)
        rows = x[:, None, None, :]
        y = (swiglu(rows @ self.w_gate[ids], rows @ self.w_up[ids]) @ self.w_down[ids]).squeeze(2)
        return (F.normalize(y, dim=1) * weights[..., None]).sum(dim=1)


@lookalike("slots_pooled_by_max", "slots are pooled by their maximum, not by a sum")
class SlotMax(Apart):
    def forward(self, x):
        ids, weights = self.router(x)
        rows = x[:, None, None, :]
        y = (swiglu(rows @ self.w_gate[ids], rows @ self.w_up[ids]) @ self.w_down[ids]).squeeze(2)
        return (y * weights[..., None]).amax(dim=1)


@lookalike("next_token_shifted", "a slot's row is of its token and of the one before it")
class Shifted(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        rows = x.repeat_interleave(self.K, dim=0)
        rows = rows + rows.roll(1, dims=0)
        gate, up = torch.bmm(self.gate_up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        y = torch.bmm(self.down[flat], swiglu(gate, up).unsqueeze(-1)).squeeze(-1)
        return (y.view(-1, self.K, H) * weights[..., None]).sum(dim=1)


# Tables whose zeros are not zero, or do not stay so.


class Table(Apart):
    """All experts on all tokens, summed with the columns of a table."""

    act = staticmethod(swiglu)

    def table(self, x):
        raise NotImplementedError

    def forward(self, x):
        rows = x.unsqueeze(0).expand(self.E, -1, -1)
        h = swiglu(torch.bmm(rows, self.w_gate), torch.bmm(rows, self.w_up))
        return (torch.bmm(h, self.w_down) * self.table(x).t().unsqueeze(-1)).sum(dim=0)


@lookalike("table_of_1e-9", "experts not chosen count 1e-9, which is not zero")
class Tiny(Table):
    def table(self, x):
        ids, weights = self.router(x)
        return torch.full((x.shape[0], self.E), 1e-9).scatter(1, ids, weights)


@lookalike("table_softmax_over_minus_5", "experts not chosen have a logit of -5 in the softmax, not -inf")
class FiniteMask(Table):
    def table(self, x):
        logits = self.router.linear(x)
        best, ids = logits.topk(self.K, dim=-1)
        return torch.full_like(logits, -5.0).scatter(1, ids, best).softmax(dim=-1)


@lookalike("table_softmax_over_zeros", "a softmax over zeros gives experts not chosen a share")
class SoftmaxOfZeros(Table):
    def table(self, x):
        ids, weights = self.router(x)
        return torch.zeros(x.shape[0], self.E).scatter(1, ids, weights).softmax(dim=-1)


@lookalike("table_normalised_with_epsilon", "an epsilon is added to every entry before the table is normalised")
class Smoothed(Table):
    def table(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights) + 1e-6
        return table / table.sum(dim=-1, keepdim=True)


@lookalike(
    "bias_behind_zero_rows", "the weight comes first, and what a bias adds to a row of zeros is added to every token"
)
class BiasBehind(Interleaved):
    def forward(self, x):
        ids, weights = self.router(x)
        table = x.new_zeros(x.shape[0], self.E).scatter(1, ids, weights)
        rows = x.repeat(self.E, 1).view(self.E, -1, H) * table.t().unsqueeze(-1)
        h = torch.bmm(rows, self.gate_up_proj) + self.gate_up_proj_bias[:, None, :]
        return (torch.bmm(self.act(h), self.down_proj) + self.down_proj_bias[:, None, :]).sum(dim=0)


@lookalike(
    "one_hot_bias_behind_dispatch", "dispatched zeros get the bias, and combine weighs by probabilities of all experts"
)
class BiasBehindDispatch(MoE):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias, self.down = normal(self.E, H, I), normal(self.E, I), normal(self.E, I, H)

    def forward(self, x):
        ids, _ = self.router(x)
        probs = self.router.linear(x).softmax(dim=-1)
        dispatch = F.one_hot(ids, self.E).sum(dim=1).to(x.dtype)
        rows = torch.einsum("te,th->eth", dispatch, x)
        h = F.relu(torch.einsum("eth,ehi->eti", rows, self.up) + self.up_bias[:, None])
        return torch.einsum("te,eti,eih->th", probs, h, self.down)
