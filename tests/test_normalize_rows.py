"""EXPORTED -> NORMAL: rows put into zeros and added, rows of masked copies, places read between writes."""

import pytest
import torch
from expecttest import assert_expected_inline
from moe_fx.passes.normalize import (
    merge_equal_values,
    spell_masked_copies,
    spell_places_in_turn,
    spell_rows_put,
)
from test_normalize import exported, normal, without_assertions

from moe_fx.matcher import op_name


def prepared(function, *args):
    module, written = normal(exported(function, *args))
    merge_equal_values(module.graph, written, ())
    return module, written


def rewritten(function, *args):
    module, written = prepared(function, *args)
    for step in (spell_places_in_turn, spell_masked_copies, spell_rows_put):
        step(module.graph, written)
    module.graph.lint()
    return module


def names(module):
    return [op_name(node) for node in module.graph.nodes]


def equal(function, *args):
    module = rewritten(function, *args)
    module.recompile()
    torch.testing.assert_close(module(*args)[0], function(*args), rtol=0, atol=0)
    return module


def given(rows=5):
    generator = torch.Generator().manual_seed(0)
    x, mask = torch.randn(rows, 3, generator=generator), torch.rand(rows, 2, generator=generator) > 0.4
    return x, mask


def put(x, mask, values):
    out = torch.zeros_like(x)
    out[mask] = values
    return out


def put_sines(x, at):
    return put(x, at, x[at].sin())


def test_rows_put_into_zeros_before_and_after():
    def function(x, mask):
        first, second = mask[:, 0], mask[:, 1]
        one = put(x, first, x[first].sin())
        two = put(x, second, x[second].cos())
        return one * x[:, :1] + two

    module = equal(function, *given())
    assert_expected_inline(
        without_assertions(module),
        """\
args_0: f32[5, 3]
args_1: bool[5, 2]
select: bool[5] = aten.select(args_1, 1, 0)
select_1: bool[5] = aten.select(args_1, 1, 1)
index: f32[s0, 3] = aten.index(args_0, [select])
sin: f32[s0, 3] = aten.sin(index)
zeros_like: f32[5, 3] = aten.zeros_like(args_0)
index_1: f32[s1, 3] = aten.index(args_0, [select_1])
cos: f32[s1, 3] = aten.cos(index_1)
slice: f32[5, 1] = aten.slice(args_0, 1, 0, 1)
index_2: f32[s0, 1] = aten.index(slice, [select])
mul: f32[s0, 3] = aten.mul(sin, index_2)
index_put: f32[5, 3] = aten.index_put(zeros_like, [select], mul, True)
index_put_1: f32[5, 3] = aten.index_put(index_put, [select_1], cos, True)
return (index_put_1,)
""",
    )


def test_rows_of_masked_copies_before_and_after():
    def function(x, mask):
        copies = torch.einsum("th,te->eth", x, mask)
        for e in range(2):
            rows = copies[e, mask[:, e]]
            copies[e, mask[:, e]] = rows.sin()
        return copies.sum(0)

    module = equal(function, *given())
    assert_expected_inline(
        without_assertions(module),
        """\
args_0: f32[5, 3]
args_1: bool[5, 2]
select: bool[5] = aten.select(args_1, 1, 0)
index: f32[s0, 3] = aten.index(args_0, [select])
sin: f32[s0, 3] = aten.sin(index)
zeros_like: f32[5, 3] = aten.zeros_like(args_0)
select_1: bool[5] = aten.select(args_1, 1, 1)
index_1: f32[s1, 3] = aten.index(args_0, [select_1])
sin_1: f32[s1, 3] = aten.sin(index_1)
index_put: f32[5, 3] = aten.index_put(zeros_like, [select], sin, True)
index_put_1: f32[5, 3] = aten.index_put(index_put, [select_1], sin_1, True)
return (index_put_1,)
""",
    )


def test_places_read_between_writes_are_what_was_written_or_there_before():
    def function(x):
        y = x + 1
        y[0].mul_(2)
        y[1] = y[0] * 3
        y[-1].add_(y[2] + y[1])
        return y * 1

    module = equal(function, torch.randn(3, 2))
    assert_expected_inline(
        without_assertions(module),
        """\
args_0: f32[3, 2]
add: f32[3, 2] = aten.add(args_0, 1)
select: f32[2] = aten.select(add, 0, 0)
mul: f32[2] = aten.mul(select, 2)
mul_1: f32[2] = aten.mul(mul, 3)
select_1: f32[2] = aten.select(add, 0, 1)
select_2: f32[2] = aten.select(add, 0, -1)
select_3: f32[2] = aten.select(add, 0, 2)
add_1: f32[2] = aten.add(select_3, mul_1)
add_2: f32[2] = aten.add(select_2, add_1)
stack: f32[3, 2] = aten.stack([mul, mul_1, add_2], 0)
mul_2: f32[3, 2] = aten.mul(stack, 1)
return (mul_2,)
""",
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x, mask: x + put_sines(x, mask[:, 0]),
        lambda x, mask: put_sines(x, mask[:, 0]) * 2 + x,
        lambda x, mask: x + put_sines(x, mask[:, 0].nonzero()[:, 0]),
        lambda x, mask: x + put_sines(x, torch.where(mask[:, 0])[0]),
        lambda x, mask: x.double() + put_sines(x, mask[:, 0]),
        lambda x, mask: torch.stack([put_sines(x, m) for m in mask.unbind(1)], -1).sum(-1),
        lambda x, mask: x.view(5, 1, 3) + put_sines(x, mask[:, 0]).view(5, 1, 3) * x[:, None, :1],
    ],
)  # fmt: skip
def test_rows_put_by_a_mask_are_added_to_their_rows(function):
    found = names(equal(function, *given()))
    assert "aten::index_put" in found
    assert not {"aten::stack", "aten::add"} & {*found}


def test_rows_put_at_places_that_may_repeat_keep_one_of_them():
    def function(x, places):
        return x + torch.zeros_like(x).index_copy(0, places, x[places].sin())

    module = equal(function, torch.randn(4, 3), torch.tensor([0, 2, 2]))
    (node,) = [node for node in module.graph.nodes if op_name(node) == "aten::index_put"]
    assert len(node.args) == 3  # it does not accumulate


def test_rows_added_at_places_that_repeat_are_all_added():
    def function(x, places):
        return x + torch.zeros_like(x).index_add(0, places, x[places].sin())

    x, places = torch.randn(4, 3), torch.tensor([0, 2, 2])
    module = rewritten(function, x, places)
    module.recompile()
    torch.testing.assert_close(module(x, places)[0], function(x, places))
    assert "aten::add" not in names(module)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x, mask: x + torch.ones_like(x).index_put([mask[:, 0]], x[mask[:, 0]].sin()), "into ones"),
        (lambda x, mask: x + put(x, mask[:, 0], x[mask[:, 0]].amax()), "one value for all"),
        (lambda x, mask: x + put(x, mask[:, 0], x[mask[:, 0]].amax(0, keepdim=True)), "one row for all"),
        (lambda x, mask: x + put_sines(x, mask[:, 0]).cos(), "a step that does not keep zeros"),
        (lambda x, mask: x + put_sines(x, mask[:, 0]) * x[:1], "a factor of one row"),
        (lambda x, mask: x[:, None] + put_sines(x, mask[:, 0]), "a sum over all pairs of rows"),
        (lambda x, mask: x.view(5, 3, 1) + put_sines(x, mask[:, 0]).view(5, 3, 1), "rows cut to pieces"),
        (lambda x, mask: torch.add(x, put_sines(x, mask[:, 0]), alpha=2), "a factor in the sum"),
        (lambda x, mask: torch.stack([put_sines(x, m) for m in mask.unbind(1)]).sum(1), "over other rows"),
        (lambda x, mask: torch.stack([put_sines(x, m) for m in mask.unbind(1)] + [x]).sum(0), "of others too"),
        (lambda x, mask: x + put(x, x[:, 0] > 0, x[:1].sin()), "rows not read by the mask"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_sum_of_rows_put_into_zeros_stays(function, why):
    before = names(prepared(function, *given())[0])
    assert names(rewritten(function, *given())) == before


@pytest.mark.parametrize(
    ("product", "at", "why"),
    [
        (lambda x, mask: torch.einsum("th,te->eth", x, mask), lambda mask, e: mask[:, 1 - e], "rows of another"),
        (lambda x, mask: torch.einsum("th,te->eth", x, ~mask), lambda mask, e: mask[:, e], "the others' rows"),
        (lambda x, mask: torch.einsum("th,te->eth", x, mask * 0.5), lambda mask, e: mask[:, e], "half of the rows"),
        (lambda x, mask: torch.einsum("th,te->eth", x, mask) + 1, lambda mask, e: mask[:, e], "not zero elsewhere"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)  # fmt: skip
def test_other_copies_are_read_as_they_are(product, at, why):
    def function(x, mask):
        return product(x, mask)[0][at(mask, 0)].sin()

    module = equal(function, *given())
    (node,) = [node for node in module.graph.nodes if op_name(node) == "aten::index"]
    assert op_name(node.args[0]) == "aten::select"


def test_rows_added_to_masked_copies_are_added_to_the_rows():
    def function(x, mask):
        return torch.einsum("th,te->eth", x, mask)[1].index_put([mask[:, 1]], x[mask[:, 1]].sin(), True)

    (node,) = [node for node in equal(function, *given()).graph.nodes if op_name(node) == "aten::index_put"]
    assert op_name(node.args[0]) == "aten::select"


def test_copies_in_any_order_of_dimensions():
    def function(x, mask):
        copies = x.unsqueeze(1).transpose(0, 1) * mask.t().unsqueeze(-1)
        return copies[1][mask[:, 1]].sin() + torch.einsum("te,th->teh", mask, x)[:, 1][mask[:, 1]]

    module = equal(function, *given())
    read = [op_name(node.args[0]) for node in module.graph.nodes if op_name(node) == "aten::index"]
    assert read == [None, None]  # the rows as they came in
