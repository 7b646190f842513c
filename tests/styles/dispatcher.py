"""The sparsely-gated layer of 2017, as its best-known PyTorch code has it: a list of where gates are not zero."""

from __future__ import annotations

import torch

from styles.base import Listed, Sequence, Stacked, style


class SparseDispatcher:
    def __init__(self, num_experts, gates):
        self._gates = gates
        self._num_experts = num_experts
        sorted_experts, index_sorted_experts = torch.nonzero(gates).sort(0)
        _, self._expert_index = sorted_experts.split(1, dim=1)
        self._batch_index = torch.nonzero(gates)[index_sorted_experts[:, 1], 0]
        self._part_sizes = (gates > 0).sum(0).tolist()
        self._nonzero_gates = torch.gather(gates[self._batch_index.flatten()], 1, self._expert_index)

    def dispatch(self, rows):
        return torch.split(rows[self._batch_index].squeeze(1), self._part_sizes, dim=0)

    def combine(self, results):
        stitched = torch.cat(results, 0).mul(self._nonzero_gates)
        zeros = torch.zeros(self._gates.size(0), results[-1].size(1))
        return zeros.index_add(0, self._batch_index, stitched.float())

    def expert_to_gates(self):
        return torch.split(self._nonzero_gates, self._part_sizes, dim=0)


class Gated:
    noise = 1e-6

    def gates(self, x):
        probs = self.router.linear(x).softmax(1)
        best, ids = probs.topk(min(self.K + 1, self.E), dim=1)
        best, ids = best[:, : self.K], ids[:, : self.K]
        return torch.zeros_like(probs).scatter(1, ids, best / (best.sum(1, keepdim=True) + self.noise))


@style("modulelist_sparse_dispatcher")
class Dispatched(Gated, Listed):
    kind = Sequence

    def forward(self, x):
        dispatcher = SparseDispatcher(self.E, self.gates(x))
        rows = dispatcher.dispatch(x)
        dispatcher.expert_to_gates()
        return dispatcher.combine([self.experts[e](rows[e]) for e in range(self.E)])


@style("modulelist_sparse_dispatcher_experts_shared")
class DispatchedToShared(Dispatched):
    """Two numbers for each expert: a layer of as many experts, some of which are one."""

    def forward(self, x):
        dispatcher = SparseDispatcher(self.E, self.gates(x))
        rows = dispatcher.dispatch(x)
        return dispatcher.combine([self.experts[e // 2](rows[e]) for e in range(self.E)])


@style("stacked_sparse_dispatcher")
class DispatchedStacked(Gated, Stacked):
    def forward(self, x):
        dispatcher = SparseDispatcher(self.E, self.gates(x))
        return dispatcher.combine([self.expert(rows, e) for e, rows in enumerate(dispatcher.dispatch(x))])
