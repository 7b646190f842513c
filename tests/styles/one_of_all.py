"""One expert for each token, taken from what all experts make of it: nothing is summed."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from styles.base import BATCHED, H, MaxOfSoftmax, Simple, style


class OneOfAll(Simple):
    """Results [E, T, H] of a batched product."""

    route, K = MaxOfSoftmax, 1

    def results(self, x):
        return F.relu(x @ self.up.transpose(1, 2)) @ self.down.transpose(1, 2)

    def best(self, x):
        weights, ids = self.router.linear(x).softmax(-1).max(-1)
        return ids, weights

    def forward(self, x):
        ids, weights = self.best(x)
        return self.results(x)[ids, torch.arange(x.shape[0])] * weights[:, None]


style("results_of_all_experts_one_indexed")(OneOfAll)


@style("results_of_all_experts_one_gathered_along_experts")
class Gathered(OneOfAll):
    def forward(self, x):
        ids, weights = self.best(x)
        return self.results(x).gather(0, ids[None, :, None].expand(1, -1, H)).squeeze(0) * weights[:, None]


@style("results_of_all_experts_permuted_one_indexed")
class Permuted(OneOfAll):
    def forward(self, x):
        ids, weights = self.best(x)
        return weights.unsqueeze(-1) * self.results(x).permute(1, 0, 2)[torch.arange(x.shape[0]), ids]


@style("results_of_all_experts_one_gathered_by_batch_and_sequence", **BATCHED)
class ByBatchAndSequence(OneOfAll):
    def forward(self, x):
        ids, weights = self.best(x)
        results = torch.einsum("bsei,ehi->bseh", F.relu(torch.einsum("bsh,eih->bsei", x, self.up)), self.down)
        one = torch.gather(results, 2, ids[:, :, None, None].expand(-1, -1, 1, H)).squeeze(2)
        return x + one * weights[..., None]

    def beside(self, x):
        return x


@style("results_of_all_experts_one_taken_along_dim", dynamic=False)
class TakenAlong(OneOfAll):
    """``jnp.take_along_axis`` in its own words."""

    def forward(self, x):
        probs = self.router.linear(x).softmax(-1)
        best = probs.argmax(-1, keepdim=True)
        results = torch.einsum("tei,ehi->teh", F.relu(torch.einsum("th,eih->tei", x, self.up)), self.down)
        one = torch.take_along_dim(results, best[..., None], 1)[:, 0]
        return one * torch.take_along_dim(probs, best, -1)
