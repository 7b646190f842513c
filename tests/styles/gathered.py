"""Each slot gathers its expert's weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import (
    BATCHED,
    Apart,
    ArgmaxSigmoid,
    BestThenSoftmax,
    H,
    Hashed,
    I,
    Interleaved,
    MaxOfSoftmax,
    MoE,
    Router,
    Simple,
    Sorted,
    Stacked,
    geglu,
    normal,
    style,
    swiglu,
)


@style("gathered_einsum_gpt_fast", **BATCHED)
class GptFast(MoE):
    """gpt-fast's Mixtral: w1 and w3 [E, I, H], w2 [E, H, I], all [T, A, ...] by einsum."""

    E = 8

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = normal(self.E, I, H), normal(self.E, H, I), normal(self.E, I, H)

    def expert(self, rows, e):
        return F.linear(F.silu(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e]), self.w2[e])

    def forward(self, x):
        shape = x.shape
        x = x.view(-1, H)
        expert_indices, expert_weights = self.router(x)
        w1_weights, w3_weights, w2_weights = (w[expert_indices] for w in (self.w1, self.w3, self.w2))
        x1 = F.silu(torch.einsum("ti,taoi -> tao", x, w1_weights))
        x3 = torch.einsum("ti, taoi -> tao", x, w3_weights)
        outs = torch.einsum("tao, taio -> tai", (x1 * x3), w2_weights)
        return torch.einsum("tai,ta -> ti", outs, expert_weights).view(shape)


@style("gathered_einsum_bias_gpt_oss")
class GptOssReference(MoE):
    """OpenAI's torch reference: weights and biases gathered [T, K, ...], interleaved halves."""

    route = BestThenSoftmax

    def __init__(self) -> None:
        super().__init__()
        self.mlp1_weight, self.mlp1_bias = normal(self.E, 2 * I, H), normal(self.E, 2 * I)
        self.mlp2_weight, self.mlp2_bias = normal(self.E, H, I), normal(self.E, H)

    def swiglu(self, h):
        x_glu, x_linear = h[..., ::2].clamp(min=None, max=1.0), h[..., 1::2].clamp(min=-1.0, max=1.0)
        return x_glu * torch.sigmoid(1.702 * x_glu) * (x_linear + 1)

    def expert(self, rows, e):
        h = self.swiglu(F.linear(rows, self.mlp1_weight[e], self.mlp1_bias[e]))
        return F.linear(h, self.mlp2_weight[e], self.mlp2_bias[e])

    def forward(self, t):
        ids, weights = self.router(t)
        h = torch.einsum("beck,bk->bec", self.mlp1_weight[ids, ...], t) + self.mlp1_bias[ids, ...]
        h = torch.einsum("beck,bek->bec", self.mlp2_weight[ids, ...], self.swiglu(h))
        h += self.mlp2_bias[ids, ...]
        return torch.einsum("bec,be->bc", h, weights)


@style("gathered_bmm_rows_repeated")
class GatheredBmm(Stacked):
    """A row per slot, one ``bmm`` per projection."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat, token = ids.reshape(-1), torch.arange(x.shape[0]).unsqueeze(1).expand(-1, self.K).reshape(-1)
        h = torch.bmm(self.gate_up[flat], x[token].unsqueeze(-1)).squeeze(-1)
        gate, up = h.chunk(2, dim=-1)
        y = torch.bmm(self.down[flat], (F.silu(gate) * up).unsqueeze(-1)).squeeze(-1)
        return (y * weights.reshape(-1, 1)).view(-1, self.K, H).sum(dim=1)


@style("gathered_matmul_slots")
class GatheredMatmul(Apart):
    """[T, K, 1, H] @ [T, K, H, I], weights by ``index_select``."""

    def gather(self, weight, ids):
        return torch.index_select(weight, 0, ids.flatten()).view(*ids.shape, *weight.shape[1:])

    def forward(self, x):
        ids, weights = self.router(x)
        rows = x[:, None, None, :].expand(-1, self.K, -1, -1)
        h = geglu(rows @ self.gather(self.w_gate, ids), rows @ self.gather(self.w_up, ids))
        y = (h @ self.gather(self.w_down, ids)).squeeze(-2)
        return (weights.unsqueeze(-2) @ y).squeeze(-2)


@style("gathered_multiply_and_sum")
class GatheredMultiply(Simple):
    """No matrix product at all: broadcast, multiply, sum; weights by ``F.embedding``."""

    route = Hashed

    def forward(self, x):
        ids, weights = self.router(x)
        up = F.embedding(ids, self.up.flatten(1)).view(*ids.shape, I, H)
        down = F.embedding(ids, self.down.flatten(1)).view(*ids.shape, H, I)
        h = F.relu((up * x[:, None, None, :]).sum(dim=-1))
        y = (down * h.unsqueeze(-2)).sum(dim=-1)
        return (y * weights[..., None]).sum(dim=-2)


@style("slot_loop_gathered_bmm")
class SlotLoop(Apart):
    """A Python loop over the slots, each of which gathers its expert's weights."""

    act = staticmethod(swiglu)
    route = Sorted

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for k in range(self.K):
            e, rows = ids[:, k], x.unsqueeze(1)
            h = F.silu(torch.bmm(rows, self.w_gate[e])) * torch.bmm(rows, self.w_up[e])
            out = out + torch.bmm(h, self.w_down[e]).squeeze(1) * weights[:, k : k + 1]
        return out


@style("gathered_top1_baddbmm")
class TopOne(Interleaved):
    """One expert per token: no sum over slots at all."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        e = ids.squeeze(-1)
        h = torch.baddbmm(self.gate_up_proj_bias[e].unsqueeze(1), x.unsqueeze(1), self.gate_up_proj[e])
        y = torch.baddbmm(self.down_proj_bias[e].unsqueeze(1), self.act(h), self.down_proj[e])
        return y.squeeze(1) * weights


@style("slot_loop_einsum_stacked", **BATCHED)
class SlotLoopStacked(Stacked):
    """The slots' results are stacked and weighted; batch and sequence flattened first."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        ids, weights = self.router(rows)
        out = 0
        for k in range(self.K):
            h = torch.einsum("th,tnh->tn", rows, self.gate_up[ids[:, k]])
            gate, up = h.chunk(2, dim=-1)
            y = torch.einsum("ti,thi->th", F.silu(gate) * up, self.down[ids[:, k]])
            out = out + weights[:, k].unsqueeze(-1) * y
        return out.view_as(x)


@style("gathered_top1_linear_bias")
class TopOneBias(Interleaved):
    """One expert per token, bmm and then the expert's bias; the weight inside."""

    K = 1
    route = ArgmaxSigmoid

    def forward(self, x):
        ids, weights = self.router(x)
        e = ids.reshape(-1)
        h = (x.unsqueeze(1) @ self.gate_up_proj[e]).squeeze(1) + self.gate_up_proj_bias[e]
        y = (self.act(h).unsqueeze(1) @ self.down_proj[e]).squeeze(1) + self.down_proj_bias[e]
        return weights * y


@style("slot_loop_stack_sum")
class SlotStack(MoE):
    """All experts' rows in one matrix; each slot weighted by itself, all of them stacked and summed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = normal(self.E * I, H), normal(self.E * I, H)

    def expert(self, rows, e):
        up, down = (w.view(self.E, I, H)[e] for w in (self.up, self.down))
        return F.gelu(rows @ up.t()) @ down

    def slot(self, x, ids):
        up, down = (w.view(self.E, I, H)[ids] for w in (self.up, self.down))
        return torch.matmul(down.transpose(1, 2), F.gelu(up @ x.unsqueeze(-1))).squeeze(-1)

    def forward(self, x):
        ids, weights = self.router(x)
        outs = [self.slot(x, ids[:, k]) * weights[:, k, None] for k in range(self.K)]
        return torch.stack(outs, 1).sum(1)


@style("slot_loop_stack_weighted_after")
class SlotStackAfter(SlotStack):
    """The same, weighted when they are stacked."""

    def forward(self, x):
        ids, weights = self.router(x)
        outs = torch.stack([self.slot(x, ids[:, k]) for k in range(self.K)], dim=1)
        return torch.einsum("tk,tkh->th", weights, outs)


class ProductKeys(Router):
    """PEER: the best halves of a key, then the best pairs of them."""

    def __init__(self, experts: int, k: int, hidden: int = H) -> None:
        super().__init__(experts, k, hidden)
        self.keys = math.isqrt(experts)
        self.linear = nn.Linear(hidden, 2 * self.keys, bias=False)

    def forward(self, x):
        scores, places = self.linear(x).view(-1, 2, self.keys).topk(self.k, dim=-1)
        pairs = (scores[:, 0, :, None] + scores[:, 1, None, :]).flatten(1)
        numbers = (places[:, 0, :, None] * self.keys + places[:, 1, None, :]).flatten(1)
        best, chosen = pairs.topk(self.k, dim=-1)
        return numbers.gather(-1, chosen), best.softmax(dim=-1)


@style("gathered_one_neuron_matmul")
class OneNeuron(MoE):
    """PEER: an expert is one neuron, a row of two embeddings."""

    E = 16
    route = ProductKeys

    def __init__(self) -> None:
        super().__init__()
        self.down_embed, self.up_embed = nn.Embedding(self.E, H), nn.Embedding(self.E, H)

    def expert(self, rows, e):
        return F.gelu(rows @ self.down_embed.weight[e, :, None]) * self.up_embed.weight[e]

    def forward(self, x):
        ids, weights = self.router(x)
        neurons = torch.matmul(self.down_embed(ids), x.unsqueeze(-1)).squeeze(-1)
        return torch.matmul((F.gelu(neurons) * weights).unsqueeze(1), self.up_embed(ids)).squeeze(1)


@style("gathered_one_neuron_einsum", **BATCHED)
class OneNeuronEinsum(OneNeuron):
    """The same on batch and sequence, by einsum."""

    def forward(self, x):
        rows = x.flatten(0, 1)
        ids, weights = self.router(rows)
        ids, weights = ids.view(*x.shape[:2], self.K), weights.view(*x.shape[:2], self.K)
        neurons = torch.einsum("bnd,bnkd->bnk", x, self.down_embed(ids))
        return torch.einsum("bnk,bnkd->bnd", F.gelu(neurons) * weights, self.up_embed(ids))


@style("gathered_experts_last_einsum")
class ExpertsLast(MoE):
    """Weights [H, I, E], [I, E, H] and [I, E]: the experts of each slot are taken along their own dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias, self.down = normal(H, I, self.E), normal(I, self.E), normal(I, self.E, H)

    def expert(self, rows, e):
        return F.relu(rows @ self.up[..., e] + self.up_bias[:, e]) @ self.down[:, e]

    def forward(self, x):
        ids, weights = self.router(x)
        h = torch.einsum("th,hitk->itk", x, self.up[..., ids]) + self.up_bias[:, ids]
        return torch.einsum("itk,itkh,tk->th", F.relu(h), self.down[:, ids], weights)


@style("gathered_experts_last_index_select_bmm")
class ExpertsLastBmm(ExpertsLast):
    """The same, with a product of matrices for each slot."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        h = torch.bmm(x.repeat_interleave(self.K, 0).unsqueeze(1), self.up.index_select(-1, flat).permute(2, 0, 1))
        h = F.relu(h + self.up_bias.index_select(1, flat).T.unsqueeze(1))
        y = torch.bmm(h, self.down.index_select(1, flat).transpose(0, 1)).view(-1, self.K, H)
        return (y * weights.unsqueeze(-1)).sum(1)


@style("embedding_rows_looked_up_slot_after_slot", **BATCHED)
class EmbeddedBySlot(Simple):
    """An expert's matrix is a row of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.rows_up, self.rows_down = nn.Embedding(self.E, I * H), nn.Embedding(self.E, H * I)

    def expert(self, rows, e):
        up, down = self.rows_up.weight[e].view(I, H), self.rows_down.weight[e].view(H, I)
        return F.linear(self.act(F.linear(rows, up)), down)

    def forward(self, x):
        ids, weights = (each.view(*x.shape[:-1], self.K) for each in self.router(x.reshape(-1, H)))
        out = torch.zeros_like(x)
        for k in range(self.K):
            up = self.rows_up(ids[..., k]).view(*x.shape[:-1], I, H)
            down = self.rows_down(ids[..., k]).view(*x.shape[:-1], H, I)
            out = out + weights[..., k, None] * (down @ self.act(up @ x.unsqueeze(-1))).squeeze(-1)
        return out
