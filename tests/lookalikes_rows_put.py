"""Look-alikes of loops that put results into zeros, or over masked copies: see `lookalikes.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lookalikes_bins_in_turn import LOOKALIKES, lookalike
from styles.base import H, Listed, Sequence, SwiGLU
from styles.rows_put import KeptChoices

__all__ = ["LOOKALIKES", "lookalike"]


class Put(Listed):
    """Each expert's results, put somewhere and added up."""

    def total(self, results):
        return sum(results)

    def forward(self, x):
        ids, weights = self.router(x)
        results = []
        for e, expert in enumerate(self.experts):
            mine = ids == e
            chosen = mine.any(dim=-1)
            result = torch.zeros_like(x)
            result[chosen] = expert(x[chosen])
            results.append(result * (weights * mine).sum(dim=-1, keepdim=True))
        return self.total(results)


@lookalike("rows_put_into_ones", "what has no rows of an expert gets ones of it")
class IntoOnes(Put):
    def forward(self, x):
        ids, _ = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            chosen = (ids == e).any(dim=-1)
            result = torch.ones_like(x)
            result[chosen] = expert(x[chosen])
            out = out + result
        return out


@lookalike("rows_put_then_summed_over_tokens", "the sum is over the tokens, and not over the experts", dynamic=False)
class OverTokens(Put):
    def total(self, results):
        return torch.stack(results).sum(dim=1)


@lookalike("rows_put_then_greatest", "the greatest of the results")
class Greatest(Put):
    def total(self, results):
        return torch.stack(results).amax(dim=0)


@lookalike("rows_put_then_shifted", "a token's results are those of the token before")
class Shifted(Put):
    def total(self, results):
        return sum(result.roll(1, 0) for result in results)


@lookalike("rows_put_then_multiplied", "a later expert multiplies what stands there")
class Products(Put):
    def total(self, results):
        out = results[0]
        for result in results[1:]:
            out = (out + result) * (1 + result)
        return out


@lookalike("rows_put_and_looked_at", "a token's mean over all experts' results is taken away")
class LookedAt(Put):
    def total(self, results):
        return sum(results) - torch.stack(results).amax(dim=0)


@lookalike("rows_put_by_places_that_may_repeat", "of a token that names an expert twice one row is kept, whichever")
class Repeating(Listed):
    """Ids from a table of tokens' numbers: not known to be distinct."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randint(0, self.E, (7, self.K)))

    def forward(self, x):
        ids = self.table[(x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()]
        _, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            part = torch.zeros_like(x)
            part[token] = expert(x[token]) * weights[token, slot, None]
            out = out + part
        return out


class Copies(Listed):
    """Copies of the rows, masked, each written over by its expert."""

    kind = Sequence

    def copies(self, x, mask):
        return torch.einsum("bm,be->ebm", x, mask.to(x.dtype))

    def place(self, e):
        return e

    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights)
        mask = F.one_hot(ids, self.E).sum(dim=1).bool()
        copies = self.copies(x, mask)
        for e, expert in enumerate(self.experts):
            chosen = mask[:, e]
            copies[self.place(e), chosen] = table[chosen, e, None] * expert(copies[self.place(e), chosen])
        return copies.sum(dim=0)


@lookalike("masked_copies_of_another_expert", "an expert's rows stand over another's copy")
class OfAnother(Copies):
    def place(self, e):
        return (e + 1) % self.E


@lookalike("masked_copies_unmasked", "what is no expert's row stays in the copies, and in the sum")
class Unmasked(Copies):
    def copies(self, x, mask):
        return x.expand(self.E, *x.shape).clone()


@lookalike(
    "masked_copies_of_all_others", "copies are zero where the expert's rows are, and the rows themselves elsewhere"
)
class OfOthers(Copies):
    def copies(self, x, mask):
        return torch.einsum("bm,be->ebm", x, (~mask).to(x.dtype))


@lookalike("masked_copies_one_after_another", "an expert reads what the one before it wrote")
class OneAfterAnother(Copies):
    def forward(self, x):
        ids, _ = self.router(x)
        mask = F.one_hot(ids, self.E).sum(dim=1).bool()
        copies = self.copies(x, mask)
        for e, expert in enumerate(self.experts):
            chosen = mask[:, e]
            copies[0, chosen] = expert(copies[0, chosen])
        return copies.sum(dim=0)


@lookalike("masked_copies_of_the_second_choice_twice", "the second best of scores times zero may be the best again")
class SecondTwice(KeptChoices):
    def choices(self, logits):
        probs = logits.softmax(dim=-1)
        first = F.one_hot(probs.argmax(dim=-1), self.E)
        second = F.one_hot((probs * (1 - first)).argmax(dim=-1), self.E)
        return probs, first, second


class HalfWide(SwiGLU):
    def __init__(self):
        super().__init__(H // 2)


@lookalike("rows_of_which_the_half_is_read", "an expert reads the half of a row, which is no token")
class HalfRows(Listed):
    """Each expert reads, or writes, the first half of its rows by the number of each element."""

    kind = HalfWide

    def read(self, x, at):
        return x.gather(0, at.unsqueeze(-1).expand(-1, H // 2))

    def forward(self, x):
        ids, weights = self.router(x)
        out = x.new_zeros(x.shape[0], H // 2)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            at = torch.nonzero(mine.any(dim=-1)).squeeze(-1)
            out = out.index_add(0, at, expert(self.read(x, at)) * (weights * mine).sum(dim=-1)[at, None])
        return out


@lookalike("rows_of_which_the_half_is_written", "an expert's results are written over the first half only")
class HalfWritten(Put):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mine = ids == e
            at = torch.nonzero(mine.any(dim=-1)).squeeze(-1)
            rows = expert(x[at]) * (weights * mine).sum(dim=-1)[at, None]
            out = out + torch.zeros_like(x).scatter(0, at.unsqueeze(-1).expand(-1, H // 2), rows)
        return out


@lookalike("rows_of_which_the_half_is_added", "of an expert's results the first half only is added")
class HalfAdded(Put):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            rows = expert(x[token]) * weights[token, slot, None]
            out = out.scatter_add(0, token.unsqueeze(-1).expand(-1, H // 2), rows)
        return out
