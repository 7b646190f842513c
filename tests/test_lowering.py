"""What each lowering writes, for each format."""

import pytest
import torch
from expecttest import assert_expected_inline
from toys import Gathered, export, relu_squared

import moe_fx
from moe_fx.printer import format_graph


def lowered(experts, quantize=None, num_experts=2):
    model = Gathered(gated=False, activation=relu_squared, num_experts=num_experts)
    program = moe_fx.transform(export(model), moe_fx.Config(experts=experts, quantize=quantize, require=1))
    inputs, _, rest = format_graph(program.graph_module).partition("linear: ")
    # The router is the same everywhere, and ends in the division; what follows it is the lowering.
    return inputs + "...\n" + rest[rest.index("div: ") :]


def test_grouped_mm():
    assert_expected_inline(
        lowered("grouped_mm"),
        """\
p_router: f32[2, 8]
p_up: f32[2, 16, 8]
p_down: f32[2, 8, 16]
x: f32[s0, 8]
...
div: f32[s0, 2] = aten.div(getitem, sum)
reshape: i64[2*s0] = aten.reshape(getitem_1, [-1])
sort = aten.sort(reshape)
getitem_2: i64[2*s0] = getitem(sort, 0)
getitem_3: i64[2*s0] = getitem(sort, 1)
arange: i64[2] = aten.arange(2, dtype=i64)
searchsorted: i32[2] = aten.searchsorted(getitem_2, arange, out_int32=True, right=True)
floor_divide: i64[2*s0] = aten.floor_divide(getitem_3, 2)
index: f32[2*s0, 8] = aten.index(x, [floor_divide])
reshape_1: f32[2*s0] = aten.reshape(div, [-1])
index_1: f32[2*s0] = aten.index(reshape_1, [getitem_3])
transpose: f32[2, 8, 16] = aten.transpose(p_up, -2, -1)
grouped_mm: f32[2*s0, 16] = moe_fx.grouped_mm(index, transpose, searchsorted)
relu: f32[2*s0, 16] = aten.relu(grouped_mm)
square: f32[2*s0, 16] = aten.square(relu)
transpose_1: f32[2, 16, 8] = aten.transpose(p_down, -2, -1)
grouped_mm_1: f32[2*s0, 8] = moe_fx.grouped_mm(square, transpose_1, searchsorted)
reshape_2: f32[2*s0, 1] = aten.reshape(index_1, [-1, 1])
mul: f32[2*s0, 8] = aten.mul(grouped_mm_1, reshape_2)
sym_size = aten.sym_size(getitem_3, 0)
arange_1: i64[2*s0] = aten.arange(sym_size, dtype=i64)
zeros_like: i64[2*s0] = aten.zeros_like(getitem_3)
scatter: i64[2*s0] = aten.scatter(zeros_like, 0, getitem_3, arange_1)
index_2: f32[2*s0, 8] = aten.index(mul, [scatter])
reshape_3: f32[s0, 2, 8] = aten.reshape(index_2, [-1, 2, 8])
sum_1: f32[s0, 8] = aten.sum(reshape_3, [1])
return (sum_1,)
""",
    )


def test_linear():
    assert_expected_inline(
        lowered("linear"),
        """\
p_router: f32[2, 8]
p_up: f32[2, 16, 8]
p_down: f32[2, 8, 16]
x: f32[s0, 8]
...
div: f32[s0, 2] = aten.div(getitem, sum)
sym_size = aten.sym_size(div, 0)
new_zeros: f32[s0, 2] = aten.new_zeros(div, [sym_size, 2])
scatter: f32[s0, 2] = aten.scatter(new_zeros, 1, getitem_1, div)
unbind = aten.unbind(scatter, 1)
sym_size_1 = aten.sym_size(getitem_1, 0)
new_zeros_1: bool[s0, 2] = aten.new_zeros(getitem_1, [sym_size_1, 2], dtype=bool)
scatter_1: bool[s0, 2] = aten.scatter(new_zeros_1, 1, getitem_1, True)
unsqueeze: bool[s0, 2, 1] = aten.unsqueeze(scatter_1, -1)
unbind_1 = aten.unbind(unsqueeze, 1)
unbind_2 = aten.unbind(p_up, 0)
unbind_3 = aten.unbind(p_down, 0)
getitem_2: f32[16, 8] = getitem(unbind_2, 0)
getitem_3: f32[8, 16] = getitem(unbind_3, 0)
getitem_4: f32[s0] = getitem(unbind, 0)
linear_1: f32[s0, 16] = aten.linear(x, getitem_2)
relu: f32[s0, 16] = aten.relu(linear_1)
square: f32[s0, 16] = aten.square(relu)
linear_2: f32[s0, 8] = aten.linear(square, getitem_3)
reshape: f32[s0, 1] = aten.reshape(getitem_4, [-1, 1])
mul: f32[s0, 8] = aten.mul(linear_2, reshape)
getitem_5: bool[s0, 1] = getitem(unbind_1, 0)
scalar_tensor: f32[] = aten.scalar_tensor(0.0, dtype=f32)
where: f32[s0, 8] = aten.where(getitem_5, mul, scalar_tensor)
getitem_6: f32[16, 8] = getitem(unbind_2, 1)
getitem_7: f32[8, 16] = getitem(unbind_3, 1)
getitem_8: f32[s0] = getitem(unbind, 1)
linear_3: f32[s0, 16] = aten.linear(x, getitem_6)
relu_1: f32[s0, 16] = aten.relu(linear_3)
square_1: f32[s0, 16] = aten.square(relu_1)
linear_4: f32[s0, 8] = aten.linear(square_1, getitem_7)
reshape_1: f32[s0, 1] = aten.reshape(getitem_8, [-1, 1])
mul_1: f32[s0, 8] = aten.mul(linear_4, reshape_1)
getitem_9: bool[s0, 1] = getitem(unbind_1, 1)
where_1: f32[s0, 8] = aten.where(getitem_9, mul_1, scalar_tensor)
add: f32[s0, 8] = aten.add(where, where_1)
return (add,)
""",
    )


def test_gather():
    assert_expected_inline(
        lowered("gather"),
        """\
p_router: f32[2, 8]
p_up: f32[2, 16, 8]
p_down: f32[2, 8, 16]
x: f32[s0, 8]
...
div: f32[s0, 2] = aten.div(getitem, sum)
reshape: i64[2*s0] = aten.reshape(getitem_1, [-1])
unsqueeze: f32[s0, 1, 8] = aten.unsqueeze(x, 1)
expand: f32[s0, 2, 8] = aten.expand(unsqueeze, [-1, 2, 8])
reshape_1: f32[2*s0, 8] = aten.reshape(expand, [-1, 8])
reshape_2: f32[2*s0] = aten.reshape(div, [-1])
index: f32[2*s0, 16, 8] = aten.index(p_up, [reshape])
unsqueeze_1: f32[2*s0, 1, 8] = aten.unsqueeze(reshape_1, -2)
mul: f32[2*s0, 16, 8] = aten.mul(index, unsqueeze_1)
sum_1: f32[2*s0, 16] = aten.sum(mul, [-1])
relu: f32[2*s0, 16] = aten.relu(sum_1)
square: f32[2*s0, 16] = aten.square(relu)
index_1: f32[2*s0, 8, 16] = aten.index(p_down, [reshape])
unsqueeze_2: f32[2*s0, 1, 16] = aten.unsqueeze(square, -2)
mul_1: f32[2*s0, 8, 16] = aten.mul(index_1, unsqueeze_2)
sum_2: f32[2*s0, 8] = aten.sum(mul_1, [-1])
reshape_3: f32[2*s0, 1] = aten.reshape(reshape_2, [-1, 1])
mul_2: f32[2*s0, 8] = aten.mul(sum_2, reshape_3)
reshape_4: f32[s0, 2, 8] = aten.reshape(mul_2, [-1, 2, 8])
sum_3: f32[s0, 8] = aten.sum(reshape_4, [1])
return (sum_3,)
""",
    )


@pytest.mark.parametrize("experts", ["grouped_mm", "linear", "gather"])
def test_no_bmm_over_gathered_weights_is_written(experts):
    assert "bmm" not in lowered(experts)


def test_grouped_mm_in_bfloat16_is_the_aten_op():
    program = moe_fx.transform(export(Gathered(dtype=torch.bfloat16)), moe_fx.Config(experts="grouped_mm"))
    assert program.graph.find_nodes(op="call_function", target=torch.ops.aten._grouped_mm.default)
    assert moe_fx.report(program).layers[0].why == "as configured"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(dtype=torch.float32), "compiles in bfloat16 only (before torch 2.15), not float32"),
        (dict(dtype=torch.bfloat16, inner=12), "needs strides of 16 bytes, weights are 8 x 12"),
    ],
)
def test_where_the_aten_op_does_not_fit_the_report_says_why(options, reason):
    program = moe_fx.transform(export(Gathered(**options)), moe_fx.Config(experts="grouped_mm"))
    assert reason in moe_fx.report(program).layers[0].why
    assert program.graph.find_nodes(op="call_function", target=torch.ops.moe_fx.grouped_mm.default)


def test_auto_takes_the_cpu_kernel_where_there_is_one(monkeypatch):
    monkeypatch.setattr("moe_fx.kernels.grouped_amx.unavailable", lambda: None)

    def chosen(dtype=torch.bfloat16, quantize=None, **sizes):
        program = export(Gathered(dtype=dtype, **sizes), tokens=1, dynamic=False, hidden=32)
        return moe_fx.report(moe_fx.transform(program, moe_fx.Config(quantize=quantize))).layers[0].lowering

    fitting = dict(hidden=32, inner=64)
    assert chosen(**fitting) == "grouped_mm"
    assert chosen(**fitting, quantize=moe_fx.Int4WeightOnly(32)) == "grouped_mm"
    # Of an int8 weight Inductor reads few bytes as well, and starts sooner.
    assert chosen(**fitting, num_experts=8, quantize=moe_fx.Int8WeightOnly()) == "gather"
    assert chosen(**fitting, num_experts=7, quantize=moe_fx.Int8WeightOnly()) == "grouped_mm"
    assert chosen(**fitting, dtype=torch.float32) == "gather"
    assert chosen(hidden=32, inner=24) == "gather"


def test_auto_chooses_by_token_count_and_format():
    def chosen(quantize=None, **options):
        program = moe_fx.transform(export(Gathered(), **options), moe_fx.Config(quantize=quantize))
        (layer,) = moe_fx.report(program).layers
        return layer.lowering, layer.why.split(":")[0]

    assert chosen(tokens=2, dynamic=False) == ("gather", "2 tokens are 4 slots for 4 experts")
    assert chosen(tokens=2, dynamic=False, quantize=moe_fx.Int8WeightOnly()) == ("grouped_mm", "2 tokens")
    assert chosen(tokens=6, dynamic=False) == ("grouped_mm", "6 tokens")
    assert chosen() == ("grouped_mm", "up to 512 tokens")
