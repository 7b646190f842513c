"""EXPORTED -> NORMAL: columns of masks, numbers of rows, and wide linears whose units are weighted, in one spelling."""

import pytest
import torch
import torch.nn.functional as F
from test_normalize_otherwise import given, rewritten


def chosen(ids, value=True):
    return torch.zeros(5, 3, dtype=torch.bool).scatter(-1, ids, value)


SAME = {
    "places of a one-hot column": (
        lambda x, ids: torch.where(F.one_hot(ids, 3)[..., 1])[0],
        lambda x, ids: torch.where(ids == 1)[0],
    ),
    "places of a one-hot column above zero": (
        lambda x, ids: (F.one_hot(ids, 3)[:, :, 1] > 0).nonzero(),
        lambda x, ids: (ids == 1).nonzero(),
    ),
    "weights of a one-hot column": (
        lambda x, ids: x[:, :2] * F.one_hot(ids, 3)[..., 1],
        lambda x, ids: x[:, :2] * (ids == 1).to(torch.int64),
    ),
    "tokens of a one-hot column": (
        lambda x, ids: F.one_hot(ids, 3)[..., 1].sum(-1).nonzero(),
        lambda x, ids: (ids == 1).any(-1).nonzero(),
    ),
    "column of a scattered mask": (
        lambda x, ids: chosen(ids)[:, 2],
        lambda x, ids: (ids == 2).any(-1),
    ),
    "numbers of rows that a mask chooses": (
        lambda x, ids: torch.arange(5).masked_select(ids[:, 0] == 1) + 1,
        lambda x, ids: torch.where(ids[:, 0] == 1)[0] + 1,
    ),
    "units times repeated weights": (
        lambda x, ids: x.repeat(1, 4).sin() * x.cos().repeat_interleave(4, dim=-1),
        lambda x, ids: (x.repeat(1, 4).sin().view(5, 3, 4) * x.cos().unsqueeze(-1)).reshape(5, 12),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_two_ways_to_write_it_are_one_graph(name):
    one, other = SAME[name]
    assert rewritten(one, *given()) == rewritten(other, *given())


KEPT = {
    "a row of one-hot rows": (lambda x, ids: F.one_hot(ids, 3)[1].nonzero(), "one_hot"),
    "a column that is not chosen": (lambda x, ids: chosen(ids, False)[:, 2] & (ids[:, 0] > 0), "scatter"),
    "a column of what was true before": (
        lambda x, ids: (x > 0).scatter(-1, ids, True)[:, 2].float(), "scatter"
    ),
    "numbers of other rows": (lambda x, ids: torch.arange(1, 6).masked_select(ids[:, 0] == 1) + 1, "arange"),
    "units times weights one after the other": (lambda x, ids: x.repeat(1, 4).sin() * x.cos().repeat(1, 4), "repeat"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_what_says_something_else_stays(name):
    function, kept = KEPT[name]
    assert f"aten::{kept}" in rewritten(function, *given())
