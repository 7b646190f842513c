"""EXPORTED -> NORMAL: what decomposition tables alone write, and the sizes that they spell out."""

import pytest
import torch
from moe_fx.passes.normalize import spell_places_in_turn
from moe_fx.passes.normalize.copies import copied
from test_normalize import exported, normal
from toys import writes_parts

from moe_fx.matcher import op_name


def copies(function, *args):
    """How many copies are left of a program in core ATen, whose results stay what they were."""
    module, _ = normal(exported(function, *args).run_decompositions())
    for found, wanted in zip(module(*args), function(*args), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    return sum(op_name(node) == "aten::copy" for node in module.graph.nodes)


def part_after_part(x, count, other=lambda rows: rows, out=torch.zeros_like):
    many = count.item()
    out = out(x)
    out[:many] = other(x[:many] * 2)
    out[many:] = x[many:] * 3
    return (out.relu(),)


COUNT = torch.tensor(2)


def test_rows_copied_over_a_part_of_known_length_are_the_part():
    def function(x, y):
        out = torch.zeros_like(x)
        out[1:3], out[:, 2] = y, y[0, 0]
        return (out.relu(),)

    assert copies(function, torch.randn(5, 4), torch.randn(2, 4)) == 1  # one number for a whole column


@writes_parts
def test_rows_copied_over_a_part_from_where_they_were_cut_are_the_part():
    assert copies(part_after_part, torch.randn(5, 4), COUNT) == 0


@writes_parts
def test_rows_copied_over_a_part_of_another_dtype_stay_copied():
    def function(x, count):
        return part_after_part(x, count, out=lambda x: torch.zeros(5, 4, dtype=torch.float64))

    assert copies(function, torch.randn(5, 4), COUNT) == 2


@writes_parts
@pytest.mark.parametrize("other", [lambda rows: rows.sum(0, keepdim=True), lambda rows: rows[0]])
def test_a_row_copied_over_a_part_is_expanded_to_it(other):
    assert copies(lambda x, count: part_after_part(x, count, other), torch.randn(5, 4), COUNT) == 0


def copied_over(cut, rows=lambda rows: rows, written=""):
    """Whether ``x[:n]``, copied over a part of other values, is taken for the copy."""

    def function(x, count):
        return rows(x[: count.item()] * 2), cut(torch.zeros(6, 4), count.item()) * 1

    graph = exported(function, torch.randn(6, 4), COUNT).graph
    new, old = next(iter(reversed(graph.nodes))).args[0]
    with graph.inserting_after(new):
        copy = graph.call_function(torch.ops.aten.copy.default, (old.args[0], new))
    copy.meta["val"] = old.meta["val"]
    return copied(copy, {"copy": {copy}, "new": {new}}.get(written, set())) is new


def test_a_part_is_as_long_as_another_if_both_are_cut_alike():
    assert copied_over(lambda out, count: out[:count])
    assert not copied_over(lambda out, count: out[:count], written="copy")
    assert not copied_over(lambda out, count: out[:count], written="new")
    others = (
        lambda out, count: out[count:],
        lambda out, count: out[1:count],
        lambda out, count: out[: count + 1],
        lambda out, count: out[:count:2],
        lambda out, count: out[:3][:count],
        lambda out, count: torch.zeros(4, 6)[:, :count].t(),
        lambda out, count: out.double()[:count],
    )
    assert not any(copied_over(other) for other in others)
    assert not copied_over(lambda out, count: out[:count], lambda rows: rows.sum(0, keepdim=True))
    assert not copied_over(lambda out, count: out[:count], lambda rows: rows.sum(0))


SHAPES = {(24,): [-1], (24, 1): [-1, 1], (1, 24, 1): [1, -1, 1], (6, 4): [6, 4], (6, 1, 4): [6, 1, 4]}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_only_wide_dimension_of_a_reshape_is_left_open(shape):
    module, _ = normal(exported(lambda x: x.reshape(shape).relu(), torch.randn(2, 3, 4)))
    (call,) = [node for node in module.graph.nodes if op_name(node) == "aten::reshape"]
    assert call.args[1] == SHAPES[shape]


@pytest.mark.parametrize("x", [torch.randn(1, 1), torch.randn(0, 3)])
def test_a_reshape_of_one_element_or_none_stays_of_its_shape(x):
    shape = [1, 1, 1] if len(x) else [0, 1]
    module, _ = normal(exported(lambda x: x.reshape(shape).relu(), x))
    (value,) = module(x)
    assert list(value.shape) == shape


def stacks(function, *args):
    """How many stacks there are, undecomposed and decomposed, of a program that stays what it was."""
    found = []
    for program in (exported(function, *args), exported(function, *args).run_decompositions()):
        module, written = normal(program)
        spell_places_in_turn(module.graph, written)
        module.graph.lint()
        for result, wanted in zip(module(*args), function(*args), strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0)
        found.append(sum(op_name(node) == "aten::stack" for node in module.graph.nodes))
    return tuple(found)


def written_along(dim, places, dtype=torch.float32, between=lambda out: out):
    def function(x, y, z):
        out = torch.full([3, 2, 4] if dim else [3, 3, 2], 0.5, dtype=dtype)
        for place, rows in zip(places, (x, y, z, x + z), strict=False):
            if dim:
                out[..., place] = rows
            else:
                out[place] = rows
            out = between(out)
        return (out.relu(),)

    return function


X, Y, Z = torch.randn(3, 3, 2).unbind(0)


@pytest.mark.parametrize("dim", [0, -1])
def test_places_that_are_all_written_in_turn_are_stacked(dim):
    last = (3,) if dim else ()
    assert stacks(written_along(dim, (1, 0, 2, *last)), X, Y, Z) == (1, 1)
    if not dim:
        assert stacks(written_along(dim, (2, 0, 2, 1)), X, Y, Z) == (1, 1)  # of two writes to a place, the last counts
    assert stacks(written_along(dim, (1, 0, -1, *last)), X, Y, Z) == ((1, 1) if dim == 0 else (0, 0))


@pytest.mark.parametrize("change", [dict(places=(0, 2, 0)), dict(places=(0, 1, 2), between=lambda out: out + 1)])
def test_places_of_which_one_is_left_or_changed_after_it_was_written_are_not_stacked(change):
    assert stacks(written_along(0, **change), X, Y, Z) == (0, 0)


def test_places_written_in_turn_are_stacked_whoever_asks_where_they_hold_something():
    def function(x, y):
        out = torch.zeros(2, 3, 2)
        out[0], out[1] = x.relu(), y
        return torch.where(out)

    assert stacks(function, X, Y) == (1, 1)


def test_places_that_are_cast_are_stacked():
    assert stacks(written_along(0, (0, 1, 2), dtype=torch.float64), X, Y, Z) == (1, 1)


def test_places_that_are_written_to_again_in_between_are_not_stacked():
    graph = torch.fx.Graph()
    base, x, y = (graph.placeholder(name) for name in ("base", "x", "y"))
    first = graph.call_function(torch.ops.aten.select_scatter.default, (base, x, 0, 0))
    last = graph.call_function(torch.ops.aten.select_scatter.default, (first, y, 0, 1))
    graph.output((last,))
    mode = torch._subclasses.FakeTensorMode()
    for node, shape in {base: (2, 3), x: (3,), y: (3,), first: (2, 3), last: (2, 3)}.items():
        node.meta["val"] = mode.from_tensor(torch.empty(shape))
    for written in ({first}, {x}, {last}):
        spell_places_in_turn(graph, written)
        assert last.users
    spell_places_in_turn(graph, set())
    assert not any(node.target is last.target for node in graph.nodes)
