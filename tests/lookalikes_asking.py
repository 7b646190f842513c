"""Look-alikes of loops that ask which experts have rows: each asks, or takes, something else."""

from __future__ import annotations

import torch
from lookalikes_bins import LOOKALIKES, lookalike
from styles.base import ASKS, Listed

__all__ = ["LOOKALIKES"]


class Looped(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = torch.nonzero((ids == e).any(dim=1)).squeeze(-1)
            if self.skips(token, x, e):
                continue
            mine = (weights[token] * (ids[token] == e)).sum(1, keepdim=True)
            out[token] += expert(x[token]) * self.weighted(mine, token)
        return out

    def skips(self, token, x, e):
        return len(token) == 0

    def weighted(self, mine, token):
        return mine


@lookalike("asking_for_two_rows", "an expert with a single row is left out", **ASKS)
class OneRow(Looped):
    def skips(self, token, x, e):
        return len(token) <= 1


@lookalike("asking_divided_by_rows", "results are divided by how many rows there are", **ASKS)
class Divided(Looped):
    def weighted(self, mine, token):
        return mine / len(token)


@lookalike("asking_for_the_second_row", "an expert is left out if its second row is not there", **ASKS)
class SecondRow(Looped):
    def skips(self, token, x, e):
        return token[1:].numel() == 0


@lookalike("asking_for_some_rows", "an expert is left out if none of its rows is positive", **ASKS)
class SomeRows(Looped):
    def skips(self, token, x, e):
        rows = x[token]
        return rows[rows.sum(-1) > 0].shape[0] == 0


@lookalike("asking_place_among_named", "the place of an expert among those named", **ASKS)
class Enumerated(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for place, e in enumerate(ids.unique()):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[place](x[token]) * weights[token, slot, None])
        return out


@lookalike("asking_first_choice", "the experts that the first choice names", **ASKS)
class FirstChoice(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in ids[:, 0].unique():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class Sorted(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        order, counts = flat.argsort(), flat.bincount()
        rows, results, start = x[order // self.K], [], 0
        for e, count in enumerate(counts.tolist()):
            results.append(self.experts[e](rows[start : start + count]))
            start = start + count
        weighted = torch.cat(results) * weights.view(-1)[order, None]
        return torch.zeros_like(x).index_add(0, order // self.K, weighted) * self.scale(counts, results)


@lookalike("asking_counts_read", "how far it was counted is read elsewhere", **ASKS)
class CountsRead(Sorted):
    def scale(self, counts, results):
        return counts.float().var()


@lookalike("asking_how_many_counted", "how many experts were counted is read elsewhere", **ASKS)
class ListedLength(Sorted):
    def scale(self, counts, results):
        return len(results)


@lookalike("asking_for_the_expert_before", "where the expert before last ends is asked", **ASKS)
class TwoBefore(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        order = flat.argsort()
        token, scale = order // self.K, weights.view(-1)[order]
        ends = [0, *torch.bincount(flat, minlength=self.E).cumsum(0).tolist()]
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if ends[e] > ends[max(e - 1, 0)]:
                here = token[ends[e] : ends[e + 1]]
                out.index_add_(0, here, expert(x[here]) * scale[ends[e] : ends[e + 1], None])
        return out


@lookalike("asking_results_backwards", "results listed in another order than their tokens", **ASKS)
class Backwards(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        tokens, results = [], []
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                tokens.append(token)
                results.append(expert(x[token]) * weights[token, slot, None])
        return torch.zeros_like(x).index_add(0, torch.cat(tokens[::-1]), torch.cat(results))


@lookalike("asking_averaged", "how many experts have results is read elsewhere", **ASKS)
class Averaged(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        tokens, results = [], []
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                tokens.append(token)
                results.append(expert(x[token]) * weights[token, slot, None])
        return torch.zeros_like(x).index_add(0, torch.cat(tokens), torch.cat(results)) / len(results)


@lookalike("asking_for_another_part", "rows of another expert where one has some", **ASKS)
class AnotherPart(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        order = flat.argsort()
        parts = torch.split(x[order // self.K], torch.bincount(flat, minlength=self.E).tolist())
        results = [self.experts[e](rows) for e, rows in enumerate(parts) if parts[e - 1].shape[0] > 0]
        weighted = torch.cat(results) * weights.view(-1)[order, None]
        return torch.zeros_like(x).index_add(0, order // self.K, weighted)
