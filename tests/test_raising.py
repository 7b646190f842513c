"""The two disguises, part by part: what is raised, and what is refused and why."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from moe_fx.passes.normalize import drop_no_ops, functionalize, spell
from moe_fx.passes.raising import raise_layers
from torch import nn
from toys import Gathered, Grouped, Toy, export, interleaved_clamped_swiglu, relu_squared, swiglu

import moe_fx
from moe_fx.check import check_layer
from moe_fx.pipeline import Work
from moe_fx.printer import format_graph
from moe_fx.program import ExportedWork

VARIANTS = {
    "swiglu": dict(activation=swiglu),
    "clamped interleaved swiglu": dict(activation=interleaved_clamped_swiglu),
    "gelu, no gate": dict(activation=F.gelu, gated=False),
    "relu squared, no gate": dict(activation=relu_squared, gated=False),
    "bias": dict(bias=True),
    "transposed": dict(transposed=True),
    "transposed with bias": dict(transposed=True, bias=True),
    "weight before the experts": dict(weight_before=True),
    "one expert per token": dict(top_k=1),
    "norm inside the expert": dict(activation=lambda h: F.layer_norm(h, h.shape[-1:]), gated=False),
}


@pytest.mark.parametrize("decomposed", [False, True], ids=["training IR", "core ATen"])
@pytest.mark.parametrize("toy", [Gathered, Grouped])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_is_optional(toy, variant, decomposed):
    program = export(toy(**VARIANTS[variant]))
    if decomposed:
        program = program.run_decompositions()
    (layer,) = moe_fx.explain(program).layers
    assert layer.error < 1e-9
    assert (layer.num_experts, layer.top_k) == (4, VARIANTS[variant].get("top_k", 2))
    assert moe_fx.explain(program).misses == ()


@pytest.mark.parametrize("toy", [Gathered, Grouped])
def test_static_token_counts_small_and_large(toy):
    for tokens in (1, 6, 500):
        (layer,) = moe_fx.explain(export(toy(), tokens=tokens, dynamic=False)).layers
        assert layer.error < 1e-9


class CountedAsIntegers(Grouped):
    """What transformers writes for a GPU; a CPU cannot run it."""

    count_dtype = torch.int32


def test_a_program_of_another_device_is_checked_all_the_same():
    (layer,) = moe_fx.explain(export(CountedAsIntegers().to("meta"))).layers
    assert layer.error < 1e-9


def raised(model, export=export):
    work = Work(ExportedWork(export(model)), moe_fx.Config())
    work.written = functionalize(work.program.graph)
    spell(work.program.graph)
    drop_no_ops(work.program.graph, work.written)
    raise_layers(work)
    return format_graph(work.program.graph_module)


def test_gathered_weights_before_and_after():
    assert_expected_inline(
        raised(Gathered(bias=True)),
        """\
p_router: f32[4, 8]
p_up: f32[4, 32, 8]
p_down: f32[4, 8, 16]
p_up_bias: f32[4, 32]
p_down_bias: f32[4, 8]
x: f32[s0, 8]
linear: f32[s0, 4] = aten.linear(x, p_router)
softmax: f32[s0, 4] = aten.softmax(linear, -1)
topk = aten.topk(softmax, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
sum: f32[s0, 1] = aten.sum(getitem, [-1], True)
div: f32[s0, 2] = aten.div(getitem, sum)
moe_body_0 = attribute
experts: f32[s0, 8] = experts(x, getitem_1, (div,), (p_up, p_up_bias, p_down, p_down_bias), (), moe_body_0)
return (experts,)
moe_body_0:
    x
    s0
    p0
    p1
    p2
    p3
    linear = aten.linear(x, p0)
    per_row = per_row(p1, x)
    add = aten.add(linear, per_row)
    split_with_sizes = aten.split_with_sizes(add, [16, 16], -1)
    getitem = getitem(split_with_sizes, 0)
    silu = aten.silu(getitem)
    getitem_1 = getitem(split_with_sizes, 1)
    mul = aten.mul(silu, getitem_1)
    linear_1 = aten.linear(mul, p2)
    per_row_1 = per_row(p3, x)
    add_1 = aten.add(linear_1, per_row_1)
    reshape = aten.reshape(s0, [-1, 1])
    mul_1 = aten.mul(add_1, reshape)
    return mul_1
""",
    )


def test_sorted_groups_before_and_after():
    assert_expected_inline(
        raised(Grouped()),
        """\
p_router: bf16[4, 8]
p_up: bf16[4, 32, 8]
p_down: bf16[4, 8, 16]
x: bf16[s0, 8]
linear: bf16[s0, 4] = aten.linear(x, p_router)
to: f32[s0, 4] = aten.to(linear, f32)
softmax: f32[s0, 4] = aten.softmax(to, -1)
topk = aten.topk(softmax, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
sum: f32[s0, 1] = aten.sum(getitem, [-1], True)
div: f32[s0, 2] = aten.div(getitem, sum)
to_1: bf16[s0, 2] = aten.to(div, bf16)
moe_body_0 = attribute
experts: bf16[s0, 8] = experts(x, getitem_1, (to_1,), (p_up, p_down), (), moe_body_0)
return (experts,)
moe_body_0:
    x
    s0
    p0
    p1
    linear = aten.linear(x, p0)
    split_with_sizes = aten.split_with_sizes(linear, [16, 16], -1)
    getitem = getitem(split_with_sizes, 0)
    silu = aten.silu(getitem)
    getitem_1 = getitem(split_with_sizes, 1)
    mul = aten.mul(silu, getitem_1)
    linear_1 = aten.linear(mul, p1)
    reshape = aten.reshape(s0, [-1, 1])
    mul_1 = aten.mul(linear_1, reshape)
    return mul_1
""",
    )


class DownIdsOfAnotherRouting(Gathered):
    def down_routing(self, flat):
        return flat.flip(0)


class SlotsInAnotherOrder(Grouped):
    def slot_order(self, perm):
        return perm.flip(0)


class LeakedHidden(Gathered):
    def activation_and_leak(self, h):
        self.leaked = h
        return swiglu(h)

    def forward(self, x):
        self.activation = self.activation_and_leak
        return super().forward(x) + self.leaked.sum()


class WeightsOfAnotherChoice(Gathered):
    def route(self, x):
        ids, _ = super().route(x)
        _, weights = super().route(x.flip(-1))
        return ids, weights


class ClampedBelowTheLastExpert(Gathered):
    def route(self, x):
        ids, weights = super().route(x)
        return ids, weights

    def experts(self, x, ids, weights):
        flat = ids.reshape(-1).clamp(0, self.E - 2)
        rows = x.repeat_interleave(self.K, 0)
        y = self.apply(swiglu(self.apply(rows, self.up, flat)), self.down, flat) * weights.reshape(-1, 1)
        return y.view(-1, self.K, y.shape[-1]).sum(1)


class MissingExpert(Grouped):
    counted = 3


def refusal(model):
    program = export(model)
    result = moe_fx.explain(program)
    assert result.layers == ()
    transformed = moe_fx.transform(program)
    assert format_graph(transformed.graph_module) == format_graph(program.graph_module)
    (miss,) = result.misses
    return miss


def test_refuses_indices_that_are_not_the_layers():
    miss = refusal(DownIdsOfAnotherRouting())
    assert "flip" in miss.found or "ids = " in miss.wanted


def test_refuses_routing_weights_in_another_order():
    miss = refusal(SlotsInAnotherOrder())
    assert "flip" in miss.found


def test_refuses_an_interior_value_that_is_used_elsewhere():
    miss = refusal(LeakedHidden())
    assert "to be read inside the layer only" in miss.wanted
    assert "aten::sum" in miss.found


def test_refuses_routing_weights_of_another_choice():
    miss = refusal(WeightsOfAnotherChoice())
    assert miss.wanted.startswith("routing weights chosen by topk")
    assert "topk_1" in miss.found


def test_refuses_a_missing_expert():
    assert "an expert is missing" in refusal(MissingExpert()).found
    assert "an expert is missing" in refusal(ClampedBelowTheLastExpert()).found


def test_a_miss_names_the_line_and_the_module():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = LeakedHidden()

        def forward(self, x):
            return self.layer(x)

    miss = refusal(Model())
    assert miss.module == "layer"
    assert "toys.py:" in miss.source


def test_stacked_weights_without_a_sum_over_slots_are_a_near_miss():
    class NoCombine(Gathered):
        def experts(self, x, ids, weights):
            return self.apply(x.repeat_interleave(self.K, 0), self.up, ids.reshape(-1))

    miss = refusal(NoCombine())
    assert "a sum over each token's slots" in miss.wanted


def test_attention_is_no_moe_layer():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.mix(x[None], x[None], x[None], need_weights=False)[0][0]

    result = moe_fx.explain(export(Attention()))
    assert (result.layers, result.misses) == ((), ())
    assert str(result) == "no MoE layer was found"


class Reordered(Toy):
    """Each slot's results, stacked from the last to the first, beside weights from the first to the last."""

    def forward(self, x):
        ids, weights = self.route(x)
        outs = []
        for k in reversed(range(self.K)):
            h = self.activation(torch.einsum("th,tnh->tn", x, self.up[ids[:, k]]))
            outs.append(torch.einsum("tn,thn->th", h, self.down[ids[:, k]]))
        return (torch.stack(outs, 1) * weights[..., None]).sum(1)


def test_slots_stacked_in_another_order_than_their_weights_are_no_one_layer():
    model = Reordered().eval()
    program = export(model)
    result = moe_fx.transform(program)
    assert all(layer.top_k == 1 for layer in moe_fx.report(result).layers)
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert torch.allclose(result.module()(x), model(x), atol=1e-6)


@pytest.mark.parametrize("change", [lambda ids: ids - 1, lambda ids: torch.where(ids == 0, -1, ids)])
def test_refuses_an_index_that_may_count_from_the_end(change):
    class Counted(Toy):
        def forward(self, x):
            ids, weights = self.route(x)
            ids = change(ids)
            h = self.activation(torch.einsum("th,tknh->tkn", x, self.up[ids]))
            return (torch.einsum("tkn,tkhn->tkh", h, self.down[ids]) * weights[..., None]).sum(1)

    result = moe_fx.explain(export(Counted()))
    assert result.layers == ()
    assert [miss.wanted for miss in result.misses] == ["ids that are certainly not negative"]


def test_a_body_whose_rows_are_not_apart_is_refused_though_every_expert_gets_one():
    class Model(nn.Module):
        def forward(self, x, ids, weight):
            return (x.unsqueeze(1) * weight[ids]).sum(1)

    ids = torch.tensor([[1, 0]])
    graph = torch.export.export(Model(), (torch.randn(1, 4), ids, torch.randn(2, 4))).graph
    x, ids, weight = graph.find_nodes(op="placeholder")
    (root,) = graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)

    def checked(body):
        body = torch.fx.symbolic_trace(body)
        return check_layer(root, (x, ids, [], [weight], []), body, in_range=True, distinct=True)

    assert checked(lambda x, weight: x * weight).passed
    crossed = checked(lambda x, weight: (x.unsqueeze(1) + x * 0) * weight)
    assert not crossed.passed
    assert crossed.problem == "the body makes [3, 3, 4] of three rows, and not [3, 1, 4]"
    mixed = checked(lambda x, weight: (x + x.cumsum(0) - x) * weight)
    assert mixed.problem == "the body's rows depend on one another"
