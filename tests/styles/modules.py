"""Loops over a list of modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import (
    ASKS,
    BATCHED,
    ArgmaxSigmoid,
    BestThenSoftmax,
    GeGLU,
    GroupLimited,
    H,
    I,
    Listed,
    MaxOfSoftmax,
    ReLU2,
    Sequence,
    SigmoidWithBias,
    Sorted,
    Stacked,
    SwiGLU,
    TwoArgmaxes,
    Unnormalised,
    style,
)


@style("modulelist_where_index_add", **BATCHED)
class MixtralLoop(Listed):
    """Mixtral in transformers 4: a mask [E, K, T], and a step for every expert."""

    def forward(self, hidden_states):
        batch, length, hidden = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden)
        ids, weights = self.router(hidden_states)
        final = torch.zeros((batch * length, hidden), dtype=hidden_states.dtype, device=hidden_states.device)
        mask = F.one_hot(ids, num_classes=self.E).permute(2, 1, 0)
        for e in range(self.E):
            idx, top_x = torch.where(mask[e])
            current = hidden_states[None, top_x].reshape(-1, hidden)
            current = self.experts[e](current) * weights[top_x, idx, None]
            final.index_add_(0, top_x, current.to(hidden_states.dtype))
        return final.reshape(batch, length, hidden)


@style("modulelist_hit_nonzero", **ASKS, **BATCHED)
class HitModules(Listed):
    """Mixtral and Qwen in late transformers 4: only the experts that were hit."""

    E = 8
    route = Unnormalised

    def forward(self, x):
        batch, length, hidden = x.shape
        x = x.view(-1, hidden)
        ids, weights = self.router(x)
        final = torch.zeros((batch * length, hidden), dtype=x.dtype, device=x.device)
        mask = F.one_hot(ids, num_classes=self.E).permute(2, 1, 0)
        expert_hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
        for e in expert_hit:
            idx, top_x = torch.where(mask[e].squeeze(0))
            current = self.experts[e](x[None, top_x].reshape(-1, hidden)) * weights[top_x, idx, None]
            final.index_add_(0, top_x, current)
        return final.reshape(batch, length, hidden)


@style("modulelist_where_index_assign_add")
class MistralInference(Listed):
    """mistral-inference: no one-hot, ``results[rows] += ...``."""

    route = BestThenSoftmax

    def forward(self, x):
        ids, weights = self.router(x)
        results = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            batch_idx, nth_expert = torch.where(ids == i)
            results[batch_idx] += weights[batch_idx, nth_expert, None] * expert(x[batch_idx])
        return results


@style("modulelist_counts_continue_deepseek_v3", **ASKS, **BATCHED)
class DeepSeekInference(Listed):
    """DeepSeek's own inference: counts on the host, empty experts skipped, a shared expert added.

    ``torch.export`` does not know how many counts ``bincount`` gives, so not even their list can be traced.
    """

    E = 8
    route = GroupLimited

    def __init__(self) -> None:
        super().__init__()
        self.shared_experts = SwiGLU(inner=2 * I)

    def beside(self, x):
        return self.shared_experts(x)

    def forward(self, x):
        shape = x.size()
        x = x.view(-1, H)
        indices, weights = self.router(x)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=self.E).tolist()
        for i in range(self.E):
            if counts[i] == 0:
                continue
            idx, top = torch.where(indices == i)
            y[idx] += self.experts[i](x[idx]) * weights[idx, top, None]
        return (y + self.shared_experts(x)).view(shape)


@style("modulelist_boolean_mask")
class BooleanMask(Listed):
    """Rows by a boolean mask; the weight is what the expert's slots add up to."""

    kind = GeGLU
    route = Sorted

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = ids == e
            mask = chosen.any(dim=-1)
            weight = (weights * chosen).sum(dim=-1)[mask]
            out[mask] += expert(x[mask]) * weight.unsqueeze(-1)
        return out


@style("modulelist_if_any_gating_table_makemoe", **ASKS, **BATCHED)
class MakeMoE(Listed):
    """The tutorial that everybody starts with: a softmax over -inf, and ``if mask.any()``."""

    kind = Sequence

    def plain(self, x):
        ids, _ = self.router(x.reshape(-1, H))
        weights = self.router.linear(x.reshape(-1, H)).gather(1, ids).softmax(-1)
        outs = [sum(self.expert(r[None], e)[0] * w for e, w in zip(i.tolist(), s, strict=True))
                for r, i, s in zip(x.reshape(-1, H), ids, weights, strict=True)]  # fmt: skip
        return torch.stack(outs).view(x.shape)

    def forward(self, x):
        logits = self.router.linear(x)
        best, indices = logits.topk(self.K, dim=-1)
        sparse = torch.full_like(logits, float("-inf")).scatter(-1, indices, best)
        gating = F.softmax(sparse, dim=-1)
        final = torch.zeros_like(x)
        flat_x, flat_gating = x.view(-1, x.size(-1)), gating.view(-1, gating.size(-1))
        for i, expert in enumerate(self.experts):
            mask = (indices == i).any(dim=-1)
            flat = mask.view(-1)
            if flat.any():
                scores = flat_gating[flat, i].unsqueeze(1)
                final[mask] += (expert(flat_x[flat]) * scores).squeeze(1)
        return final


@style("modulelist_numel_continue_index_put", **ASKS)
class NumelContinue(Listed):
    """Empty experts are skipped by the size of what was found; added by ``index_put_``."""

    kind = ReLU2
    route = SigmoidWithBias

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            out.index_put_((token,), self.experts[e](x[token]) * weights[token, slot].unsqueeze(-1), accumulate=True)
        return out


@style("modulelist_scatter_add")
class ScatterAdd(Listed):
    """Added by ``scatter_add``, out of place; the flat ids give slots, the slots give tokens."""

    kind = ReLU2

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.flatten()
        out = x.new_zeros(x.shape)
        for e, expert in enumerate(self.experts):
            slots = torch.nonzero(flat == e).squeeze(-1)
            token = slots // self.K
            y = expert(x.index_select(0, token)) * weights.flatten()[slots].unsqueeze(-1)
            out = out.scatter_add(0, token.unsqueeze(-1).expand(-1, H), y)
        return out


@style("modulelist_weight_before_index_add")
class WeightBefore(Listed):
    """One expert per token; the weight multiplies the row that goes in."""

    K = 1
    route = ArgmaxSigmoid
    before = True

    def forward(self, x):
        ids, weights = self.router(x)
        chosen, scaled = ids.squeeze(-1), x * weights
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            (token,) = torch.where(chosen == e)
            out.index_add_(0, token, expert(scaled[token]))
        return out


@style("modulelist_weight_inside")
class WeightInside(Listed):
    """The weight is given to the expert, which applies it ahead of the projection down."""

    class Weighted(SwiGLU):
        def forward(self, x, weight=None):
            h = F.silu(self.w1(x)) * self.w3(x)
            return self.w2(h if weight is None else h * weight)

    kind = Weighted
    route = TwoArgmaxes

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token], weights[token, slot][:, None]))
        return out


@style("modulelist_moe_infer_deepseek_v2", **ASKS)
class MoEInfer(Listed):
    """DeepSeek V2: sorted rows in slices, put back to their slots, weighted at the end."""

    E = 8

    def forward(self, x):
        ids, weights = self.router(x)
        cnts = ids.new_zeros((ids.shape[0], self.E))
        cnts.scatter_(1, ids, 1)
        tokens_per_expert = cnts.sum(dim=0)
        idxs = ids.view(-1).argsort()
        sorted_tokens = x[idxs // ids.shape[1]]
        outputs, start = [], 0
        for i, num_tokens in enumerate(tokens_per_expert.tolist()):
            end = start + num_tokens
            if num_tokens == 0:
                continue
            outputs.append(self.experts[i](sorted_tokens[start:end]))
            start = end
        outs = torch.cat(outputs, dim=0) if len(outputs) else sorted_tokens.new_empty(0)
        new_x = torch.empty_like(outs)
        new_x[idxs] = outs
        return new_x.view(*ids.shape, -1).mul_(weights.unsqueeze(dim=-1)).sum(dim=1)


@style("stacked_slices_cat_index_back")
class SlicesIndexBack(Stacked):
    """The same without asking: empty slices are multiplied too, and the slots' places are a scatter."""

    def forward(self, x):
        ids, weights = self.router(x)
        counts = ids.new_zeros((ids.shape[0], self.E)).scatter_(1, ids, 1).sum(dim=0).tolist()
        order = ids.view(-1).argsort()
        rows = x[order // self.K]
        outputs, start = [], 0
        for e, count in enumerate(counts):
            outputs.append(self.expert(rows[start : start + count], e))
            start += count
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
        y = torch.cat(outputs, dim=0)[inverse].view(*ids.shape, -1)
        return (y * weights.unsqueeze(-1)).sum(dim=1)


@style("modulelist_slot_masks_combine_after")
class SlotMasks(Listed):
    """DeepSeek's training path: every slot is a row, written where its expert is; combined after the loop."""

    route = Unnormalised

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        rows = x.repeat_interleave(self.K, dim=0)
        y = torch.empty_like(rows)
        for i, expert in enumerate(self.experts):
            y[flat == i] = expert(rows[flat == i])
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


@style("modulelist_split_counts_unsort")
class SplitCounts(Listed):
    """Sorted rows split by counts, each expert its part, concatenated and put back in order."""

    kind = GeGLU

    def forward(self, x):
        ids, weights = self.router(x)
        order = torch.argsort(ids.flatten(), stable=True)
        counts = F.one_hot(ids.flatten(), self.E).sum(dim=0)
        parts = torch.split(x[order // self.K], counts.tolist(), dim=0)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)], dim=0)
        y = y[torch.argsort(order)].view(-1, self.K, H)
        return torch.einsum("tkh,tk->th", y, weights)


@style("modulelist_switch_bool_column")
class SwitchColumns(Listed):
    """Switch in transformers: a mask [T, E] column by column; the probability multiplies at the end."""

    K = 1
    kind = Sequence
    route = MaxOfSoftmax

    def forward(self, x):
        ids, probs = self.router(x)
        router_mask = F.one_hot(ids.squeeze(-1), self.E).bool()
        next_states = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token_indices = router_mask[:, e]
            next_states[token_indices] = expert(x[token_indices])
        return probs * next_states


@style("modulelist_masked_copy_per_expert_nllb")
class NLLB(Listed):
    """NLLB: a copy of the rows per expert, overwritten with its results, summed over experts."""

    kind = Sequence

    def forward(self, x):
        ids, weights = self.router(x)
        probs = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights)
        router_mask = F.one_hot(ids, self.E).sum(1).bool()
        masked = torch.einsum("bm,be->ebm", x, router_mask.to(x.dtype))
        for e, expert in enumerate(self.experts):
            token_indices = router_mask[:, e]
            combining = probs[token_indices, e]
            masked[e, token_indices] = torch.einsum("b,be->be", combining, expert(masked[e, token_indices]))
        return masked.sum(dim=0)


@style("modulelist_top1_sorted_split_fairseq", **ASKS)
class FairseqTop1(Listed):
    """One expert per token: rows sorted by it, cut by counts, joined, and put back; weighted at the end."""

    K = 1
    route = ArgmaxSigmoid

    def forward(self, x):
        logits = self.router.linear(x)
        ids = logits.argmax(dim=-1)
        order = torch.argsort(ids)
        parts = x[order].split(torch.bincount(ids, minlength=self.E).tolist())
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        return y[back] * logits.gather(-1, ids[:, None]).sigmoid()
