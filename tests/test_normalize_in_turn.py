"""EXPORTED -> NORMAL: dispatch added up choice by choice, as one sum over choices that are stacked."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from lookalikes_bins_in_turn import HalfTheTokens
from moe_fx.passes.normalize import spell_bins_in_turn
from test_normalize import exported, normal
from toys import Gathered

import moe_fx
from moe_fx.matcher import op_name
from moe_fx.outline import same_graph
from moe_fx.printer import format_graph

E, C = 3, 10


def hots(ids):
    return [F.one_hot(each, E) for each in ids]


def weighted(weights, hots, ranks):
    return sum(w[:, None, None] * hot[:, :, None] * F.one_hot(rank, C)[:, None]
               for w, hot, rank in zip(weights, hots, ranks, strict=True))  # fmt: skip


def two(first, second, weights):
    mask1, mask2 = hots((first, second))
    rank1 = ((mask1.cumsum(0) - 1) * mask1).sum(-1)
    rank2 = ((mask2.cumsum(0) - 1 + mask1.sum(0, keepdim=True)) * mask2).sum(-1)
    return weighted(weights.unbind(1), (mask1, mask2), (rank1, rank2))


def two_backwards(first, second, weights):
    return two(second, first, weights.flip(1))


def looked_up(first, second, weights):
    mask1, mask2 = hots((first, second))
    rank1 = mask1.cumsum(0).gather(1, first.unsqueeze(-1)).squeeze(-1) - 1
    rank2 = (mask1.sum(0, keepdim=True) + mask2.cumsum(0)).gather(1, second.unsqueeze(-1)).squeeze(-1) - 1
    return weighted(weights.unbind(1), (mask1, mask2), (rank1, rank2))


def largest(first, second, weights):
    mask1, mask2 = hots((first, second))
    rank1 = ((mask1.cumsum(0) - mask1) * mask1).amax(1)
    rank2 = ((mask2.cumsum(0) - (mask2 - mask1.sum(0, keepdim=True))) * mask2).amax(1)
    return weighted(weights.unbind(1), (mask1, mask2), (rank1, rank2))


def of_features(first, second, weights):
    """Of one-hot rows by comparison, which are transposed; what is shared is broadcast."""
    numbers, places = torch.arange(E), torch.arange(C)
    mask1, mask2 = ((each.unsqueeze(0) == numbers.unsqueeze(1)).long() for each in (first, second))
    rank1 = ((mask1.cumsum(-1) - 1) * mask1).sum(0)
    rank2 = ((mask2.cumsum(-1) + mask1.sum(-1, keepdim=True) - 1) * mask2).sum(0)

    def term(weight, mask, rank):
        gate = torch.einsum("s,es->es", weight, mask.float()) * numbers.unsqueeze(-1).float()
        place = (rank.unsqueeze(-1) == places).float()
        return torch.bmm(gate.t().reshape(-1, E, 1), place.unsqueeze(1)) * places.float()

    return term(weights[:, 0], mask1, rank1) + term(weights[:, 1], mask2, rank2)


def three(first, second, weights):
    masks = hots((first, second, (first + second) % E))
    before, ranks = 0, []
    for mask in masks:
        ranks.append(((mask.cumsum(0) + before - 1) * mask).sum(-1))
        before = before + mask.sum(0, keepdim=True)
    return weighted((weights[:, 0], weights[:, 1], weights[:, 0]), masks, ranks)


def of_columns(first, second, weights):
    ids = (first.unsqueeze(-1) + torch.arange(2)) % E
    return two(ids[:, 0], ids[:, 1], weights)


def of_columns_exchanged(first, second, weights):
    ids = (first.unsqueeze(-1) + torch.arange(2)) % E
    return two(ids[:, 1], ids[:, 0], weights)


def of_columns_of_three(first, second, weights):
    ids = (first.unsqueeze(-1) + torch.arange(3)) % E
    return two(ids[:, 0], ids[:, 1], weights)


def of_parts_of_a_batch(first, second, weights):
    ids = (first.view(2, 2, 1) + torch.arange(2)) % E
    return two(*(each.reshape(-1) for each in ids.chunk(2, dim=-1)), weights)


def of_rows(first, second, weights):
    ids = (first + torch.arange(2).unsqueeze(-1)) % E
    return two(ids[0], ids[1], weights)


def given(seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(0, E, (2, 4), generator=generator)
    return first, second, torch.rand(4, 2, generator=generator)


def test_bins_filled_choice_by_choice_before_and_after():
    module, written = normal(exported(two, *given()))
    spell_bins_in_turn(module.graph, written)
    assert_expected_inline(
        format_graph(module),
        """\
args_0: i64[4]
args_1: i64[4]
args_2: f32[4, 2]
unbind = aten.unbind(args_2, 1)
getitem: f32[4] = getitem(unbind, 0)
getitem_1: f32[4] = getitem(unbind, 1)
stack: f32[4, 2] = aten.stack([getitem, getitem_1], -1)
transpose: f32[2, 4] = aten.transpose(stack, 0, 1)
unsqueeze: f32[2, 4, 1] = aten.unsqueeze(transpose, -1)
unsqueeze_1: f32[2, 4, 1, 1] = aten.unsqueeze(unsqueeze, 3)
stack_1: i64[4, 2] = aten.stack([args_0, args_1], -1)
transpose_1: i64[2, 4] = aten.transpose(stack_1, 0, 1)
one_hot: i64[2, 4, 3] = aten.one_hot(transpose_1, 3)
unsqueeze_2: i64[2, 4, 3, 1] = aten.unsqueeze(one_hot, 3)
mul: f32[2, 4, 3, 1] = aten.mul(unsqueeze_1, unsqueeze_2)
reshape: i64[8, 3] = aten.reshape(one_hot, [8, 3])
cumsum: i64[8, 3] = aten.cumsum(reshape, 0)
reshape_1: i64[2, 4, 3] = aten.reshape(cumsum, [2, 4, 3])
add: i64[2, 4, 3] = aten.add(reshape_1, -1)
mul_1: i64[2, 4, 3] = aten.mul(add, one_hot)
sum: i64[2, 4] = aten.sum(mul_1, [2])
one_hot_1: i64[2, 4, 10] = aten.one_hot(sum, 10)
unsqueeze_3: i64[2, 4, 1, 10] = aten.unsqueeze(one_hot_1, 2)
mul_2: f32[2, 4, 3, 10] = aten.mul(mul, unsqueeze_3)
sum_1: f32[4, 3, 10] = aten.sum(mul_2, [0])
return (sum_1,)
""",
    )


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    "function",
    [two, two_backwards, looked_up, largest, of_features, three, of_columns, of_columns_exchanged, of_columns_of_three,
     of_parts_of_a_batch, of_rows],
)  # fmt: skip
def test_bins_filled_choice_by_choice_hold_the_same_values(function, decomposed):
    program = exported(function, *given())
    module, written = normal(program.run_decompositions() if decomposed else program)
    spell_bins_in_turn(module.graph, written)
    module.graph.lint()
    module.recompile()
    assert [op_name(node) for node in module.graph.nodes].count("aten::cumsum") == 1
    for seed in range(20):
        assert torch.equal(module(*given(seed))[0], function(*given(seed)))


def in_floats(first, second, weights):
    mask1, mask2 = (each.float() for each in hots((first, second)))
    rank1 = ((mask1.cumsum(0) - 1) * mask1).sum(-1).long()
    rank2 = ((mask2.cumsum(0) - 1 + mask1.sum(0, keepdim=True)) * mask2).sum(-1).long()
    return weighted(weights.unbind(1), (mask1, mask2), (rank1, rank2))


def each_for_itself(first, second, weights):
    masks = hots((first, second))
    return weighted(weights.unbind(1), masks, [((mask.cumsum(0) - 1) * mask).sum(-1) for mask in masks])


def with_a_number(first, second, weights):
    return two(first, second, weights) + 1


def of_other_dtypes(first, second, weights):
    return two(first, second, weights) + two(first, second, weights.double())


def of_whole_sums(first, second, weights):
    one, other = (weights[:, None] * each.cumsum(0)[:, None, None] for each in (first, second))
    return one * one.sum() + other * other.sum()


def of_parts(first, second, weights):
    best, others = (weights[:, None, :, None] * each.cumsum(0)[:, None, None, None] for each in (first, second))
    return best.max(dim=0).values.topk(1, dim=0).values + others.max(dim=0).values.topk(1, dim=0).values


def at_random(first, second, weights):
    one, other = (weights[:, None, :] * each.cumsum(0)[:, None, None] for each in (first, second))
    return torch.rand_like(one) * one + torch.rand_like(other) * other


def added_twice_as_much(first, second, weights):
    one, other = (weights[:, None, :] * each.cumsum(0)[:, None, None] for each in (first, second))
    return torch.add(one, other, alpha=2)


@pytest.mark.parametrize(
    "function",
    [in_floats, each_for_itself, with_a_number, of_other_dtypes, of_whole_sums, of_parts, at_random,
     added_twice_as_much],
)  # fmt: skip
def test_other_sums_stay_as_they_are(function):
    module, written = normal(exported(function, *given()))
    before, _ = normal(exported(function, *given()))
    spell_bins_in_turn(module.graph, written)
    assert same_graph(before.graph, module.graph)


def test_what_is_written_before_the_sum_is_not_read_again():
    def function(first, second, weights, scale):
        masks = hots((first, second))
        rank1 = ((masks[0].cumsum(0) - 1) * masks[0]).sum(-1)
        rank2 = ((masks[1].cumsum(0) - 1 + masks[0].sum(0, keepdim=True)) * masks[1]).sum(-1)
        rows = [mask[:, :, None] * F.one_hot(rank, C)[:, None]
                for mask, rank in zip(masks, (rank1, rank2), strict=True)]  # fmt: skip
        one, other = rows[0] * weights[:, :1, None] * scale, rows[1] * weights[:, 1:, None] * scale
        scale.zero_()
        return one + other

    scale = torch.rand(C)
    program = exported(function, *given(), scale)
    module, written = normal(program)
    assert written
    spell_bins_in_turn(module.graph, written)
    assert same_graph(normal(program)[0].graph, module.graph)
    # What nobody writes is read wherever it is wanted.
    spell_bins_in_turn(module.graph, set())
    assert not same_graph(normal(program)[0].graph, module.graph)


@torch.no_grad()
def test_bins_that_drop_tokens_drop_the_same_ones_beside_a_layer_that_is_raised():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = HalfTheTokens(), Gathered(hidden=16)

        def forward(self, x):
            return self.second(self.first(x))

    torch.manual_seed(0)
    model = Both().eval()
    after = moe_fx.transform(torch.export.export(model, (torch.randn(9, 16),)))
    report = moe_fx.report(after)
    assert len(report.layers) == 1
    assert "tokens can be dropped" in str(report.misses[0])
    for _ in range(5):
        x = torch.randn(9, 16)
        torch.testing.assert_close(after.module()(x), model(x))
