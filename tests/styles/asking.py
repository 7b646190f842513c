"""Loops that ask which experts have rows, by the ways in which they ask."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import (
    ASKS,
    Apart,
    BestThenSoftmax,
    GeGLU,
    H,
    I,
    Listed,
    ReLU2,
    Sorted,
    Stacked,
    Unnormalised,
    normal,
    style,
)


@style("modulelist_len_of_places", **ASKS)
class LenOfPlaces(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = torch.nonzero((ids == e).any(dim=1)).squeeze(-1)
            if len(token) == 0:
                continue
            mine = torch.where(ids[token] == e, weights[token], 0.0).sum(1, keepdim=True)
            out[token] += expert(x[token]) * mine
        return out


@style("modulelist_shape_of_rows", **ASKS)
class ShapeOfRows(Listed):
    """The rows are taken first, and then asked how many they are."""

    kind = ReLU2

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            rows = x[token]
            if rows.shape[0] == 0:
                continue
            out.index_add_(0, token, expert(rows) * weights[token, slot, None])
        return out


@style("modulelist_counts_one_by_one", **ASKS)
class CountsOneByOne(Listed):
    """The counts stay a tensor, of which each expert's is asked for."""

    route = BestThenSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        counts = torch.bincount(ids.flatten(), minlength=self.E)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if counts[e] == 0:
                continue
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot].unsqueeze(-1))
        return out


@style("modulelist_counts_of_one_hot_listed", **ASKS)
class CountsOfOneHot(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        counts = F.one_hot(ids, self.E).sum(1).sum(0).tolist()
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if counts[e] > 0:
                mask = ids == e
                token = mask.any(-1)
                out[token] += expert(x[token]) * weights.masked_fill(~mask, 0).sum(1, keepdim=True)[token]
        return out


@style("modulelist_unique_ids", **ASKS)
class UniqueIds(Listed):
    """A loop over the experts that ids name."""

    route = Sorted

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


@style("stacked_unique_flat_ids", **ASKS)
class UniqueStacked(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in torch.unique(ids.view(-1)):
            token, slot = (ids == e).nonzero(as_tuple=True)
            out[token] += self.expert(x[token], e) * weights[token, slot].unsqueeze(-1)
        return out


@style("modulelist_unique_with_counts", **ASKS)
class UniqueCounts(Listed):
    """The experts that ids name, and how many rows each takes of the sorted ones."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        order = flat.argsort()
        rows, token, start, results = x[order // self.K], order // self.K, 0, []
        named, counts = torch.unique(flat, return_counts=True)
        for e, count in zip(named.tolist(), counts.tolist(), strict=True):
            results.append(self.experts[e](rows[start : start + count]))
            start += count
        weighted = torch.cat(results) * weights.view(-1)[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, token, weighted)


@style("modulelist_moe_infer_ends_numpy_deepseek", **ASKS)
class MoeInfer(Listed):
    """DeepSeek's first ``moe_infer``: where rows end, counted as far as the last expert that was hit."""

    @torch.no_grad()
    def moe_infer(self, x, flat_ids, flat_weights):
        cache = torch.zeros_like(x)
        order = flat_ids.argsort()
        ends = flat_ids.bincount().cpu().numpy().cumsum(0)
        tokens = order // self.K
        for i, end in enumerate(ends):
            start = 0 if i == 0 else ends[i - 1]
            if start == end:
                continue
            token = tokens[start:end]
            rows = self.experts[i](x[token])
            rows.mul_(flat_weights[order[start:end]])
            cache.scatter_reduce_(0, token.view(-1, 1).repeat(1, x.shape[-1]), rows, reduce="sum")
        return cache

    def forward(self, x):
        ids, weights = self.router(x)
        return self.moe_infer(x, ids.view(-1), weights.view(-1, 1))


@style("modulelist_ends_listed_index_add", **ASKS)
class EndsListed(Listed):
    kind = GeGLU

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        ends = torch.cumsum(torch.bincount(flat, minlength=self.E), dim=0).tolist()
        token, scale = order // self.K, weights.reshape(-1)[order]
        out, start = torch.zeros_like(x), 0
        for e, end in enumerate(ends):
            if end > start:
                here = token[start:end]
                out.index_add_(0, here, self.experts[e](x[here]) * scale[start:end, None])
            start = end
        return out


@style("modulelist_parts_with_rows", **ASKS)
class PartsWithRows(Listed):
    """Sorted rows split by their counts; parts without rows are passed over."""

    def forward(self, x):
        ids, weights = self.router(x)
        sorted_ids, order = ids.view(-1).sort()
        counts = torch.bincount(sorted_ids, minlength=self.E).tolist()
        results = []
        for e, rows in enumerate(torch.split(x[order // self.K], counts)):
            if rows.shape[0] > 0:
                results.append(self.experts[e](rows))
        weighted = torch.cat(results) * weights.view(-1)[order][:, None]
        return torch.zeros_like(x).index_add_(0, order // self.K, weighted)


@style("modulelist_results_listed", **ASKS)
class ResultsListed(Listed):
    """Tokens and results collected in lists, which are joined and added at once."""

    def forward(self, x):
        ids, weights = self.router(x)
        tokens, results = [], []
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            tokens.append(token)
            results.append(expert(x[token]) * weights[token, slot, None])
        return torch.zeros(x.shape[0], H).index_add(0, torch.cat(tokens), torch.cat(results))


@style("stacked_results_listed_without_question")
class ResultsJoined(Stacked):
    def forward(self, x):
        ids, weights = self.router(x)
        tokens, results = [], []
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            tokens.append(token)
            results.append(self.expert(x[token], e) * weights[token, slot, None])
        return torch.zeros_like(x).index_add(0, torch.cat(tokens), torch.cat(results))


@style("stacked_sequential_gemm_index_copy_aria", torch="2.13", **ASKS)
class Aria(Apart):
    """Aria of transformers 4.57: each product apart, written to slices of a buffer; put back by ``index_copy_``."""

    def sequential_gemm(self, tokens, weight, counts):
        out = torch.zeros(tokens.shape[0], weight.shape[-1], dtype=tokens.dtype)
        ends = torch.cumsum(counts, dim=0)
        ends = torch.cat((torch.zeros(1, dtype=torch.long), ends))
        for e in range(weight.shape[0]):
            start, end = ends[e], ends[e + 1]
            out[start:end] = torch.matmul(tokens[start:end], weight[e])
        return out

    def forward(self, x):
        ids, weights = self.router(x)
        counts = torch.histc(ids.flatten().float(), bins=self.E, min=0, max=self.E - 1).long()
        order = torch.argsort(ids.view(-1))
        rows = x.index_select(0, order // self.K)
        h = self.act(self.sequential_gemm(rows, self.w_gate, counts), self.sequential_gemm(rows, self.w_up, counts))
        results = self.sequential_gemm(h, self.w_down, counts)
        back = torch.zeros(x.shape[0] * self.K, H)
        back.index_copy_(0, order, results)
        return (back.view(-1, self.K, H) * weights.unsqueeze(-1)).sum(dim=1)


@style("modulelist_slot_found_by_argmax", **ASKS)
class SlotFound(Listed):
    """An expert's slot of a token is found in the mask at the token's row."""

    route = BestThenSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            if not mask.any():
                continue
            token = mask.any(dim=-1).nonzero().squeeze(-1)
            if token.numel() == 0:
                continue
            slot = mask[token].int().argmax(dim=-1, keepdim=True)
            weight = torch.gather(weights.index_select(0, token), -1, slot).squeeze(-1)
            out.index_add_(0, token, expert(x.index_select(0, token)) * weight.unsqueeze(-1))
        return out


@style("modulelist_hit_experts_dropped_beyond_capacity", shape=(2, 5, H), **ASKS)
class Dropped(Listed):
    """Switch: of each sequence, an expert takes the first two tokens; the others get nothing of the layer."""

    K, capacity = 1, 2

    def mask(self, scores):
        hot = F.one_hot(scores.argmax(dim=-1), self.E)
        return hot * (hot.cumsum(dim=-2) <= self.capacity)

    def forward(self, x):
        scores = self.router.linear(x).softmax(dim=-1)
        mask, weights = self.mask(scores).view(-1, 1, self.E), scores.max(dim=-1).values.view(-1, 1)
        rows, mask = x.view(-1, H), mask.permute(2, 1, 0)
        out = torch.zeros_like(rows)
        for e in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            out.index_add_(0, token, self.experts[e[0]](rows[token]) * weights[token, slot, None])
        return out.view_as(x)


@style("stacked_hit_experts_some_return_the_token_longcat", **ASKS)
class ReturnsTheToken(Stacked):
    """Ids from E on stand for experts that return the token, for which one of the stacks holds something too."""

    EXTRA = 2

    def __init__(self) -> None:
        super().__init__()
        self.router = Unnormalised(self.E + self.EXTRA, self.K)
        self.gate_up = normal(self.E + self.EXTRA, 2 * I, H)

    def expert(self, rows, e):
        return super().expert(rows, e) if e < self.E else rows

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, self.E + self.EXTRA).permute(2, 1, 0)
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            e = int(hit.item())
            slot, token = torch.where(mask[e].squeeze(0))
            if token.numel() == 0:
                continue
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


@style("modulelist_rows_of_batch_and_sequence_written_switch", shape=(2, 5, H), **ASKS)
class DroppedAndWritten(Dropped):
    """The first Switch in transformers: the experts with any rows by their counts, which write the rows of a mask."""

    def forward(self, x):
        scores = self.router.linear(x).softmax(dim=-1)
        mask = self.mask(scores).bool()
        out = torch.zeros(x.shape, dtype=x.dtype)
        for e in torch.nonzero(mask.reshape(-1, self.E).sum(dim=0), as_tuple=True)[0].tolist():
            out[mask[:, :, e]] = self.experts[e](x[mask[:, :, e]])
        return scores.max(dim=-1).values.unsqueeze(-1) * out
