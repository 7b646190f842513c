"""Look-alikes of loops over the places of a mask: see `lookalikes.py`."""

from __future__ import annotations

import torch
from lookalikes_rows_put import LOOKALIKES, lookalike
from styles.base import BATCHED, H
from styles.routing_map import Batched, MegatronGrouped, PlacesGrouped, RoutingMap

__all__ = ["LOOKALIKES", "lookalike"]


class Map(RoutingMap):
    """Tokens of a map, split, each part an expert's, joined and added."""

    def counts(self, routing_map):
        return routing_map.sum(dim=0)

    def rows(self, x, token):
        return x[token]

    def order(self, results):
        return results

    def forward(self, x):
        probs, routing_map = self.maps(x)
        expert_of_row, token = torch.where(routing_map.T)
        parts = self.rows(x, token).split(self.counts(routing_map).tolist())
        results = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        results = torch.cat(self.order(results)) * probs[token, expert_of_row, None]
        return torch.zeros_like(x).index_add(0, token, results)


@lookalike("routing_map_above_a_threshold", "any number of experts takes a token")
class Threshold(Map):
    def maps(self, x):
        probs = self.router.linear(x).sigmoid()
        return probs * (probs > 0.5), probs > 0.5


@lookalike("routing_map_of_tokens_that_experts_chose", "experts choose tokens")
class ExpertsChoose(Map):
    def maps(self, x):
        probs = self.router.linear(x).softmax(dim=-1)
        ids = probs.topk(2, dim=0).indices
        chosen = torch.zeros_like(probs, dtype=torch.int).scatter(0, ids, 1).bool()
        return probs * chosen, chosen


@lookalike("routing_map_counts_of_other_experts", "an expert has as many rows as the one before it")
class OtherCounts(Map):
    def counts(self, routing_map):
        return routing_map.sum(dim=0).roll(1)


@lookalike("routing_map_results_in_another_order", "results are added to another expert's tokens")
class OtherOrder(Map):
    def order(self, results):
        return results[::-1]


@lookalike("routing_map_rows_summed_so_far", "an expert reads the sum of all rows before")
class SoFar(Map):
    def rows(self, x, token):
        return x[token].cumsum(0)


@lookalike("routing_map_of_another_router", "the tokens of a second router's map")
class OtherRouter(Map):
    def rows(self, x, token):
        other = torch.where(self.maps(x.flip(-1))[1].T)[1]
        return x[other[: token.shape[0]]]


class Places(Batched):
    def read(self, x, b, s):
        return x[b, s]

    def forward(self, x):
        ids, weights = self.choose(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, s, k = torch.where(ids == e)
            out = out.index_put((b, s), expert(self.read(x, b, s)) * weights[b, s, k, None], accumulate=True)
        return out


@lookalike("places_exchanged", "rows of a square batch are read at sequence and batch", shape=(3, 3, H), dynamic=False)
class Exchanged(Places):
    def read(self, x, b, s):
        return x[s, b]


@lookalike("places_of_the_token_before", "an expert reads the token before", **BATCHED)
class Before(Places):
    def read(self, x, b, s):
        return x[b, (s - 1).clamp(min=0)]


@lookalike("places_of_the_first_sequence", "an expert reads the first sequence's tokens", **BATCHED)
class FirstSequence(Places):
    def read(self, x, b, s):
        return x[b * 0, s]


@lookalike("routing_map_grouped_mm_above_a_threshold", "any number of experts takes a token")
class GroupedThreshold(MegatronGrouped):
    def maps(self, x):
        probs = self.router.linear(x).sigmoid()
        return probs * (probs > 0.5), probs > 0.5


@lookalike("routing_map_grouped_mm_of_choices_that_repeat", "a token that names an expert twice has one row of it")
class GroupedRepeated(MegatronGrouped):
    def maps(self, x):
        logits = self.router.linear(x)
        ids = torch.stack([logits.argmax(-1), (logits + x[:, : self.E]).argmax(-1)], -1)
        probs = torch.zeros_like(logits).scatter_add(1, ids, torch.ones_like(logits[:, :2]))
        return probs, torch.zeros_like(logits).int().scatter(1, ids, 1).bool()


class MapOf(PlacesGrouped):
    """A map, the order in which its places are listed, and where its rows end."""

    def listed(self, routing_map):
        return routing_map.t().nonzero(as_tuple=True)

    def ends_of(self, routing_map):
        return routing_map

    def forward(self, x):
        scores = self.router.linear(x).sigmoid()
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(self.K).indices, True)
        expert, token = self.listed(routing_map)
        rows = self.experts(x[token], self.ends_of(routing_map))
        return x.index_add(0, token, rows * scores[token, expert].unsqueeze(1))


@lookalike("routing_map_grouped_mm_listed_by_token", "rows stand in the order of the tokens, and are no expert's")
class ListedByToken(MapOf):
    def listed(self, routing_map):
        return reversed(routing_map.nonzero(as_tuple=True))


class TwoOrders(PlacesGrouped):
    """Rows as the map lists them, and weights as a sort of the slots does."""

    def slots(self, values):
        return values.t().reshape(-1)

    def forward(self, x):
        ids, weights = self.router(x)
        routing_map = torch.zeros(x.shape[0], self.E, dtype=torch.bool).scatter(1, ids, True)
        _, token = routing_map.t().nonzero(as_tuple=True)
        order = self.slots(ids).argsort(stable=True)
        rows = self.experts(x[token], routing_map) * self.slots(weights)[order, None]
        return torch.zeros_like(x).index_add(0, token, rows)


lookalike("routing_map_grouped_mm_weights_sorted_slot_by_slot", "weights are those of an expert's other rows")(
    TwoOrders
)


@lookalike("routing_map_grouped_mm_rows_of_one_order_added_in_another", "rows are added to an expert's other tokens")
class AddedInAnotherOrder(TwoOrders):
    def forward(self, x):
        ids, weights = self.router(x)
        routing_map = torch.zeros(x.shape[0], self.E, dtype=torch.bool).scatter(1, ids, True)
        _, token = routing_map.t().nonzero(as_tuple=True)
        order = self.slots(ids).argsort(stable=True)
        rows = self.experts(x[order % x.shape[0]] * self.slots(weights)[order, None], routing_map)
        return torch.zeros_like(x).index_add(0, token, rows)


@lookalike("routing_map_grouped_mm_ends_of_the_mirrored_experts", "rows end where other experts' would")
class MirroredEnds(MapOf):
    def ends_of(self, routing_map):
        return routing_map.flip(1)


@lookalike("routing_map_grouped_mm_of_what_was_not_chosen", "each expert takes the tokens that did not choose it")
class NotChosen(MapOf):
    def listed(self, routing_map):
        return (~routing_map).t().nonzero(as_tuple=True)

    def ends_of(self, routing_map):
        return ~routing_map
