"""Loops over a list of modules: what differs from expert to expert is stacked."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.export import Dim

import moe_fx
from moe_fx.printer import format_graph

NUM_EXPERTS, HIDDEN, INNER = 4, 8, 16


class Expert(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, INNER, bias=False)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """An expert of one matrix."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        return self.matrix(x)


class Normed(Expert):
    """A scale of its own for every feature, a norm that all experts share, and a matrix that is not an nn.Linear."""

    shared = nn.Parameter(torch.linspace(0.5, 1.5, INNER))

    def __init__(self):
        super().__init__(bias=True)
        self.scale = nn.Parameter(torch.rand(INNER))
        self.matrix = nn.Parameter(torch.randn(INNER, INNER) * 0.2)

    def forward(self, x):
        h = F.rms_norm(F.gelu(self.gate(x)) * self.scale, (INNER,), self.shared)
        return self.down(h @ self.matrix)


class Model(nn.Module):
    def __init__(self, expert=Expert):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.router = nn.Linear(HIDDEN, NUM_EXPERTS, bias=False)
            self.experts = nn.ModuleList(expert() for _ in range(NUM_EXPERTS))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def export(model):
    return torch.export.export(model.eval(), (torch.randn(6, HIDDEN),), dynamic_shapes=({0: Dim.AUTO},))


def error(program, model):
    worst = 0.0
    for tokens in (6, 9):
        x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            worst = max(worst, float((program.module()(x) - model(x)).abs().max() / model(x).abs().max()))
    return worst


CONFIGS = {
    "grouped_mm": dict(experts="grouped_mm"), "linear": dict(experts="linear"), "gather": dict(experts="gather"),
    "per expert": dict(storage="per_expert"),
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("expert", [Expert, Normed])
def test_a_list_of_modules_is_one_layer(expert, config):
    model = Model(expert)
    program = moe_fx.transform(export(model), moe_fx.Config(**CONFIGS[config], require="all"))
    (layer,) = moe_fx.report(program).layers
    assert (layer.fqn, layer.source_form, layer.num_experts, layer.top_k) == ("experts", "expert_loop", 4, 2)
    assert error(program, model) < 1e-6


def test_a_list_of_modules_before_and_after():
    program = export(Model(Plain))
    after = moe_fx.transform(program, moe_fx.Config(experts="gather"))
    assert_expected_inline(
        format_graph(after.graph),
        """\
p_router_weight: f32[4, 8]
b_experts_matrix_weight: f32[4, 8, 8]
x: f32[s0, 8]
linear: f32[s0, 4] = aten.linear(x, p_router_weight)
softmax: f32[s0, 4] = aten.softmax(linear, -1)
topk = aten.topk(softmax, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
reshape: i64[2*s0] = aten.reshape(getitem_1, [-1])
unsqueeze: f32[s0, 1, 8] = aten.unsqueeze(x, 1)
expand: f32[s0, 2, 8] = aten.expand(unsqueeze, [-1, 2, 8])
reshape_1: f32[2*s0, 8] = aten.reshape(expand, [-1, 8])
reshape_2: f32[2*s0] = aten.reshape(getitem, [-1])
index: f32[2*s0, 8, 8] = aten.index(b_experts_matrix_weight, [reshape])
unsqueeze_1: f32[2*s0, 1, 8] = aten.unsqueeze(reshape_1, -2)
mul: f32[2*s0, 8, 8] = aten.mul(index, unsqueeze_1)
sum: f32[2*s0, 8] = aten.sum(mul, [-1])
reshape_3: f32[2*s0, 1] = aten.reshape(reshape_2, [-1, 1])
mul_1: f32[2*s0, 8] = aten.mul(sum, reshape_3)
reshape_4: f32[s0, 2, 8] = aten.reshape(mul_1, [-1, 2, 8])
sum_1: f32[s0, 8] = aten.sum(reshape_4, [1])
return (sum_1,)
""",
    )
    assert list(after.state_dict) == ["router.weight", "experts.matrix.weight"]


def test_weights_stay_where_they_are_if_stored_per_expert():
    program = export(Model())
    after = moe_fx.transform(program, moe_fx.Config(storage="per_expert", require="all"))
    assert after.state_dict.keys() == program.state_dict.keys()


@pytest.mark.parametrize("config", [{}, dict(storage="per_expert")])
def test_quantized_weights_are_named_after_the_modules(config):
    model = Model()
    program = export(model)
    after = moe_fx.transform(program, moe_fx.Config(quantize=moe_fx.Int8WeightOnly(), **config))
    place = "experts.1.gate" if config else "experts.gate"
    names = moe_fx.report(after).names
    assert names["experts.1.gate.weight"] == (f"{place}.weight_qdata", f"{place}.weight_scale")
    assert set(sum(names.values(), ())) <= set(after.state_dict)
    assert not set(names) & set(after.state_dict)
    (layer,) = moe_fx.compare(program, after, (torch.randn(32, HIDDEN),)).layers
    assert all(40 < decibels < 60 for decibels in layer.weight_sqnr.values())
    assert error(after, model) < 0.05


def test_a_pattern_names_a_projection_of_all_experts():
    config = moe_fx.Config(quantize={"experts.down.weight": moe_fx.Int8WeightOnly()})
    (layer,) = moe_fx.report(moe_fx.transform(export(Model()), config)).layers
    formats = {name: record["format"] for name, record in layer.formats.items()}
    assert formats["experts.down.weight"] != formats["experts.up.weight"]


def test_the_backend_stacks_the_weights_once():
    model, backend = Model(), moe_fx.backend(moe_fx.Config(experts="grouped_mm", require="all"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for tokens in (6, 9, 12):
        x = torch.randn(tokens, HIDDEN)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    stacks = [made for _, made in backend._made.values()]
    assert len(stacks) == 3
    assert all(tensor.shape[0] == NUM_EXPERTS for (tensor,) in stacks)


def refusal(model):
    report = moe_fx.explain(export(model))
    assert report.layers == ()
    return report.misses[0]


def test_refuses_experts_that_are_not_alike():
    class Uneven(Model):
        def __init__(self):
            super().__init__(Plain)
            self.experts[2] = nn.Sequential(Plain(), nn.ReLU())

    miss = refusal(Uneven())
    assert (miss.wanted, miss.found) == ("a loop whose every step does the same to its expert", "steps that differ")


def test_refuses_a_list_that_lacks_an_expert():
    class Short(Model):
        def __init__(self):
            super().__init__()
            self.experts = self.experts[:3]

    # Tokens of expert 3 get nothing: that is the equation for three experts and ids that may name none.
    program = moe_fx.transform(export(Short()), moe_fx.Config(require="all"))
    (layer,) = moe_fx.report(program).layers
    assert layer.num_experts == 3
    assert error(program, Short()) < 1e-6


def test_refuses_an_expert_with_a_factor_of_its_own():
    class Factors(Model):
        def forward(self, x):
            weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                token, slot = torch.where(ids == e)
                out = out.index_add(0, token, 0.5**e * expert(x[token]) * weights[token, slot, None])
            return out

    assert refusal(Factors()).found == "steps that differ"


def test_every_expert_in_turn_is_summed_in_the_dtype_of_the_model():
    class Wide(Model):
        """Experts in bfloat16, whose results are added up in float32."""

        def forward(self, x):
            weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
            table = torch.zeros(x.shape[0], NUM_EXPERTS, dtype=x.dtype).scatter(1, ids, weights)
            out = torch.zeros(x.shape, dtype=torch.float32)
            for e, expert in enumerate(self.experts):
                out = out + table[:, e, None] * expert(x)
            return out

    model = Wide().bfloat16().eval()
    x = torch.randn(6, HIDDEN, dtype=torch.bfloat16)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO},))
    after = moe_fx.transform(program, moe_fx.Config(require="all", experts="linear"))
    with torch.no_grad():
        actual, expected = after.module()(x), model(x)
    assert actual.dtype is torch.float32
    # Terms are rounded alike, and no sum is.
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


class TwoLayers(nn.Module):
    """Two layers, the second of which has experts of the first in other places."""

    def __init__(self, places):
        super().__init__()
        self.first, self.second = Model(), Model()
        for place, other in enumerate(places):
            if other is not None:
                self.second.experts[place] = self.first.experts[other]

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("form", [moe_fx.Int8WeightOnly(), moe_fx.Float8WeightOnly()], ids=repr)
@pytest.mark.parametrize("places", [(3, 2, 1, 0), (None, None, None, 0)])
def test_experts_that_two_layers_share_are_quantized_once(places, form):
    exported = export(TwoLayers(places))
    program = moe_fx.transform(exported, moe_fx.Config(quantize=form, storage="per_expert", require="all"))
    stacked = moe_fx.transform(exported, moe_fx.Config(quantize=form, experts="linear", require="all"))
    assert len(moe_fx.report(program).layers) == 2
    held = [name for name in program.state_dict if name.endswith("up.weight_qdata")]
    assert len(held) == 8 - sum(other is not None for other in places)
    assert error(program, stacked.module()) < 1e-5
