"""EXPORTED -> NORMAL: functional, one spelling per meaning."""

import copy

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from moe_fx.passes.normalize import (
    drop_no_ops,
    functionalize,
    merge_equal_values,
    spell,
    spell_choices_in_turn,
    spell_dropped_rows,
    spell_whole_rows,
    synonyms,
)
from moe_fx.passes.normalize.spelling import leftover

import moe_fx
from moe_fx.matcher import op_name
from moe_fx.printer import format_graph
from moe_fx.rewrite import drop_dead_code, erase_dead


def exported(function, *args):
    class Model(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    return torch.export.export(Model(), args)


def normal(program):
    module = torch.fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    written = functionalize(module.graph)
    spell(module.graph)
    spell_whole_rows(module.graph, written)
    drop_no_ops(module.graph, written)
    module.graph.lint()
    return module, written


def without_assertions(module):
    """The graph, without what torch.export asserts about counts."""
    asserted = ("ge(", "le(", "eq(", "add(", "sub(", "aten.sym_", "aten._assert")
    lines = format_graph(module).splitlines(True)
    return "".join(line for line in lines if not any(f"= {call}" in line for call in asserted))


def test_spelling_before_and_after():
    def function(x, w):
        a = x.view(2, 12).to(torch.float32).reshape(2, 3, 4)
        b = torch.div(a.permute(0, 2, 1), 2.0, rounding_mode="floor")
        left, right = b.chunk(2, dim=-2)
        return torch.mm(left.reshape(-1, 3), w.t()) + right.flatten()[0]

    module, written = normal(exported(function, torch.randn(2, 3, 4), torch.randn(5, 3)))
    assert written == set()
    assert_expected_inline(
        format_graph(module),
        """\
args_0: f32[2, 3, 4]
args_1: f32[5, 3]
transpose: f32[2, 4, 3] = aten.transpose(args_0, 1, 2)
floor_divide: f32[2, 4, 3] = aten.floor_divide(transpose, 2.0)
split_with_sizes = aten.split_with_sizes(floor_divide, [2, 2], -2)
getitem: f32[2, 2, 3] = getitem(split_with_sizes, 0)
getitem_1: f32[2, 2, 3] = getitem(split_with_sizes, 1)
reshape: f32[4, 3] = aten.reshape(getitem, [-1, 3])
transpose_1: f32[3, 5] = aten.transpose(args_1, -2, -1)
linear: f32[4, 5] = aten.linear(reshape, args_1)
reshape_1: f32[12] = aten.reshape(getitem_1, [-1])
select: f32[] = aten.select(reshape_1, 0, 0)
add: f32[4, 5] = aten.add(linear, select)
return (add,)
""",
    )


def test_decomposed_graph_has_the_same_spelling_of_linear_and_softmax():
    def function(x, w, b):
        return torch.nn.functional.linear(x, w, b).softmax(-1)

    args = torch.randn(2, 3), torch.randn(5, 3), torch.randn(5)
    module, _ = normal(exported(function, *args).run_decompositions())
    names = [node.target._schema.name for node in module.graph.nodes if node.op == "call_function"]
    assert names[-2:] == ["aten::linear", "aten::softmax"]


def test_what_several_ops_say_together_is_one_op():
    def function(x, a, b, c):
        inner, outer = torch.stack([a, b, c], 1), torch.stack([a, b, c], -1)
        kept = (x > 0).to(torch.int64).to(torch.bool)
        return x[:, 1:2].squeeze(1) + 1, inner + 1, outer + 1, kept.logical_not()

    program = exported(function, *torch.randn(4, 2, 3)).run_decompositions()
    names = [node.target._schema.name for node in program.graph.nodes if "aten" in str(node.target)]
    assert "aten::stack" not in names
    module, _ = normal(program)
    drop_dead_code(module.graph)
    assert_expected_inline(
        format_graph(module),
        """\
args_0: f32[2, 3]
args_1: f32[2, 3]
args_2: f32[2, 3]
args_3: f32[2, 3]
stack: f32[2, 3, 3] = aten.stack([args_1, args_2, args_3], 1)
stack_1: f32[2, 3, 3] = aten.stack([args_1, args_2, args_3], 2)
gt: bool[2, 3] = aten.gt(args_0, 0)
select: f32[2] = aten.select(args_0, 1, 1)
add: f32[2] = aten.add(select, 1)
add_1: f32[2, 3, 3] = aten.add(stack, 1)
add_2: f32[2, 3, 3] = aten.add(stack_1, 1)
logical_not: bool[2, 3] = aten.logical_not(gt)
return (add, add_1, add_2, logical_not)
""",
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([x, x + 1], 1).view(2, 3, 2),  # cut elsewhere than they were joined
        lambda x: torch.cat([x, x[:, :1]], 1).view(2, 4, 1),  # of different sizes
        lambda x: torch.cat([x, (x + 1).double()], 1).view(2, 2, 3),  # of different dtypes
        lambda x: torch.cat([x.unsqueeze(1), x.unsqueeze(2).transpose(1, 2)], 1),  # another way to three dimensions
        lambda x: x[:, -4:1].squeeze(1),  # what lies before the first place is none to select
        lambda x: x.to(torch.int64).to(torch.bool).logical_not(),  # a half is no mask
    ],
)
def test_what_only_looks_like_one_op_stays(function):
    x = torch.randn(2, 3)
    module, _ = normal(exported(function, x))
    names = {str(node.target) for node in module.graph.nodes}
    assert not names & {"aten.stack.default", "aten.select.int"}
    torch.testing.assert_close(module(x)[0], function(x), rtol=0, atol=0)


def test_joined_tensors_that_are_written_in_place_stay_joined():
    def function(x):
        joined = torch.cat([x, x + 1])
        pair = joined.view(2, 3)
        joined.add_(1)
        return pair * 2

    assert not in_place(function, torch.randn(3))


def test_a_spelling_is_found_behind_a_no_op():
    program = exported(lambda x, w: torch.mm(x, w.t().to(torch.float32)), torch.randn(2, 3), torch.randn(5, 3))
    assert moe_fx.explain(program).layers == ()  # the stage's verifier looks at every call


def in_place(function, *args):
    """Whether all writes became functional; the numbers must be the same either way."""
    module, written = normal(exported(function, *args))
    expected = function(*(arg.clone() for arg in args))
    torch.testing.assert_close(module(*(arg.clone() for arg in args))[0], expected, rtol=0, atol=0)
    mutable = [n for n in module.graph.nodes if n.op == "call_function" and "_." in str(n.target)]
    assert bool(mutable) == bool(written)
    return not written


def test_write_to_a_fresh_value_becomes_functional():
    assert in_place(lambda x: (x + 1).mul_(2).clamp_(0, 1), torch.randn(3))


def test_later_readers_see_the_written_value():
    def function(x):
        y = x + 1
        y.add_(1)
        return y * 2

    assert in_place(function, torch.randn(3))


def test_write_to_a_part_is_seen_by_later_readers_of_the_whole():
    def function(x):
        y = x + 1
        y[0].add_(1)
        y[:, 1:].clamp_(max=0.5)
        y[1].index_put_([torch.zeros(1, dtype=torch.long)], x[0, :1])
        return y * 2

    assert in_place(function, torch.randn(3, 2))


def test_write_to_a_part_of_a_part_stays():
    def function(x):
        y = x + 1
        y[0][1:].add_(1)
        return y * 2

    assert not in_place(function, torch.randn(3, 2))


def test_write_to_a_part_that_is_read_later_stays():
    def function(x):
        y = x + 1
        row = y[0]
        row.add_(1)
        return y * 2, row

    module, written = normal(exported(function, torch.randn(3, 2)))
    assert written
    x = torch.randn(3, 2)
    torch.testing.assert_close(module(x), function(x), rtol=0, atol=0)


def test_write_to_a_part_by_what_it_returns_stays():
    def function(x):
        y = x + 1
        row = y[0].add_(1)
        y[0].mul_(3)
        return row * y

    assert not in_place(function, torch.randn(3, 2))


def test_write_to_a_part_whose_whole_is_viewed_later_stays():
    def function(x):
        y = x + 1
        turned = y.t()
        y[0].add_(1)
        return turned * 2

    assert not in_place(function, torch.randn(3, 2))


def test_write_through_a_view_whose_base_is_read_later_stays():
    def function(x):
        y = x + 1
        y.t().add_(1)
        return y * 2

    assert not in_place(function, torch.randn(3, 2))


def test_write_to_a_base_whose_view_is_read_later_stays():
    def function(x):
        y = x + 1
        row = y[0]
        y.add_(1)
        return row * 2

    assert not in_place(function, torch.randn(3, 2))


def test_write_to_an_input_stays():
    def function(x):
        x.add_(1)
        return x * 2

    assert not in_place(function, torch.randn(3))


def test_write_that_keeps_a_narrower_dtype_is_computed_in_the_wider_one():
    assert in_place(lambda x, y: (x + 1).mul_(y).add_(y), torch.randn(64).bfloat16(), torch.randn(64))
    module, _ = normal(exported(lambda x, y: (x + 1).mul_(y), torch.randn(3).bfloat16(), torch.randn(3)))
    assert_expected_inline(
        format_graph(module.graph),
        """\
args_0: bf16[3]
args_1: f32[3]
add: bf16[3] = aten.add(args_0, 1)
mul: f32[3] = aten.mul(add, args_1)
to: bf16[3] = aten.to(mul, bf16)
return (to,)
""",
    )


def test_write_that_keeps_a_whole_number_stays():
    assert not in_place(lambda x, y: (x * 2).add_(y), torch.randn(3), torch.arange(3))


def test_casts_that_change_something_are_kept():
    module, _ = normal(exported(lambda x: x.to(torch.float64).to(torch.float64) + 1, torch.randn(3)))
    casts = [node for node in module.graph.nodes if "aten.to" in str(node.target)]
    assert len(casts) == 1


def merged(function, *args):
    """How many calls are left; the last argument is the model's own."""
    module, written = normal(exported(function, *args))
    merge_equal_values(module.graph, written, module.graph.find_nodes(op="placeholder")[-1:])
    torch.testing.assert_close(module(*(arg.clone() for arg in args))[0], function(*(arg.clone() for arg in args)))
    return sum(node.op == "call_function" for node in module.graph.nodes)


def test_what_is_computed_of_a_weight_twice_is_computed_once():
    def function(x, weight):
        return x * (1.0 + weight).double() + (1.0 + weight).double()

    assert merged(function, torch.randn(3), torch.randn(3)) == 4


def test_equal_casts_are_one():
    assert merged(lambda x, weight: x.double() * weight + x.double(), torch.randn(3), torch.randn(3)) == 3


def test_what_is_computed_of_an_input_twice_stays():
    def function(x, weight):
        return weight * (1.0 + x).double() + (1.0 + x).double()

    assert merged(function, torch.randn(3), torch.randn(3)) == 6


def test_zeros_of_two_signs_stay_two():
    def function(x, weight):
        return torch.copysign(x, weight * 0.0) + torch.copysign(x, weight * -0.0)

    assert merged(function, torch.randn(3), torch.randn(3)) == 5


def test_a_comparison_before_a_write_and_one_after_it_stay_two():
    def function(x, count):
        before = count == 1
        count.add_(1)
        return x * before + (count == 1)

    assert merged(function, torch.ones(3), torch.ones(3)) == 5


def test_flatten_of_a_batch_of_any_size_is_a_reshape():
    batch = torch.export.Dim("batch", min=2)

    class Model(torch.nn.Module):
        def forward(self, x):
            return x.flatten(0, 1)

    module, _ = normal(torch.export.export(Model(), (torch.randn(3, 4, 5),), dynamic_shapes=({0: batch},)))
    (call,) = [node for node in module.graph.nodes if op_name(node) == "aten::reshape"]
    assert call.args[1] == [-1, 5]


def dropped(function, *args):
    module, _ = normal(exported(function, *args))
    spell_dropped_rows(module.graph, set())
    assert not any(leftover(node) for node in module.graph.nodes)
    for found, wanted in zip(module(*args), function(*args), strict=True):
        assert torch.equal(found, wanted)
    return any(op_name(node) == "aten::one_hot" for node in module.graph.nodes)


def test_a_one_hot_mask_with_rows_dropped_is_that_of_ids_that_name_no_expert():
    ids, kept = torch.tensor([[0, 2], [1, 1], [3, 0]]), torch.rand(3, 2, 4) < 0.5
    assert not dropped(lambda ids, kept: torch.where(F.one_hot(ids, 4) * kept), ids, kept)
    for rows in (-1, 6):
        assert not dropped(lambda ids, kept, n=rows: torch.where((kept * F.one_hot(ids, 4)).view(n, 4).t()), ids, kept)


def test_who_reads_a_mask_with_rows_dropped_for_more_than_its_places_reads_it_as_it_was():
    def function(ids, kept):
        mask = F.one_hot(ids, 4) * kept
        return *torch.where(mask.bool()), mask.argmax(-1)

    assert dropped(function, torch.tensor([0, 2, 1]), torch.rand(3, 4) < 0.5)


def test_a_one_hot_mask_that_is_weighted_or_of_which_no_places_are_taken_stays():
    ids, numbers = torch.tensor([0, 2, 1]), torch.rand(3, 4)
    assert dropped(lambda ids, numbers: torch.where(F.one_hot(ids, 4) * numbers), ids, numbers)
    assert dropped(lambda ids, numbers: [F.one_hot(ids, 4) * (numbers > 0.5)], ids, numbers)


def names(function, *args):
    module, _ = normal(exported(function, *args))
    return [node.target._schema.name for node in module.graph.nodes if "aten" in str(node.target)]


def test_columns_of_nonzero_are_the_places_of_its_mask():
    mask = torch.tensor([[True, False], [True, True]])
    for columns in (lambda m: m.nonzero().unbind(1), lambda m: m.nonzero().T.unbind(0)):
        assert "aten::where" in names(lambda m, columns=columns: [each + 1 for each in columns(m)], mask)


def test_columns_that_share_their_memory_with_a_list_read_elsewhere_stay():
    def function(mask):
        listed = mask.nonzero()
        row, column = listed.unbind(1)
        return row + 1, column + 1, listed

    assert "aten::unbind" in names(function, torch.tensor([[True, False], [True, True]]))


def test_rows_scattered_by_a_wide_mask_are_rows_put_where_the_mask_is_true():
    def function(x, mask):
        return torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), x[mask] * 2)

    assert "aten::index_put" in names(function, torch.randn(3, 2), torch.tensor([True, False, True]))


def test_rows_scattered_that_may_be_more_than_the_mask_takes_stay():
    def function(x, mask, other):
        return torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), x[other] * 2)

    mask = torch.tensor([True, False, True])
    assert "aten::masked_scatter" in names(function, torch.randn(3, 2), mask, ~mask)


def test_rows_scattered_by_a_mask_of_features_stay():
    def function(x, mask):
        return torch.zeros_like(x).masked_scatter(mask, x[mask])

    assert "aten::masked_scatter" in names(function, torch.randn(2, 2), torch.tensor([True, False]))


def test_a_single_row_put_in_a_single_place_keeps_its_dimension():
    def inverse(order):
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return back

    module, _ = normal(exported(inverse, torch.tensor([0])))
    (put,) = [node for node in module.graph.nodes if op_name(node) == "aten::index_put"]
    assert op_name(put.args[2]) == "aten::arange"


@pytest.mark.parametrize(
    ("written", "equation", "shapes"),
    [
        ("... h, e i h -> ... e i", "ABh,eih->ABei", [(2, 5, 4), (3, 6, 4)]),
        ("...h,...hi->...i", "Bh,ABhi->ABi", [(5, 4), (2, 5, 4, 6)]),
        ("...h,hA->...A", "Bh,hA->BA", [(5, 4), (4, 3)]),
        ("th,hi", "th,hi->it", [(5, 4), (4, 3)]),
        ("b...,Z...->...", "bA,ZA->A", [(2, 5), (3, 5)]),
        ("z...h,hB", "zAh,hB->ABz", [(2, 3, 5), (5, 4)]),
        ("...h->...", "Ah->A", [(5, 4)]),
    ],
)
def test_equations_name_every_dimension(written, equation, shapes):
    operands = [torch.randn(shape) for shape in shapes]
    module, _ = normal(exported(lambda *operands: torch.einsum(written, *operands), *operands))
    (einsum,) = [node for node in module.graph.nodes if op_name(node) == "aten::einsum"]
    assert einsum.args[0] == equation
    torch.testing.assert_close(module(*operands)[0], torch.einsum(written, *operands))


def test_a_number_in_place_of_some_ids_is_written_as_one():
    def given(fill, dtype):
        return lambda mask, ids: torch.where(mask, ids.to(dtype), torch.scalar_tensor(fill, dtype=dtype))

    mask, ids = torch.tensor([True, False]), torch.tensor([2, 1])
    module, _ = normal(exported(given(7, torch.int64), mask, ids))
    assert torch.ops.aten.where.ScalarOther in [node.target for node in module.graph.nodes]
    assert module(mask, ids)[0].tolist() == [2, 7]
    # Rows that give way to zero, and a single id that is made as many as there are of the mask, stay as they are.
    for function in (
        given(0.0, torch.float32),
        lambda mask, ids: torch.where(mask, ids[0], torch.scalar_tensor(7, dtype=torch.int64)),
    ):
        module, _ = normal(exported(function, mask, ids))
        assert torch.ops.aten.where.self in [node.target for node in module.graph.nodes]


def test_a_scatter_that_sums_is_scatter_add():
    def scattered(reduce, include_self):
        index = torch.tensor([0, 0, 1])
        return names(
            lambda x: torch.ones(2).scatter_reduce(0, index, x, reduce, include_self=include_self), torch.randn(3)
        )

    assert "aten::scatter_add" in scattered("sum", True)
    assert "aten::scatter_reduce" in scattered("sum", False)
    assert "aten::scatter_reduce" in scattered("mean", True)


#: by function of x [6, 4] and mask [6, 4], the op that it becomes
SYNONYMS = {
    "multiply": (lambda x, m: torch.multiply(x, x), "aten::mul"),
    "multiply in place": (lambda x, m: (x + 1).multiply_(x), "aten::mul"),
    "subtract": (lambda x, m: torch.subtract(x, 2), "aten::sub"),
    "divide": (lambda x, m: torch.divide(x, 3.0), "aten::div"),
    "divide down": (lambda x, m: torch.divide(x, x, rounding_mode="floor"), "aten::floor_divide"),
    "true_divide": (lambda x, m: torch.true_divide(x, x + 9), "aten::div"),
    "clip": (lambda x, m: x.clip(max=0.5), "aten::clamp"),
    "greater": (lambda x, m: torch.greater(x, 0), "aten::gt"),
    "not_equal": (lambda x, m: torch.not_equal(x, x.abs()), "aten::ne"),
    "concat": (lambda x, m: torch.concat([x, x], dim=-1), "aten::cat"),
    "hstack": (lambda x, m: torch.hstack([x, x + 1]), "aten::cat"),
    "hstack of lines": (lambda x, m: torch.hstack([x[0], x[1]]), "aten::cat"),
    "vstack": (lambda x, m: torch.vstack([x, x + 1]), "aten::cat"),
    "column_stack": (lambda x, m: torch.column_stack([x, x + 1]), "aten::cat"),
    "swapaxes": (lambda x, m: x.swapaxes(0, 1) + 1, "aten::transpose"),
    "adjoint": (lambda x, m: x.adjoint() + 1, "aten::transpose"),
    "movedim": (lambda x, m: torch.movedim(x, 0, -1) + 1, "aten::transpose"),
    "movedim over two": (lambda x, m: torch.movedim(x.view(2, 3, 4), 0, 2) + 1, "aten::permute"),
    "ravel": (lambda x, m: x.ravel() + 1, "aten::reshape"),
    "view_as": (lambda x, m: x.view_as(m.view(3, 8)) + 1, "aten::reshape"),
    "expand_as": (lambda x, m: x[:, :1].expand_as(m) + 1, "aten::expand"),
    "expand_as with more dimensions": (lambda x, m: x[0].expand_as(m) + 1, "aten::expand"),
    "tile": (lambda x, m: x.tile(2, 3), "aten::repeat"),
    "narrow": (lambda x, m: x.narrow(0, 1, 3) + 1, "aten::slice"),
    "inner": (lambda x, m: torch.inner(x, x[:3]), "aten::linear"),
    "linalg.matmul": (lambda x, m: torch.linalg.matmul(x, x.reshape(4, 6)), "aten::matmul"),
    "special.softmax": (lambda x, m: torch.special.softmax(x, -1), "aten::softmax"),
    "special.expit": (lambda x, m: torch.special.expit(x), "aten::sigmoid"),
    "argwhere": (lambda x, m: torch.argwhere(m), "aten::nonzero"),
    "masked_select": (lambda x, m: x.masked_select(m), "aten::index"),
}


@pytest.mark.parametrize("name", SYNONYMS)
def test_another_name_of_an_op_becomes_the_op(name):
    function, becomes = SYNONYMS[name]
    x = torch.randn(6, 4)
    module, _ = normal(exported(function, x, x > 0))
    names = [op_name(node) for node in module.graph.nodes]
    assert becomes in names
    assert not set(names) & set(synonyms.RULES)
    for mask in (x > 0, x < 0.3):
        torch.testing.assert_close(module(x, mask)[0], function(x, mask), rtol=0, atol=0)


def one_hot_rows(ids):
    return F.one_hot(ids, 4).float()


def compared_rows(ids):
    return (ids.unsqueeze(-1) == torch.arange(4)).float()


def whole_rows(ids):
    return F.one_hot(ids, 4)


@pytest.mark.parametrize("rows", [one_hot_rows, compared_rows, whole_rows])
def test_a_table_added_up_choice_by_choice_is_that_of_stacked_ids(rows):
    def function(best, second, weights):
        return weights[:, :1] * rows(best) + weights[:, 1:] * rows(second)

    generator = torch.Generator().manual_seed(0)
    best, second = torch.randint(0, 4, (2, 5), generator=generator)
    weights = torch.rand(5, 2, generator=generator)
    module, written = normal(exported(function, best, second, weights))
    spell_choices_in_turn(module.graph, written)
    module.recompile()
    assert [op_name(node) for node in module.graph.nodes].count("aten::stack") == 2
    assert torch.equal(module(best, second, weights)[0], function(best, second, weights))
    if rows is compared_rows:  # of which an id that is no class is no error
        assert torch.equal(module(best + 1, second - 1, weights)[0], function(best + 1, second - 1, weights))


def test_a_table_of_wider_masks_than_weights_stays_a_sum():
    def function(best, second, weights):
        return weights[:, :1] * one_hot_rows(best).double() + weights[:, 1:] * one_hot_rows(second).double()

    module, written = normal(exported(function, torch.tensor([0, 2]), torch.tensor([1, 3]), torch.rand(2, 2)))
    spell_choices_in_turn(module.graph, written)
    assert all(op_name(node) != "aten::stack" for node in module.graph.nodes)


def test_what_a_deep_program_reads_is_not_dead():
    graph = torch.fx.Graph()
    first = last = graph.call_function(torch.ops.aten.neg.default, (graph.placeholder("x"),))
    for _ in range(3000):
        last = graph.call_function(torch.ops.aten.neg.default, (last,))
    graph.output(last)
    erase_dead(graph, [first])
    assert len(graph.nodes) == 3003
