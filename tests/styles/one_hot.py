"""One-hot dispatch and combine."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import Apart, MaxOfSoftmax, Simple, Stacked, style, swiglu


@style("one_hot_dispatch_combine_te")
class DispatchTE(Apart):
    """Without bins: dispatch [T, E] of ones, combine [T, E] of weights."""

    act = staticmethod(swiglu)

    def forward(self, x):
        ids, weights = self.router(x)
        one_hot = F.one_hot(ids, self.E).to(x.dtype)
        dispatch, combine = one_hot.sum(dim=1), (one_hot * weights[..., None]).sum(dim=1)
        rows = torch.einsum("te,th->eth", dispatch, x)
        h = F.silu(torch.einsum("eth,ehi->eti", rows, self.w_gate)) * torch.einsum("eth,ehi->eti", rows, self.w_up)
        y = torch.einsum("eti,eih->eth", h, self.w_down)
        return torch.einsum("te,eth->th", combine, y)


@style("one_hot_dispatch_switch_mesh")
class SwitchMesh(Simple):
    """Switch: one expert, its gate times the one-hot mask; dispatch per sequence is left out."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        ids, gate = self.router(x)
        mask = F.one_hot(ids[:, 0], self.E).to(x.dtype)
        h = F.relu(torch.einsum("te,th,eih->tei", mask, x, self.up))
        return torch.einsum("tei,ehi,te->th", h, self.down, mask * gate)


@style("one_hot_per_slot_tke")
class PerSlotOneHot(Stacked):
    """The weights themselves are chosen by one-hot products: [T, K, E] with [E, N, K]."""

    def forward(self, x):
        ids, weights = self.router(x)
        one_hot = F.one_hot(ids, self.E).to(x.dtype)
        gate, up = torch.einsum("th,enh,tke->tkn", x, self.gate_up, one_hot).chunk(2, dim=-1)
        return torch.einsum("tki,ehi,tke,tk->th", F.silu(gate) * up, self.down, one_hot, weights)
