"""Loops over a list of modules, by the ways in which they find an expert's rows and put its results back."""

from __future__ import annotations

import torch

from styles.base import GeGLU, GroupLimited, H, Listed, ReLU2, Sorted, Stacked, style


@style("modulelist_nonzero_unbind")
class NonzeroUnbind(Listed):
    """The columns of ``nonzero``, taken apart in one statement."""

    E = 8
    route = GroupLimited

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (ids == e).nonzero().unbind(1)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot].unsqueeze(-1).to(x.dtype))
        return out


@style("stacked_nonzero_transposed")
class NonzeroTransposed(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.nonzero(ids == e).T
            out[token] += self.expert(x[token], e) * weights[token, slot, None]
        return out


@style("modulelist_scatter_reduce")
class ScatterReduce(Listed):
    kind = ReLU2
    route = Sorted

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            rows = expert(x[token]) * weights[token, slot, None]
            out = out.scatter_reduce(0, token[:, None].expand(-1, H), rows, reduce="sum", include_self=True)
        return out


@style("modulelist_masked_scatter_combine_after")
class MaskedScatter(Listed):
    """Every slot's row, written where a wide mask is true."""

    kind = GeGLU

    def forward(self, x):
        ids, weights = self.router(x)
        rows, flat = x.repeat_interleave(self.K, dim=0), ids.view(-1)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mask = flat == e
            out = out.masked_scatter(mask.unsqueeze(-1).expand_as(out), expert(rows[mask]))
        return (out.view(*ids.shape, H) * weights.unsqueeze(-1)).sum(dim=1)
