"""Every expert's result, weighted by its column of a table, in a stack that is summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import BATCHED, H, Listed, Router, Stacked, style


class Weighted(Listed):
    def table(self, x):
        ids, weights = self.router(x)
        return torch.zeros(*x.shape[:-1], self.E).scatter(-1, ids, weights)

    def column(self, table, e):
        return table[..., e : e + 1]

    def forward(self, x):
        table = self.table(x)
        return torch.stack([expert(x) * self.column(table, e) for e, expert in enumerate(self.experts)]).sum(0)


style("weighted_results_stacked_and_summed")(Weighted)


@style("weighted_results_stacked_behind_softmax_of_the_best", **BATCHED)
class OfSoftmax(Weighted):
    class Best(Router):
        def forward(self, x):
            best, ids = self.linear(x).topk(self.k, -1)
            return ids, best.softmax(-1)

    route = Best

    def table(self, x):
        logits = self.router.linear(x)
        best, ids = logits.topk(self.K, -1)
        return torch.full_like(logits, float("-inf")).scatter(-1, ids, best).softmax(-1)

    def forward(self, x):
        table = self.table(x)
        results = [expert(x) * table[..., e, None] for e, expert in enumerate(self.experts)]
        return torch.stack(results, dim=-2).sum(-2)


@style("weighted_results_added_by_split_columns")
class Split(Weighted):
    def forward(self, x):
        columns = self.table(x).split(1, dim=-1)
        return sum(expert(x) * column for expert, column in zip(self.experts, columns, strict=True))


@style("rows_where_a_split_column_is_above_zero")
class Chunked(Weighted):
    def forward(self, x):
        out = torch.zeros_like(x)
        for expert, column in zip(self.experts, self.table(x).chunk(self.E, -1), strict=True):
            rows = column.squeeze(-1) > 0
            out[rows] += expert(x[rows]) * column[rows]
        return out


@style("weighted_results_added_of_units_unflattened")
class Unflattened(Stacked):
    """Gate and up lie side by side, and are no columns of a table."""

    def expert(self, rows, e):
        units = F.linear(rows, self.gate_up[e]).unflatten(-1, (-1, 2))
        return F.linear(F.silu(units[..., 0]) * units[..., 1], self.down[e])

    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
        out = torch.zeros(x.shape[0], H)
        for e in range(self.E):
            out = out + table[:, e : e + 1] * self.expert(x, e)
        return out
