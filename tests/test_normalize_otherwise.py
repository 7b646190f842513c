"""EXPORTED -> NORMAL: what is written in two ways becomes one graph."""

import pytest
import torch
import torch.nn.functional as F
from moe_fx.passes.normalize import normalize
from test_normalize import exported

import moe_fx
from moe_fx.matcher import op_name
from moe_fx.pipeline import Work
from moe_fx.program import ExportedWork
from moe_fx.rewrite import drop_dead_code, only_asserted


def rewritten(function, *args):
    work = Work(ExportedWork(exported(function, *args)), moe_fx.Config())
    module = work.program.graph_module
    normalize(work)
    module.graph.lint()
    module.recompile()
    one, other = ([each.clone() for each in args] for _ in range(2))  # some write to what they are given
    torch.testing.assert_close(module(*one)[0], function(*other), rtol=1e-6, atol=1e-6)
    drop_dead_code(module.graph)
    return sorted(name for node in module.graph.nodes if (name := op_name(node)) and not _about_counts(node))


def _about_counts(node):
    """Assertions, sizes, and places of which only the number is asked."""
    return "assert" in op_name(node) or "sym_" in op_name(node) or (all(map(only_asserted, node.users)) and node.users)


def given():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, generator=generator), torch.randint(0, 3, (5, 2), generator=generator)


def added_in_place(x):
    y = x + 1
    y.addcmul_(x.sin(), x.cos(), value=2)
    return y


SAME = {
    "addcmul": (
        lambda x, ids: torch.addcmul(x, x.sin(), x.cos()),
        lambda x, ids: x + x.sin() * x.cos(),
    ),
    "addcmul in place, scaled": (
        lambda x, ids: added_in_place(x),
        lambda x, ids: (x + 1) + x.sin() * x.cos() * 2,
    ),
    "tensordot": (
        lambda x, ids: torch.tensordot(x.view(5, 3, 1), x.view(3, 5, 1), dims=([1, 2], [0, 2])),
        lambda x, ids: torch.einsum("abc,bdc->ad", x.view(5, 3, 1), x.view(3, 5, 1)),
    ),
    "differences": (
        lambda x, ids: torch.diff(x, prepend=x[:, :1]),
        lambda x, ids: (y := torch.cat([x[:, :1], x], -1))[:, 1:] - y[:, :-1],
    ),
    "sum above zero": (lambda x, ids: (ids == 1).sum(-1) > 0, lambda x, ids: (ids == 1).any(-1)),
    "sum of numbers not zero": (lambda x, ids: (ids == 1).float().sum(1) != 0, lambda x, ids: (ids == 1).any(1)),
    "sum as a mask": (lambda x, ids: (ids == 1).sum(-1).bool(), lambda x, ids: (ids == 1).any(-1)),
    "largest": (lambda x, ids: (ids == 1).max(dim=-1).values, lambda x, ids: (ids == 1).any(-1)),
    "largest of all": (lambda x, ids: (ids == 1).amax(-1, keepdim=True), lambda x, ids: (ids == 1).any(-1, True)),
    "filled where not": (
        lambda x, ids: x[:, :2].masked_fill(ids != 1, 0),
        lambda x, ids: torch.where(ids == 1, x[:, :2], 0),
    ),
    "zero where not": (
        lambda x, ids: torch.where(ids != 1, 0.0, x[:, :2]),
        lambda x, ids: torch.where(ids == 1, x[:, :2], 0),
    ),
    "selected rows": (
        lambda x, ids: x.masked_select((ids == 1).any(-1, keepdim=True)).view(-1, 3),
        lambda x, ids: x[(ids == 1).any(-1)],
    ),
    "selected elements": (
        lambda x, ids: x.masked_select((ids[:, :1] == 1).expand_as(x)).view(-1, 3),
        lambda x, ids: x[ids[:, 0] == 1],
    ),
    "mask squeezed": (lambda x, ids: (ids[:, :1] == 1).squeeze(1), lambda x, ids: ids[:, 0] == 1),
    "mask by its only slot": (lambda x, ids: (ids[:, :1] == 1)[:, 0], lambda x, ids: ids[:, 0] == 1),
    "mask by any slot of one": (lambda x, ids: (ids[:, :1] == 1).any(-1), lambda x, ids: ids[:, 0] == 1),
    "mask of a one-hot column": (
        lambda x, ids: F.one_hot(ids, 3)[:, :, 1].bool(),
        lambda x, ids: ids == 1,
    ),
    "column of chosen rows": (
        lambda x, ids: x[ids[:, 0] == 1][:, 2],
        lambda x, ids: x[:, 2][ids[:, 0] == 1],
    ),
    "turned masks": (
        lambda x, ids: (((ids + 1).t() == 1) * x[:, :2].sin().t()).sum(0),
        lambda x, ids: (((ids + 1) == 1) * x[:, :2].sin()).sum(1),
    ),
    "any of turned ids": (lambda x, ids: ((ids + 1).t() == 1).any(0), lambda x, ids: ((ids + 1) == 1).any(1)),
    "row of turned weights": (lambda x, ids: x.sin().t()[2], lambda x, ids: x.sin()[:, 2]),
    "element of turned weights": (
        lambda x, ids: x.sin().t()[ids[:, 0], ids[:, 1]],
        lambda x, ids: x.sin()[ids[:, 1], ids[:, 0]],
    ),
    "product with a vector": (
        lambda x, ids: x.mv(x[0]),
        lambda x, ids: F.linear(x, x[0].unsqueeze(0)).squeeze(-1),
    ),
    "one of expanded copies": (lambda x, ids: x.unsqueeze(0).expand(4, -1, -1)[2].sin(), lambda x, ids: x.sin()),
    "masks added up": (
        lambda x, ids: (F.one_hot(ids[:, 0], 3) + F.one_hot(ids[:, 1], 3)).bool(),
        lambda x, ids: F.one_hot(torch.stack([ids[:, 0], ids[:, 1]], -1), 3).any(-2),
    ),
    "some places of zeros": (
        lambda x, ids: torch.zeros(5, 4, 3).select_scatter(x, 1, 2).select_scatter(x.sin(), 1, 0),
        lambda x, ids: torch.stack([x.sin(), (zeros := torch.zeros(5, 4, 3))[:, 1], x, zeros[:, 3]], 1),
    ),
    "truncated division of places": (
        lambda x, ids: torch.div(torch.where(ids.view(-1) == 1)[0], 2, rounding_mode="trunc"),
        lambda x, ids: torch.where(ids.view(-1) == 1)[0] // 2,
    ),
    "rows written by places": (
        lambda x, ids: torch.zeros_like(x).index_put((torch.where(ids[:, 0] == 1)[0],), x[ids[:, 0] == 1].sin()),
        lambda x, ids: torch.zeros_like(x).index_put((ids[:, 0] == 1,), x[ids[:, 0] == 1].sin()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_two_ways_to_write_it_are_one_graph(name):
    one, other = SAME[name]
    assert rewritten(one, *given()) == rewritten(other, *given())


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x, ids: ids.sum(-1) > 0, "aten::sum"),
        (lambda x, ids: (ids == 1).sum(-1) > 1, "aten::sum"),
        (lambda x, ids: (ids == 1).sum() > 0, "aten::sum"),
        (lambda x, ids: x.max(dim=-1).values, "aten::max"),
        (lambda x, ids: x[:, :2].masked_fill(ids != 1, 1), "aten::masked_fill"),
        (lambda x, ids: x[:, :1].masked_fill(ids != 1, 0), "aten::masked_fill"),
        (lambda x, ids: torch.div(ids - 2, 2, rounding_mode="trunc"), "aten::div"),
        (lambda x, ids: torch.diff(x > 0), "aten::diff"),
        (lambda x, ids: x.masked_select((ids == 1).any(-1, keepdim=True)).view(3, -1), "aten::masked_select"),
        (lambda x, ids: (ids == 1)[:, 0], "aten::select"),
        (lambda x, ids: (ids == 1).any(-1), "aten::any"),
        (lambda x, ids: (x[:, :1] == 1).squeeze(1), "aten::squeeze"),
        (lambda x, ids: F.one_hot(ids, 3)[:, 1].bool(), "aten::one_hot"),
        (lambda x, ids: x[None].expand(4, -1, -1)[:, 2], "aten::select"),
        (lambda x, ids: F.one_hot(ids[:, 0], 3) + F.one_hot(ids[:, 1], 3).bool(), "aten::add"),
        (lambda x, ids: (x.sin().t() * x.cos().t()).exp(), "aten::transpose"),
        (lambda x, ids: x.t()[1].sin(), "aten::transpose"),
        (lambda x, ids: torch.ones(6, 4, 3).select_scatter(x, 1, 2).select_scatter(x, 1, 0), "aten::select_scatter"),
    ],
    ids=["numbers", "above one", "of all dimensions", "of numbers", "not with zero", "made wider", "may be negative",
         "of truth values", "columns", "one of several slots", "any of several slots", "of scores",
         "one-hot rows of a slot", "a place of every copy", "one of them a mask", "turned numbers",
         "a turned input", "places of ones"],
)  # fmt: skip
def test_what_says_something_else_stays(function, kept):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1], [2, 1], [1, 0], [0, 2], [0, 0], [2, 0]])
    assert kept in rewritten(function, x, ids)


def differs_before_ids_change(x, ids):
    different = ids != 1
    ids.add_(1)
    return x[:, :2].masked_fill(different, 0)


def selected_before_rows_change(x, ids):
    selected = x.masked_select((ids == 1).any(-1, keepdim=True))
    x.mul_(2)
    return selected.view(-1, 3)


def compared_before_ids_change(x, ids):
    same = ids[:, :1] == 1
    ids.add_(1)
    return same.squeeze(1)


def chosen_before_rows_change(x, ids):
    rows = x[ids[:, 0] == 1]
    x.mul_(2)
    return rows[:, 2]


def counted_before_the_mask_changes(x, ids):
    mask = (x > 0)[:, :2]
    counts = mask.sum(-1)
    mask[0].logical_not_()
    other = mask.t()
    mask.logical_and_(ids > 0)
    return counts.bool(), other


def read_before_slots_are_repeated(x, ids):
    place = torch.where(ids.view(-1) == 1)[0]
    x.mul_(2)
    return torch.zeros(10, 3).index_put((place,), x[place // 2].sin())


@pytest.mark.parametrize(
    "function",
    [differs_before_ids_change, selected_before_rows_change, read_before_slots_are_repeated,
     compared_before_ids_change, chosen_before_rows_change,
     lambda x, ids: counted_before_the_mask_changes(x, ids)[0]],
    ids=["differs", "selected", "repeated", "compared", "chosen", "counted"],
)  # fmt: skip
def test_what_is_read_later_than_it_was_has_not_changed_since(function):
    rewritten(function, *given())  # which compares the numbers
