"""Bins [E, C, H] of which each expert, a module, takes its own: GShard's layer as DeepSpeed and fairseq have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import GeGLU, H, Listed, Sequence, style

#: one_hot with as many classes as there are tokens is traced for these only
STATIC = dict(dynamic=False, shape=(9, H))


class Binned(Listed):
    """Two argmaxes, each with places behind those of the first; bins that hold all tokens."""

    def combine(self, x):
        logits = self.router.linear(x)
        gates, capacity = logits.softmax(dim=1), x.shape[0]
        first = F.one_hot(gates.argmax(dim=1), self.E)
        second = F.one_hot(logits.masked_fill(first.bool(), float("-inf")).argmax(dim=1), self.E)
        places = torch.cumsum(first, dim=0) - 1, torch.cumsum(second, dim=0) - 1
        places[1].add_(first.sum(dim=0, keepdim=True))
        tables = []
        for mask, place in ((first, places[0]), (second, places[1])):
            mask = mask * torch.lt(place, capacity)
            at = F.one_hot((place * mask).sum(dim=1), capacity).float()
            weights = torch.einsum("s,se->se", (gates * mask).sum(dim=1), mask.float())
            tables.append(torch.einsum("se,sc->sec", weights, at))
        return tables[0] + tables[1]

    def experts_of(self, bins):
        parts = bins.chunk(self.E, dim=0)
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)], dim=0)

    def forward(self, x):
        combine = self.combine(x)
        bins = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), x)
        return torch.einsum("sec,ecm->sm", combine, self.experts_of(bins))

    def plain(self, x):
        gates = self.router.linear(x).softmax(dim=-1)
        weights, ids = gates.topk(2, dim=-1)
        table = torch.zeros_like(gates).scatter(1, ids, weights)
        return sum(table[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


@style("bins_chunked_by_module_deepspeed", **STATIC)
class Chunked(Binned):
    kind = Sequence


@style("bins_read_by_module_and_stacked", **STATIC)
class Read(Binned):
    kind = GeGLU

    def experts_of(self, bins):
        return torch.stack([expert(bins[e]) for e, expert in enumerate(self.experts)])


@style("bins_unbound_by_module", **STATIC)
class Unbound(Binned):
    """The best alone."""

    K = 1

    def combine(self, x):
        gates = self.router.linear(x).softmax(dim=1)
        mask = F.one_hot(gates.argmax(dim=1), self.E)
        place = ((torch.cumsum(mask, dim=0) - 1) * mask).sum(dim=1)
        return torch.einsum("se,sc->sec", gates * mask, F.one_hot(place, num_classes=x.shape[0]).float())

    def experts_of(self, bins):
        return torch.stack([expert(rows) for expert, rows in zip(self.experts, bins.unbind(0), strict=True)], dim=0)

    def plain(self, x):
        weights, ids = self.router.linear(x).softmax(dim=-1).max(dim=-1, keepdim=True)
        return sum(weights * (ids == e) * expert(x) for e, expert in enumerate(self.experts))
