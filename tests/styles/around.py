"""What stands around the experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.all_at_once import GptOssDense
from styles.base import BATCHED, GeGLU, H, I, Listed, MoE, Router, Simple, Stacked, SwiGLU, Unnormalised, normal, style
from styles.gathered import GptFast


@style("shared_expert_sigmoid_gated_qwen2", **BATCHED)
class Qwen2(Listed):
    """Qwen2-MoE: a loop, and a shared expert behind a sigmoid of its own."""

    route = Unnormalised

    def __init__(self) -> None:
        super().__init__()
        self.shared_expert, self.shared_expert_gate = SwiGLU(), nn.Linear(H, 1, bias=False)

    def beside(self, x):
        return torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)

    def forward(self, x):
        shape = x.shape
        x = x.view(-1, H)
        ids, weights = self.router(x)
        final = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=self.E).permute(2, 1, 0)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(mask[e])
            final.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return (final + self.beside(x)).reshape(shape)


@style("shared_expert_plain_gathered", **BATCHED)
class SharedGathered(GptFast):
    def __init__(self) -> None:
        super().__init__()
        self.shared = SwiGLU()

    def beside(self, x):
        return self.shared(x)

    def forward(self, x):
        return self.shared(x) + super().forward(x)


@style("two_blocks_residual", **BATCHED, layers=2)
class TwoBlocks(nn.Module):
    """Two different styles in a row, each with norm and residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(2))
        self.blocks = nn.ModuleList([GptOssDense(), GptFast()])

    def forward(self, x):
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x

    def plain(self, x):
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block.plain(norm(x))
        return x


@style("latent_experts_up_projected_after")
class Latent(MoE):
    """The experts work on a projection of the tokens; the router reads the tokens themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.to_latent, self.from_latent = nn.Linear(H, 8, bias=False), nn.Linear(8, H, bias=False)
        self.up, self.down = normal(self.E, I, 8), normal(self.E, 8, I)

    def expert(self, rows, e):
        return self.from_latent(F.linear(F.relu(F.linear(self.to_latent(rows), self.up[e])).square(), self.down[e]))

    def forward(self, x):
        ids, weights = self.router(x)
        z = self.to_latent(x)
        h = torch.einsum("th,tkih->tki", z, self.up[ids])
        y = torch.einsum("tki,tkhi->tkh", F.relu(h).square(), self.down[ids])
        return self.from_latent(torch.einsum("tkh,tk->th", y, weights))


@style("per_expert_scale_gemma4")
class PerExpertScale(Stacked):
    """A learned scale per expert, gathered into the routing weights."""

    def __init__(self) -> None:
        super().__init__()
        self.per_expert_scale = nn.Parameter(torch.rand(self.E) + 0.5)

    def expert(self, rows, e):
        return super().expert(rows, e) * self.per_expert_scale[e]

    def forward(self, x):
        ids, weights = self.router(x)
        weights = weights * self.per_expert_scale[ids]
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.E).permute(2, 1, 0)
        for e in range(self.E):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, super().expert(x[token], e) * weights[token, slot, None])
        return out


@style("norm_inside_expert_dense")
class NormInside(Simple):
    """Each expert has a norm with a weight of its own between its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(self.E, I) + 0.5)

    def expert(self, rows, e):
        h = F.rms_norm(F.linear(rows, self.up[e]), (I,), self.norm[e], eps=1e-5)
        return F.linear(F.relu(h), self.down[e])

    def forward(self, x):
        ids, weights = self.router(x)
        gates = x.new_zeros(x.shape[0], self.E).scatter(1, ids, weights)
        h = torch.einsum("th,eih->eti", x, self.up)
        h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + 1e-5) * self.norm[:, None]
        return (torch.einsum("eti,ehi->eth", F.relu(h), self.down) * gates.t().unsqueeze(-1)).sum(dim=0)


@style("identity_experts_longcat")
class IdentityExperts(Listed):
    """LongCat: ids from E on stand for experts that return the token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Unnormalised(self.E + 2, self.K)

    def expert(self, rows, e):
        return self.experts[e](rows) if e < self.E else rows

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E + 2):
            token, slot = torch.where(ids == e)
            rows = x[token]
            y = self.experts[e](rows) if e < self.E else rows
            out.index_add_(0, token, y * weights[token, slot, None])
        return out


@style("null_experts_skipped_index_add")
class NullExperts(Stacked):
    """Ids from E on stand for no expert: they take weight and give nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(self.E + 2, self.K)

    def expert(self, rows, e):
        return super().expert(rows, e) if e < self.E else torch.zeros_like(rows)

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


@style("router_on_another_tensor", **BATCHED)
class RouterElsewhere(Listed):
    """The router reads tokens with a norm of its own; the experts, those with another."""

    kind = GeGLU

    def __init__(self) -> None:
        super().__init__()
        self.router_norm, self.expert_norm = nn.RMSNorm(H, eps=1e-6), nn.LayerNorm(H)

    def plain(self, x):
        rows, outs = self.expert_norm(x).view(-1, H), []
        for row, chosen, slots in zip(rows, *self.router(self.router_norm(x.view(-1, H))), strict=True):
            outs.append(sum(self.expert(row[None], e)[0] * w for e, w in zip(chosen.tolist(), slots, strict=True)))
        return x + torch.stack(outs).view(x.shape)

    def forward(self, x):
        ids, weights = self.router(self.router_norm(x.view(-1, H)))
        rows = self.expert_norm(x).view(-1, H)
        table = torch.zeros(rows.shape[0], self.E, dtype=x.dtype).scatter(-1, ids, weights)
        every = torch.stack([expert(rows) for expert in self.experts], dim=-1)
        return x + (every @ table.unsqueeze(-1)).view(x.shape)


@style("stacked_hit_experts_then_shared_norm", through="moe_fx.export")
class SharedNorm(Stacked):
    """One norm after every expert, which shifts and casts its scale in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(H) * 0.1)

    def expert(self, rows, e):
        return F.rms_norm(super().expert(rows, e) * (1.0 + self.scale).float(), (H,), eps=1e-6)

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.E).permute(2, 1, 0)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e[0]])
            out.index_add_(0, token, self.expert(x[token], e[0]) * weights[token, slot, None])
        return out
