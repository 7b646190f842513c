"""All experts side by side in one feed-forward layer, whose hidden units are weighted expert by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import BATCHED, H, I, MoE, Router, normal, style


class Wide(MoE):
    """One linear up and one down; a table of routing weights, zero for experts not chosen."""

    route = Router
    bias = False

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, self.E * I, bias=self.bias), nn.Linear(self.E * I, H, bias=False)

    def table(self, x):
        ids, weights = self.router(x.reshape(-1, H))
        table = torch.zeros(*x.shape[:-1], self.E, dtype=weights.dtype)
        return table.scatter(-1, ids.view(*x.shape[:-1], self.K), weights.view(*x.shape[:-1], self.K))

    def hidden(self, x):
        return F.relu(self.up(x))

    def forward(self, x):
        hidden = self.hidden(x).view(-1, self.E, I) * self.table(x).unsqueeze(-1)
        return self.down(hidden.flatten(1))

    def expert(self, rows, e):
        only = torch.zeros(self.E * I)
        only[e * I : (e + 1) * I] = 1
        return F.linear(self.hidden(rows) * only, self.down.weight)


style("wide_ffn_cut_by_expert")(Wide)


@style("wide_ffn_times_repeated_weights_with_bias", **BATCHED)
class Repeated(Wide):
    bias = True

    def forward(self, x):
        return x + self.down(self.hidden(x) * self.table(x).repeat_interleave(I, dim=-1))

    def beside(self, x):
        return x


@style("wide_gated_ffn_times_expanded_weights", **BATCHED)
class Gated(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, self.E * I, bias=False)
        self.output_bias = nn.Parameter(torch.randn(H) * 0.3)

    def hidden(self, x):
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, x):
        hidden = self.hidden(x)
        weights = self.table(x).unsqueeze(-1).expand(*x.shape[:-1], self.E, I).reshape(hidden.shape)
        return F.linear(hidden * weights, self.down.weight, self.output_bias)

    def beside(self, x):
        return self.output_bias


@style("wide_ffn_of_plain_matrices")
class Matrices(Wide):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = normal(H, self.E * I), normal(self.E * I, H)

    def hidden(self, x):
        return F.gelu(x @ self.up)

    def forward(self, x):
        return (self.hidden(x) * torch.repeat_interleave(self.table(x), I, dim=1)) @ self.down

    def expert(self, rows, e):
        mine = slice(e * I, (e + 1) * I)
        return self.hidden(rows)[:, mine] @ self.down[mine]


@style("wide_ffn_einsum_of_views")
class Einsum(Wide):
    """The same weights, seen by expert where they are multiplied."""

    def forward(self, x):
        hidden = F.relu(torch.einsum("th,eih->tei", x, self.up.weight.view(self.E, I, H)))
        return torch.einsum("te,tei,hei->th", self.table(x), hidden, self.down.weight.view(H, self.E, I))
