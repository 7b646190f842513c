"""Loops over the places of a mask: of a map [T, E] of who goes where, or over batch, sequence and slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import ASKS, BATCHED, Apart, GeGLU, H, Listed, ReLU2, Sequence, normal, style


class RoutingMap(Listed):
    """Megatron: a map beside a table of probabilities."""

    def maps(self, x):
        logits = self.router.linear(x)
        weights, ids = torch.topk(logits.softmax(dim=-1), self.K, dim=-1)
        probs = torch.zeros_like(logits).scatter(1, ids, weights)
        return probs, torch.zeros_like(logits).int().scatter(1, ids, 1).bool()


@style("routing_map_selected_and_split_megatron")
class Megatron(RoutingMap):
    """The map turned around selects the tokens from their numbers; split by the map's sums."""

    def forward(self, x):
        probs, routing_map = self.maps(x)
        turned = routing_map.T.contiguous()
        token = torch.arange(x.shape[0]).unsqueeze(0).expand(self.E, -1).masked_select(turned)
        parts = torch.split(x.index_select(0, token), routing_map.sum(dim=0).tolist())
        rows = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        rows = rows * probs.T.contiguous().masked_select(turned).unsqueeze(-1)
        return torch.zeros_like(x).scatter_add(0, token.unsqueeze(1).expand(-1, H), rows)


@style("routing_map_places_sliced")
class MapPlaces(RoutingMap):
    """Its places; slices that start where the one before ended."""

    kind = Sequence

    def forward(self, x):
        probs, routing_map = self.maps(x)
        expert_of_row, token = torch.where(routing_map.T)
        rows, results, start = x[token], [], 0
        for expert, count in zip(self.experts, routing_map.sum(dim=0).tolist(), strict=True):
            results.append(expert(rows[start : start + count]))
            start += count
        results = torch.cat(results) * probs[token, expert_of_row, None]
        return torch.zeros_like(x).index_add(0, token, results)


@style("routing_map_weights_split_before")
class MapBefore(RoutingMap):
    """Weighted before the experts, by numbers that are split too."""

    before = True

    def forward(self, x):
        probs, routing_map = self.maps(x)
        expert_of_row, token = torch.nonzero(routing_map.t()).unbind(1)
        counts = routing_map.sum(dim=0).tolist()
        parts = zip(self.experts, x[token].split(counts), probs[token, expert_of_row].split(counts), strict=True)
        results = [expert(rows * weights[:, None]) for expert, rows, weights in parts]
        return torch.zeros_like(x).index_put((token,), torch.cat(results), accumulate=True)


class Grouped(Apart):
    """The same with a grouped product: the rows end where the map's sums, added up, say."""

    maps = RoutingMap.maps

    def product(self, rows, matrices, ends):
        return torch.ops.moe_fx.grouped_mm(rows, matrices, ends)

    def experts(self, rows, routing_map):
        ends = routing_map.sum(dim=0).cumsum(0).to(torch.int32)
        rows = self.act(self.product(rows, self.w_gate, ends), self.product(rows, self.w_up, ends))
        return self.product(rows, self.w_down, ends)


@style("routing_map_selected_grouped_mm_megatron")
class MegatronGrouped(Grouped):
    def forward(self, x):
        probs, routing_map = self.maps(x)
        turned = routing_map.T.contiguous()
        token = torch.arange(x.shape[0]).unsqueeze(0).expand(self.E, -1).masked_select(turned)
        rows = self.experts(x.index_select(0, token), routing_map)
        rows = rows * probs.T.contiguous().masked_select(turned).unsqueeze(-1)
        return torch.zeros_like(x).scatter_add(0, token.unsqueeze(1).expand(-1, H), rows)


@style("routing_map_nonzero_grouped_mm")
class PlacesGrouped(Grouped):
    """Weighted by the scores of all experts, where the map is true."""

    def forward(self, x):
        scores = self.router.linear(x).sigmoid()
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(self.K).indices, True)
        expert, token = routing_map.t().nonzero(as_tuple=True)
        return x.index_add(0, token, self.experts(x[token], routing_map) * scores[token, expert].unsqueeze(1))


@style("routing_map_of_one_hot_rows_grouped_mm_bias")
class HotGrouped(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.bias = normal(self.E, H)

    def forward(self, x):
        ids, weights = self.router(x)
        routing_map = F.one_hot(ids, self.E).sum(1).bool()
        expert, token = routing_map.t().nonzero().unbind(1)
        table = x.new_zeros(x.shape[0], self.E).scatter(1, ids, weights)
        rows = self.experts(x[token] * table.t()[expert, token, None], routing_map) + self.bias[expert]
        return torch.zeros_like(x).index_add(0, token, rows)


class Batched(Listed):
    """[B, S, H], ids and weights [B, S, K]."""

    def choose(self, x):
        ids, weights = self.router(x.flatten(0, 1))
        return ids.unflatten(0, x.shape[:2]), weights.unflatten(0, x.shape[:2])


@style("places_of_batch_sequence_and_slot", **BATCHED, **ASKS)
class ThreePlaces(Batched):
    kind = GeGLU

    def forward(self, x):
        ids, weights = self.choose(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if mask.any():
                b, s, k = torch.where(mask)
                out[b, s] += weights[b, s, k].unsqueeze(-1) * expert(x[b, s])
        return out


@style("places_of_batch_sequence_and_slot_listed", **BATCHED, **ASKS)
class ThreeListed(Batched):
    kind = ReLU2

    def forward(self, x):
        ids, weights = self.choose(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            places = (ids == e).nonzero()
            if places.numel() == 0:
                continue
            b, s, k = places[:, 0], places[:, 1], places[:, 2]
            out.index_put_((b, s), expert(x[b, s]) * weights[b, s, k, None], accumulate=True)
        return out


@style("places_of_batch_and_sequence", **BATCHED)
class TwoPlaces(Batched):
    def forward(self, x):
        ids, weights = self.choose(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            b, s = torch.where(mine.any(dim=-1))
            out[b, s] += (weights * mine).sum(dim=-1)[b, s][:, None] * expert(x[b, s])
        return out
