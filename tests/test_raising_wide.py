"""Wide linears weighted by expert, and layers one after the other in the residual stream: before and after."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from moe_fx.passes.normalize import normalize
from moe_fx.passes.raising import raise_layers
from torch.export import Dim

import moe_fx
from moe_fx.pipeline import Work
from moe_fx.printer import format_graph
from moe_fx.program import ExportedWork

H, I, E, K = 8, 6, 4, 2  # noqa: E741


def normal(*shape):
    return torch.nn.Parameter(torch.randn(*shape) * 0.3)


class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.up, self.down, self.bias = normal(E, H), normal(E * I, H), normal(H, E * I), normal(H)

    def forward(self, x):
        weights, ids = F.linear(x, self.router).topk(K)
        table = torch.zeros(x.shape[0], E).scatter(1, ids, weights.sigmoid())
        hidden = F.linear(x, self.up).relu() * table.repeat_interleave(I, dim=1)
        return F.linear(hidden, self.down, self.bias)


class Layers(torch.nn.Module):
    """Two layers, each of which adds to the token; ``half`` reads what the first half of an expert loop added."""

    def __init__(self, half=False):
        super().__init__()
        self.half, self.router = half, normal(E, H)
        self.first, self.second = normal(E, H, H), normal(E, H, H)

    def forward(self, x):
        for experts in (self.first, self.second):
            rows = F.layer_norm(x, (H,))
            weights, ids = F.linear(rows, self.router).topk(K)
            for e in range(E):
                if self.half and e == E // 2:
                    rows = F.layer_norm(x, (H,))
                token, slot = torch.where(ids == e)
                x = x.index_add(0, token, F.linear(rows[token], experts[e]).relu() * weights[token, slot, None])
        return x


def export(model):
    torch.manual_seed(0)
    return torch.export.export(model, (torch.randn(6, H),), dynamic_shapes=({0: Dim.AUTO},))


def stages(model):
    """The program in its normal form, and with its layers raised."""
    work = Work(ExportedWork(export(model)), moe_fx.Config())
    normalize(work)
    before = format_graph(work.program.graph_module)
    raise_layers(work)
    return before, format_graph(work.program.graph_module)


def test_a_wide_linear_weighted_by_expert_before_and_after():
    before, after = stages(Wide())
    assert_expected_inline(
        before,
        """\
p_router: f32[4, 8]
p_up: f32[24, 8]
p_down: f32[8, 24]
p_bias: f32[8]
x: f32[s0, 8]
sym_size = aten.sym_size(x, 0)
linear: f32[s0, 4] = aten.linear(x, p_router)
topk = aten.topk(linear, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
zeros: f32[s0, 4] = aten.zeros([sym_size, 4])
sigmoid: f32[s0, 2] = aten.sigmoid(getitem)
scatter: f32[s0, 4] = aten.scatter(zeros, 1, getitem_1, sigmoid)
linear_1: f32[s0, 24] = aten.linear(x, p_up)
relu: f32[s0, 24] = aten.relu(linear_1)
sym_size_1 = aten.sym_size(relu, 0)
reshape: f32[s0, 4, 6] = aten.reshape(relu, [sym_size_1, 4, 6])
unsqueeze: f32[s0, 4, 1] = aten.unsqueeze(scatter, -1)
mul: f32[s0, 4, 6] = aten.mul(reshape, unsqueeze)
reshape_1: f32[8, 4, 6] = aten.reshape(p_down, [8, 4, 6])
einsum: f32[s0, 8] = aten.einsum('abc,dbc->ad', [mul, reshape_1])
add: f32[s0, 8] = aten.add(einsum, p_bias)
return (add,)
""",
    )
    assert_expected_inline(
        after,
        """\
p_router: f32[4, 8]
p_up: f32[24, 8]
p_down: f32[8, 24]
p_bias: f32[8]
x: f32[s0, 8]
reshape: f32[8, 4, 6] = aten.reshape(p_down, [8, 4, 6])
permute: f32[4, 8, 6] = aten.permute(reshape, [1, 0, 2])
reshape_1: f32[4, 6, 8] = aten.reshape(p_up, [4, 6, 8])
linear: f32[s0, 4] = aten.linear(x, p_router)
topk = aten.topk(linear, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
sigmoid: f32[s0, 2] = aten.sigmoid(getitem)
moe_body_0 = attribute
experts: f32[s0, 8] = experts(x, getitem_1, (sigmoid,), (reshape_1, permute), (), moe_body_0)
add: f32[s0, 8] = aten.add(experts, p_bias)
return (add,)
moe_body_0:
    x
    s0
    p0
    p1
    linear = aten.linear(x, p0)
    relu = aten.relu(linear)
    reshape = aten.reshape(s0, [-1, 1])
    mul = aten.mul(relu, reshape)
    linear_1 = aten.linear(mul, p1)
    return linear_1
""",
    )


def test_two_layers_in_the_residual_stream_after():
    assert_expected_inline(
        stages(Layers())[1],
        """\
p_router: f32[4, 8]
p_first: f32[4, 8, 8]
p_second: f32[4, 8, 8]
x: f32[s0, 8]
layer_norm: f32[s0, 8] = aten.layer_norm(x, [8], None, None, 1e-05, False)
linear: f32[s0, 4] = aten.linear(layer_norm, p_router)
topk = aten.topk(linear, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
moe_body_0 = attribute
experts: f32[s0, 8] = experts(layer_norm, getitem_1, (getitem,), (p_first,), (), moe_body_0)
add: f32[s0, 8] = aten.add(x, experts)
layer_norm_1: f32[s0, 8] = aten.layer_norm(add, [8], None, None, 1e-05, False)
linear_1: f32[s0, 4] = aten.linear(layer_norm_1, p_router)
topk_1 = aten.topk(linear_1, 2)
getitem_2: f32[s0, 2] = getitem(topk_1, 0)
getitem_3: i64[s0, 2] = getitem(topk_1, 1)
moe_body_1 = attribute
experts_1: f32[s0, 8] = experts(layer_norm_1, getitem_3, (getitem_2,), (p_second,), (), moe_body_1)
add_1: f32[s0, 8] = aten.add(add, experts_1)
return (add_1,)
moe_body_0:
    x
    s0
    p0
    linear = aten.linear(x, p0)
    relu = aten.relu(linear)
    reshape = aten.reshape(s0, [-1, 1])
    mul = aten.mul(relu, reshape)
    return mul
moe_body_1:
    x
    s0
    p0
    linear = aten.linear(x, p0)
    relu = aten.relu(linear)
    reshape = aten.reshape(s0, [-1, 1])
    mul = aten.mul(relu, reshape)
    return mul
""",
    )


@torch.no_grad()
def test_half_a_loop_whose_sum_is_read_is_no_layer_of_all_experts():
    model = Layers(half=True)
    program = export(model)
    after = moe_fx.transform(program, moe_fx.Config(validate=False))
    told = " ".join(map(str, moe_fx.report(after).misses))
    assert moe_fx.report(after).layers == ()
    assert "wanted a sum that nothing in the loop reads" in told or "every expert of 4 once" in told


@pytest.mark.parametrize("model", [Wide, Layers])
@torch.no_grad()
def test_the_raised_program_is_the_model(model):
    module = model()
    after = moe_fx.transform(export(module), moe_fx.Config(require="all"))
    for tokens in (6, 9):
        x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens))
        assert (after.module()(x) - module(x)).abs().max() <= 1e-6 * module(x).abs().max()


class Terms(torch.nn.Module):
    """Every expert on every token, one term after the other; what is made of one is returned as well."""

    def __init__(self, returned):
        super().__init__()
        self.returned, self.router, self.experts = returned, normal(E, H), normal(E, H, H)

    def forward(self, x):
        weights, ids = F.linear(x, self.router).topk(K)
        table = torch.zeros(x.shape[0], E).scatter(1, ids, weights.sigmoid())
        out, results = torch.zeros_like(x), []
        for e in range(E):
            results.append(F.linear(x, self.experts[e]).relu())
            out = out + table[:, e, None] * results[e]
        return out, (results[0] if self.returned == "result" else table).sum()


def test_what_an_expert_makes_is_not_read_beside_a_layer_but_its_table_may_be():
    (miss,) = moe_fx.explain(export(Terms("result"))).misses
    assert "wanted relu to be read inside the layer only" in str(miss)
    assert len(moe_fx.explain(export(Terms("table"))).layers) == 1
