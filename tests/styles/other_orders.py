"""Loops that go through the experts in another order than that of their numbers."""

from __future__ import annotations

import torch

from styles.base import H, Listed, MaxOfSoftmax, Simple, style

ORDER = (2, 0, 3, 1)


@style("modulelist_in_another_order_index_add")
class Added(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in ORDER:
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


@style("modulelist_reversed_rows_of_slots_written")
class Written(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat, rows = ids.flatten(), x.repeat_interleave(self.K, 0)
        done = torch.empty_like(rows)
        for e in reversed(range(self.E)):
            mine = flat == e
            done[mine] = self.experts[e](rows[mine])
        return (done.view(-1, self.K, H) * weights[..., None]).sum(1)


@style("modulelist_reversed_rows_of_tokens_written")
class WrittenOnce(Listed):
    K, route = 1, MaxOfSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in reversed(range(self.E)):
            mine = ids[:, 0] == e
            out[mine] = self.experts[e](x[mine]) * weights[mine]
        return out


@style("modulelist_in_another_order_dense_loop")
class Dense(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e in ORDER:
            out = out + self.experts[e](x) * table[:, e, None]
        return out


@style("modules_that_stand_in_another_order_than_their_numbers")
class Numbered(Listed):
    def expert(self, rows, e):
        return self.experts[ORDER.index(e)](rows)

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in zip(ORDER, self.experts, strict=True):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@style("stacked_down_in_another_order_than_up")
class Mixed(Simple):
    def expert(self, rows, e):
        return self.act(rows @ self.up[e].t()) @ self.down[ORDER[e]].t()

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out
