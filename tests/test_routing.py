"""What is known of a layer's ids: valid, distinct, chosen by which op."""

import pytest
import torch
from moe_fx.passes.raising.routing import selection_of


def selection(function, num_experts=4):
    class Model(torch.nn.Module):
        def forward(self, scores):
            return function(scores)

    program = torch.export.export(Model(), (torch.randn(6, 4),))
    return selection_of(program.graph.output_node().args[0][0], num_experts)


@pytest.mark.parametrize(
    ("choose", "in_range", "distinct"),
    [
        (lambda s: s.topk(2).indices, True, True),
        (lambda s: s.sort(descending=True).indices[:, :2], True, True),
        (lambda s: s.argsort(-1), True, True),
        (lambda s: s.argmax(-1, keepdim=True), True, True),
        (lambda s: s.topk(2, dim=0).indices, False, False),
        (lambda s: s.topk(2).indices.reshape(-1, 4), True, False),
        (lambda s: s.topk(2).values.to(torch.int64), False, False),
        (lambda s: s.topk(2).values.to(torch.int64).clamp(0, 3), True, False),
        (lambda s: s.topk(2).values.to(torch.int64).clamp(0, 4), False, False),
        (lambda s: s.to(torch.int64), False, False),
    ],
)
def test_ids_are_valid_and_distinct_only_where_that_is_certain(choose, in_range, distinct):
    found = selection(choose)
    assert (found.in_range, found.distinct) == (in_range, distinct)


def test_a_choice_among_more_experts_than_the_layer_has_is_not_certainly_valid():
    assert not selection(lambda s: s.topk(2).indices, num_experts=3).in_range


def in_turn(scores):
    best = scores.argmax(-1, keepdim=True)
    return torch.cat([best, scores.scatter(-1, best, float("-inf")).argmax(-1, keepdim=True)], -1)


@pytest.mark.parametrize(
    ("choose", "distinct"),
    [
        (lambda s: in_turn(s @ torch.eye(4)), True),
        (lambda s: in_turn((s @ torch.eye(4)).softmax(-1)), True),
        (lambda s: in_turn((s @ torch.eye(4)).masked_fill(s < 0, float("-inf"))), False),
        (lambda s: in_turn(s @ torch.eye(4) + (s > 0).float().log()), False),
        (lambda s: in_turn(s), False),
    ],
)
def test_the_best_is_left_out_of_the_next_choice_only_if_another_is_better_than_minus_infinity(choose, distinct):
    found = selection(choose)
    assert (found.in_range, found.distinct) == (True, distinct)
