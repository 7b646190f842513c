"""One expert for each token, in the ways in which its mask, its rows or its weight are written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import ASKS, BATCHED, GeGLU, H, Listed, MaxOfSoftmax, MoE, Sequence, normal, style


class One(Listed):
    """Ids and weights [.., 1]."""

    K = 1
    route = MaxOfSoftmax

    def chosen(self, x):
        weights, ids = self.router.linear(x).softmax(dim=-1).max(dim=-1, keepdim=True)
        return ids, weights

    def plain(self, x):
        ids, weights = self.chosen(x)
        return sum(expert(x) * weights * (ids == e) for e, expert in enumerate(self.experts))


@style("one_written_over_a_copy", **BATCHED)
class OverCopy(One):
    """Every row of a copy of the tokens is written over."""

    def forward(self, x):
        ids, weights = self.chosen(x)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            mine = ids.squeeze(-1) == e
            out[mine] = expert(x[mine])
        return out * weights


@style("one_hot_column_as_a_mask_switch", **BATCHED)
class OneHotColumn(One):
    """Switch of transformers: the column of one-hot rows, as a mask of batch and sequence."""

    def forward(self, x):
        probs = self.router.linear(x).softmax(dim=-1)
        hot = F.one_hot(torch.argmax(probs, dim=-1), self.E)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = hot[:, :, e].bool()
            out[mine] = expert(x[mine])
        return probs.max(dim=-1).values.unsqueeze(-1) * out


@style("one_mask_squeezed", **BATCHED)
class MaskSqueezed(One):
    """Compared, then without the dimension of slots."""

    kind = Sequence

    def forward(self, x):
        ids, weights = self.chosen(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).squeeze(-1)
            out[mine] = expert(x[mine]) * weights[mine]
        return out


@style("one_mask_by_its_only_slot", **BATCHED)
class MaskSelected(One):
    def forward(self, x):
        ids, weights = self.chosen(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (ids == e)[..., 0]
            out[mine] = expert(x[mine]) * weights[mine]
        return out


@style("one_mask_by_any_slot", **BATCHED)
class MaskAny(One):
    def forward(self, x):
        ids, weights = self.chosen(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).any(dim=-1)
            out[mine] = expert(x[mine]) * weights[mine]
        return out


@style("one_selected_and_scattered_by_elements", **BATCHED)
class ByElements(One):
    """A mask as wide as the rows."""

    kind = GeGLU

    def forward(self, x):
        ids, weights = self.chosen(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = (ids == e).expand_as(x)
            out = out.masked_scatter(mine, expert(x.masked_select(mine).view(-1, H)))
        return out * weights


@style("one_weighed_by_its_centroid_base_layer", **ASKS)
class Centroid(Listed):
    """BASE layers: rows sorted, and each expert weighed by a row's product with its own vector."""

    K = 1
    kind = Sequence

    def __init__(self):
        super().__init__()
        self.centroids = normal(self.E, H)

    def forward(self, x):
        best, order = torch.sort((x @ self.centroids.t()).argmax(dim=1))
        results = []
        for e, rows in enumerate(x[order].split(torch.bincount(best, minlength=self.E).tolist())):
            alpha = torch.sigmoid(rows.mv(self.centroids[e])).unsqueeze(1)
            results.append(alpha * self.experts[e](rows) + (1 - alpha) * rows)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return torch.cat(results)[back]

    def plain(self, x):
        scores = x @ self.centroids.t()
        alpha, best = scores.sigmoid(), scores.argmax(dim=1, keepdim=True)
        return sum(
            (best == e) * (alpha[:, e, None] * expert(x) + (1 - alpha[:, e, None]) * x)
            for e, expert in enumerate(self.experts)
        )


@style("one_chosen_at_two_levels")
class TwoLevels(One):
    """A group first, then one of its experts, by a router of the group's own."""

    E, groups = 6, 2

    def __init__(self):
        super().__init__()
        self.group = nn.Linear(H, self.groups)
        self.inner = nn.ModuleList(nn.Linear(H, self.E // self.groups) for _ in range(self.groups))

    def chosen(self, x):
        of_group, group = self.group(x).softmax(dim=-1).max(dim=-1)
        inner = torch.stack([router(x).softmax(dim=-1) for router in self.inner], dim=1)
        at = group[:, None, None].expand(-1, 1, inner.shape[-1])
        within, place = inner.gather(1, at).squeeze(1).max(dim=-1)
        return (group * inner.shape[-1] + place)[:, None], (of_group * within)[:, None]

    def forward(self, x):
        ids, weights = self.chosen(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids[:, 0] == e
            out[mine] = expert(x[mine]) * weights[mine]
        return out


@style("slots_in_turn_weights_of_their_rows", **BATCHED)
class ColumnOfRows(Listed):
    """A loop over slots and experts, which takes a token's row of weights and then one of them."""

    def forward(self, x):
        rows = x.reshape(-1, H)
        ids, weights = self.router(rows)
        out = torch.zeros_like(rows)
        for k in range(self.K):
            for e, expert in enumerate(self.experts):
                mine = ids[:, k] == e
                out[mine] += expert(rows[mine]) * weights[mine][:, k].unsqueeze(-1)
        return out.view_as(x)


@style("parameterlist_linears_index_add")
class Parameters(MoE):
    """The experts' matrices in lists of parameters."""

    def __init__(self):
        super().__init__()
        self.up = nn.ParameterList(normal(H, H) for _ in range(self.E))
        self.down = nn.ParameterList(normal(H, H) for _ in range(self.E))

    def expert(self, rows, e):
        return F.linear(F.silu(F.linear(rows, self.up[e])), self.down[e])

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out
