"""Every expert on every token: raised where what was not chosen certainly counts zero, and refused elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from test_raising import raised
from toys import Toy, interleaved_clamped_swiglu, relu_squared
from toys import export as export_toy

import moe_fx
from moe_fx.check_inputs import windows


def export(model, tokens=6, dynamic=True):
    """With any number of tokens; flattening a table makes a guard on it that a fixed range does not fit."""
    if not isinstance(model, BySigmoid) or not dynamic:
        return export_toy(model, tokens, dynamic)
    with torch.no_grad():
        return torch.export.export(
            model.eval(), (torch.randn(tokens, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
        )


class Dense(Toy):
    """Weights ``[E, N, K]``, a table of routing weights, all experts on all rows."""

    def table(self, x):
        ids, weights = self.route(x)
        return x.new_zeros(x.shape[0], self.E).scatter(1, ids, weights)

    def spread(self, x):
        return x.repeat(self.E, 1).view(self.E, -1, x.shape[-1])

    def columns(self, table):
        return table.transpose(0, 1).unsqueeze(-1)

    def apply(self, rows, weight):
        return torch.bmm(rows, weight if self.transposed else weight.transpose(1, 2))

    def forward(self, x):
        scores, rows = self.columns(self.table(x)), self.spread(x)
        if self.weight_before:
            rows = rows * scores
        h = self.apply(rows, self.up)
        h = self.activation(h + self.up_bias[:, None] if self.bias else h)
        y = self.apply(h, self.down)
        y = y + self.down_bias[:, None] if self.bias else y
        return (y if self.weight_before else y * scores).sum(0)


class BySigmoid(Dense):
    """Llama 4: sigmoid of -inf is what the others get; one flat batch of rows."""

    def table(self, x):
        scores, ids = F.linear(x, self.router).topk(self.K, dim=-1)
        table = torch.full((x.shape[0], self.E), float("-inf")).to(x.dtype).scatter_(1, ids, scores)
        return torch.sigmoid(table.float()).to(x.dtype)

    def forward(self, x):
        rows = x.repeat(self.E, 1) * self.table(x).transpose(0, 1).reshape(-1, 1)
        h = self.activation(torch.bmm(rows.view(self.E, -1, x.shape[-1]), self.up.mT))
        return torch.bmm(h, self.down.mT).view(-1, x.shape[-1]).reshape(self.E, -1, x.shape[-1]).sum(0)


class ByOneHot(Dense):
    def table(self, x):
        ids, weights = self.route(x)
        return (F.one_hot(ids, self.E).to(x.dtype) * weights.unsqueeze(-1)).sum(1)


class Expanded(Dense):
    def spread(self, x):
        return x.unsqueeze(0).expand(self.E, -1, -1)

    def apply(self, rows, weight):
        return rows @ weight.mT


VARIANTS = {
    "weight after": (Dense, {}),
    "weight before": (Dense, dict(weight_before=True)),
    "bias and weight after": (Dense, dict(bias=True)),
    "clamped interleaved swiglu": (Dense, dict(bias=True, activation=interleaved_clamped_swiglu)),
    "no gate": (Dense, dict(gated=False, activation=relu_squared, weight_before=True)),
    "transposed": (Dense, dict(transposed=True)),
    "one expert per token": (Dense, dict(top_k=1)),
    "sigmoid of -inf": (BySigmoid, {}),
    "one hot": (ByOneHot, {}),
    "expanded": (Expanded, dict(bias=True)),
}


@pytest.mark.parametrize("decomposed", [False, True], ids=["training IR", "core ATen"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_same_layer(variant, decomposed):
    toy, options = VARIANTS[variant]
    lowering = ("grouped_mm", "linear", "gather")[list(VARIANTS).index(variant) % 3]
    model = toy(**options).eval()
    program = export(model)
    if decomposed:
        program = program.run_decompositions()
    result = moe_fx.transform(program, moe_fx.Config(experts=lowering, require="all"))
    (layer,) = moe_fx.report(result).layers
    assert (layer.num_experts, layer.top_k) == (4, options.get("top_k", 2))
    for tokens in (6, 9):
        x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            actual, expected = result.module()(x), model(x)
        assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_static_token_counts_small_and_large():
    for tokens in (1, 6, 500):
        (layer,) = moe_fx.explain(export(Dense(), tokens=tokens, dynamic=False)).layers
        assert layer.error < 1e-9


def test_sigmoid_table_before_and_after():
    assert_expected_inline(
        raised(BySigmoid(activation=F.relu, gated=False), export),
        """\
p_router: f32[4, 8]
p_up: f32[4, 16, 8]
p_down: f32[4, 8, 16]
x: f32[s0, 8]
linear: f32[s0, 4] = aten.linear(x, p_router)
topk = aten.topk(linear, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
moe_body_0 = attribute
experts: f32[s0, 8] = experts(x, getitem_1, (getitem,), (p_up, p_down), (), moe_body_0)
return (experts,)
moe_body_0:
    x
    s0
    p0
    p1
    sigmoid = aten.sigmoid(s0)
    reshape = aten.reshape(sigmoid, [-1, 1])
    mul = aten.mul(x, reshape)
    linear = aten.linear(mul, p0)
    relu = aten.relu(linear)
    linear_1 = aten.linear(relu, p1)
    return linear_1
""",
    )


def refusal(model):
    result = moe_fx.explain(export(model))
    assert result.layers == ()
    (miss,) = result.misses
    return f"wanted {miss.wanted}, found {miss.found}"


def test_refuses_a_bias_behind_the_routing_weight():
    # What an expert adds to a row of zeros, it adds to every token.
    assert_expected_inline(
        refusal(Dense(bias=True, weight_before=True)),
        """wanted an expert's output that is zero wherever its routing weight is, found one that need not be""",
    )


def test_refuses_an_activation_that_is_not_zero_at_zero():
    assert_expected_inline(
        refusal(Dense(weight_before=True, gated=False, activation=torch.cos)),
        """wanted an expert's output that is zero wherever its routing weight is, found one that need not be""",
    )


def test_refuses_scores_that_are_small_but_not_zero():
    class Small(Dense):
        def table(self, x):
            ids, weights = self.route(x)
            return torch.full((x.shape[0], self.E), 1e-6).scatter(1, ids, weights)

    assert_expected_inline(
        refusal(Small()), """wanted a table that is zero for experts not chosen, found 9.999999974752427e-07 there"""
    )


class Softmax(Dense):
    """Scores of other experts are set to a low number, and their softmax is the table."""

    fill = -1e9

    def table(self, x):
        ids, weights = self.route(x)
        return torch.full((x.shape[0], self.E), self.fill).scatter(1, ids, weights).softmax(-1)


def test_refuses_a_softmax_of_scores_that_are_low_but_not_the_lowest():
    assert_expected_inline(
        refusal(Softmax()).replace(": ", ":\n"),
        """\
wanted minus infinity for experts not chosen, before a softmax:
others need not come out as zero, found -1e+09 there""",
    )


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
def test_a_softmax_of_what_is_lowest_for_all_others_is_zero_there(fill):
    model = Softmax()
    model.fill = fill
    (layer,) = moe_fx.explain(export(model)).layers
    assert layer.error is not None
    assert layer.error < 1e-12


def test_refuses_scores_that_are_zero_until_the_table_was_turned_around():
    class Turned(Dense):
        def columns(self, table):
            return table.transpose(0, 1).sigmoid().unsqueeze(-1)

    assert_expected_inline(refusal(Turned()), """wanted a table that is zero for experts not chosen, found 0.5 there""")


def test_a_table_times_itself_is_a_table():
    class Squared(Dense):
        def table(self, x):
            table = super().table(x)
            return table * table

    (layer,) = moe_fx.explain(export(Squared())).layers
    assert layer.error is not None
    assert layer.error < 1e-12


def test_scores_of_all_experts_are_no_near_miss():
    class Soft(Dense):
        def table(self, x):
            return F.linear(x, self.router).softmax(-1)

    result = moe_fx.explain(export(Soft()))
    assert (result.layers, result.misses) == ((), ())


def test_refuses_ids_that_may_repeat():
    class Given(Dense):
        def forward(self, x, ids, weights):
            self.given = ids, weights
            return super().forward(x)

        def route(self, x):
            return self.given

    args = (torch.randn(5, 8), torch.randint(4, (5, 2)), torch.rand(5, 2))
    with torch.no_grad():
        program = torch.export.export(Given().eval(), args)
    result = moe_fx.explain(program)
    assert result.layers == ()
    assert "ids, which may repeat" in result.misses[0].found


class Heads(torch.nn.Module):
    """A block-diagonal product summed over its blocks: no routing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return torch.bmm(x.unsqueeze(0).expand(4, -1, -1), self.weight).sum(0)


def test_a_sum_of_heads_is_left_alone():
    program = export(Heads())
    result = moe_fx.transform(program)
    assert moe_fx.report(result).layers == ()
    assert [node.name for node in result.graph.nodes] == [node.name for node in program.graph.nodes]


class Selected(Dense):
    """One expert per token, whose results ``torch.where`` takes."""

    steps = ((0, 0), (1, 1), (2, 2), (3, 3))

    def __init__(self):
        super().__init__(top_k=1)

    def ids(self, x):
        return F.linear(x, self.router).argmax(-1)

    def start(self, x):
        return torch.zeros_like(x)

    def forward(self, x):
        ids, y = self.ids(x), self.start(x)
        for number, e in self.steps:
            rows = F.linear(self.activation(F.linear(x, self.up[e])), self.down[e])
            y = torch.where((ids == number)[:, None], rows, y)
        return y


def test_rows_that_no_expert_takes():
    class FromTokens(Selected):
        def start(self, x):
            return x

    class OneMore(FromTokens):
        def ids(self, x):
            return F.linear(x, torch.cat([self.router, -self.router[:1]])).argmax(-1)

    (layer,) = moe_fx.explain(export(Selected())).layers
    assert layer.source_form == "selected_rows"
    assert len(moe_fx.explain(export(FromTokens())).layers) == 1
    result = moe_fx.explain(export(OneMore()))
    assert result.layers == ()
    assert [miss.wanted for miss in result.misses] == ["ids that certainly name an expert"]


def test_refuses_an_expert_that_is_selected_twice():
    class Twice(Selected):
        steps = ((0, 0), (1, 1), (2, 2), (2, 3))

    assert_expected_inline(refusal(Twice()), """wanted every expert of 4 once, found experts 0, 1, 2, 2""")


@pytest.mark.parametrize("size", [7, 11, 77])
def test_the_check_tells_experts_from_rows_of_any_size(size):
    node = torch.fx.Graph().placeholder("param")
    node.meta["val"] = torch.empty(4, 4, size, device="meta")
    param = windows(node, torch.Generator().manual_seed(0))
    assert not torch.equal(param, param.transpose(0, 1))
