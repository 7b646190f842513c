"""EXPORTED -> NORMAL: places of a mask listed expert by expert, selected by it, or along batch and sequence."""

import pytest
import torch
from expecttest import assert_expected_inline
from moe_fx.passes.normalize import (
    flatten_masks,
    flatten_places,
    merge_equal_values,
    spell_column_lists,
    spell_selections,
)
from test_normalize import exported, normal, without_assertions

from moe_fx.matcher import op_name


def rewritten(function, *args):
    module, written = normal(exported(function, *args))
    flatten_masks(module.graph, written)
    merge_equal_values(module.graph, written, ())
    for step in (flatten_places, spell_selections, spell_column_lists):
        step(module.graph, written)
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*args)[0], function(*args), rtol=0, atol=1e-6)
    return module


def count(module, name):
    return sum(op_name(node) == name for node in module.graph.nodes)


def given(rows=5):
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(rows, 3, generator=generator), torch.rand(rows, 2, generator=generator) > 0.4
    return x, mask, torch.rand(rows, 2, generator=generator)


def listed(x, mask, table):
    expert, token = torch.where(mask.T)
    one, two = x[token].split(mask.sum(0).tolist())
    rows = torch.cat([one.sin(), two.cos()]) * table[token, expert, None]
    return torch.zeros_like(x).index_add(0, token, rows)


def selected(x, mask, table):
    turned = mask.T.contiguous()
    token = torch.arange(len(x)).unsqueeze(0).expand(2, -1).masked_select(turned)
    one, two = x.index_select(0, token).split(mask.sum(0).tolist())
    rows = torch.cat([one.sin(), two.cos()]) * table.T.contiguous().masked_select(turned).unsqueeze(-1)
    return torch.zeros_like(x).scatter_add(0, token.unsqueeze(1).expand(-1, 3), rows)


def sliced(x, mask, table):
    token = torch.nonzero(mask.t())[:, 1]
    first, second = mask.long().sum(0).tolist()
    rows = x[token]
    results = torch.cat([rows[:first].sin(), rows[first : first + second].cos()])
    return torch.zeros_like(x).index_put((token,), results, accumulate=True)


def test_places_listed_expert_by_expert_before_and_after():
    assert_expected_inline(
        without_assertions(rewritten(listed, *given())),
        """\
args_0: f32[5, 3]
args_1: bool[5, 2]
args_2: f32[5, 2]
select: bool[5] = aten.select(args_1, 1, 0)
where = aten.where(select)
getitem: i64[s0] = getitem(where, 0)
select_1: bool[5] = aten.select(args_1, 1, 1)
where_1 = aten.where(select_1)
getitem_1: i64[s1] = getitem(where_1, 0)
index: f32[s0, 3] = aten.index(args_0, [getitem])
index_1: f32[s1, 3] = aten.index(args_0, [getitem_1])
sin: f32[s0, 3] = aten.sin(index)
cos: f32[s1, 3] = aten.cos(index_1)
unsqueeze: f32[5, 2, 1] = aten.unsqueeze(args_2, 2)
zeros_like: f32[5, 3] = aten.zeros_like(args_0)
select_2: f32[5, 1] = aten.select(unsqueeze, 1, 0)
index_2: f32[s0, 1] = aten.index(select_2, [getitem])
mul: f32[s0, 3] = aten.mul(sin, index_2)
index_add: f32[5, 3] = aten.index_add(zeros_like, 0, getitem, mul)
select_3: f32[5, 1] = aten.select(unsqueeze, 1, 1)
index_3: f32[s1, 1] = aten.index(select_3, [getitem_1])
mul_1: f32[s1, 3] = aten.mul(cos, index_3)
index_add_1: f32[5, 3] = aten.index_add(index_add, 0, getitem_1, mul_1)
return (index_add_1,)
""",
    )


@pytest.mark.parametrize("function", [listed, selected, sliced])
def test_a_list_of_places_is_a_loop_over_its_columns(function):
    module = rewritten(function, *given())
    assert count(module, "aten::index_add") == 2
    assert count(module, "aten::cat") == count(module, "aten::split_with_sizes") == count(module, "aten::slice") == 0


def counts_of_another_mask(x, mask, table):
    token = torch.where(mask.T)[1]
    one, two = x[token].split((~mask).logical_not().sum(0).tolist())
    return torch.zeros_like(x).index_add(0, token, torch.cat([one.sin(), two.cos()]))


def rows_also_summed(x, mask, table):
    token = torch.where(mask.T)[1]
    rows = x[token]
    one, two = rows.split(mask.sum(0).tolist())
    return torch.zeros_like(x).index_add(0, token, torch.cat([one.sin(), two.cos()])) + rows.sum()


def places_of_the_mask_itself(x, mask, table):
    token = torch.where(mask)[0]
    one, two = x[token].split(mask.sum(0).tolist())
    return torch.zeros_like(x).index_add(0, token, torch.cat([one.sin(), two.cos()]))


def joined_the_other_way_round(x, mask, table):
    token = torch.where(mask.T)[1]
    one, two = x[token].split(mask.sum(0).tolist())
    return torch.zeros_like(x).index_add(0, token, torch.cat([two.cos(), one.sin()]))


@pytest.mark.parametrize(
    "function", [counts_of_another_mask, rows_also_summed, places_of_the_mask_itself, joined_the_other_way_round]
)
def test_other_lists_stay(function):
    assert count(rewritten(function, *given()), "aten::cat") == 1


def test_what_selects_no_numbers_stays():
    def function(x, mask, table):
        return table.T.contiguous().masked_select(mask.T.contiguous())

    assert count(rewritten(function, *given()), "aten::where") == 0


def batch():
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(2, 3, 4, generator=generator), torch.rand(2, 3, 2, generator=generator) > 0.5
    return x, mask, torch.rand(2, 3, 2, generator=generator)


def test_places_of_batch_sequence_and_slot_before_and_after():
    def function(x, mask, weights):
        b, s, k = torch.where(mask)
        return torch.zeros_like(x).index_put((b, s), x[b, s] * weights[b, s, k, None], accumulate=True)

    assert_expected_inline(
        without_assertions(rewritten(function, *batch())),
        """\
args_0: f32[2, 3, 4]
args_1: bool[2, 3, 2]
args_2: f32[2, 3, 2]
reshape: f32[6, 4] = aten.reshape(args_0, [-1, 4])
reshape_1: bool[6, 2] = aten.reshape(args_1, [-1, 2])
where = aten.where(reshape_1)
getitem: i64[s0] = getitem(where, 0)
getitem_1: i64[s0] = getitem(where, 1)
zeros_like: f32[2, 3, 4] = aten.zeros_like(args_0)
reshape_2: f32[6, 4] = aten.reshape(zeros_like, [-1, 4])
index: f32[s0, 4] = aten.index(reshape, [getitem])
reshape_3: f32[6, 2] = aten.reshape(args_2, [-1, 2])
unsqueeze: f32[6, 2, 1] = aten.unsqueeze(reshape_3, -1)
index_1: f32[s0, 1] = aten.index(unsqueeze, [getitem, getitem_1])
mul: f32[s0, 4] = aten.mul(index, index_1)
index_put: f32[6, 4] = aten.index_put(reshape_2, [getitem], mul, True)
reshape_4: f32[2, 3, 4] = aten.reshape(index_put, [2, 3, 4])
return (reshape_4,)
""",
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x, mask, weights: torch.where(mask)[0] + torch.where(mask)[1],
        lambda x, mask, weights: x[torch.where(mask)[0]],
        lambda x, mask, weights: x.transpose(0, 1)[torch.where(mask)[1], torch.where(mask)[0]],
    ],
    ids=["as numbers", "of sequences", "exchanged"],
)
def test_places_that_are_not_those_of_tokens_stay(function):
    places = [node for node in rewritten(function, *batch()).graph.nodes if op_name(node) == "aten::where"]
    assert {node.args[0].meta["val"].dim() for node in places} == {3}
