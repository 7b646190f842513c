"""What core ATen writes in another order, or in other ops, is found as what the model wrote is."""

import pytest
import torch
from styles.dispatcher import SparseDispatcher
from torch.export import Dim
from toys import writes_parts

import moe_fx


@torch.no_grad()
def layers(model, x, dynamic=True):
    """How many layers are raised, decomposed and not; whatever was, the numbers are the model's."""
    model = model.eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("T")},) if dynamic else None)
    found = []
    for each in (program, program.run_decompositions()):
        after = moe_fx.transform(each)
        found.append(len(moe_fx.report(after).layers))
        for tokens in (1, 2, 9) if dynamic else (len(x),):
            rows = torch.randn(tokens, *x.shape[1:], generator=torch.Generator().manual_seed(tokens))
            torch.testing.assert_close(after.module()(rows), model(rows))
    return tuple(found)


class TopOne(torch.nn.Module):
    """One expert per token, whose bias is written before its product."""

    def __init__(self, other=lambda ids: ids):
        super().__init__()
        self.router, self.other = torch.nn.Linear(8, 4), other
        self.up, self.up_bias = torch.nn.Parameter(torch.randn(4, 8, 16)), torch.nn.Parameter(torch.randn(4, 16))
        self.down, self.down_bias = torch.nn.Parameter(torch.randn(4, 16, 8)), torch.nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).max(-1)
        h = self.up_bias[ids].unsqueeze(1) + torch.bmm(x.unsqueeze(1), self.up[ids])
        y = self.down_bias[self.other(ids)].unsqueeze(1) + torch.bmm(h.relu(), self.down[ids])
        return y.squeeze(1) * weights.unsqueeze(-1)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_bias_before_its_product_is_the_experts_own(dynamic):
    assert layers(TopOne(), torch.randn(6, 8), dynamic) == (1, 1)


def test_refuses_a_bias_before_its_product_that_other_ids_choose():
    assert layers(TopOne(lambda ids: 3 - ids), torch.randn(6, 8)) == (0, 0)


class Dispatched(torch.nn.Module):
    """A layer with one expert per token, and one whose rows are read and added by the places where gates are."""

    def __init__(self, order=(0, 1, 2, 3), wide=8):
        super().__init__()
        self.first, self.router, self.order = TopOne(), torch.nn.Linear(8, 4), order
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, wide) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        weights, ids = self.router(x).softmax(-1).topk(2)
        dispatcher = SparseDispatcher(4, torch.zeros(x.shape[0], 4).scatter(1, ids, weights))
        rows = dispatcher.dispatch(x)
        return self.added(x, dispatcher, [self.experts[e](rows[e]) for e in self.order])

    def added(self, x, dispatcher, results):
        return dispatcher.combine(results)


class AddedToAll(Dispatched):
    """Each result is a number, and added to all features of its token."""

    def __init__(self):
        super().__init__(wide=1)

    def added(self, x, dispatcher, results):
        values = torch.cat(results) * dispatcher._nonzero_gates
        return torch.zeros_like(x).index_put((dispatcher._batch_index,), values, accumulate=True)


@pytest.mark.parametrize("dynamic", [True, False])
def test_rows_added_by_the_places_of_a_table_are_added_by_each_column(dynamic):
    assert layers(Dispatched(), torch.randn(6, 8), dynamic) == (2, 2)


@pytest.mark.parametrize("model", [Dispatched((1, 2, 3, 0)), AddedToAll()])
def test_rows_added_by_the_places_of_a_table_to_others_stay_beside_a_layer(model):
    assert layers(model, torch.randn(6, 8)) == (1, 1)


def test_experts_held_twice_are_told_of_where_their_rows_are_added_to_others():
    model = Dispatched((2, 1, 0, 3))
    model.experts[3], model.experts[1] = model.experts[2], model.experts[0]
    program = torch.export.export(model.eval(), (torch.randn(1, 8),)).run_decompositions()
    (miss,) = moe_fx.explain(program).misses
    assert "exported with two tokens, or with any number of them" in str(miss)


class PositiveGates(torch.nn.Module):
    """Two choices in turn, each a mask; an expert's tokens are those whose gate is above zero."""

    def __init__(self, gates=lambda scores: scores, left=lambda scores, mask: scores.masked_fill(mask, -torch.inf)):
        super().__init__()
        self.router, self.gates, self.left = torch.nn.Linear(8, 4), gates, left
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        first = scores.argmax(-1).unsqueeze(-1) == torch.arange(4)
        second = self.left(scores, first).argmax(-1).unsqueeze(-1) == torch.arange(4)
        gates = self.gates(scores)
        best, next_best = ((gates * mask).sum(-1, keepdim=True) * mask.float() for mask in (first, second))
        table = best + next_best
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = torch.where(table[:, e] > 0)[0]
            out = out.index_add(0, rows, expert(x[rows]) * table[rows, e, None])
        return out


def test_gates_above_zero_of_masks_and_weights_that_are_not_negative_are_all_gates():
    assert layers(PositiveGates(), torch.randn(6, 8)) == (1, 1)


@pytest.mark.parametrize(
    "change",
    [
        dict(gates=lambda scores: scores - 0.25),
        dict(gates=lambda scores: scores * (scores > 0.2).logical_not().float().sub(0.5)),
        dict(left=lambda scores, mask: scores * mask.logical_not()),
    ],
)
def test_refuses_gates_above_zero_where_others_may_be_below_or_a_choice_repeat(change):
    assert layers(PositiveGates(**change), torch.randn(6, 8)) == (0, 0)


def expert_after_expert(tokens, width):
    return torch.arange(tokens).view(1, tokens).expand(4, tokens).reshape(4 * tokens, 1).expand(4 * tokens, width)


def token_after_token(tokens, width):
    return torch.arange(tokens).view(tokens, 1).expand(tokens, 4).reshape(4 * tokens, 1).expand(4 * tokens, width)


class EveryToken(torch.nn.Module):
    """Every token is gathered for every expert, and results are added to tokens: at ``places``, written with sizes."""

    def __init__(self, places=expert_after_expert):
        super().__init__()
        self.router, self.places = torch.nn.Linear(8, 4), places
        self.up, self.down = torch.nn.Parameter(torch.randn(4, 8, 16)), torch.nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x):
        tokens, width = x.shape
        weights, ids = self.router(x).topk(2, dim=-1)
        table = torch.full((tokens, 4), -torch.inf).scatter(1, ids, weights).sigmoid()
        places = self.places(tokens, width)
        rows = x.gather(0, places) * table.t().reshape(4 * tokens, 1)
        results = torch.bmm(torch.bmm(rows.view(4, tokens, width), self.up).relu(), self.down)
        return torch.zeros_like(x).scatter_add(0, places, results.view(4 * tokens, width))


@pytest.mark.parametrize("dynamic", [True, False])
def test_tokens_gathered_for_every_expert_are_found_however_sizes_are_written(dynamic):
    assert layers(EveryToken(), torch.randn(6, 8), dynamic) == (1, 1)


class RepeatedTokens(EveryToken):
    """The same by index: ``read`` at some places, and added to every token, expert after expert."""

    def __init__(self, read=lambda tokens: torch.arange(tokens).repeat(4)):
        super().__init__()
        self.read = read

    def forward(self, x):
        tokens = x.shape[0]
        weights, ids = self.router(x).topk(2, dim=-1)
        table = torch.full((tokens, 4), -torch.inf).scatter(1, ids, weights).sigmoid()
        rows = x[self.read(tokens)] * table.t().reshape(-1, 1)
        results = torch.bmm(torch.bmm(rows.view(4, tokens, 8), self.up).relu(), self.down)
        return torch.zeros_like(x).index_add(0, torch.arange(tokens).repeat(4), results.view(-1, 8))


@pytest.mark.parametrize("dynamic", [True, False])
def test_tokens_read_at_repeated_numbers_are_those_of_every_expert(dynamic):
    assert layers(RepeatedTokens(), torch.randn(6, 8), dynamic) == (1, 1)


@pytest.mark.parametrize(
    "read",
    [
        lambda tokens: torch.arange(tokens // 2).repeat(8),
        lambda tokens: torch.arange(tokens // 2).view(1, -1).expand(8, -1).reshape(-1),
    ],
)
def test_refuses_half_of_the_tokens_read_twice_as_often(read):
    model = RepeatedTokens(read)
    assert layers(model, torch.randn(6, 8), dynamic=False) == (0, 0)
    (miss,) = moe_fx.explain(torch.export.export(model, (torch.randn(6, 8),))).misses
    assert "every token once for each of 4 experts" in str(miss)


@pytest.mark.parametrize("tokens", [6, 4])
def test_refuses_tokens_gathered_in_another_order_than_their_experts(tokens):
    assert layers(EveryToken(token_after_token), torch.randn(tokens, 8), dynamic=False) == (0, 0)
    assert layers(EveryToken(token_after_token), torch.randn(tokens, 8)) == (0, 0)


class PartAfterPart(torch.nn.Module):
    """Sorted rows, cut where each expert's end; its results are written over a part of zeros."""

    def __init__(self, over=lambda out, e, start, end, rows: slice(start, end), made=lambda rows: rows, dtype=None):
        super().__init__()
        self.router, self.over, self.made, self.dtype = torch.nn.Linear(8, 4), over, made, dtype
        self.up, self.down = torch.nn.Parameter(torch.randn(4, 16, 8)), torch.nn.Parameter(torch.randn(4, 8, 16))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        order = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=4).cumsum(0)
        rows, start = x[order // 2], 0
        out = torch.zeros_like(rows, dtype=self.dtype)
        for e in range(4):
            end = ends[e].item()
            h = torch.nn.functional.linear(rows[start:end], self.up[e]).relu()
            own = self.made(torch.nn.functional.linear(h, self.down[e]))
            out[self.over(out, e, start, end, own)] = own
            start = end
        slots = torch.empty_like(out)
        slots[order] = out
        return (slots.view(-1, 2, 8) * weights.unsqueeze(-1)).sum(1)


@writes_parts
@pytest.mark.parametrize("dynamic", [True, False])
def test_results_written_over_parts_are_those_of_sorted_rows(dynamic):
    assert layers(PartAfterPart(), torch.randn(6, 8), dynamic) == (1, 1)


@writes_parts
@pytest.mark.parametrize(
    "change",
    [
        dict(over=lambda out, e, start, end, rows: slice(out.shape[0] - end, out.shape[0] - start)),
        dict(made=lambda rows: rows.sum(0, keepdim=True)),
        dict(made=lambda rows: rows.flip(0)),
        dict(dtype=torch.int64),
    ],
)
def test_refuses_results_written_over_other_parts_or_rows_or_as_whole_numbers(change):
    assert layers(PartAfterPart(**change), torch.randn(6, 8)) == (0, 0)


@writes_parts
def test_results_written_in_a_wider_dtype_are_cast():
    assert layers(PartAfterPart(dtype=torch.float64), torch.randn(6, 8))[0] == 1


class ResultsWritten(torch.nn.Module):
    """Every expert's results are written to their place, then weighed by a table and summed."""

    def __init__(self, dim, written=range(4)):
        super().__init__()
        self.router, self.dim, self.written = torch.nn.Linear(8, 4), dim, written
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        table = torch.zeros(x.shape[0], 4).scatter(1, ids, weights)
        results = torch.ones(x.shape[0], 4, 8) if self.dim else torch.ones(4, x.shape[0], 8)
        for e in self.written:
            results.select(self.dim, e).copy_(self.experts[e](x).relu())
        results = results if self.dim else results.transpose(0, 1)
        return (results * table.unsqueeze(-1)).sum(1)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dynamic", [True, False])
def test_results_written_to_their_places_are_stacked_results(dim, dynamic):
    assert layers(ResultsWritten(dim), torch.randn(6, 8), dynamic) == (1, 1)


@pytest.mark.parametrize("dim", [0, 1])
def test_refuses_results_of_which_one_is_not_written(dim):
    assert layers(ResultsWritten(dim, (0, 1, 3)), torch.randn(6, 8)) == (0, 0)
