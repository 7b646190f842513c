"""NORMAL -> RAISED: rows sorted by expert as the places of a routing map are listed."""

import torch
from expecttest import assert_expected_inline
from moe_fx.passes.normalize import normalize
from moe_fx.passes.raising import raise_layers
from styles.routing_map import MegatronGrouped
from torch.export import Dim

import moe_fx
from moe_fx.pipeline import Work
from moe_fx.printer import format_graph
from moe_fx.program import ExportedWork


class Repeated(MegatronGrouped):
    def maps(self, x):
        logits = self.router.linear(x)
        ids = torch.stack([logits.argmax(-1), (logits * 0.5).argmax(-1)], -1)
        probs = torch.zeros_like(logits).scatter(1, ids, 0.5)
        return probs, torch.zeros_like(logits).int().scatter(1, ids, 1).bool()


def exported(model):
    return torch.export.export(model.eval(), (torch.randn(5, 16),), dynamic_shapes=({0: Dim.AUTO},))


@torch.no_grad()
def test_a_routing_map_listed_by_expert_before_and_after():
    work = Work(ExportedWork(exported(MegatronGrouped())), moe_fx.Config())
    normalize(work)
    before = format_graph(work.program.graph_module)
    raise_layers(work)
    assert_expected_inline(
        before,
        """\
p_w_gate: f32[4, 16, 24]
p_w_up: f32[4, 16, 24]
p_w_down: f32[4, 24, 16]
p_router_linear_weight: f32[4, 16]
x: f32[s0, 16]
linear: f32[s0, 4] = aten.linear(x, p_router_linear_weight)
softmax: f32[s0, 4] = aten.softmax(linear, -1)
topk = aten.topk(softmax, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
zeros_like: f32[s0, 4] = aten.zeros_like(linear)
scatter: f32[s0, 4] = aten.scatter(zeros_like, 1, getitem_1, getitem)
zeros_like_1: f32[s0, 4] = aten.zeros_like(linear)
to: i32[s0, 4] = aten.to(zeros_like_1, i32)
scatter_1: i32[s0, 4] = aten.scatter(to, 1, getitem_1, 1)
to_1: bool[s0, 4] = aten.to(scatter_1, bool)
transpose: bool[4, s0] = aten.transpose(to_1, -2, -1)
where = aten.where(transpose)
getitem_2: i64[s1] = getitem(where, 0)
getitem_3: i64[s1] = getitem(where, 1)
sym_size = aten.sym_size(getitem_3, 0)
ge = ge(sym_size, 0)
_assert_scalar = aten._assert_scalar(ge, "Runtime assertion failed for expression u0 >= 0 on node 'ge'")
index: f32[s1, 16] = aten.index(x, [getitem_3])
sum: i64[4] = aten.sum(to_1, [0])
cumsum: i64[4] = aten.cumsum(sum, 0)
to_2: i32[4] = aten.to(cumsum, i32)
grouped_mm: f32[s1, 24] = moe_fx.grouped_mm(index, p_w_gate, to_2)
grouped_mm_1: f32[s1, 24] = moe_fx.grouped_mm(index, p_w_up, to_2)
gelu: f32[s1, 24] = aten.gelu(grouped_mm, approximate='tanh')
mul: f32[s1, 24] = aten.mul(gelu, grouped_mm_1)
grouped_mm_2: f32[s1, 16] = moe_fx.grouped_mm(mul, p_w_down, to_2)
index_1: f32[s2] = aten.index(scatter, [getitem_3, getitem_2])
sym_size_1 = aten.sym_size(index_1, 0)
ge_1 = ge(sym_size_1, 0)
_assert_scalar_1 = aten._assert_scalar(ge_1, "Runtime assertion failed for expression u1 >= 0 on node 'ge_1'")
eq = eq(sym_size, sym_size_1)
_assert_scalar_2 = aten._assert_scalar(eq, "Runtime assertion failed for expression Eq(u0, u1) on node 'eq_14'")
unsqueeze: f32[s2, 1] = aten.unsqueeze(index_1, -1)
mul_1: f32[s1, 16] = aten.mul(grouped_mm_2, unsqueeze)
zeros_like_2: f32[s0, 16] = aten.zeros_like(x)
index_put: f32[s0, 16] = aten.index_put(zeros_like_2, [getitem_3], mul_1, True)
return (index_put,)
""",
    )
    assert_expected_inline(
        format_graph(work.program.graph_module),
        """\
p_w_gate: f32[4, 16, 24]
p_w_up: f32[4, 16, 24]
p_w_down: f32[4, 24, 16]
p_router_linear_weight: f32[4, 16]
x: f32[s0, 16]
linear: f32[s0, 4] = aten.linear(x, p_router_linear_weight)
softmax: f32[s0, 4] = aten.softmax(linear, -1)
topk = aten.topk(softmax, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
zeros_like: f32[s0, 4] = aten.zeros_like(linear)
scatter: f32[s0, 4] = aten.scatter(zeros_like, 1, getitem_1, getitem)
gather: f32[s0, 2] = aten.gather(scatter, -1, getitem_1)
moe_body_0 = attribute
experts: f32[s0, 16] = experts(x, getitem_1, (gather,), (p_w_gate, p_w_up, p_w_down), (), moe_body_0)
return (experts,)
moe_body_0:
    x
    s0
    p0
    p1
    p2
    transpose = aten.transpose(p0, 0, 1)
    linear = aten.linear(x, transpose)
    gelu = aten.gelu(linear, approximate='tanh')
    transpose_1 = aten.transpose(p1, 0, 1)
    linear_1 = aten.linear(x, transpose_1)
    mul = aten.mul(gelu, linear_1)
    transpose_2 = aten.transpose(p2, 0, 1)
    linear_2 = aten.linear(mul, transpose_2)
    reshape = aten.reshape(s0, [-1, 1])
    mul_1 = aten.mul(linear_2, reshape)
    return mul_1
""",
    )


@torch.no_grad()
def test_a_map_of_ids_that_may_repeat_is_refused():
    (miss, *_) = moe_fx.explain(exported(Repeated())).misses
    assert "wanted ids that are certainly distinct for each token" in str(miss)
