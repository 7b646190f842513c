"""EXPORTED -> NORMAL: rows moved element by element are moved as rows, where all their elements are."""

import pytest
import torch
from expecttest import assert_expected_inline
from test_normalize import exported, normal

from moe_fx.matcher import op_name
from moe_fx.printer import format_graph

MOVES = ("aten::gather", "aten::scatter", "aten::scatter_add", "aten::scatter_reduce")


def rewritten(function, *args):
    module, _ = normal(exported(function, *args))
    module.recompile()
    torch.testing.assert_close(module(*args)[0], function(*args), rtol=0, atol=0)
    return module


def moves(module):
    return sum(op_name(node) in MOVES for node in module.graph.nodes)


def given():
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(5, (7,), generator=generator)
    return torch.randn(5, 3, generator=generator), torch.randn(7, 3, generator=generator), places


def test_rows_gathered_and_added_before_and_after():
    def function(x, rows, places):
        wide = places[:, None].expand(-1, 3)
        return x.scatter_add(0, wide, x.gather(0, wide) * rows)

    assert_expected_inline(
        format_graph(rewritten(function, *given())),
        """\
args_0: f32[5, 3]
args_1: f32[7, 3]
args_2: i64[7]
index: f32[7, 3] = aten.index(args_0, [args_2])
mul: f32[7, 3] = aten.mul(index, args_1)
index_put: f32[5, 3] = aten.index_put(args_0, [args_2], mul, True)
return (index_put,)
""",
    )


SAME = {
    "a column that is reshaped": lambda x, rows, at: x.gather(0, at.reshape(-1, 1).expand(-1, 3)),
    "places in two dimensions": lambda x, rows, at: x.gather(0, torch.stack([at, at]).reshape(-1, 1).expand(-1, 3)),
    "places that are repeated": lambda x, rows, at: x.gather(-2, at.unsqueeze(-1).repeat(1, 3)),
    "places expanded as the rows are": lambda x, rows, at: x.scatter_add(0, at[:, None].expand_as(rows), rows),
    "rows put": lambda x, rows, at: torch.zeros_like(rows).scatter(0, at.argsort()[:, None].expand(-1, 3), rows),
}


@pytest.mark.parametrize("name", SAME)
def test_whole_rows_are_moved_as_rows(name):
    assert moves(rewritten(SAME[name], *given())) == 0


KEPT = {
    "fewer features than x has, read": lambda x, rows, at: x.gather(0, at[:, None].expand(-1, 2)),
    "fewer features than the rows have, added": lambda x, rows, at: x.scatter_add(0, at[:, None].expand(-1, 2), rows),
    "fewer features than the rows have, put": lambda x, rows, at: x.scatter(0, at[:5, None].expand(-1, 2), rows),
    "fewer places than rows": lambda x, rows, at: x.scatter_add(0, at[:4, None].expand(-1, 3), rows),
    "one place for all rows": lambda x, rows, at: x.scatter_add(0, at[:1, None].expand(7, 3), rows),
    "what is added to is wider": lambda x, rows, at: torch.cat([x, x], 1).scatter_add(
        0, at[:, None].expand(-1, 3), rows
    ),
    "along the features": lambda x, rows, at: x.t().gather(1, at[:, None].expand(-1, 3).t()),
    "a number is put": lambda x, rows, at: x.scatter(0, at[:, None].expand(-1, 3), 2.0),
    "the largest is kept": lambda x, rows, at: x.scatter_reduce(0, at[:, None].expand(-1, 3), rows, "amax"),
    "places of each element": lambda x, rows, at: x.gather(0, torch.stack([at, at % 2, at // 2], 1)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_moves_other_than_whole_rows_is_kept(name):
    assert moves(rewritten(KEPT[name], *given())) == 1
