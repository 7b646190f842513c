"""The pattern language, word by word."""

import operator

import pytest
import torch
from moe_fx.passes.normalize import spell

from moe_fx.matcher import Match, Miss, match, op_name
from moe_fx.pattern import ACC, ANY, As, AtLeast, Fold, Last, OneOfValues, Var, aten, either, item, optional

A, B, C = Var("a"), Var("b"), Var("c")


def root(function, *shapes):
    """The last op of a function's exported graph."""

    class Model(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    program = torch.export.export(Model(), tuple(torch.randn(shape) for shape in shapes))
    spell(program.graph)
    return program.graph.output_node().args[0][0]


def test_a_name_is_the_same_value_everywhere():
    assert match(aten.sub(A, A), root(lambda x: x - x, (2,)))
    miss = match(aten.sub(A, A), root(lambda x, y: x - y, (2,), (2,)))
    assert isinstance(miss, Miss)
    assert miss.wanted.startswith("a = ")


def test_rank_is_part_of_a_capture():
    node = root(lambda x: x.relu(), (2, 3))
    assert match(aten.relu(Var("x", rank=2)), node)
    assert match(aten.relu(Var("x", rank=3)), node).wanted == "x of rank 3"


def test_commutative_ops_fit_both_ways_round_and_others_do_not():
    pattern = aten.add(aten.relu(A), B)
    assert match(pattern, root(lambda x, y: y + x.relu(), (2,), (2,)))
    assert not match(aten.sub(aten.relu(A), B), root(lambda x, y: y - x.relu(), (2,), (2,)))


def test_an_argument_not_mentioned_has_its_default():
    node = root(lambda x: x.sort(descending=True)[0], (3,))
    miss = match(item(aten.sort(A), 0), node)
    assert miss.wanted == "aten::sort with descending=False"
    assert match(item(aten.sort(A, descending=True), 0), node)
    assert match(item(aten.sort(A, descending=ANY), 0), node)


def test_a_choice_that_fails_later_comes_back_to_the_next():
    # The first alternative binds a to x.relu(), and only the second lets the whole pattern hold.
    pattern = aten.add(either(A, aten.relu(A)), aten.neg(A))
    found = match(pattern, root(lambda x: x.relu() + x.neg(), (2,)))
    assert isinstance(found, Match)
    assert found["a"].op == "placeholder"


def test_optional_op():
    pattern = aten.neg(optional(aten.relu, A))
    assert match(pattern, root(lambda x: x.relu().neg(), (2,)))["a"].op == "placeholder"
    assert match(pattern, root(lambda x: x.neg(), (2,)))["a"].op == "placeholder"


def test_dimensions_are_counted_from_either_end():
    for dim in (1, -1):
        assert match(aten.unsqueeze(A, Last(-1)), root(lambda x, d=dim: x[0].unsqueeze(d), (2, 2))) is not None
        assert match(aten.softmax(A, Last(-1)), root(lambda x, d=dim: x.softmax(d), (2, 3)))
    assert not match(aten.softmax(A, Last(-1)), root(lambda x: x.softmax(0), (2, 3)))


def test_literals():
    node = root(lambda x: x.sum([1]), (2, 3))
    assert match(aten.sum(A, [1]), node)
    assert match(aten.sum(A, [AtLeast(1)]), node)
    assert match(aten.sum(A, [OneOfValues(0, 1)]), node)
    assert not match(aten.sum(A, [0]), node)
    assert not match(aten.sum(A, [1], True), node)
    assert not match(aten.sum(A, [1], 0), node)  # False is not 0


def test_a_named_pattern_is_the_same_node_everywhere():
    pattern = aten.sub(As("r", aten.relu(A)), As("r", aten.relu(A)))

    def shared(x):
        y = x.relu()
        return y - y

    assert match(pattern, root(shared, (2,)))["r"].name == "relu"
    assert not match(pattern, root(lambda x: x.relu() - x.relu(), (2,)))


def test_a_miss_is_the_deepest_place_reached():
    miss = match(aten.neg(aten.relu(aten.sigmoid(A))), root(lambda x: x.tanh().relu().neg(), (2,)))
    assert (miss.wanted, miss.found, miss.node.name) == ("aten::sigmoid", "tanh (aten::tanh)", "tanh")


def test_a_miss_names_what_a_list_may_hold_by_its_ops():
    miss = match(aten.index(A, [either(aten.relu(A), aten.neg(A)), B]), root(lambda x: x[x > 0], (2,)))
    assert miss.wanted == "[aten::relu or aten::neg, b]"


def test_an_op_that_is_given_its_result_is_another_op():
    node = root(lambda x: torch.mm(x, x, out=torch.zeros(2, 2)), (2, 2))
    assert op_name(node) == "aten::mm.out"
    assert not match(aten.mm(A, A), node)


OTHERWISE = {
    "aten::add.alpha": lambda x: torch.add(x, x.cos(), alpha=2),
    "aten::sub.alpha": lambda x: torch.sub(x, x.cos(), alpha=0.5),
    "aten::scatter.reduce": lambda x: x.scatter(0, torch.zeros(1, dtype=torch.int64), 2.0, reduce="add"),
    "aten::add": lambda x: torch.add(x, x.cos(), alpha=1),
    "aten::scatter": lambda x: x.scatter(0, torch.zeros(1, dtype=torch.int64), 2.0),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_an_op_that_an_argument_makes_another_has_another_name(name):
    assert op_name(root(OTHERWISE[name], (2,))) == name


def test_names_bound_before_hold():
    node = root(lambda x, y: x.relu() + y, (2,), (2,))
    x = node.args[0].args[0]
    assert match(aten.add(aten.relu(A), B), node, {"a": x})
    assert not match(aten.add(aten.relu(A), B), node, {"b": x})


# Fold: a loop over experts, unrolled by the export

STEP = aten.add(
    ACC,
    aten.mul(
        aten.linear(Var("x"), aten.select(Var("weights"), 0, Var("expert"))),
        aten.slice(Var("gates"), 1, Var("expert"), ANY),
    ),
)
LOOP = Fold(STEP, aten.zeros_like(Var("x")), each=("expert",))


def loop(num_experts, skipped=None, stranger=None):
    def run(x, gates, weights, other):
        total = torch.zeros_like(x)
        for expert in range(num_experts):
            if expert != skipped:
                rows = other if expert == stranger else x
                total = total + torch.nn.functional.linear(rows, weights[expert]) * gates[:, expert : expert + 1]
        return total

    return root(run, (5, 3), (5, num_experts + 1), (num_experts, 3, 3), (5, 3))


@pytest.mark.parametrize("num_experts", [1, 4, 17])
def test_fold_collects_the_expert_of_each_step_whatever_their_number(num_experts):
    found = match(LOOP, loop(num_experts))
    assert found["expert"] == tuple(range(num_experts))
    assert found["count"] == num_experts
    assert found["weights"].name == "args_2"


def test_fold_tells_which_experts_were_visited():
    assert match(LOOP, loop(4, skipped=3))["expert"] == (0, 1, 2)


def test_fold_refuses_a_step_that_reads_something_else():
    miss = match(LOOP, loop(4, stranger=1))
    assert isinstance(miss, Miss)
    assert "args_3" in miss.found or "args_0" in miss.found


def test_getitem_is_not_an_op_call():
    node = root(lambda x: x.topk(2)[1], (4,))
    assert node.target is operator.getitem
    assert not match(aten.topk(A, 2), node)
    assert match(item(aten.topk(A, Var("k")), 1), node)["k"] == 2
