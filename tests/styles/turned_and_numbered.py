"""Routers and masks in other shapes, rows in the order of the slots, and numbers held as tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import H, Listed, Simple, Stacked, Unnormalised, normal, style, swiglu


class Turned(Listed):
    """Scores [E, T], of which the best of each column are chosen."""

    def forward(self, x):
        weights, ids = self.router.linear(x).softmax(-1).t().topk(self.K, dim=0)
        weights = weights / weights.sum(0, keepdim=True)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[slot, token, None])
        return out


style("modulelist_scores_by_expert_topk_of_columns")(Turned)


@style("modulelist_scores_by_expert_weights_taken_first")
class TurnedPlain(Turned):
    def forward(self, x):
        weights, ids = torch.softmax(self.router.linear.weight @ x.t(), 0).topk(self.K, dim=0)
        weights = weights / weights.sum(0)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slot, token = (ids == e).nonzero(as_tuple=True)
            done = expert(x.index_select(0, token)) * weights[slot, token].unsqueeze(1)
            out = out.index_add(0, token, done)
        return out


class Added(Stacked):
    """transformers' batched_mm: one product for each slot; the slots' rows are added to their tokens."""

    def token(self, x):
        return torch.arange(x.shape[0]).unsqueeze(1).expand(-1, self.K).reshape(-1)

    def forward(self, x):
        ids, weights = self.router(x)
        token, flat = self.token(x), ids.reshape(-1)
        rows = x[token]
        gate, up = torch.bmm(self.gate_up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        done = torch.bmm(self.down[flat], swiglu(gate, up).unsqueeze(-1)).squeeze(-1)
        return torch.zeros_like(x).index_add_(0, token, done * weights.reshape(-1, 1))


style("gathered_rows_of_slots_added_to_their_tokens")(Added)


@style("gathered_rows_of_slots_added_by_repeated_numbers")
class AddedRepeated(Added):
    def token(self, x):
        return torch.arange(x.shape[0]).repeat_interleave(self.K)


@style("gathered_rows_of_slots_added_by_divided_numbers")
class AddedDivided(Added):
    def token(self, x):
        return torch.arange(x.shape[0] * self.K) // self.K


@style("loop_over_flat_places_divided_and_remainder")
class Remainder(Simple):
    """The places of an expert among all slots; token and slot are told by a division."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            place = (ids.flatten() == e).nonzero().squeeze(-1)
            token, slot = place // self.K, place % self.K
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot].unsqueeze(-1))
        return out


class AnySlot(Listed):
    """An expert's tokens are those that name it in some slot; their weights are in the order of the mask."""

    def named(self, mask, ids, e):
        return mask.sum(-1).nonzero()[:, 0]

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            token = self.named(mask, ids, e)
            out[token] += expert(x[token]) * weights[mask].unsqueeze(-1)
        return out


style("modulelist_tokens_by_sum_nonzero")(AnySlot)


@style("modulelist_tokens_by_one_column_or_the_other")
class EitherColumn(AnySlot):
    def named(self, mask, ids, e):
        return mask[:, 0] | mask[:, 1]


@style("modulelist_tokens_by_one_id_or_the_other")
class EitherId(AnySlot):
    def named(self, mask, ids, e):
        return torch.where((ids[:, 0] == e) | (ids[:, 1] == e))[0]


class OrZero(Listed):
    """A dense loop, whose weights are those of the slots that name the expert, or zero."""

    def zero(self, weights):
        return torch.tensor(0.0)

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * torch.where(ids == e, weights, self.zero(weights)).sum(-1, keepdim=True)
        return out


style("dense_loop_where_or_a_tensor_of_zero")(OrZero)


@style("dense_loop_where_or_new_zeros")
class OrNewZeros(OrZero):
    def zero(self, weights):
        return weights.new_zeros(())


@style("rows_multiplied_onto_the_token_and_copied")
class Copied(Simple):
    """What stands there and the last product are one call, and the rows are written over those that were there."""

    def beside(self, x):
        return x

    def forward(self, x):
        ids, weights = self.router(x)
        out = x.clone()
        for e in range(self.E):
            mask = ids.eq(e)
            token = mask.any(-1).nonzero().squeeze(-1)
            own = (weights * mask).sum(-1, keepdim=True).index_select(0, token)
            inner = self.act(x.index_select(0, token) @ self.up[e].t()) * own
            rows = torch.addmm(out.index_select(0, token), inner, self.down[e].t())
            out = out.index_copy(0, token, rows)
        return out


@style("stacked_with_a_scale_and_a_norm_for_each_expert")
class Scaled(Simple):
    """Each expert has a norm before and a number behind, taken from a vector of one for each."""

    route = Unnormalised

    def __init__(self):
        super().__init__()
        self.norm, self.scale, self.bias = (
            nn.Parameter(1 + 0.3 * torch.randn(self.E, H)),
            normal(self.E),
            normal(self.E, H),
        )

    def one(self, rows, norm, scale, bias, up, down):
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6) * norm
        return F.linear(self.act(F.linear(rows, up)), down) * scale + bias

    def expert(self, rows, e):
        return self.one(rows, self.norm[e], self.scale[e], self.bias[e], self.up[e], self.down[e])

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        parts = zip(self.norm, self.scale, self.bias, self.up, self.down, strict=True)
        for e, own in enumerate(parts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, self.one(x[token], *own) * weights[token, slot].unsqueeze(-1))
        return out


@style("stacked_loop_gate_and_up_by_tensor_split")
class TensorSplit(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            gate, up = F.linear(x[token], self.gate_up[e]).tensor_split(2, dim=-1)
            done = F.linear(swiglu(gate, up), self.down[e])
            out.index_add_(0, token, done * weights[token, slot, None])
        return out
