"""EXPORTED -> NORMAL: classes of one-hot rows, tables and columns that were turned around."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from moe_fx.passes.normalize import normalize
from test_normalize import exported
from test_normalize_otherwise import given, rewritten

import moe_fx
from moe_fx.pipeline import Work
from moe_fx.printer import format_graph
from moe_fx.program import ExportedWork
from moe_fx.rewrite import drop_dead_code


def written_at(x, mask, by_mask=False):
    places = torch.where(mask)
    return x.new_zeros(5, 2, 3).index_put([mask] if by_mask else places, x[places[0]])


SAME = {
    "a class behind a cast of turned rows": (
        lambda x, ids: torch.where(F.one_hot(ids, 4).permute(2, 0, 1).bool()[1])[0],
        lambda x, ids: torch.where(ids == 1)[0],
    ),
    "slots before tokens": (
        lambda x, ids: F.one_hot(ids, 4).permute(2, 1, 0).bool()[1],
        lambda x, ids: (ids == 1).t(),
    ),
    "a class before one that is cut away": (
        lambda x, ids: F.one_hot(ids, 5)[..., :4].permute(2, 0, 1)[3].float(),
        lambda x, ids: (ids == 3).to(torch.int64).float(),
    ),
    "a table by expert": (
        lambda x, ids: torch.zeros(3, 5).scatter(0, x.topk(2).indices.t(), x[:, :2].sin().t())[2],
        lambda x, ids: torch.full_like(torch.zeros(3, 5).t(), 0.0).scatter(1, x.topk(2).indices, x[:, :2].sin())[:, 2],
    ),
    "a column behind a dimension that was added": (
        lambda x, ids: x.sin().unsqueeze(1).unbind(-1)[2],
        lambda x, ids: x.sin().select(1, 2).unsqueeze(1),
    ),
    "rows written by a mask whose places are read": (
        lambda x, ids: written_at(x, ids == 1, by_mask=True),
        lambda x, ids: written_at(x, ids == 1),
    ),
    "rows by numbers": (
        lambda x, ids: torch.stack([x, x.sin(), x.cos()]).view(15, 3)[ids * 5 + torch.arange(5)[:, None]],
        lambda x, ids: torch.stack([x, x.sin(), x.cos()])[ids, torch.arange(5)[:, None]],
    ),
    "bags of as many rows": (
        lambda x, ids: F.embedding_bag(ids, x.sin(), per_sample_weights=x[:, :2].cos(), mode="sum"),
        lambda x, ids: (x.sin()[ids.reshape(-1)].view(-1, 2, 3) * x[:, :2].cos()[..., None]).sum(1),
    ),
    "a sum that is added to in a batched product": (
        lambda x, ids: torch.baddbmm(x[:, :, None], x[:, :, None], x[:, :1, None]),
        lambda x, ids: x[:, :, None] + torch.bmm(x[:, :, None], x[:, :1, None]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_two_ways_to_write_it_are_one_graph(name):
    one, other = SAME[name]
    assert rewritten(one, *given()) == rewritten(other, *given())


#: what is left of the calls that are not the same, and how often
OTHERS = {
    "classes from the second one on": (lambda x, ids: F.one_hot(ids, 5)[..., 1:].permute(2, 0, 1)[0], "one_hot", 1),
    "every second class": (lambda x, ids: F.one_hot(ids, 5)[..., :4:2].permute(2, 0, 1)[1], "one_hot", 1),
    "rows by token and class": (
        lambda x, ids: torch.stack([x, x.sin(), x.cos()], 1).view(15, 3)[torch.arange(5)[:, None] * 3 + ids], "mul", 1,
    ),
    "the last row left out": (
        lambda x, ids: F.embedding_bag(ids, x.sin(), mode="sum", padding_idx=-1), "embedding_bag", 1
    ),
    "the mean of bags": (lambda x, ids: F.embedding_bag(ids, x.sin(), mode="mean"), "embedding_bag", 1),
    "bags of which the last has fewer rows": (
        lambda x, ids: F.embedding_bag(ids.view(-1), x.sin(), torch.arange(0, 10, 3), mode="sum"), "embedding_bag", 1,
    ),
    "a table that is not of one value": (
        lambda x, ids: x.sin().t().scatter(0, x.topk(2).indices.t(), x[:, :2].sin().t()), "transpose", 3,
    ),
    "a row of what got a dimension": (lambda x, ids: x.sin().unsqueeze(1).unbind(1)[0], "unsqueeze", 1),
    "half of what a batched product is added to": (
        lambda x, ids: torch.baddbmm(x[:, :, None], x[:, :, None], x[:, :1, None], beta=0.5), "baddbmm", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_what_means_something_else_stays(name):
    made, op, times = OTHERS[name]
    assert rewritten(made, *given()).count(f"aten::{op}") == times


@torch.no_grad()
def test_a_class_that_is_read_behind_a_cut():
    def masks(x, ids):
        return F.one_hot(ids, 4)[..., :3].permute(2, 1, 0).bool()[1]

    work = Work(ExportedWork(exported(masks, *given())), moe_fx.Config())
    before = format_graph(work.program.graph)
    normalize(work)
    drop_dead_code(work.program.graph)
    assert_expected_inline(
        "before:\n" + before + "\nafter:\n" + format_graph(work.program.graph),
        """\
before:
args_1: i64[5, 2]
one_hot: i64[5, 2, 4] = aten.one_hot(args_1, 4)
slice: i64[5, 2, 3] = aten.slice(one_hot, 2, 0, 3)
permute: i64[3, 2, 5] = aten.permute(slice, [2, 1, 0])
_assert_tensor_metadata = aten._assert_tensor_metadata(permute, dtype=i64)
to: bool[3, 2, 5] = aten.to(permute, bool)
select: bool[2, 5] = aten.select(to, 0, 1)
return (select,)

after:
args_1: i64[5, 2]
eq: bool[5, 2] = aten.eq(args_1, 1)
transpose: bool[2, 5] = aten.transpose(eq, 0, 1)
return (transpose,)
""",
    )
