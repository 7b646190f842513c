"""Loops over stacked weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import (
    ASKS,
    BATCHED,
    Apart,
    BestThenSoftmax,
    H,
    Hashed,
    I,
    Interleaved,
    MoE,
    SigmoidWithBias,
    Simple,
    Stacked,
    geglu,
    normal,
    style,
)


@style("stacked_where_index_add")
class StackedLoop(Stacked):
    E = 6
    route = SigmoidWithBias

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.E).permute(2, 0, 1)
        for e in range(self.E):
            token, slot = torch.where(mask[e])
            gate, up = F.linear(x[token], self.gate_up[e]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, self.down[e])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


@style("stacked_hit_nonzero_gpt_oss", **ASKS, **BATCHED)
class StackedHit(Interleaved):
    """gpt-oss in transformers, eager: the experts hit, biases, gate and up interleaved."""

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, H)
        ids, weights = self.router(x)
        next_states = torch.zeros_like(x)
        with torch.no_grad():
            mask = F.one_hot(ids, num_classes=self.E).permute(2, 1, 0)
            expert_hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in expert_hit:
            e = e[0]
            slot, token = torch.where(mask[e])
            gate_up = x[token] @ self.gate_up_proj[e] + self.gate_up_proj_bias[e]
            out = self.act(gate_up) @ self.down_proj[e] + self.down_proj_bias[e]
            next_states.index_add_(0, token, (out * weights[token, slot, None]).to(x.dtype))
        return next_states.view(shape)


@style("stacked_index_assign_add_geglu")
class StackedAssign(Apart):
    """Weights unpacked by iteration; ``out[rows] += ...``."""

    route = Hashed

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, (gate, up, down) in enumerate(zip(self.w_gate, self.w_up, self.w_down, strict=True)):
            token, slot = torch.where(ids == e)
            rows = x[token]
            out[token] += (geglu(rows @ gate, rows @ up) @ down) * weights[token, slot].unsqueeze(1)
        return out


@style("stacked_loop_over_slots_and_experts")
class SlotsAndExperts(Simple):
    """Two loops: for each slot, for each expert, the tokens that have it there."""

    act = staticmethod(lambda h: F.relu(h) ** 2)

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for k in range(self.K):
            for e in range(self.E):
                mask = ids[:, k] == e
                out[mask] += weights[mask, k, None] * self.expert(x[mask], e)
        return out


@style("stacked_if_not_any_continue", **ASKS)
class IfNotAny(Interleaved):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            mask = ids == e
            if not mask.any():
                continue
            token, slot = mask.nonzero(as_tuple=True)
            h = torch.addmm(self.gate_up_proj_bias[e], x[token], self.gate_up_proj[e])
            y = torch.addmm(self.down_proj_bias[e], self.act(h), self.down_proj[e])
            out.index_add_(0, token, y * weights[token, slot].view(-1, 1))
        return out


@style("stacked_slots_if_mask_sum_vllm_reference", **ASKS)
class VLLMReference(Stacked):
    """The reference in vLLM's tests: rows repeated per slot, results written by mask, weighted at the end."""

    E = 8

    def forward(self, a):
        topk_ids, topk_weight = self.router(a)
        b, d = a.shape
        a = a.view(b, -1, d).repeat(1, self.K, 1).reshape(-1, d)
        out = torch.zeros(b * self.K, self.down.shape[1], dtype=a.dtype, device=a.device)
        topk_weight, topk_ids = topk_weight.view(-1), topk_ids.view(-1)
        for i in range(self.E):
            mask = topk_ids == i
            if mask.sum():
                h = a[mask] @ self.gate_up[i].transpose(0, 1)
                out[mask] = (F.silu(h[..., :I]) * h[..., I:]) @ self.down[i].transpose(0, 1)
        return (out.view(b, -1, self.down.shape[1]) * topk_weight.view(b, -1, 1).to(out.dtype)).sum(dim=1)


@style("stacked_flat_weights_chunked_dbrx")
class Dbrx(MoE):
    """DBRX: the experts' rows one below the other in one matrix, taken apart by ``chunk``."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.v1, self.w2 = normal(self.E * I, H), normal(self.E * I, H), normal(self.E * I, H)

    def expert(self, rows, e):
        w1, v1, w2 = (w[e * I : (e + 1) * I] for w in (self.w1, self.v1, self.w2))
        return (F.silu(rows @ w1.t()) * (rows @ v1.t())) @ w2

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.E).permute(2, 1, 0)
        w1, v1, w2 = (w.view(self.E, I, H).chunk(self.E, dim=0) for w in (self.w1, self.v1, self.w2))
        for e in range(self.E):
            slot, token = torch.where(mask[e])
            rows = x[None, token].reshape(-1, H)
            h = F.silu(rows.matmul(w1[e].squeeze(0).t())) * rows.matmul(v1[e].squeeze(0).t())
            out.index_add_(0, token, h.matmul(w2[e].squeeze(0)) * weights[token, slot, None])
        return out


@style("stacked_parallel_linear_jetmoe")
class JetMoE(Stacked):
    """JetMoE and Granite: two lists of linears over rows sorted by expert, added by ``index_add``."""

    route = BestThenSoftmax

    def parallel(self, rows, weight, sizes):
        parts = rows.split(sizes, dim=0)
        return torch.cat([F.linear(parts[e], weight[e]) for e in range(self.E)], dim=0)

    def forward(self, x):
        ids, weights = self.router(x)
        gates = torch.zeros([x.size(0), self.E], dtype=x.dtype, device=x.device).scatter(1, ids, 1)
        sizes = gates.long().sum(0).tolist()
        _, order = ids.flatten().sort(0)
        token = order.div(self.K, rounding_mode="trunc")
        gate, up = self.parallel(x[token], self.gate_up, sizes).chunk(2, dim=-1)
        y = self.parallel(F.silu(gate) * up, self.down, sizes) * weights.flatten()[order][:, None]
        return torch.zeros_like(x).index_add(0, token, y)
