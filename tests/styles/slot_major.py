"""Rows sorted by expert that stand slot after slot: the first choice of every token, then the second."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import ASKS, BATCHED, Apart, H, Stacked, TwoArgmaxes, style


class SlotMajor(Apart):
    """torch's grouped product; the token is the remainder."""

    act = staticmethod(lambda gate, up: F.silu(gate) * up)

    def chosen(self, x):
        ids, weights = self.router(x)
        return ids.t().reshape(-1), weights.t().reshape(-1)

    def experts(self, rows, flat):
        offs = torch.bincount(flat, minlength=self.E).cumsum(0).to(torch.int32)
        gate, up = (torch._grouped_mm(rows, w, offs=offs) for w in (self.w_gate, self.w_up))
        return torch._grouped_mm(self.act(gate, up), self.w_down, offs=offs)

    def forward(self, x):
        flat, weights = self.chosen(x)
        order = flat.argsort()
        token = order % x.shape[0]
        rows = self.experts(x[token], flat) * weights[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, token, rows)


style("slots_sorted_slot_major_remainder_index_add", **ASKS)(SlotMajor)


@style("slots_sorted_slot_major_gathered_weights")
class Gathered(SlotMajor):
    """Each row gathers its expert's weights."""

    def experts(self, rows, flat):
        return self.of_numbers(rows, flat.sort().values)

    def of_numbers(self, rows, numbers):
        gate, up = (torch.bmm(rows[:, None], w[numbers]) for w in (self.w_gate, self.w_up))
        return torch.bmm(self.act(gate, up), self.w_down[numbers])[:, 0]


@style("slots_sorted_slot_major_repeat_written_back", **ASKS)
class WrittenBack(SlotMajor):
    def forward(self, x):
        flat, weights = self.chosen(x)
        order = flat.argsort(stable=True)
        rows = self.experts(x.repeat(self.K, 1)[order], flat) * weights[order, None]
        out = torch.empty_like(rows)
        out[order] = rows
        return out.view(self.K, -1, H).sum(0)


@style("slots_sorted_slot_major_expanded_einsum", **BATCHED, **ASKS)
class Expanded(SlotMajor):
    """Numbers of tokens repeated; counts by search; weights in the sum."""

    def forward(self, x):
        tokens = x.reshape(-1, H)
        ids, weights = self.router(tokens)
        flat = ids.transpose(0, 1).contiguous().view(-1)
        numbers, order = torch.sort(flat, stable=True)
        token = torch.arange(tokens.shape[0]).repeat(self.K)[order]
        offs = torch.searchsorted(numbers, torch.arange(self.E), right=True).to(torch.int32)
        gate, up = (torch._grouped_mm(tokens[token], w, offs=offs) for w in (self.w_gate, self.w_up))
        rows = torch._grouped_mm(self.act(gate, up), self.w_down, offs=offs)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return torch.einsum("kth,tk->th", rows[back].view(self.K, -1, H), weights).view(x.shape)


@style("slots_sorted_slot_major_split_and_joined", **ASKS)
class Split(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.T.reshape(-1)
        order = flat.argsort(stable=True)
        parts = x.repeat(self.K, 1)[order].split(torch.bincount(flat, minlength=self.E).tolist())
        rows = torch.cat([self.expert(part, e) for e, part in enumerate(parts)])
        return (rows[order.argsort()].view(self.K, -1, H) * weights.T.unsqueeze(-1)).sum(0)


@style("slots_sorted_slot_major_two_argmaxes_joined", **ASKS)
class Joined(SlotMajor):
    """First choices and second ones are joined, and their rows added: a layer of twice as many tokens."""

    route = TwoArgmaxes

    def forward(self, x):
        (first, second), weights = (each.unbind(-1) for each in self.router(x))
        flat, tokens = torch.cat([first, second]), x.shape[0]
        order = flat.argsort()
        rows = self.experts(torch.cat([x, x])[order], flat) * torch.cat(weights)[order, None]
        out = torch.empty_like(rows)
        out[order] = rows
        return out[:tokens] + out[tokens:]
