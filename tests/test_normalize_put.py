"""EXPORTED -> NORMAL: casts of ids, what is scattered or put choice by choice, and places told by a quotient."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from moe_fx.passes.normalize.put_in_turn import spell_put_in_turn
from test_normalize import exported, normal
from test_normalize_otherwise import given, rewritten

from moe_fx.printer import format_graph


def ids_of(x):
    return x.topk(2, -1).indices


def marked(x, *ids, value=True):
    mask = x.new_zeros(5, 3, dtype=torch.bool)
    for each in ids:
        mask = mask.scatter(-1, each, value)
    return mask


SAME = {
    "order of narrower ids": (
        lambda x, ids: ids_of(x).int().view(-1).argsort(stable=True),
        lambda x, ids: ids_of(x).view(-1).argsort(stable=True),
    ),
    "a table at ids cast there and back": (
        lambda x, ids: x.scatter(1, ids_of(x).to(torch.int32).to(torch.int64), 1.0),
        lambda x, ids: x.scatter(1, ids_of(x), 1.0),
    ),
    "a comparison with narrower ids": (
        lambda x, ids: torch.where(ids_of(x).int() == 2)[0],
        lambda x, ids: torch.where(ids_of(x) == 2)[0],
    ),
    "a comparison with ids as floats": (
        lambda x, ids: torch.where(ids_of(x).float() == 2.0)[0],
        lambda x, ids: torch.where(ids_of(x) == 2)[0],
    ),
    "a mask of two choices": (
        lambda x, ids: marked(x, ids[:, :1], ids[:, 1:]),
        lambda x, ids: marked(x, torch.cat([ids[:, :1], ids[:, 1:]], -1)),
    ),
    "tokens by division and floor": (
        lambda x, ids: x[ids.view(-1).argsort().div(2).floor().to(torch.int64)],
        lambda x, ids: x[ids.view(-1).argsort() // 2],
    ),
    "buckets": (
        lambda x, ids: torch.bucketize(torch.arange(4), ids[0].sort().values, right=True),
        lambda x, ids: torch.searchsorted(ids[0].sort().values, torch.arange(4), right=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_two_ways_to_write_it_are_one_graph(name):
    one, other = SAME[name]
    assert rewritten(one, *given()) == rewritten(other, *given())


#: what is left of the calls that are not the same, and how often
KEPT = {
    "narrower ids that are returned": (lambda x, ids: ids_of(x).int(), "aten::to", 1),
    "ids of which nobody knows the largest": (lambda x, ids: ids.int().view(-1).argsort(), "aten::to", 1),
    "ids in eight bits": (lambda x, ids: ids_of(x).to(torch.uint8).view(-1).argsort(stable=True), "aten::to", 1),
    "ids compared with a fraction": (lambda x, ids: ids_of(x).float() == 1.5, "aten::to", 1),
    "ids in few digits": (lambda x, ids: ids_of(x).bfloat16() == 2.0, "aten::to", 1),
    "two numbers scattered": (
        lambda x, ids: marked(x, ids[:, :1]).scatter(-1, ids[:, 1:], False), "aten::scatter", 2
    ),
    "a mask that is read in between": (
        lambda x, ids: (lambda mask: mask.scatter(-1, ids[:, 1:], True) ^ mask)(marked(x, ids[:, :1])),
        "aten::scatter", 2,
    ),
    "a quotient rounded to the nearest": (
        lambda x, ids: x[ids.view(-1).argsort().div(2).round().to(torch.int64).clamp(max=4)], "aten::round", 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_what_means_something_else_is_kept(name):
    function, kept, times = KEPT[name]
    assert rewritten(function, *given()).count(kept) == times


def filled(x, ids, half=False):
    """Bins [3 * 10] filled by two choices, the second ones behind the first, and read."""
    chosen = ids.unbind(1)
    first, second = (F.one_hot(each, 3) for each in chosen)
    before = first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0, keepdim=True)
    ranks = [(count * mask).sum(-1) for count, mask in zip(before, (first, second), strict=True)]
    places = [each * 10 + rank for each, rank in zip(chosen, ranks, strict=True)]
    bins = x.new_zeros(30, 3)
    for place in places:
        bins = bins.scatter_add(0, place.unsqueeze(1).expand(-1, 2 if half else 3), x)
    rows = bins.sin()
    return rows[places[0]] + rows[places[1]]


@torch.no_grad()
def test_bins_filled_and_read_choice_by_choice_before_and_after():
    module, written = normal(exported(filled, *given()))
    assert spell_put_in_turn(module.graph, written)
    torch.testing.assert_close(module(*given())[0], filled(*given()))
    assert_expected_inline(
        format_graph(module),
        """\
args_0: f32[5, 3]
args_1: i64[5, 2]
unbind = aten.unbind(args_1, 1)
getitem: i64[5] = getitem(unbind, 0)
getitem_1: i64[5] = getitem(unbind, 1)
new_zeros: f32[30, 3] = aten.new_zeros(args_0, [30, 3])
stack: i64[5, 2] = aten.stack([getitem, getitem_1], -1)
transpose: i64[2, 5] = aten.transpose(stack, 0, 1)
mul: i64[2, 5] = aten.mul(transpose, 10)
one_hot: i64[2, 5, 3] = aten.one_hot(transpose, 3)
reshape: i64[10, 3] = aten.reshape(one_hot, [10, 3])
cumsum: i64[10, 3] = aten.cumsum(reshape, 0)
reshape_1: i64[2, 5, 3] = aten.reshape(cumsum, [2, 5, 3])
add: i64[2, 5, 3] = aten.add(reshape_1, -1)
mul_1: i64[2, 5, 3] = aten.mul(add, one_hot)
sum: i64[2, 5] = aten.sum(mul_1, [2])
add_1: i64[2, 5] = aten.add(mul, sum)
reshape_2: i64[10] = aten.reshape(add_1, [-1])
repeat: f32[10, 3] = aten.repeat(args_0, [2, 1])
index_add: f32[30, 3] = aten.index_add(new_zeros, 0, reshape_2, repeat)
sin: f32[30, 3] = aten.sin(index_add)
index: f32[2, 5, 3] = aten.index(sin, [add_1])
sum_1: f32[5, 3] = aten.sum(index, [0])
return (sum_1,)
""",
    )


@torch.no_grad()
def test_bins_of_which_only_some_columns_are_filled_are_left_alone():
    module, written = normal(exported(lambda x, ids: filled(x, ids, half=True), *given()))
    assert not spell_put_in_turn(module.graph, written)
