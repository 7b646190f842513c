"""Products of three and more tensors: read two by two, and raised where they are a layer's."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from test_raising import raised
from toys import Toy, export

import moe_fx


class OneProduct(Toy):
    """Gate, last projection and the sum over the experts in one einsum."""

    equation = "te,tei,ehi->th"

    def table(self, x):
        ids, weights = self.route(x)
        return torch.einsum("tke,tk->te", F.one_hot(ids, self.E).to(x.dtype), weights)

    def hidden(self, x):
        return F.relu(torch.einsum("th,eih->tei", x, self.up))

    def operands(self, x):
        given = {"te": self.table(x), "tei": self.hidden(x), "ehi": self.down}
        return [given[letters] for letters in self.equation.split("->")[0].split(",")]

    def forward(self, x):
        return torch.einsum(self.equation, *self.operands(x))


class GateFirst(OneProduct):
    """The routing weight before the experts, and a sum over experts and features at once."""

    equation = "tei,ehi->th"

    def hidden(self, x):
        return F.relu(torch.einsum("te,th,eih->tei", self.table(x), x, self.up))


ORDERS = ("te,tei,ehi->th", "tei,ehi,te->th", "ehi,te,tei->th", "ehi,tei,te->th")


@pytest.mark.parametrize("equation", ORDERS)
@torch.no_grad()
def test_operands_stand_in_any_order(equation):
    model = OneProduct(gated=False).eval()
    model.equation = equation
    program = moe_fx.transform(export(model), moe_fx.Config(require="all"))
    for tokens in (6, 9):
        x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens))
        expected = model(x)
        assert (program.module()(x) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_experts_and_features_summed_at_once_before_and_after():
    assert_expected_inline(
        raised(GateFirst(gated=False)),
        """\
p_router: f32[4, 8]
p_up: f32[4, 16, 8]
p_down: f32[4, 8, 16]
x: f32[s0, 8]
linear: f32[s0, 4] = aten.linear(x, p_router)
softmax: f32[s0, 4] = aten.softmax(linear, -1)
topk = aten.topk(softmax, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
sum: f32[s0, 1] = aten.sum(getitem, [-1], True)
div: f32[s0, 2] = aten.div(getitem, sum)
moe_body_0 = attribute
experts: f32[s0, 8] = experts(x, getitem_1, (div,), (p_up, p_down), (), moe_body_0)
return (experts,)
moe_body_0:
    x
    s0
    p0
    p1
    reshape = aten.reshape(s0, [-1, 1])
    mul = aten.mul(reshape, x)
    linear = aten.linear(mul, p0)
    relu = aten.relu(linear)
    linear_1 = aten.linear(relu, p1)
    return linear_1
""",
    )


class TwoTables(OneProduct):
    """Hidden values are weighted by all scores: some are left for experts that were not chosen."""

    equation = "te,tei,ehi->th"

    def table(self, x):
        return F.linear(x, self.router).softmax(-1)

    def hidden(self, x):
        ids, _ = self.route(x)
        chosen = F.one_hot(ids, self.E).sum(1).to(x.dtype)
        h = torch.einsum("te,th,eih->tei", chosen, x, self.up)
        return torch.cos(h)


class AcrossTokens(OneProduct):
    """A product of two tokens' values."""

    def forward(self, x):
        return torch.einsum("te,uei,ehi,ut->th", self.table(x), self.hidden(x), self.down, x @ x.T)


@pytest.mark.parametrize("kind", [TwoTables, AcrossTokens])
def test_what_is_no_layer_is_left_alone(kind):
    program = export(kind(gated=False).eval(), dynamic=False)
    assert moe_fx.explain(program).layers == ()
    after = moe_fx.transform(program)
    assert [node.name for node in after.graph.nodes] == [node.name for node in program.graph.nodes]


def test_attention_keeps_its_products():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (torch.nn.Parameter(torch.randn(2, 8, 4)) for _ in range(4))

        def forward(self, x):
            scores = torch.einsum("th,nhd,uh,nhd->ntu", x, self.q, x, self.k).softmax(-1)
            return torch.einsum("ntu,uh,nhd,ngd->tg", scores, x, self.v, self.out)

    program = export(Attention(), dynamic=False)
    result = moe_fx.explain(program)
    assert (result.layers, result.misses) == ((), ())


class Turned(torch.nn.Module):
    """Tokens ``[S, B, H]`` or ``[B, H, S]`` outside of a layer that has them as ``[B, S, H]``."""

    def __init__(self, dims, back):
        super().__init__()
        self.dims, self.back = dims, back
        self.router = torch.nn.Linear(8, 4, bias=False)
        self.up, self.down = torch.nn.Parameter(torch.randn(4, 8, 16)), torch.nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x):
        x = x.permute(self.dims)
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        h = torch.einsum("bsh,bskhi->bski", x, self.up[ids]).relu()
        return (torch.einsum("bski,bskih->bskh", h, self.down[ids]) * weights[..., None]).sum(2).permute(self.back)


@pytest.mark.parametrize("dims", [(1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0)])
def test_tokens_that_stand_in_another_order_outside(dims):
    back = tuple(sorted(range(3), key=dims.__getitem__))
    model = Turned(dims, back).eval()
    free = torch.export.Dim.AUTO
    shape = [8, 8, 8]
    shape[dims[0]], shape[dims[1]] = 3, 5
    dynamic = {place: free for place in range(3) if place != dims[2]}
    program = torch.export.export(model, (torch.randn(shape),), dynamic_shapes=(dynamic,))
    after = moe_fx.transform(program, moe_fx.Config(require="all"))
    for sizes in ((2, 4), (7, 3), (1, 6)):
        shape[dims[0]], shape[dims[1]] = sizes
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(after.module()(x), model(x))
