"""What other styles say, by other ops: masks asked by sums and maxima, rows selected element by element, products."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import ASKS, Apart, BestThenSoftmax, GeGLU, GroupLimited, H, Listed, ReLU2, Sequence, Stacked, style


class Table(Listed):
    def table(self, x):
        ids, weights = self.router(x)
        return torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights)


@style("dense_loop_addcmul")
class Addcmul(Table):
    def forward(self, x):
        table, out = self.table(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = torch.addcmul(out, expert(x), table[:, e : e + 1])
        return out


@style("dense_loop_addcmul_in_place")
class AddcmulInPlace(Table):
    kind = GeGLU

    def forward(self, x):
        table, out = self.table(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out.addcmul_(table[:, e, None], expert(x))
        return out


@style("all_experts_tensordot")
class Tensordot(Apart):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights)
        gate = torch.tensordot(x, self.w_gate, dims=([1], [1]))
        up = torch.tensordot(x, self.w_up, dims=([-1], [-2]))
        h = self.act(gate, up) * table.unsqueeze(-1)
        return torch.tensordot(h, self.w_down, dims=([1, 2], [0, 1]))


@style("modulelist_largest_of_a_mask")
class LargestOfMask(Listed):
    """Whether any slot is true by the largest of them; weights by where ids differ."""

    kind = ReLU2

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = (ids == e).max(dim=-1).values
            weight = weights.masked_fill(ids != e, 0.0).sum(dim=-1)
            out[chosen] += expert(x[chosen]) * weight[chosen, None]
        return out


@style("stacked_sum_of_a_mask_above_zero")
class SumAboveZero(Stacked):
    """Whether any slot is true by how many are, in numbers."""

    route = BestThenSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            hits = (ids == e).to(x.dtype)
            chosen = hits.sum(dim=-1) > 0
            out[chosen] += self.expert(x[chosen], e) * (weights * hits).sum(dim=-1)[chosen].unsqueeze(1)
        return out


@style("modulelist_sum_of_a_mask_as_a_mask")
class SumAsMask(Listed):
    kind = Sequence

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = (ids == e).sum(dim=-1).bool()
            weight = torch.where(ids != e, 0.0, weights).sum(dim=1)
            out = out.index_put((chosen,), expert(x[chosen]) * weight[chosen, None], accumulate=True)
        return out


@style("modulelist_rows_selected_element_by_element")
class Selected(Listed):
    """masked_select and masked_scatter by a mask of one column."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            chosen = mine.any(dim=-1, keepdim=True)
            rows = expert(x.masked_select(chosen).view(-1, H))
            out = out + torch.zeros_like(x).masked_scatter(chosen, rows) * (weights * mine).sum(-1, keepdim=True)
        return out


@style("modulelist_read_by_mask_put_at_places")
class ReadByMask(Listed):
    """Rows and weights by masks, added where the mask is true."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids.eq(e)
            chosen = mine.any(dim=1)
            rows = expert(x[chosen]) * weights[mine].unsqueeze(-1)
            out = out.index_put((torch.where(chosen)[0],), rows, accumulate=True)
        return out


@style("modulelist_slots_written_at_flat_places")
class FlatPlaces(Listed):
    """A row for each slot, written where the flat ids name the expert; its token by division."""

    E = 8
    route = GroupLimited

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        slots = torch.empty(flat.shape[0], H, dtype=x.dtype)
        for e, expert in enumerate(self.experts):
            place = torch.where(flat == e)[0]
            slots[place] = expert(x[torch.div(place, self.K, rounding_mode="trunc")])
        return (slots * weights.reshape(-1, 1)).view(-1, self.K, H).sum(dim=1)


@style("sorted_split_by_differences_of_ends")
class Differences(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        sorted_ids, order = torch.sort(ids.flatten())
        ends = torch.searchsorted(sorted_ids, torch.arange(self.E), right=True)
        counts = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype)).tolist()
        parts = x[order // self.K].split(counts)
        results = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        slots = torch.zeros_like(results)
        slots[order] = results
        return torch.einsum("tkh,tk->th", slots.view(-1, self.K, H), weights)


@style("stacked_products_written_to_slices", **ASKS)
class GroupedReference(Stacked):
    """The reference for a grouped GEMM: a product for each expert, written to its slice."""

    def grouped(self, rows, weights, counts):
        out, start = torch.empty(rows.shape[0], weights.shape[1], dtype=rows.dtype), 0
        for weight, count in zip(weights, counts, strict=True):
            out[start : start + count] = rows[start : start + count] @ weight.T
            start += count
        return out

    def forward(self, x):
        ids, weights = self.router(x)
        order = torch.argsort(ids.view(-1), stable=True)
        counts = torch.bincount(ids.view(-1), minlength=self.E).tolist()
        gate, up = self.grouped(x.index_select(0, order // self.K), self.gate_up, counts).chunk(2, dim=-1)
        results = self.grouped(F.silu(gate) * up, self.down, counts)
        slots = torch.empty_like(results).index_copy(0, order, results)
        return (slots.view(-1, self.K, H) * weights[..., None]).sum(dim=1)


@style("stacked_products_written_to_slices_if_any_unsloth", **ASKS)
class GroupedIfAny(GroupedReference):
    def grouped(self, rows, weights, counts):
        out, start = torch.zeros(rows.shape[0], weights.shape[1], dtype=rows.dtype), 0
        for weight, count in zip(weights, counts, strict=True):
            if count > 0:
                out[start : start + count] = rows[start : start + count] @ weight.T
                start += count
        return out


@style("stack_masked_by_one_hot_top1")
class StackMasked(Listed):
    """One expert per token: all results, masked and summed, times the masked probability."""

    K = 1

    def forward(self, x):
        probs = self.router.linear(x).softmax(dim=-1)
        mask = F.one_hot(probs.argmax(dim=-1), self.E).to(x.dtype)
        gate = (probs * mask).sum(dim=1, keepdim=True)
        return (torch.stack([expert(x) for expert in self.experts], dim=1) * mask.unsqueeze(-1)).sum(dim=1) * gate
