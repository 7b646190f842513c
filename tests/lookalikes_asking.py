"""Look-alikes of loops that ask which experts have rows: each asks, or takes, something else."""

from __future__ import annotations

import torch
from lookalikes_by_arguments import LOOKALIKES, lookalike
from styles.asking import ReturnsTheToken
from styles.base import ASKS, Listed
from styles.dispatcher import Gated, SparseDispatcher

__all__ = ["LOOKALIKES"]


class Looped(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token = torch.nonzero((ids == e).any(dim=1)).squeeze(-1)
            if self.skips(token, x, e):
                continue
            mine = (weights[token] * (ids[token] == e)).sum(1, keepdim=True)
            out[token] += expert(x[token]) * self.weighted(mine, token)
        return out

    def skips(self, token, x, e):
        return len(token) == 0

    def weighted(self, mine, token):
        return mine


@lookalike("asking_for_two_rows", "an expert with a single row is left out", **ASKS)
class OneRow(Looped):
    def skips(self, token, x, e):
        return len(token) <= 1


@lookalike("asking_divided_by_rows", "results are divided by how many rows there are", **ASKS)
class Divided(Looped):
    def weighted(self, mine, token):
        return mine / len(token)


@lookalike("asking_for_the_second_row", "an expert is left out if its second row is not there", **ASKS)
class SecondRow(Looped):
    def skips(self, token, x, e):
        return token[1:].numel() == 0


@lookalike("asking_for_some_rows", "an expert is left out if none of its rows is positive", **ASKS)
class SomeRows(Looped):
    def skips(self, token, x, e):
        rows = x[token]
        return rows[rows.sum(-1) > 0].shape[0] == 0


@lookalike("asking_place_among_named", "the place of an expert among those named", **ASKS)
class Enumerated(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for place, e in enumerate(ids.unique()):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[place](x[token]) * weights[token, slot, None])
        return out


@lookalike("asking_first_choice", "the experts that the first choice names", **ASKS)
class FirstChoice(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in ids[:, 0].unique():
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
        return out


class Sorted(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        order, counts = flat.argsort(), flat.bincount()
        rows, results, start = x[order // self.K], [], 0
        for e, count in enumerate(counts.tolist()):
            results.append(self.experts[e](rows[start : start + count]))
            start = start + count
        weighted = torch.cat(results) * weights.view(-1)[order, None]
        return torch.zeros_like(x).index_add(0, order // self.K, weighted) * self.scale(counts, results)


@lookalike("asking_how_many_counted", "how many experts were counted is read elsewhere", **ASKS)
class ListedLength(Sorted):
    def scale(self, counts, results):
        return len(results)


@lookalike("asking_for_the_expert_before", "where the expert before last ends is asked", **ASKS)
class TwoBefore(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        order = flat.argsort()
        token, scale = order // self.K, weights.view(-1)[order]
        ends = [0, *torch.bincount(flat, minlength=self.E).cumsum(0).tolist()]
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if ends[e] > ends[max(e - 1, 0)]:
                here = token[ends[e] : ends[e + 1]]
                out.index_add_(0, here, expert(x[here]) * scale[ends[e] : ends[e + 1], None])
        return out


@lookalike("asking_results_backwards", "results listed in another order than their tokens", **ASKS)
class Backwards(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        tokens, results = [], []
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                tokens.append(token)
                results.append(expert(x[token]) * weights[token, slot, None])
        return torch.zeros_like(x).index_add(0, torch.cat(tokens[::-1]), torch.cat(results))


@lookalike("asking_averaged", "how many experts have results is read elsewhere", **ASKS)
class Averaged(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        tokens, results = [], []
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() > 0:
                tokens.append(token)
                results.append(expert(x[token]) * weights[token, slot, None])
        return torch.zeros_like(x).index_add(0, torch.cat(tokens), torch.cat(results)) / len(results)


@lookalike("asking_for_another_part", "rows of another expert where one has some", **ASKS)
class AnotherPart(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.view(-1)
        order = flat.argsort()
        parts = torch.split(x[order // self.K], torch.bincount(flat, minlength=self.E).tolist())
        results = [self.experts[e](rows) for e, rows in enumerate(parts) if parts[e - 1].shape[0] > 0]
        weighted = torch.cat(results) * weights.view(-1)[order, None]
        return torch.zeros_like(x).index_add(0, order // self.K, weighted)


class ByGates(Listed):
    """Rows by a table of routing weights."""

    def forward(self, x):
        gates = self.gates(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = self.rows(gates[:, e])
            out[rows] += self.weighted(gates[rows, e].unsqueeze(1), expert(x[rows]))
        return out

    def gates(self, x):
        logits, ids = self.router.linear(x).topk(self.K, dim=-1)
        return torch.zeros(x.shape[0], self.E).scatter(1, ids, logits.softmax(-1))

    def rows(self, column):
        return column > 0

    def weighted(self, weight, rows):
        return weight * rows


@lookalike("positive_gates_of_raw_scores", "those that are negative are left out")
class Negative(ByGates):
    def gates(self, x):
        logits, ids = self.router.linear(x).topk(self.K, dim=-1)
        return torch.zeros(x.shape[0], self.E).scatter(1, ids, logits)


@lookalike("positive_gates_above_a_threshold", "experts with little weight are left out")
class Above(ByGates):
    def rows(self, column):
        return column > 0.4


@lookalike("positive_gates_not_multiplied", "where a weight comes out as zero, nothing is added")
class NotMultiplied(ByGates):
    def weighted(self, weight, rows):
        return rows


@lookalike("slots_written_at_the_token", "written at the place of the token among all, not at its slot")
class AtTheToken(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        results = torch.zeros(x.shape[0], self.K, x.shape[1])
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            results[token, 1 - slot] = expert(x[token])
        return (results * weights[..., None]).sum(1)


@lookalike("slots_written_with_rows_of_slots", "the row of the token whose number is the slot's")
class RowsOfSlots(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        results = torch.zeros(x.shape[0], self.K, x.shape[1])
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            results[token, slot] = expert(x[slot])
        return (results * weights[..., None]).sum(1)


class Masked(Listed):
    """One expert per token, whose results a mask keeps."""

    K = 1

    def forward(self, x):
        weights, ids = self.router.linear(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            out = out + self.kept((ids == e)[:, None], expert(x), e)
        return out * weights[:, None]


@lookalike("masked_results_beside_all", "results of all experts are added too")
class BesideAll(Masked):
    def kept(self, mask, rows, e):
        return torch.where(mask, rows, 0.0) + rows


@lookalike("masked_results_shifted", "experts that a token was not routed to add a number")
class Shifted(Masked):
    def kept(self, mask, rows, e):
        return torch.where(mask, rows, 0.0).cos()


@lookalike("masked_results_by_the_wrong_side", "a token takes all results but its expert's")
class WrongSide(Masked):
    def kept(self, mask, rows, e):
        return rows.masked_fill(mask, 0.0)


@lookalike("table_by_places_of_one_row", "all weights are written to the first token's row")
class FirstRow(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        table = torch.zeros(x.shape[0], self.E)
        table[torch.arange(1).unsqueeze(1), ids] = weights
        return sum(table[:, e : e + 1] * expert(x) for e, expert in enumerate(self.experts))


class Dispatched(Gated, Listed):
    """Rows in parts, by a list of the places where gates are not zero."""

    def forward(self, x):
        dispatcher = SparseDispatcher(self.E, self.gates(x))
        rows = dispatcher.dispatch(x)
        return dispatcher.combine(self.results(rows, dispatcher))

    def results(self, rows, dispatcher):
        return [self.experts[e](rows[e]) for e in range(self.E)]


@lookalike("dispatcher_rows_turned_around", "a token takes the result of another")
class TurnedAround(Dispatched):
    def results(self, rows, dispatcher):
        return [self.experts[e](rows[e].flip(0)) for e in range(self.E)]


@lookalike("dispatcher_parts_in_another_order", "tokens take the results of others")
class PartsInAnotherOrder(Dispatched):
    def results(self, rows, dispatcher):
        return [self.experts[e](rows[e]) for e in (1, 2, 3, 0)]


@lookalike("dispatcher_gates_twice", "results are scaled by the weights of others")
class GatesTwice(Dispatched):
    def results(self, rows, dispatcher):
        gates = dispatcher.expert_to_gates()
        return [self.experts[e](rows[e]) * gates[(e + 1) % self.E].sum() for e in range(self.E)]


@lookalike("tokens_by_number_of_another_count", "slots are counted through in another order than ids stand")
class OtherNumbers(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        flat, scale = ids.reshape(-1), weights.reshape(-1)
        number = torch.arange(x.shape[0]).repeat(self.K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = flat == e
            out.index_add_(0, number[mask], expert(x[number[mask]]) * scale[mask].unsqueeze(-1))
        return out


@lookalike("column_of_the_next_expert", "rows are weighted by the probability of another expert")
class NextColumn(Listed):
    K = 1

    def forward(self, x):
        probs = self.router.linear(x).softmax(dim=-1)
        ids = probs.argmax(dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = ids == e
            out[mask] = expert(x[mask]) * probs[mask, (e + 1) % self.E].unsqueeze(-1)
        return out


class ByRawGates(Listed):
    """Gates of either sign; what is asked of them is not what chooses the rows."""

    def forward(self, x):
        scores, ids = self.router.linear(x).topk(self.K, dim=-1)
        gates = torch.zeros(x.shape[0], self.E).scatter(1, ids, scores)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = gates[:, e].nonzero(as_tuple=True)[0]
            if self.asked(gates, e):
                out.index_add_(0, rows, expert(x[rows]) * gates[rows, e, None])
        return out


@lookalike("raw_gates_with_a_positive_sum", "an expert is left out if its weights add up to less than zero", **ASKS)
class PositiveSum(ByRawGates):
    def asked(self, gates, e):
        return gates[:, e].sum() > 0


@lookalike("raw_gates_with_a_positive_total", "the same, of the totals of all experts", **ASKS)
class PositiveTotal(ByRawGates):
    def asked(self, gates, e):
        return gates.sum(0)[e] > 0


@lookalike("raw_gates_with_any_above_zero", "an expert is left out if all of its weights are negative", **ASKS)
class AnyAboveZero(ByRawGates):
    def asked(self, gates, e):
        return (gates[:, e] > 0).any()


@lookalike("mask_of_halves", "cast to whole numbers, a half is no yes")
class Halves(Listed):
    def forward(self, x):
        probs = self.router.linear(x).softmax(dim=-1)
        mask = torch.zeros_like(probs).scatter(1, probs.topk(self.K, dim=-1).indices, 0.5).long().bool()
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = mask[:, e]
            out[rows] += expert(x[rows]) * probs[rows, e, None]
        return out


@lookalike("asking_returned_tokens_shifted", "an expert without parameters adds something where it has no rows", **ASKS)
class ShiftedWithoutRows(ReturnsTheToken):
    """Of tokens that an expert returns, something is added to all."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e in range(self.E + self.EXTRA):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                out = out + (1.0 if e >= self.E else 0.0)
                continue
            out = out.index_add(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


@lookalike("asking_returned_tokens_summed", "tokens that are returned are summed over before", **ASKS)
class Summed(ReturnsTheToken):
    def expert(self, rows, e):
        return super().expert(rows, e) if e < self.E else rows.cumsum(0)


class Lists(Listed):
    """Places turned into lists."""

    def forward(self, x):
        ids, weights = self.router(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if len(token) == 0:
                continue
            tokens, slots = self.lists(token.tolist(), slot.tolist())
            out.index_add_(0, token[: len(tokens)], expert(x[tokens]) * weights[tokens, slots, None])
        return out


@lookalike("asking_lists_turned_around", "rows are added to the tokens in another order", **ASKS)
class TurnedLists(Lists):
    def lists(self, tokens, slots):
        return tokens[::-1], slots[::-1]


@lookalike("asking_lists_without_the_last", "an expert leaves out its last row", **ASKS)
class ShorterLists(Lists):
    def lists(self, tokens, slots):
        return tokens[:-1], slots[:-1]


@lookalike("asking_lists_up_to_eight", "an expert takes no more than eight rows", **ASKS)
class EightOfLists(Lists):
    def lists(self, tokens, slots):
        return tokens[:8], slots[:8]


@lookalike("asking_one_of_a_list", "an expert's first row is added to all of its rows", **ASKS)
class FirstOfList(Lists):
    def lists(self, tokens, slots):
        return [tokens[0]] * 2, [slots[0]] * 2


@lookalike("asking_idle_experts_add_to_the_token", "an expert without rows adds the token", **ASKS)
class IdleAdds(Listed):
    def forward(self, x):
        ids, weights = self.router(x)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if len(token) == 0:
                out = out + x
            else:
                out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out
