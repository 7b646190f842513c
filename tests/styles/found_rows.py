"""Loops over a list of modules, by the ways in which they find an expert's rows and put its results back."""

from __future__ import annotations

import torch

from styles.base import (
    ASKS,
    BATCHED,
    BestThenSoftmax,
    GeGLU,
    GroupLimited,
    H,
    Listed,
    MaxOfSoftmax,
    ReLU2,
    Sequence,
    Sorted,
    Stacked,
    normal,
    style,
)


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


@style("modulelist_index_select_summed_mask")
class IndexSelectSummed(Listed):
    """The weights of all tokens by a mask, zero where another expert was chosen; then those of the expert's rows."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            token = mask.any(-1).nonzero().squeeze(-1)
            weight = (weights * mask).sum(dim=-1, keepdim=True)
            out.index_add_(0, token, expert(x.index_select(0, token)) * weight.index_select(0, token))
        return out


@style("modulelist_weights_by_mask_of_slots")
class WeightsByMask(Listed):
    """One mask for the weights, [T, K], and one for the rows, [T]; each expert has a scale."""

    kind = Sequence

    def __init__(self) -> None:
        super().__init__()
        self.scale = normal(self.E)

    def expert(self, rows, e):
        return self.experts[e](rows) * self.scale[e]

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            rows = (ids == e).any(dim=1)
            out[rows] += self.expert(x[rows], e) * weights[ids == e][:, None]
        return out


@style("modulelist_slots_and_experts_if_mask_sum", **ASKS, **BATCHED)
class SlotsAndExperts(Listed):
    """A loop over the slots around one over the experts; the weights of a slot as a slice."""

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for k in range(self.K):
            for e in range(self.E):
                mask = ids[:, k] == e
                if mask.sum() > 0:
                    out[mask] = out[mask] + weights[mask, k : k + 1] * self.experts[e](x[mask])
        return out.reshape(shape)


@style("modulelist_where_of_rows")
class WhereOfRows(Listed):
    """The weights of an expert's tokens: in their rows of ids, those where it stands."""

    route = BestThenSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = torch.nonzero((ids == e).any(dim=1), as_tuple=True)[0]
            mine = weights[token]
            gate = torch.where(ids[token] == e, mine, torch.zeros_like(mine)).sum(1, keepdim=True)
            out = out.index_add(0, token, gate * expert(x[token]))
        return out


@style("modulelist_positive_gates")
class PositiveGates(Listed):
    """A table of routing weights, of which those above zero say which rows an expert has."""

    route = BestThenSoftmax

    def gates(self, x):
        ids, weights = self.router(x)
        return torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights)

    def forward(self, x):
        gates = self.gates(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = gates[:, e] > 0
            out[mask] += gates[mask, e].unsqueeze(1) * expert(x[mask])
        return out


@style("modulelist_nonzero_gates", **ASKS)
class NonzeroGates(PositiveGates):
    """The places of what is not zero, if there are any; the weights as a slice."""

    kind = ReLU2

    def forward(self, x):
        gates = self.gates(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = gates[:, e].nonzero(as_tuple=True)[0]
            if rows.numel() == 0:
                continue
            out.index_add_(0, rows, expert(x[rows]) * gates[rows, e : e + 1])
        return out


@style("modulelist_normed_masked_gates")
class NormedMaskedGates(Listed):
    """Probabilities times a mask of the best, made to add up to one."""

    def forward(self, x):
        probs = self.router.linear(x).softmax(dim=-1)
        mask = torch.zeros_like(probs).scatter_(1, probs.topk(self.K, dim=-1).indices, 1.0)
        gates = probs * mask
        gates = gates / gates.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(gates[:, e] > 0)[0]
            out.index_add_(0, rows, expert(x[rows]) * gates[rows, e].unsqueeze(-1))
        return out


@style("modulelist_columns_of_a_mask")
class ColumnsOfMask(Listed):
    """A mask by token and expert says which rows an expert has; experts with bias."""

    kind = Sequence

    def forward(self, x):
        probs = self.router.linear(x).sigmoid()
        mask = torch.zeros_like(probs, dtype=torch.bool).scatter_(1, probs.topk(self.K, dim=-1).indices, True)
        gates = probs * mask
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = mask[:, e]
            out[rows] += expert(x[rows]) * gates[rows, e, None]
        return out


@style("modulelist_slots_written_by_places")
class SlotsWritten(Listed):
    """Results written where a token's slot is; weighted and added up afterwards."""

    def forward(self, x):
        ids, weights = self.router(x)
        results = x.new_empty(x.shape[0], self.K, H)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            results[token, slot] = expert(x[token])
        return torch.einsum("tkh,tk->th", results, weights)


@style("stacked_weighted_slots_written_by_places", **ASKS)
class WeightedSlotsWritten(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        results = torch.zeros(x.shape[0], self.K, H)
        for e in range(self.E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if token.numel() > 0:
                results[token, slot] = self.expert(x[token], e) * weights[token, slot, None]
        return results.sum(dim=1)


@style("modulelist_slots_written_by_a_mask")
class SlotsWrittenByMask(Listed):
    """Tokens repeated for each slot; a mask over tokens and slots reads and writes."""

    route = Sorted

    def forward(self, x):
        ids, weights = self.router(x)
        rows = x[:, None].expand(-1, self.K, -1)
        results = torch.zeros(x.shape[0], self.K, H)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            results[mask] = expert(rows[mask])
        return (results * weights[..., None]).sum(dim=1)


@style("modulelist_tokens_by_number")
class TokensByNumber(Listed):
    """Slots numbered through, and the number of each one's token, both by a mask."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat, scale = ids.reshape(-1), weights.reshape(-1)
        number = torch.arange(x.shape[0]).repeat_interleave(self.K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = flat == e
            token = number[mask]
            out.index_add_(0, token, expert(x[token]) * scale[mask].unsqueeze(-1))
        return out


@style("stacked_tokens_by_number_expanded", **ASKS)
class TokensByNumberExpanded(Stacked):
    K = 3

    def forward(self, x):
        ids, weights = self.router(x)
        flat, scale = ids.view(-1), weights.view(-1)
        number = torch.arange(x.shape[0]).unsqueeze(1).expand(-1, self.K).reshape(-1)
        out = torch.zeros_like(x)
        for e in range(self.E):
            mask = flat == e
            if mask.any():
                out.index_add_(0, number[mask], self.expert(x[number[mask]], e) * scale[mask, None])
        return out


@style("modulelist_where_weights_batched", **ASKS, **BATCHED)
class WhereBatched(Listed):
    """[B, S, H] all the way; an expert's weight is chosen by ``torch.where``."""

    def forward(self, x):
        ids, weights = self.router(x.flatten(0, 1))
        ids, weights = ids.unflatten(0, x.shape[:2]), weights.unflatten(0, x.shape[:2])
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(dim=-1)
            if mask.any():
                weight = torch.where(ids == e, weights, torch.zeros_like(weights)).sum(dim=-1)
                out[mask] += expert(x[mask]) * weight[mask].unsqueeze(-1)
        return out


@style("modulelist_slots_and_experts_batched", **BATCHED)
class SlotsBatched(Listed):
    kind = ReLU2

    def forward(self, x):
        ids, weights = self.router(x.flatten(0, 1))
        ids, weights = ids.unflatten(0, x.shape[:2]), weights.unflatten(0, x.shape[:2])
        out = torch.zeros_like(x)
        for k in range(self.K):
            for e, expert in enumerate(self.experts):
                mask = ids[..., k] == e
                out[mask] += expert(x[mask]) * weights[..., k][mask].unsqueeze(-1)
        return out


@style("modulelist_weighted_rows_written_top1", **ASKS)
class WeightedRowsWritten(Listed):
    """One expert per token, whose weight is a vector."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        weights, ids = self.router.linear(x).softmax(dim=-1).max(dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (ids == e).nonzero(as_tuple=True)[0]
            if rows.numel() > 0:
                out[rows] = expert(x[rows]) * weights[rows].unsqueeze(-1)
        return out


@style("modulelist_column_rows_written_top1")
class ColumnRowsWritten(Listed):
    """One expert per token, whose weight stands in its column of all probabilities."""

    K = 1
    route = MaxOfSoftmax

    def forward(self, x):
        probs = self.router.linear(x).softmax(dim=-1)
        ids = probs.argmax(dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            out[mask] = expert(x[mask]) * probs[mask, e].unsqueeze(-1)
        return out
