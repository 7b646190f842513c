"""EXPORTED -> NORMAL: convolutions of single places as products of channels."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from moe_fx.passes.normalize.pointwise_convs import spell_pointwise_convs
from styles.base import STYLES
from styles.other_ops import Groups
from test_normalize import exported, without_assertions
from torch import nn

import moe_fx
from moe_fx.matcher import op_name

CONVOLUTIONS = ("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution")


def rewritten(program):
    spell_pointwise_convs(program.graph, ())
    program.graph.lint()
    program.graph_module.recompile()
    return program.graph_module


def convolutions(graph):
    return sum(op_name(node) in CONVOLUTIONS for node in graph.nodes)


def given(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def of_rows(conv):
    """The rows that a mask is true for, as a batch of single places."""
    return lambda x, w, b: conv(x[x[:, 0] > 0].unsqueeze(-1), w, b).squeeze(-1)


def by_group(conv, groups=4):
    """Groups of which the best two are added."""

    def function(x, w, b, scores):
        best = torch.zeros_like(scores).scatter(0, scores.topk(2).indices, 1.0)
        y = conv(x, w, b, groups=groups).unflatten(-w.dim() + 1, (groups, -1))
        return (y * best.view(-1, *[1] * (w.dim() - 1))).sum(-w.dim())

    return function


def test_rows_of_an_expert_before_and_after():
    module = rewritten(exported(of_rows(F.conv1d), *given((5, 6), (8, 6, 1), (8,))))
    assert_expected_inline(
        without_assertions(module),
        """\
args_0: f32[5, 6]
args_1: f32[8, 6, 1]
args_2: f32[8]
select: f32[5] = aten.select(args_0, 1, 0)
gt: bool[5] = aten.gt(select, 0)
index: f32[s0, 6] = aten.index(args_0, [gt])
unsqueeze: f32[s0, 6, 1] = aten.unsqueeze(index, -1)
reshape: f32[8, 6] = aten.reshape(args_1, [8, 6])
permute: f32[s0, 1, 6] = aten.permute(unsqueeze, [0, 2, 1])
linear: f32[s0, 1, 8] = aten.linear(permute, reshape, args_2)
permute_1: f32[s0, 8, 1] = aten.permute(linear, [0, 2, 1])
squeeze: f32[s0, 8] = aten.squeeze(permute_1, -1)
return (squeeze,)
""",
    )


def test_groups_before_and_after():
    module = rewritten(exported(by_group(F.conv1d), *given((2, 12, 5), (8, 3, 1), (8,), (4,))))
    assert_expected_inline(
        without_assertions(module),
        """\
args_0: f32[2, 12, 5]
args_1: f32[8, 3, 1]
args_2: f32[8]
args_3: f32[4]
zeros_like: f32[4] = aten.zeros_like(args_3)
topk = aten.topk(args_3, 2)
getitem: f32[2] = getitem(topk, 0)
getitem_1: i64[2] = getitem(topk, 1)
scatter: f32[4] = aten.scatter(zeros_like, 0, getitem_1, 1.0)
reshape: f32[2, 4, 3, 5] = aten.reshape(args_0, [2, 4, 3, 5])
reshape_1: f32[4, 2, 3] = aten.reshape(args_1, [4, 2, 3])
einsum: f32[2, 4, 2, 5] = aten.einsum('ngcx,goc->ngox', [reshape, reshape_1])
reshape_2: f32[4, 2] = aten.reshape(args_2, [4, 2])
unsqueeze: f32[4, 2, 1] = aten.unsqueeze(reshape_2, -1)
add: f32[2, 4, 2, 5] = aten.add(einsum, unsqueeze)
reshape_3: f32[2, 8, 5] = aten.reshape(add, [2, 8, 5])
unflatten: f32[2, 4, 2, 5] = aten.unflatten(reshape_3, -2, [4, -1])
view: f32[4, 1, 1] = aten.view(scatter, [-1, 1, 1])
mul: f32[2, 4, 2, 5] = aten.mul(unflatten, view)
permute: f32[2, 4, 5, 2] = aten.permute(mul, [0, 1, 3, 2])
sum: f32[2, 5, 2] = aten.sum(permute, [1], dtype=None)
permute_1: f32[2, 2, 5] = aten.permute(sum, [0, 2, 1])
return (permute_1,)
""",
    )


SAME = {
    "rows": (of_rows(F.conv1d), (5, 6), (8, 6, 1), (8,)),
    "rows as images": (lambda x, w, b: F.conv2d(x[x[:, 0] > 0][:, :, None, None], w, b), (5, 6), (8, 6, 1, 1), (8,)),
    "rows as volumes": (
        lambda x, w, b: F.conv3d(x[x[:, 0] > 0][:, :, None, None, None], w, b), (5, 6), (8, 6, 1, 1, 1), (8,),
    ),
    "rows as a sequence": (lambda x, w, b: F.conv1d(x[x[:, 0] > 0].t()[None], w, b), (5, 6), (8, 6, 1), (8,)),
    "rows without a batch": (lambda x, w, b: F.conv1d(x[x[:, 0] > 0].t(), w, b), (5, 6), (8, 6, 1), (8,)),
    "rows without a bias": (lambda x, w: F.conv1d(x[x[:, 0] > 0].t(), w), (5, 6), (8, 6, 1)),
    "one channel": (lambda x, w: F.conv1d(x[x[:, 0] > 0].t()[:1], w), (5, 6), (1, 1, 1)),
    "groups": (by_group(F.conv1d), (2, 12, 5), (8, 3, 1), (8,), (4,)),
    "groups without a batch": (by_group(F.conv1d), (12, 5), (8, 3, 1), (8,), (4,)),
    "groups of images": (by_group(F.conv2d), (2, 12, 5, 3), (8, 3, 1, 1), (8,), (4,)),
    "groups of images without a bias": (
        lambda x, w, scores: by_group(F.conv2d)(x, w, None, scores), (2, 12, 5, 3), (8, 3, 1, 1), (4,),
    ),
    "groups of one channel": (by_group(F.conv1d), (2, 4, 5), (4, 1, 1), (4,), (4,)),
}  # fmt: skip


#: of as many places as there are rows, which torch.export of 2.11 cannot trace
OF_PLACES = ("rows as a sequence", "rows without a batch", "rows without a bias", "one channel")


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_the_product_is_the_convolution(name, decomposed):
    if name in OF_PLACES and torch.__version__ < "2.13":
        pytest.skip("torch.export of 2.13 or later")
    function, *shapes = SAME[name]
    args = given(*shapes)
    program = exported(function, *args)
    module = rewritten(program.run_decompositions() if decomposed else program)
    assert convolutions(module.graph) == 0
    torch.testing.assert_close(module(*args)[0], function(*args), rtol=1e-5, atol=1e-5)


def beside_a_choice(conv):
    """Something is chosen from four, by which no group is weighed."""
    return lambda x, w, b: (conv(x, w, b), x.flatten()[:4].topk(2).indices)


OTHERS = {
    "all places": (beside_a_choice(F.conv1d), (2, 6, 5), (8, 6, 1), (8,)),
    "as many groups as nothing is chosen from": (
        beside_a_choice(lambda x, w, b: F.conv1d(x, w, b, groups=3)), (2, 6, 5), (9, 2, 1), (9,),
    ),
    "groups where nothing is chosen": (
        lambda x, w, b: F.conv1d(x, w, b, groups=4), (2, 12, 5), (8, 3, 1), (8,),
    ),
    "neighbours": (by_group(F.conv1d), (2, 12, 5), (8, 3, 3), (8,), (4,)),
    "neighbours in one direction": (by_group(F.conv2d), (2, 12, 5, 3), (8, 3, 1, 3), (8,), (4,)),
    "every second place": (
        by_group(lambda *args, groups: F.conv1d(*args, groups=groups, stride=2)), (2, 12, 5), (8, 3, 1), (8,), (4,),
    ),
    "zeros around": (
        by_group(lambda *args, groups: F.conv1d(*args, groups=groups, padding=1)), (2, 12, 5), (8, 3, 1), (8,), (4,),
    ),
    "transposed": (
        by_group(lambda *args, groups: F.conv_transpose1d(*args, groups=groups)), (2, 12, 5), (12, 2, 1), (8,), (4,),
    ),
    "rows of neighbours": (
        lambda x, w, b: F.conv1d(x[x[:, 0] > 0].unsqueeze(-1).repeat(1, 1, 3), w, b), (5, 6), (8, 6, 2), (8,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_other_convolutions_stay(name, decomposed):
    function, *shapes = OTHERS[name]
    program = exported(function, *given(*shapes))
    program = program.run_decompositions() if decomposed else program
    before = [node.format_node() for node in program.graph.nodes]
    rewritten(program)
    assert [node.format_node() for node in program.graph.nodes] == before


@torch.no_grad()
def test_what_is_summed_over_channels_stays():
    def function(x, w, scores):
        y = F.conv1d(x, w, groups=4).unflatten(1, (4, -1))
        return (y * scores.topk(4).values.view(4, 1, 1)).sum(2)

    args = given((2, 12, 5), (8, 3, 1), (4,))
    module = rewritten(exported(function, *args))
    assert [op_name(node) for node in module.graph.nodes].count("aten::permute") == 0
    torch.testing.assert_close(module(*args)[0], function(*args), rtol=1e-5, atol=1e-5)


class Beside(nn.Module):
    """Convolutions of another part of a model, and a layer."""

    def __init__(self):
        super().__init__()
        self.before, self.layer = nn.Conv1d(16, 16, 1), STYLES["modulelist_conv2d_index_add"].build()
        self.shuffled = nn.Conv1d(16, 16, 1, groups=8)

    def forward(self, x):
        y = self.shuffled(F.gelu(self.before(x.t()[None])))[0].t()
        return self.layer(y)


@torch.no_grad()
def test_convolutions_beside_a_layer_stay():
    x, model = torch.randn(6, 16), Beside().eval()
    after = moe_fx.transform(torch.export.export(model, (x,)), moe_fx.Config(require="all"))
    assert convolutions(after.graph) == 2
    torch.testing.assert_close(after.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["modulelist_conv2d_index_add", "grouped_conv1d_times_table"])
@torch.no_grad()
def test_the_layer_that_was_found_is_the_equation(style):
    torch.manual_seed(0)
    model = STYLES[style].build().eval()
    (x,) = given(STYLES[style].shape)
    after = moe_fx.transform(torch.export.export(model, (x,)), moe_fx.Config(require="all"))
    torch.testing.assert_close(after.module()(x), model.plain(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_convolution_of_all_groups_without_a_choice_has_no_layer():
    class Weighed(Groups):
        def table(self, x):
            return self.router.linear(x).softmax(-1)

    (x,) = given((2, 5, 16))
    program = torch.export.export(Weighed().eval(), (x,))
    assert moe_fx.transform(program).graph_module.code == program.graph_module.code


class Joined(Groups):
    """The tokens are joined once for each group, along the channels of all groups."""

    def groups(self, x):
        return self.down(F.relu6(self.up(torch.cat([x.transpose(1, 2)] * self.E, 1))))


@torch.no_grad()
def test_what_is_joined_along_experts_and_features_at_once_is_no_row_of_an_expert():
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    program = torch.export.export(Joined().eval(), (torch.randn(2, 5, 16),), dynamic_shapes=(dynamic,))
    report = moe_fx.explain(program, moe_fx.Config(validate=False))
    assert report.layers == ()
    assert "experts stops at cat: wanted an op along other dimensions than the rows" in str(report.misses[0])
