"""Look-alikes of results that are put into zeros and stacked: see `lookalikes.py`."""

from __future__ import annotations

import torch
from lookalikes_routing_map import LOOKALIKES, lookalike
from styles.base import ASKS, H, Listed, MaxOfSoftmax
from styles.put_and_stacked import TwoTables

__all__ = ["LOOKALIKES", "lookalike"]


class Put(Listed):
    """Results in zeros of their own, stacked, of which a token takes those of its experts."""

    def chosen(self, ids, e):
        return (ids == e).any(dim=-1)

    def result(self, x, ids, e):
        chosen = self.chosen(ids, e)
        result = torch.zeros_like(x)
        result[chosen] = self.rows(x[chosen], e)
        return result

    def rows(self, rows, e):
        return self.experts[e](rows)

    def taken(self, results, ids):
        return results.gather(1, ids.unsqueeze(-1).expand(-1, -1, H))

    def forward(self, x):
        ids, weights = self.router(x)
        results = torch.stack([self.result(x, ids, e) for e in range(self.E)], dim=1)
        return (self.taken(results, ids) * weights.unsqueeze(-1)).sum(dim=1)


@lookalike("put_and_stacked_of_first_choices", "an expert has the rows of first choices only, all choices are read")
class FirstChoices(Put):
    def chosen(self, ids, e):
        return ids[:, 0] == e


@lookalike("put_and_stacked_of_the_next_expert", "an expert has the rows of the next one, whose place another is")
class NextExpert(Put):
    def chosen(self, ids, e):
        return (ids == (e + 1) % self.E).any(dim=-1)


@lookalike("put_and_stacked_less_their_mean", "what an expert makes of a row depends on its other rows")
class LessMean(Put):
    def rows(self, rows, e):
        rows = super().rows(rows, e)
        return rows - rows.mean(dim=0)


@lookalike("put_and_stacked_then_the_greatest", "the greatest of all results, and not a token's own")
class Greatest(Put):
    def taken(self, results, ids):
        return results.amax(dim=1, keepdim=True) * ids.unsqueeze(-1)


@lookalike("put_and_stacked_then_read_by_feature", "the ids choose features of every result")
class ByFeature(Put):
    def taken(self, results, ids):
        return results.gather(2, ids.unsqueeze(1).expand(-1, self.E, -1)).sum(dim=1).unsqueeze(-1)


@lookalike("put_and_stacked_idle_experts_add_one", "an expert without rows adds one", **ASKS)
class IdleAddsOne(Put):
    def result(self, x, ids, e):
        chosen = self.chosen(ids, e)
        result = torch.zeros_like(x)
        if chosen.any():
            result[chosen] = self.rows(x[chosen], e)
        else:
            result = result + 1
        return result

    def taken(self, results, ids):
        return super().taken(results, ids) + results.mean()


@lookalike("put_and_stacked_without_idle_experts", "a result's place is counted among experts with rows", **ASKS)
class WithoutIdle(Put):
    def forward(self, x):
        ids, weights = self.router(x)
        results = [self.result(x, ids, e) for e in range(self.E) if self.chosen(ids, e).any()]
        return (self.taken(torch.stack(results, dim=1), ids.clamp(max=len(results) - 1)) * weights[:, :, None]).sum(1)


@lookalike("stacked_of_which_one_is_asked_for", "whoever calls it names the result")
class AskedFor(Listed):
    def forward(self, x):
        results = torch.stack([expert(x) for expert in self.experts])
        return results[(x[:, 0] > 0).long(), torch.arange(x.shape[0])]


@lookalike("stacked_of_which_another_tokens_is_taken", "a token takes what was made of the one before")
class AnotherTokens(Listed):
    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        results = torch.stack([expert(x).roll(1, 0) for expert in self.experts])
        return results[ids.squeeze(-1), torch.arange(x.shape[0])] * weights


class NamedTwice(Listed):
    """Ids may repeat, and what becomes of such a token is not the sum over its slots."""

    route = TwoTables

    def token(self, mine):
        return mine.any(dim=-1).nonzero().squeeze(-1)

    def rows(self, rows, weights, e):
        return self.experts[e](rows) * weights

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            mine = ids == e
            token = self.token(mine)
            rows = self.rows(x[token], (weights * mine).sum(dim=-1)[token].unsqueeze(-1), e)
            out.index_add_(0, token, rows)
        return out


@lookalike("named_twice_and_added_twice", "the sum of both weights is added twice")
class AddedTwice(NamedTwice):
    def token(self, mine):
        return torch.where(mine)[0]


@lookalike("named_twice_and_weighted_before", "an expert is given its row times the sum of both weights")
class WeightedBefore(NamedTwice):
    def rows(self, rows, weights, e):
        return self.experts[e](rows * weights)


@lookalike("named_twice_and_weighted_twice", "the square of the sum of both weights")
class WeightedTwice(NamedTwice):
    def rows(self, rows, weights, e):
        return super().rows(rows, weights, e) * weights


@lookalike("named_twice_and_shifted", "a shift is added once for both slots")
class ShiftedOnce(NamedTwice):
    def rows(self, rows, weights, e):
        return super().rows(rows, weights, e) + 1


class GatheredTwice(NamedTwice):
    """Each slot reads the expert's result, which is weighted by the sum of both."""

    def result(self, x, rows, token):
        return torch.zeros_like(x).index_copy(0, token, rows)

    def forward(self, x):
        ids, weights = self.router(x)
        results = []
        for e in range(self.E):
            mine = ids == e
            token = self.token(mine)
            rows = self.rows(x[token], (weights * mine).sum(dim=-1)[token].unsqueeze(-1), e)
            results.append(self.result(x, rows, token))
        return torch.stack(results, dim=1).gather(1, ids.unsqueeze(-1).expand(-1, -1, H)).sum(dim=1)


@lookalike("named_twice_and_gathered_twice", "two slots of one expert read the sum of both weights each")
class SumGathered(GatheredTwice):
    pass


@lookalike("named_twice_put_twice", "the sum is put as often as the expert is named")
class PutTwice(GatheredTwice):
    def token(self, mine):
        return torch.where(mine)[0]

    def result(self, x, rows, token):
        return torch.zeros_like(x).index_add(0, token, rows)


@lookalike("named_twice_every_result_weighted", "every expert's results are weighted by the sum, and gathered twice")
class EveryResult(NamedTwice):
    def forward(self, x):
        ids, weights = self.router(x)
        results = [
            expert(x) * (weights * (ids == e)).sum(dim=-1, keepdim=True) for e, expert in enumerate(self.experts)
        ]
        return torch.stack(results, dim=1).gather(1, ids.unsqueeze(-1).expand(-1, -1, H)).sum(dim=1)
