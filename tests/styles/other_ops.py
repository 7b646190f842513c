"""Experts that are convolutions of single places, as those write them who come from images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from styles.base import ASKS, BATCHED, BestThenSoftmax, H, I, Listed, MoE, Simple, Unnormalised, style


class ConvExpert(nn.Sequential):
    """Rows [n, H] as images of one place."""

    def __init__(self) -> None:
        super().__init__(nn.Conv1d(H, I, 1), nn.ReLU(), nn.Conv1d(I, H, 1, bias=False))

    def forward(self, rows):
        return super().forward(rows.unsqueeze(-1)).squeeze(-1)


class ImageExpert(ConvExpert):
    def __init__(self) -> None:
        nn.Sequential.__init__(self, nn.Conv2d(H, I, (1, 1)), nn.Hardswish(), nn.Conv2d(I, H, (1, 1)))

    def forward(self, rows):
        return nn.Sequential.forward(self, rows[:, :, None, None]).flatten(1)


class SequenceExpert(ConvExpert):
    """The rows side by side, as a sequence."""

    def forward(self, rows):
        up, _, down = self
        return down(F.logsigmoid(up(rows.t()[None])))[0].t()


class UnbatchedExpert(ConvExpert):
    def forward(self, rows):
        return nn.Sequential.forward(self, rows.t()).t()


@style("modulelist_conv1d_masked_scatter_slot_after_slot", torch="2.13", **BATCHED)
class PutBack(Listed):
    """The rows of a slot are put where its mask is true."""

    kind, route = ConvExpert, Unnormalised

    def forward(self, x):
        tokens = x.reshape(-1, H)
        ids, weights = self.router(tokens)
        out = torch.zeros_like(tokens)
        for slot in range(self.K):
            part = torch.zeros_like(tokens)
            for e, expert in enumerate(self.experts):
                mask = ids[:, slot] == e
                part = part.masked_scatter(mask.unsqueeze(-1), expert(tokens[mask]))
            out += part * weights[:, slot : slot + 1]
        return out.reshape(x.shape) + x

    def beside(self, x):
        return x


@style("modulelist_conv2d_index_add")
class Images(Listed):
    kind = ImageExpert

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@style("modulelist_conv1d_of_sequences_continue_index_add", torch="2.13", **ASKS)
class Sequences(Listed):
    kind = SequenceExpert

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


@style("modulelist_conv1d_unbatched_continue_index_add", torch="2.13", **ASKS)
class Unbatched(Sequences):
    kind = UnbatchedExpert


class Groups(MoE):
    """All experts are groups of one convolution, to which the tokens are repeated; a table [B, S, E] weighs them."""

    route, bias = BestThenSoftmax, True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv1d(self.E * H, self.E * I, 1, groups=self.E, bias=self.bias)
        self.down = nn.Conv1d(self.E * I, self.E * H, 1, groups=self.E, bias=self.bias)

    def table(self, x):
        ids, weights = self.router(x.reshape(-1, H))
        table = weights.new_zeros(ids.shape[0], self.E).scatter_(1, ids, weights)
        return table.view(*x.shape[:-1], self.E)

    def groups(self, x):
        """Results of all groups [B, E*H, S]."""
        return self.down(F.relu6(self.up(x.transpose(1, 2).repeat(1, self.E, 1))))

    def forward(self, x):
        results = self.groups(x).view(x.shape[0], self.E, H, x.shape[1])
        return (results * self.table(x).permute(0, 2, 1).unsqueeze(2)).sum(1).transpose(1, 2)

    def expert(self, rows, e):
        results = self.groups(rows.unsqueeze(0))[0]
        return results[e * H : (e + 1) * H].t()


style("grouped_conv1d_times_table", **BATCHED)(Groups)


@style("grouped_conv1d_without_bias_of_expanded_tokens", **BATCHED)
class Expanded(Groups):
    bias = False

    def groups(self, x):
        channels = x.transpose(1, 2).unsqueeze(1).expand(-1, self.E, -1, -1).reshape(x.shape[0], -1, x.shape[1])
        return self.down(F.gelu(self.up(channels)))


@style("grouped_conv1d_tokens_as_length")
class AsLength(Groups):
    """The tokens of one sequence, and the table turned around."""

    def forward(self, x):
        results = self.groups(x.unsqueeze(0))[0].view(self.E, H, -1)
        return (results * self.table(x).t()[:, None, :]).sum(0).t()


@style("grouped_conv1d_of_stacked_weights_tokens_as_batch")
class AsBatch(Simple):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
        hidden = self.act(F.conv1d(x.repeat(1, self.E).unsqueeze(-1), self.up.view(-1, H, 1), groups=self.E))
        results = F.conv1d(hidden, self.down.view(-1, I, 1), groups=self.E).view(-1, self.E, H)
        return (results * table.unsqueeze(-1)).sum(1)
