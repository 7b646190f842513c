"""Grouped by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import BATCHED, Apart, BestThenSoftmax, H, I, MoE, SigmoidWithBias, SwiGLU, normal, style, swiglu


class Bfloat16(Apart):
    """``_grouped_mm`` wants bfloat16."""

    act = staticmethod(swiglu)

    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()

    def grouped(self, rows, offsets):
        h = torch._grouped_mm(rows, self.w_gate, offs=offsets), torch._grouped_mm(rows, self.w_up, offs=offsets)
        return torch._grouped_mm(F.silu(h[0]) * h[1], self.w_down, offs=offsets)


@style("grouped_mm_score_before_torchtitan", **BATCHED)
class Torchtitan(MoE):
    """torchtitan: histc, stable argsort, scores before the experts, scatter_add into zeros; w1, w2, w3 as linears."""

    E = 8
    route = SigmoidWithBias
    before = True

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = normal(self.E, I, H), normal(self.E, H, I), normal(self.E, I, H)
        self.bfloat16()

    def expert(self, rows, e):
        return F.linear(F.silu(F.linear(rows, self.w1[e])) * F.linear(rows, self.w3[e]), self.w2[e])

    def forward(self, x):
        bs, slen, dim = x.shape
        x = x.view(-1, dim)
        selected, top_scores = self.router(x)
        counts = torch.histc(selected.view(-1).float(), bins=self.E, min=0, max=self.E)
        order = torch.argsort(selected.view(-1), stable=True)
        top_scores, token_indices = top_scores.view(-1)[order], order // self.K
        token_indices = token_indices.reshape(-1, 1).expand(-1, dim)
        routed = torch.gather(x, dim=0, index=token_indices)
        routed = (routed.to(torch.float32) * top_scores.reshape(-1, 1)).to(x.dtype)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        h = F.silu(torch._grouped_mm(routed, self.w1.transpose(-2, -1), offs=offsets))
        h = h * torch._grouped_mm(routed, self.w3.transpose(-2, -1), offs=offsets)
        y = torch._grouped_mm(h, self.w2.transpose(-2, -1), offs=offsets)
        return torch.zeros_like(x).scatter_add(dim=0, index=token_indices, src=y).reshape(bs, slen, dim)


@style("grouped_mm_double_argsort")
class DoubleArgsort(Bfloat16):
    """Counts by bincount; the order of the order puts the rows back; weights at the end."""

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        order = flat.argsort()
        offsets = torch.bincount(flat, minlength=self.E).cumsum(0).to(torch.int32)
        y = self.grouped(x[order // self.K], offsets)
        y = y[order.argsort()].view(-1, self.K, H)
        return (y * weights[..., None]).sum(1)


@style("grouped_mm_one_hot_offsets_index_add")
class OneHotOffsets(Bfloat16):
    """Offsets are sums of one-hot rows; results are added to their tokens."""

    route = BestThenSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        flat, order = ids.flatten().sort(stable=True)
        offsets = F.one_hot(flat, self.E).sum(dim=0).cumsum(dim=0).int()
        token = torch.arange(x.shape[0]).repeat_interleave(self.K)[order]
        y = self.grouped(x.index_select(0, token), offsets) * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(x).index_add_(0, token, y)


@style("grouped_mm_searchsorted_shared_start")
class SharedStart(Bfloat16):
    """Offsets by searchsorted in the sorted ids; added into what the shared expert gives."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = SwiGLU().bfloat16()

    def beside(self, x):
        return self.shared(x)

    def forward(self, x):
        ids, weights = self.router(x)
        flat, order = torch.sort(ids.reshape(-1), stable=True)
        offsets = torch.searchsorted(flat, torch.arange(self.E), right=True).to(torch.int32)
        token = torch.div(order, self.K, rounding_mode="floor")
        y = self.grouped(x[token], offsets) * weights.reshape(-1)[order, None]
        return self.shared(x).scatter_add(0, token[:, None].expand_as(y), y)


@style("grouped_slices_by_counts_torchtitan")
class TorchtitanSlices(Apart):
    """torchtitan without grouped_mm: split by counts, one expert per part, score before."""

    act = staticmethod(swiglu)
    before = True

    def forward(self, x):
        ids, weights = self.router(x)
        order = torch.argsort(ids.view(-1), stable=True)
        token = order // self.K
        counts = torch.histc(ids.view(-1).float(), bins=self.E, min=0, max=self.E).long().tolist()
        parts = torch.split(x[token] * weights.view(-1)[order, None], split_size_or_sections=counts, dim=0)
        outs = []
        for e, part in enumerate(parts):
            h = F.silu(torch.matmul(part, self.w_gate[e])) * torch.matmul(part, self.w_up[e])
            outs.append(torch.matmul(h, self.w_down[e]))
        return torch.zeros_like(x).scatter_add(0, token.reshape(-1, 1).expand(-1, H), torch.cat(outs, dim=0))


@style("grouped_mm_repeated_rows_cast_to_bfloat16_fastmoe")
class RepeatedRows(Apart):
    """Rows repeated for each slot, then sorted; weights cast where they are used; counts cast before they are added."""

    act = staticmethod(swiglu)

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        order = torch.argsort(flat, stable=True)
        rows = x.repeat_interleave(self.K, dim=0)[order].bfloat16()
        counts = torch.histc(flat.float(), bins=self.E, min=0, max=self.E - 1).int()
        offsets = counts.cumsum(0).int()
        h = F.silu(torch._grouped_mm(rows, self.w_gate.bfloat16(), offs=offsets))
        h = h * torch._grouped_mm(rows, self.w_up.bfloat16(), offs=offsets)
        done = torch._grouped_mm(h, self.w_down.bfloat16(), offs=offsets).to(x.dtype)
        y = torch.empty_like(done)
        y[order] = done
        return (y.view(-1, self.K, H) * weights.unsqueeze(-1)).sum(1)
