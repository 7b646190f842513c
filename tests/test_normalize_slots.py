"""EXPORTED -> NORMAL: rows in the order of the slots, places numbered through, and masks of slots, in one spelling."""

import pytest
import torch
from test_normalize_otherwise import given, rewritten


def rows_of(x):
    return torch.cat([x.sin(), x.cos()])


def column():
    return torch.arange(5)[:, None].expand(-1, 2).reshape(-1)


def listed(ids):
    return (ids.flatten() == 1).nonzero().squeeze(-1)


def cut_then_written(x):
    y = x.sin()
    first, _ = y.split([2, 3])
    first.mul_(2)
    return y + 1


SAME = {
    "added by widened numbers": (
        lambda x, ids: torch.zeros(5, 3).index_add(0, column(), rows_of(x)),
        lambda x, ids: rows_of(x).view(-1, 2, 3).sum(1),
    ),
    "added by repeated numbers": (
        lambda x, ids: torch.zeros(5, 3).index_put([torch.arange(5).repeat_interleave(2)], rows_of(x), accumulate=True),
        lambda x, ids: rows_of(x).view(-1, 2, 3).sum(1),
    ),
    "added by divided numbers to something": (
        lambda x, ids: x.scatter_add(0, (torch.arange(10) // 2)[:, None].expand(-1, 3), rows_of(x)),
        lambda x, ids: x + rows_of(x).view(-1, 2, 3).sum(1),
    ),
    "added twice as much": (
        lambda x, ids: torch.zeros(5, 3).index_add(0, listed(ids) // 2, x.sin()[listed(ids) // 2], alpha=2),
        lambda x, ids: torch.zeros(5, 3).index_add(0, listed(ids) // 2, x.sin()[listed(ids) // 2] * 2),
    ),
    "rows scattered element by element": (
        lambda x, ids: x.scatter(0, (p := listed(ids) // 2)[:, None].expand(-1, 3), x.sin()[p]),
        lambda x, ids: x.index_put([p := listed(ids) // 2], x.sin()[p]),
    ),
    "quotient and remainder": (
        lambda x, ids: x[:, :2].sin()[(p := listed(ids)) // 2, p % 2],
        lambda x, ids: x[:, :2].sin().reshape(-1)[listed(ids)],
    ),
    "what the quotient leaves": (
        lambda x, ids: x[:, :2].sin()[(t := (p := listed(ids)) // 2), p - t * 2],
        lambda x, ids: x[:, :2].sin().reshape(-1)[listed(ids)],
    ),
    "one column or the other": (
        lambda x, ids: (m := ids == 1)[:, 0] | m[:, 1],
        lambda x, ids: (ids == 1).any(-1),
    ),
    "one id or the other": (
        lambda x, ids: torch.logical_or(ids[:, 0] == 1, ids[:, 1] == 1),
        lambda x, ids: (ids == 1).any(-1),
    ),
    "places of a sum": (
        lambda x, ids: (ids == 1).sum(-1).nonzero(),
        lambda x, ids: (ids == 1).any(-1).nonzero(),
    ),
    "places of what is above zero": (
        lambda x, ids: (torch.nn.functional.one_hot(ids, 3).permute(2, 1, 0)[1] > 0).nonzero(),
        lambda x, ids: torch.nn.functional.one_hot(ids, 3).permute(2, 1, 0)[1].nonzero(),
    ),
    "or a number filled in": (
        lambda x, ids: torch.where(ids == 1, x[:, :2], torch.full((), 0.0)),
        lambda x, ids: torch.where(ids == 1, x[:, :2], x.new_zeros(())),
    ),
    "onto rows": (
        lambda x, ids: torch.addmm(x.sin(), x, x[:3]),
        lambda x, ids: x.sin() + torch.mm(x, x[:3]),
    ),
    "turned weights made to add up": (
        lambda x, ids: ((w := x[:, :2].sigmoid().t()) / w.sum(0))[0],
        lambda x, ids: ((w := x[:, :2].sigmoid()) / w.sum(1).unsqueeze(-1))[:, 0],
    ),
    "into a tensor that is given": (
        lambda x, ids: torch.mul(x.sin(), x, out=torch.zeros(5, 3)) + 1,
        lambda x, ids: torch.zeros(5, 3).copy_(x.sin() * x) + 1,
    ),
    "cut in equal parts": (
        lambda x, ids: x.tensor_split(3, -1)[1] + 1,
        lambda x, ids: x.chunk(3, -1)[1] + 1,
    ),
    "zeros computed of zeros": (
        lambda x, ids: x.sin() + torch.relu(torch.zeros(1, 3) @ x[:3]).square(),
        lambda x, ids: x.sin(),
    ),
    "columns taken one by one": (
        lambda x, ids: x.sin().unbind(-1)[1] + 1,
        lambda x, ids: x.sin()[:, 1] + 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_two_ways_to_write_it_are_one_graph(name):
    one, other = SAME[name]
    assert rewritten(one, *given()) == rewritten(other, *given())


KEPT = {
    "ones computed of zeros": (lambda x, ids: x.sin() + torch.zeros(1, 3).cos(), "cos"),
    "zeros and what is added to them": (lambda x, ids: x.sin() + torch.addmm(x[0], torch.zeros(1, 3), x[:3]), "addmm"),
    "numbers slot after slot": (
        lambda x, ids: torch.zeros(5, 3).index_add(0, torch.arange(5).repeat(2), rows_of(x)), "index_add"
    ),
    "fewer rows than the sum has": (lambda x, ids: torch.zeros(7, 3).index_add(0, column(), rows_of(x)), "index_add"),
    "numbers from one": (lambda x, ids: torch.zeros(6, 3).index_add(0, column() + 1, rows_of(x)), "index_add"),
    "another remainder": (lambda x, ids: x.sin()[(p := listed(ids)) // 2, p % 3], "remainder"),
    "narrower than the rows": (lambda x, ids: x.sin()[(p := listed(ids)) // 2, p % 2], "remainder"),
    "some of the columns": (lambda x, ids: (m := x > 0)[:, 0] | m[:, 1], "__or__"),
    "columns the other way round": (lambda x, ids: (m := ids == 1)[:, 1] | m[:, 0], "__or__"),
    "two numbers": (lambda x, ids: (ids[:, 0] == 1) | (ids[:, 1] == 2), "__or__"),
    "places of a sum of numbers": (lambda x, ids: ids.sum(-1).nonzero(), "sum"),
    "places above one": (lambda x, ids: ((ids == 1).sum(-1) > 1).nonzero(), "sum"),
    "places of positive numbers": (lambda x, ids: (x.sin() > 0).nonzero(), "gt"),
    "onto a line": (lambda x, ids: torch.addmm(x[0], x, x[:3]), "addmm"),
    "half of what is there": (lambda x, ids: torch.addmm(x.sin(), x, x[:3], beta=0.5), "addmm"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_what_says_something_else_stays(name):
    function, kept = KEPT[name]
    assert f"aten::{kept}" in rewritten(function, *given())


def test_a_result_written_where_it_is_read_elsewhere_is_not_lost():
    def function(x, ids):
        part = torch.zeros(5, 5)
        torch.mm(x, x.t(), out=part)
        return part * 2

    with torch.no_grad():
        assert "aten::mul" in rewritten(function, *given())


def test_what_is_written_to_a_part_of_a_split_is_written_to_the_whole():
    assert "aten::slice_scatter" in rewritten(lambda x, ids: cut_then_written(x), *given())


@torch.no_grad()
def test_an_op_of_one_argument_on_a_part_is_one_on_the_whole():
    def function(x, ids):
        y = x.sin()
        y[0].zero_()
        return y + 1

    assert "aten::select_scatter" in rewritten(function, *given())


@torch.no_grad()
def test_ids_chosen_along_columns_are_those_of_rows_turned_around():
    found = rewritten(lambda x, ids: (x.sin().t().topk(2, dim=0)[1] == 1).any(0), *given())
    assert found == ["aten::any", "aten::eq", "aten::sin", "aten::topk", "aten::transpose", "aten::transpose"]
