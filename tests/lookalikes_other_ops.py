"""Look-alikes of experts that are groups of a convolution: see `styles/other_ops.py`."""

from __future__ import annotations

import torch.nn.functional as F
from lookalikes_turned_over import LOOKALIKES, lookalike
from styles.base import BATCHED, H, I, MoE
from styles.other_ops import Groups
from torch import nn

__all__ = ["LOOKALIKES", "lookalike"]


@lookalike("grouped_conv1d_of_neighbours", "what a token gets depends on those beside it", **BATCHED)
class Neighbours(Groups):
    def __init__(self):
        super().__init__()
        self.up = nn.Conv1d(self.E * H, self.E * I, 3, padding=1, groups=self.E)


@lookalike("grouped_conv1d_of_shuffled_channels", "the channels of the groups are shuffled in between", **BATCHED)
class Shuffled(Groups):
    def groups(self, x):
        hidden = F.relu6(self.up(x.transpose(1, 2).repeat(1, self.E, 1)))
        hidden = hidden.unflatten(1, (self.E, I)).transpose(1, 2).flatten(1, 2)
        return self.down(hidden)


@lookalike("grouped_conv1d_of_interleaved_tokens", "a group reads some channels several times, and not all", **BATCHED)
class Interleaved(Groups):
    def groups(self, x):
        return self.down(F.relu6(self.up(x.transpose(1, 2).repeat_interleave(self.E, 1))))


@lookalike("grouped_conv1d_weighed_by_groups_of_their_own", "a group reads its own part of the channels", **BATCHED)
class Parts(Groups):
    """As ShuffleNet and ResNeXt have groups, with a table of weights for them."""

    def __init__(self):
        MoE.__init__(self)
        self.up = nn.Conv1d(H, self.E * I, 1, groups=self.E)
        self.down = nn.Conv1d(self.E * I, self.E * H, 1, groups=self.E)

    def groups(self, x):
        return self.down(F.relu6(self.up(x.transpose(1, 2))))


@lookalike(
    "grouped_conv1d_summed_over_channels", "the sum is over a group's channels, and not over the groups", **BATCHED
)
class OverChannels(Groups):
    def forward(self, x):
        results = self.groups(x).view(x.shape[0], self.E, H, x.shape[1])
        return (results * self.table(x).permute(0, 2, 1).unsqueeze(2)).sum(2).transpose(1, 2)
