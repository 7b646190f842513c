"""What differs from a layer in an argument of one op only: a width, or a factor."""

from __future__ import annotations

import torch
from lookalikes_other_ops import LOOKALIKES, lookalike
from styles.base import H, Listed
from styles.turned_over import EndsByComparison

__all__ = ["LOOKALIKES", "lookalike"]


class AddedToTokens(EndsByComparison):
    """Rows sorted by expert, their results moved to the tokens by places that are repeated for each feature."""

    def forward(self, x):
        ids, weights = self.router(x)
        order = ids.flatten().argsort()
        ends = (ids.flatten().unsqueeze(1) <= torch.arange(self.E)).sum(0).int()
        rows = x[order // self.K]
        rows = self.act(self.product(rows, self.w_gate, ends), self.product(rows, self.w_up, ends))
        return self.moved(x, self.product(rows, self.w_down, ends) * weights.flatten()[order][:, None], order)

    def moved(self, x, rows, order):
        raise NotImplementedError


@lookalike("sorted_bmm_half_of_the_features_added", "the other half of a token's features gets nothing")
class HalfAdded(AddedToTokens):
    def moved(self, x, rows, order):
        return torch.zeros_like(x).scatter_add(0, (order // self.K)[:, None].expand(-1, H // 2), rows)


@lookalike("sorted_bmm_all_but_one_feature_reduced", "the last feature of a token gets nothing")
class AllButOneReduced(AddedToTokens):
    def moved(self, x, rows, order):
        return x.scatter_reduce(0, (order // self.K)[:, None].expand(-1, H - 1), rows, "sum")


@lookalike("sorted_bmm_half_of_the_features_put_back", "the other half of a slot's features stays zero")
class HalfPutBack(AddedToTokens):
    def moved(self, x, rows, order):
        slots = torch.zeros_like(rows).scatter(0, order[:, None].expand(-1, H // 2), rows)
        return slots.view(-1, self.K, H).sum(1)


@lookalike("sorted_bmm_added_to_wider_tokens", "what is added to has more features than the rows")
class WiderTokens(AddedToTokens):
    def moved(self, x, rows, order):
        wide = (order // self.K)[:, None].expand(-1, H)
        return torch.cat([x, x], -1).scatter_add(0, wide, rows)[:, :H]


@lookalike("modulelist_half_of_the_features_added", "the other half of a token's features gets nothing")
class HalfAddedByExperts(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            results = expert(x[token]) * weights[token, slot, None]
            out = out.scatter_add(0, token[:, None].expand(-1, H // 2), results)
        return out


class AllTokens(Listed):
    """Every expert on every token, weighted by its column of a table."""

    def begin(self, x):
        return torch.zeros_like(x)

    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
        out = self.begin(x)
        for e, expert in enumerate(self.experts):
            out = self.add(out, expert(x) * table[:, e, None])
        return out


@lookalike("dense_loop_each_expert_added_twice", "a sum has a factor")
class AddedTwice(AllTokens):
    def add(self, out, part):
        return torch.add(out, part, alpha=2)


@lookalike("dense_loop_what_was_added_before_counts_twice", "a sum has a factor")
class DoubledInTurn(AllTokens):
    def add(self, out, part):
        return torch.add(part, out, alpha=2)


@lookalike("dense_loop_taken_away_in_place", "a difference has a factor")
class TakenAway(AllTokens):
    def add(self, out, part):
        return out.sub_(part, alpha=0.5)


@lookalike("dense_loop_table_of_products", "experts that were not chosen have a weight of one")
class TableOfProducts(AllTokens):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.ones(x.shape[0], self.E).scatter(1, ids, weights, reduce="multiply")
        return sum(expert(x) * table[:, e, None] for e, expert in enumerate(self.experts))


@lookalike("modulelist_ids_halved", "half of an odd number names no expert")
class HalvedIds(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        ids, out = ids.float() / 2, torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@lookalike("modulelist_put_into_zeros_and_added_twice", "a sum has a factor")
class PutAndAddedTwice(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            part = torch.zeros_like(x).index_copy(0, token, expert(x[token]) * weights[token, slot, None])
            out = torch.add(out, part, alpha=3)
        return out
