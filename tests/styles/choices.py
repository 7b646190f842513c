"""Masks and choices: one-hot rows multiplied by, two argmaxes, numbers for each token, and where experts stand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import BATCHED, Apart, H, I, Listed, MoE, Router, Sequence, normal, style


class TwoMasks(Router):
    """fairseq, DeepSpeed: the best, then the best of the others, as masks; a table of both."""

    def forward(self, x):
        gates = F.softmax(self.linear(x), dim=-1)
        first = F.one_hot(gates.argmax(dim=-1), self.experts)
        second = F.one_hot(gates.masked_fill(first.bool(), float("-inf")).argmax(dim=-1), self.experts).to(x.dtype)
        first = first.to(x.dtype)
        one, two = (gates * first).sum(dim=-1), (gates * second).sum(dim=-1)
        total = (one + two).clamp(min=torch.finfo(x.dtype).eps)
        return (one / total).unsqueeze(-1) * first + (two / total).unsqueeze(-1) * second


@style("all_experts_einsum_two_argmaxes_deepspeed")
class TwoMasksDense(Apart):
    route = TwoMasks

    def forward(self, x):
        h = self.act(torch.einsum("th,ehi->tei", x, self.w_gate), torch.einsum("th,ehi->tei", x, self.w_up))
        return torch.einsum("te,teh->th", self.router(x), torch.einsum("tei,eih->teh", h, self.w_down))


@style("modulelist_positive_gates_of_two_argmaxes")
class TwoMasksRows(Listed):
    route = TwoMasks

    def forward(self, x):
        gates, out = self.router(x), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(gates[:, e] > 0)[0]
            out.index_add_(0, rows, expert(x[rows]) * gates[rows, e, None])
        return out


@style("all_experts_rows_times_one_hot", **BATCHED)
class RowsTimesOneHot(Apart):
    K = 1

    def forward(self, x):
        weights, ids = self.router.linear(x).softmax(dim=-1).max(dim=-1)
        hot = F.one_hot(ids, self.E).to(x.dtype)
        rows = torch.einsum("bse,bsh->bseh", hot, x)
        h = self.act(torch.einsum("bseh,ehi->bsei", rows, self.w_gate), torch.einsum("bseh,ehi->bsei", rows, self.w_up))
        y = torch.einsum("bsei,eih->bseh", h, self.w_down)
        return torch.einsum("bseh,bse->bsh", y, hot * weights.unsqueeze(-1))


@style("dense_loop_masked_before_and_after")
class MaskedTwice(Listed):
    """Biases do no harm where the results are masked too."""

    K = 1
    kind = Sequence

    def forward(self, x):
        weights, ids = self.router.linear(x).softmax(dim=-1).max(dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).to(x.dtype).unsqueeze(-1)
            out += expert(x * mask) * mask * weights.unsqueeze(-1)
        return out


@style("dense_loop_column_of_a_mask_and_of_a_table")
class MaskAndTable(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        mask = torch.zeros(x.shape[0], self.E).scatter(1, ids, 1.0)
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * mask[:, e : e + 1] * table[:, e : e + 1]
        return out


@style("all_experts_einsum_router_static", dynamic=False, **BATCHED)
class StaticRouter(Apart):
    """The router is a product of the batch as it is, which is of fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.w_router = normal(H, self.E)

    def forward(self, x):
        weights, ids = torch.einsum("bsh,he->bse", x, self.w_router).softmax(dim=-1).topk(self.K, dim=-1)
        table = x.new_zeros(*x.shape[:2], self.E).scatter(-1, ids, weights)
        h = self.act(torch.einsum("bsh,ehi->bsei", x, self.w_gate), torch.einsum("bsh,ehi->bsei", x, self.w_up))
        return torch.einsum("bse,bseh->bsh", table, torch.einsum("bsei,eih->bseh", h, self.w_down))


class Last(MoE):
    """Weights with their experts last."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = normal(H, I, self.E), normal(I, H, self.E)


@style("all_experts_einsum_experts_last")
class ExpertsLast(Last):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
        h = F.relu(torch.einsum("th,hie->tie", x, self.up))
        return torch.einsum("the,te->th", torch.einsum("tie,ihe->the", h, self.down), table)


@style("gathered_experts_last_permuted")
class ExpertsLastGathered(Last):
    def forward(self, x):
        ids, weights = self.router(x)
        up, down = self.up.permute(2, 0, 1)[ids], self.down.permute(2, 0, 1)[ids]
        y = torch.einsum("tki,tkih->tkh", F.relu(torch.einsum("th,tkhi->tki", x, up)), down)
        return (y * weights.unsqueeze(-1)).sum(dim=1)


@style("all_experts_in_one_linear", **BATCHED)
class OneLinear(MoE):
    """All first projections as one linear, whose results are cut by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.bias = nn.Linear(H, self.E * I), normal(self.E, I, H), normal(self.E, H)

    def forward(self, x):
        weights, ids = self.router.linear(x).softmax(dim=-1).topk(self.K, dim=-1)
        table = torch.zeros(*x.shape[:2], self.E).scatter(-1, ids, weights)
        h = F.gelu(self.up(x)).view(*x.shape[:2], self.E, I)
        return ((torch.einsum("bsei,eih->bseh", h, self.down) + self.bias) * table.unsqueeze(-1)).sum(dim=-2)


@style("modulelist_number_for_each_token")
class ScaledRows(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(H, 1)

    def forward(self, x):
        ids, weights = self.router(x)
        scale, out = self.scale(x).sigmoid(), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == e)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None] * scale[rows])
        return out


@style("gathered_number_for_each_token")
class ScaledSlots(Apart):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(H, 1)

    def forward(self, x):
        ids, weights = self.router(x)
        h = self.act(torch.einsum("th,tkhi->tki", x, self.w_gate[ids]), torch.einsum("th,tkhi->tki", x, self.w_up[ids]))
        y = torch.einsum("tki,tkih->tkh", h, self.w_down[ids])
        return (y * weights.unsqueeze(-1) * self.scale(x).sigmoid().unsqueeze(1)).sum(dim=1)


@style("dense_loop_number_for_each_token")
class ScaledDense(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(H, 1)

    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
        scale, out = self.scale(x).sigmoid(), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out.clone() + scale * table[:, e, None] * expert(x)
        return out


@style("modulelist_sum_copied_at_every_step")
class Copied(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == e)
            out = out.clone()
            out[rows] += expert(x[rows]) * weights[rows, slots, None]
        return out


@style("modulelist_one_expert_in_two_places")
class Tied(Listed):
    def __init__(self) -> None:
        super().__init__()
        self.experts[2] = self.experts[0]

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == e)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


@style("modulelist_masks_listed_litgpt", **BATCHED)
class ListedMasks(Listed):
    def forward(self, x):
        rows = x.view(-1, H)
        best, ids = self.router.linear(rows).topk(self.K)
        weights = best.softmax(dim=1)
        masks = (ids.unsqueeze(-1) == torch.arange(self.E)).permute(2, 0, 1)
        out = torch.zeros_like(rows)
        for mask, expert in zip(masks, self.experts, strict=True):
            tokens, slots = torch.where(mask)
            out[tokens] += weights[tokens, slots, None] * expert(rows[tokens])
        return out.view_as(x)


@style("modulelist_added_to_the_residual")
class AddedToResidual(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            rows, slots = torch.where(ids == e)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


@style("parameterlist_stacked_bmm")
class StackedParameters(MoE):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ParameterList(normal(H, I) for _ in range(self.E))
        self.down = nn.ParameterList(normal(I, H) for _ in range(self.E))

    def forward(self, x):
        ids, weights = self.router(x)
        up, down = torch.stack(list(self.up)), torch.stack(list(self.down))
        y = torch.bmm(F.gelu(torch.bmm(x.unsqueeze(0).expand(self.E, -1, -1), up)), down)
        return torch.einsum("eth,te->th", y, torch.zeros(x.shape[0], self.E).scatter_(1, ids, weights))


@style("dense_loop_where_slot_by_slot_batched", **BATCHED)
class WhereSlots(Listed):
    def forward(self, x):
        weights, ids = self.router.linear(x).softmax(dim=-1).topk(self.K, dim=-1)
        out = torch.zeros_like(x)
        for k in range(self.K):
            for e, expert in enumerate(self.experts):
                mask = (ids[..., k] == e).unsqueeze(-1)
                out = out + torch.where(mask, expert(x) * weights[..., k].unsqueeze(-1), torch.zeros_like(x))
        return out


@style("dense_bmm_table_of_one_hot_columns")
class TableOfColumns(Apart):
    """A table that is added up slot by slot, of one-hot rows and a column of weights."""

    def forward(self, x):
        ids, weights = self.router(x)
        table = sum(F.one_hot(ids[:, k], self.E) * weights[:, k : k + 1] for k in range(self.K))
        rows = x.unsqueeze(0).expand(self.E, -1, -1)
        h = self.act(torch.bmm(rows, self.w_gate), torch.bmm(rows, self.w_up))
        return torch.einsum("eth,te->th", torch.bmm(h, self.w_down), table)


@style("dense_stack_gathered_mean_of_slots")
class MeanOfSlots(Listed):
    """No weights: what the chosen experts make counts alike."""

    def forward(self, x):
        ids, _ = self.router(x)
        results = torch.stack([expert(x) for expert in self.experts], -2)
        return results.gather(-2, ids[..., None].expand(*ids.shape, H)).mean(-2)


@style("gathered_einsum_mean_of_weighted_slots")
class MeanOfWeighted(Apart):
    def forward(self, x):
        ids, weights = self.router(x)
        rows = torch.einsum("th,tkhi->tki", x, self.w_gate[ids]), torch.einsum("th,tkhi->tki", x, self.w_up[ids])
        return (torch.einsum("tki,tkih->tkh", self.act(*rows), self.w_down[ids]) * weights[..., None]).mean(1)
