"""What each lowering writes for quantized weights."""

from expecttest import assert_expected_inline
from test_lowering import lowered

import moe_fx


def test_grouped_mm_int8():
    assert_expected_inline(
        lowered("grouped_mm", moe_fx.Int8WeightOnly()),
        """\
p_router: f32[2, 8]
b_up_qdata: i8[2, 16, 8]
b_up_scale: f32[2, 16]
b_down_qdata: i8[2, 8, 16]
b_down_scale: f32[2, 8]
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
transpose: i8[2, 8, 16] = aten.transpose(b_up_qdata, -2, -1)
grouped_mm: f32[2*s0, 16] = moe_fx.grouped_mm(index, transpose, searchsorted)
index_2: f32[2*s0, 16] = aten.index(b_up_scale, [getitem_2])
mul: f32[2*s0, 16] = aten.mul(grouped_mm, index_2)
relu: f32[2*s0, 16] = aten.relu(mul)
square: f32[2*s0, 16] = aten.square(relu)
transpose_1: i8[2, 16, 8] = aten.transpose(b_down_qdata, -2, -1)
grouped_mm_1: f32[2*s0, 8] = moe_fx.grouped_mm(square, transpose_1, searchsorted)
index_3: f32[2*s0, 8] = aten.index(b_down_scale, [getitem_2])
mul_1: f32[2*s0, 8] = aten.mul(grouped_mm_1, index_3)
reshape_2: f32[2*s0, 1] = aten.reshape(index_1, [-1, 1])
mul_2: f32[2*s0, 8] = aten.mul(mul_1, reshape_2)
sym_size = aten.sym_size(getitem_3, 0)
arange_1: i64[2*s0] = aten.arange(sym_size, dtype=i64)
zeros_like: i64[2*s0] = aten.zeros_like(getitem_3)
scatter: i64[2*s0] = aten.scatter(zeros_like, 0, getitem_3, arange_1)
index_4: f32[2*s0, 8] = aten.index(mul_2, [scatter])
reshape_3: f32[s0, 2, 8] = aten.reshape(index_4, [-1, 2, 8])
sum_1: f32[s0, 8] = aten.sum(reshape_3, [1])
return (sum_1,)
""",
    )


def test_linear_int8():
    assert_expected_inline(
        lowered("linear", moe_fx.Int8WeightOnly()),
        """\
p_router: f32[2, 8]
b_up_qdata: i8[2, 16, 8]
b_up_scale: f32[2, 16]
b_down_qdata: i8[2, 8, 16]
b_down_scale: f32[2, 8]
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
kept: i8[2, 16, 8] = moe_fx.kept(b_up_qdata)
unbind_2 = aten.unbind(kept, 0)
kept_1: f32[2, 16] = moe_fx.kept(b_up_scale)
unbind_3 = aten.unbind(kept_1, 0)
kept_2: i8[2, 8, 16] = moe_fx.kept(b_down_qdata)
unbind_4 = aten.unbind(kept_2, 0)
kept_3: f32[2, 8] = moe_fx.kept(b_down_scale)
unbind_5 = aten.unbind(kept_3, 0)
getitem_2: i8[16, 8] = getitem(unbind_2, 0)
getitem_3: f32[16] = getitem(unbind_3, 0)
getitem_4: i8[8, 16] = getitem(unbind_4, 0)
getitem_5: f32[8] = getitem(unbind_5, 0)
getitem_6: f32[s0] = getitem(unbind, 0)
to: f32[16, 8] = aten.to(getitem_2, f32)
linear_1: f32[s0, 16] = aten.linear(x, to)
mul: f32[s0, 16] = aten.mul(linear_1, getitem_3)
relu: f32[s0, 16] = aten.relu(mul)
square: f32[s0, 16] = aten.square(relu)
to_1: f32[8, 16] = aten.to(getitem_4, f32)
linear_2: f32[s0, 8] = aten.linear(square, to_1)
mul_1: f32[s0, 8] = aten.mul(linear_2, getitem_5)
reshape: f32[s0, 1] = aten.reshape(getitem_6, [-1, 1])
mul_2: f32[s0, 8] = aten.mul(mul_1, reshape)
getitem_7: bool[s0, 1] = getitem(unbind_1, 0)
scalar_tensor: f32[] = aten.scalar_tensor(0.0, dtype=f32)
where: f32[s0, 8] = aten.where(getitem_7, mul_2, scalar_tensor)
getitem_8: i8[16, 8] = getitem(unbind_2, 1)
getitem_9: f32[16] = getitem(unbind_3, 1)
getitem_10: i8[8, 16] = getitem(unbind_4, 1)
getitem_11: f32[8] = getitem(unbind_5, 1)
getitem_12: f32[s0] = getitem(unbind, 1)
to_2: f32[16, 8] = aten.to(getitem_8, f32)
linear_3: f32[s0, 16] = aten.linear(x, to_2)
mul_3: f32[s0, 16] = aten.mul(linear_3, getitem_9)
relu_1: f32[s0, 16] = aten.relu(mul_3)
square_1: f32[s0, 16] = aten.square(relu_1)
to_3: f32[8, 16] = aten.to(getitem_10, f32)
linear_4: f32[s0, 8] = aten.linear(square_1, to_3)
mul_4: f32[s0, 8] = aten.mul(linear_4, getitem_11)
reshape_1: f32[s0, 1] = aten.reshape(getitem_12, [-1, 1])
mul_5: f32[s0, 8] = aten.mul(mul_4, reshape_1)
getitem_13: bool[s0, 1] = getitem(unbind_1, 1)
where_1: f32[s0, 8] = aten.where(getitem_13, mul_5, scalar_tensor)
add: f32[s0, 8] = aten.add(where, where_1)
return (add,)
""",
    )


def test_gather_int8_dynamic():
    assert_expected_inline(
        lowered("gather", moe_fx.Int8Dynamic()),
        """\
p_router: f32[2, 8]
b_up_qdata: i8[2, 16, 8]
b_up_scale: f32[2, 16]
b_down_qdata: i8[2, 8, 16]
b_down_scale: f32[2, 8]
x: f32[s0, 8]
...
div: f32[s0, 2] = aten.div(getitem, sum)
reshape: i64[2*s0] = aten.reshape(getitem_1, [-1])
unsqueeze: f32[s0, 1, 8] = aten.unsqueeze(x, 1)
expand: f32[s0, 2, 8] = aten.expand(unsqueeze, [-1, 2, 8])
reshape_1: f32[2*s0, 8] = aten.reshape(expand, [-1, 8])
reshape_2: f32[2*s0] = aten.reshape(div, [-1])
abs: f32[2*s0, 8] = aten.abs(reshape_1)
amax: f32[2*s0, 1] = aten.amax(abs, [-1], True)
div_1: f32[2*s0, 1] = aten.div(amax, 127.0)
clamp_min: f32[2*s0, 1] = aten.clamp_min(div_1, 1.1920928955078125e-07)
reciprocal: f32[2*s0, 1] = aten.reciprocal(clamp_min)
mul: f32[2*s0, 8] = aten.mul(reshape_1, reciprocal)
round: f32[2*s0, 8] = aten.round(mul)
clamp: f32[2*s0, 8] = aten.clamp(round, -128, 127)
index: i8[2*s0, 16, 8] = aten.index(b_up_qdata, [reshape])
unsqueeze_1: f32[2*s0, 1, 8] = aten.unsqueeze(clamp, -2)
to: f32[2*s0, 16, 8] = aten.to(index, f32)
mul_1: f32[2*s0, 16, 8] = aten.mul(to, unsqueeze_1)
sum_1: f32[2*s0, 16] = aten.sum(mul_1, [-1])
index_1: f32[2*s0, 16] = aten.index(b_up_scale, [reshape])
mul_2: f32[2*s0, 16] = aten.mul(sum_1, clamp_min)
mul_3: f32[2*s0, 16] = aten.mul(mul_2, index_1)
relu: f32[2*s0, 16] = aten.relu(mul_3)
square: f32[2*s0, 16] = aten.square(relu)
abs_1: f32[2*s0, 16] = aten.abs(square)
amax_1: f32[2*s0, 1] = aten.amax(abs_1, [-1], True)
div_2: f32[2*s0, 1] = aten.div(amax_1, 127.0)
clamp_min_1: f32[2*s0, 1] = aten.clamp_min(div_2, 1.1920928955078125e-07)
reciprocal_1: f32[2*s0, 1] = aten.reciprocal(clamp_min_1)
mul_4: f32[2*s0, 16] = aten.mul(square, reciprocal_1)
round_1: f32[2*s0, 16] = aten.round(mul_4)
clamp_1: f32[2*s0, 16] = aten.clamp(round_1, -128, 127)
index_2: i8[2*s0, 8, 16] = aten.index(b_down_qdata, [reshape])
unsqueeze_2: f32[2*s0, 1, 16] = aten.unsqueeze(clamp_1, -2)
to_1: f32[2*s0, 8, 16] = aten.to(index_2, f32)
mul_5: f32[2*s0, 8, 16] = aten.mul(to_1, unsqueeze_2)
sum_2: f32[2*s0, 8] = aten.sum(mul_5, [-1])
index_3: f32[2*s0, 8] = aten.index(b_down_scale, [reshape])
mul_6: f32[2*s0, 8] = aten.mul(sum_2, clamp_min_1)
mul_7: f32[2*s0, 8] = aten.mul(mul_6, index_3)
reshape_3: f32[2*s0, 1] = aten.reshape(reshape_2, [-1, 1])
mul_8: f32[2*s0, 8] = aten.mul(mul_7, reshape_3)
reshape_4: f32[s0, 2, 8] = aten.reshape(mul_8, [-1, 2, 8])
sum_3: f32[s0, 8] = aten.sum(reshape_4, [1])
return (sum_3,)
""",
    )


def test_linear_float8_dynamic():
    assert_expected_inline(
        lowered("linear", moe_fx.Float8Dynamic()),
        """\
p_router: f32[2, 8]
b_up_qdata: f8[2, 16, 8]
b_up_scale: f32[2, 16]
b_down_qdata: f8[2, 8, 16]
b_down_scale: f32[2, 8]
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
kept: f8[2, 16, 8] = moe_fx.kept(b_up_qdata)
unbind_2 = aten.unbind(kept, 0)
kept_1: f32[2, 16] = moe_fx.kept(b_up_scale)
unbind_3 = aten.unbind(kept_1, 0)
kept_2: f8[2, 8, 16] = moe_fx.kept(b_down_qdata)
unbind_4 = aten.unbind(kept_2, 0)
kept_3: f32[2, 8] = moe_fx.kept(b_down_scale)
unbind_5 = aten.unbind(kept_3, 0)
getitem_2: f8[16, 8] = getitem(unbind_2, 0)
getitem_3: f32[16] = getitem(unbind_3, 0)
getitem_4: f8[8, 16] = getitem(unbind_4, 0)
getitem_5: f32[8] = getitem(unbind_5, 0)
getitem_6: f32[s0] = getitem(unbind, 0)
abs: f32[s0, 8] = aten.abs(x)
amax: f32[s0, 1] = aten.amax(abs, [-1], True)
div_1: f32[s0, 1] = aten.div(amax, 448.0)
clamp_min: f32[s0, 1] = aten.clamp_min(div_1, 1.1920928955078125e-07)
div_2: f32[s0, 8] = aten.div(x, clamp_min)
clamp: f32[s0, 8] = aten.clamp(div_2, -448.0, 448.0)
to: f8[s0, 8] = aten.to(clamp, f8)
to_1: f32[s0, 8] = aten.to(to, f32)
to_2: f32[16, 8] = aten.to(getitem_2, f32)
linear_1: f32[s0, 16] = aten.linear(to_1, to_2)
mul: f32[s0, 16] = aten.mul(linear_1, clamp_min)
mul_1: f32[s0, 16] = aten.mul(mul, getitem_3)
relu: f32[s0, 16] = aten.relu(mul_1)
square: f32[s0, 16] = aten.square(relu)
abs_1: f32[s0, 16] = aten.abs(square)
amax_1: f32[s0, 1] = aten.amax(abs_1, [-1], True)
div_3: f32[s0, 1] = aten.div(amax_1, 448.0)
clamp_min_1: f32[s0, 1] = aten.clamp_min(div_3, 1.1920928955078125e-07)
div_4: f32[s0, 16] = aten.div(square, clamp_min_1)
clamp_1: f32[s0, 16] = aten.clamp(div_4, -448.0, 448.0)
to_3: f8[s0, 16] = aten.to(clamp_1, f8)
to_4: f32[s0, 16] = aten.to(to_3, f32)
to_5: f32[8, 16] = aten.to(getitem_4, f32)
linear_2: f32[s0, 8] = aten.linear(to_4, to_5)
mul_2: f32[s0, 8] = aten.mul(linear_2, clamp_min_1)
mul_3: f32[s0, 8] = aten.mul(mul_2, getitem_5)
reshape: f32[s0, 1] = aten.reshape(getitem_6, [-1, 1])
mul_4: f32[s0, 8] = aten.mul(mul_3, reshape)
getitem_7: bool[s0, 1] = getitem(unbind_1, 0)
scalar_tensor: f32[] = aten.scalar_tensor(0.0, dtype=f32)
where: f32[s0, 8] = aten.where(getitem_7, mul_4, scalar_tensor)
getitem_8: f8[16, 8] = getitem(unbind_2, 1)
getitem_9: f32[16] = getitem(unbind_3, 1)
getitem_10: f8[8, 16] = getitem(unbind_4, 1)
getitem_11: f32[8] = getitem(unbind_5, 1)
getitem_12: f32[s0] = getitem(unbind, 1)
to_6: f32[16, 8] = aten.to(getitem_8, f32)
linear_3: f32[s0, 16] = aten.linear(to_1, to_6)
mul_5: f32[s0, 16] = aten.mul(linear_3, clamp_min)
mul_6: f32[s0, 16] = aten.mul(mul_5, getitem_9)
relu_1: f32[s0, 16] = aten.relu(mul_6)
square_1: f32[s0, 16] = aten.square(relu_1)
abs_2: f32[s0, 16] = aten.abs(square_1)
amax_2: f32[s0, 1] = aten.amax(abs_2, [-1], True)
div_5: f32[s0, 1] = aten.div(amax_2, 448.0)
clamp_min_2: f32[s0, 1] = aten.clamp_min(div_5, 1.1920928955078125e-07)
div_6: f32[s0, 16] = aten.div(square_1, clamp_min_2)
clamp_2: f32[s0, 16] = aten.clamp(div_6, -448.0, 448.0)
to_7: f8[s0, 16] = aten.to(clamp_2, f8)
to_8: f32[s0, 16] = aten.to(to_7, f32)
to_9: f32[8, 16] = aten.to(getitem_10, f32)
linear_4: f32[s0, 8] = aten.linear(to_8, to_9)
mul_7: f32[s0, 8] = aten.mul(linear_4, clamp_min_2)
mul_8: f32[s0, 8] = aten.mul(mul_7, getitem_11)
reshape_1: f32[s0, 1] = aten.reshape(getitem_12, [-1, 1])
mul_9: f32[s0, 8] = aten.mul(mul_8, reshape_1)
getitem_13: bool[s0, 1] = getitem(unbind_1, 1)
where_1: f32[s0, 8] = aten.where(getitem_13, mul_9, scalar_tensor)
add: f32[s0, 8] = aten.add(where, where_1)
return (add,)
""",
    )


def test_grouped_mm_int4():
    assert_expected_inline(
        lowered("grouped_mm", moe_fx.Int4WeightOnly(8)),
        """\
p_router: f32[2, 8]
b_up_qdata: u8[2, 16, 4]
b_up_scale: f32[2, 16, 1]
b_down_qdata: u8[2, 8, 8]
b_down_scale: f32[2, 8, 2]
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
grouped_mm_int4: f32[2*s0, 16] = moe_fx.grouped_mm_int4(index, b_up_qdata, b_up_scale, None, searchsorted)
relu: f32[2*s0, 16] = aten.relu(grouped_mm_int4)
square: f32[2*s0, 16] = aten.square(relu)
grouped_mm_int4_1: f32[2*s0, 8] = moe_fx.grouped_mm_int4(square, b_down_qdata, b_down_scale, None, searchsorted)
reshape_2: f32[2*s0, 1] = aten.reshape(index_1, [-1, 1])
mul: f32[2*s0, 8] = aten.mul(grouped_mm_int4_1, reshape_2)
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


def test_gather_int4_with_zero_points():
    assert_expected_inline(
        lowered("gather", moe_fx.Int4WeightOnly(8, symmetric=False)),
        """\
p_router: f32[2, 8]
b_up_qdata: u8[2, 16, 4]
b_up_scale: f32[2, 16, 1]
b_up_zero: i8[2, 16, 1]
b_down_qdata: u8[2, 8, 8]
b_down_scale: f32[2, 8, 2]
b_down_zero: i8[2, 8, 2]
x: f32[s0, 8]
...
div: f32[s0, 2] = aten.div(getitem, sum)
reshape: i64[2*s0] = aten.reshape(getitem_1, [-1])
unsqueeze: f32[s0, 1, 8] = aten.unsqueeze(x, 1)
expand: f32[s0, 2, 8] = aten.expand(unsqueeze, [-1, 2, 8])
reshape_1: f32[2*s0, 8] = aten.reshape(expand, [-1, 8])
reshape_2: f32[2*s0] = aten.reshape(div, [-1])
index: u8[2*s0, 16, 4] = aten.index(b_up_qdata, [reshape])
index_1: f32[2*s0, 16, 1] = aten.index(b_up_scale, [reshape])
index_2: i8[2*s0, 16, 1] = aten.index(b_up_zero, [reshape])
unsqueeze_1: f32[2*s0, 1, 8] = aten.unsqueeze(reshape_1, -2)
bitwise_and: u8[2*s0, 16, 4] = aten.bitwise_and(index, 15)
bitwise_right_shift: u8[2*s0, 16, 4] = aten.bitwise_right_shift(index, 4)
reshape_3: u8[2*s0, 16, 1, 4] = aten.reshape(bitwise_and, [-1, 16, 1, 4])
to: f32[2*s0, 16, 1, 4] = aten.to(reshape_3, f32)
sub: f32[2*s0, 16, 1, 4] = aten.sub(to, 8)
unsqueeze_2: i8[2*s0, 16, 1, 1] = aten.unsqueeze(index_2, -1)
to_1: f32[2*s0, 16, 1, 1] = aten.to(unsqueeze_2, f32)
sub_1: f32[2*s0, 16, 1, 4] = aten.sub(sub, to_1)
unsqueeze_3: f32[2*s0, 16, 1, 1] = aten.unsqueeze(index_1, -1)
mul: f32[2*s0, 16, 1, 4] = aten.mul(sub_1, unsqueeze_3)
reshape_4: f32[2*s0, 16, 4] = aten.reshape(mul, [-1, 16, 4])
reshape_5: u8[2*s0, 16, 1, 4] = aten.reshape(bitwise_right_shift, [-1, 16, 1, 4])
to_2: f32[2*s0, 16, 1, 4] = aten.to(reshape_5, f32)
sub_2: f32[2*s0, 16, 1, 4] = aten.sub(to_2, 8)
unsqueeze_4: i8[2*s0, 16, 1, 1] = aten.unsqueeze(index_2, -1)
to_3: f32[2*s0, 16, 1, 1] = aten.to(unsqueeze_4, f32)
sub_3: f32[2*s0, 16, 1, 4] = aten.sub(sub_2, to_3)
unsqueeze_5: f32[2*s0, 16, 1, 1] = aten.unsqueeze(index_1, -1)
mul_1: f32[2*s0, 16, 1, 4] = aten.mul(sub_3, unsqueeze_5)
reshape_6: f32[2*s0, 16, 4] = aten.reshape(mul_1, [-1, 16, 4])
reshape_7: f32[2*s0, 1, 4, 2] = aten.reshape(unsqueeze_1, [-1, 1, 4, 2])
select: f32[2*s0, 1, 4] = aten.select(reshape_7, -1, 0)
mul_2: f32[2*s0, 16, 4] = aten.mul(reshape_4, select)
select_1: f32[2*s0, 1, 4] = aten.select(reshape_7, -1, 1)
mul_3: f32[2*s0, 16, 4] = aten.mul(reshape_6, select_1)
add: f32[2*s0, 16, 4] = aten.add(mul_2, mul_3)
sum_1: f32[2*s0, 16] = aten.sum(add, [-1])
relu: f32[2*s0, 16] = aten.relu(sum_1)
square: f32[2*s0, 16] = aten.square(relu)
index_3: u8[2*s0, 8, 8] = aten.index(b_down_qdata, [reshape])
index_4: f32[2*s0, 8, 2] = aten.index(b_down_scale, [reshape])
index_5: i8[2*s0, 8, 2] = aten.index(b_down_zero, [reshape])
unsqueeze_6: f32[2*s0, 1, 16] = aten.unsqueeze(square, -2)
bitwise_and_1: u8[2*s0, 8, 8] = aten.bitwise_and(index_3, 15)
bitwise_right_shift_1: u8[2*s0, 8, 8] = aten.bitwise_right_shift(index_3, 4)
reshape_8: u8[2*s0, 8, 2, 4] = aten.reshape(bitwise_and_1, [-1, 8, 2, 4])
to_4: f32[2*s0, 8, 2, 4] = aten.to(reshape_8, f32)
sub_4: f32[2*s0, 8, 2, 4] = aten.sub(to_4, 8)
unsqueeze_7: i8[2*s0, 8, 2, 1] = aten.unsqueeze(index_5, -1)
to_5: f32[2*s0, 8, 2, 1] = aten.to(unsqueeze_7, f32)
sub_5: f32[2*s0, 8, 2, 4] = aten.sub(sub_4, to_5)
unsqueeze_8: f32[2*s0, 8, 2, 1] = aten.unsqueeze(index_4, -1)
mul_4: f32[2*s0, 8, 2, 4] = aten.mul(sub_5, unsqueeze_8)
reshape_9: f32[2*s0, 8, 8] = aten.reshape(mul_4, [-1, 8, 8])
reshape_10: u8[2*s0, 8, 2, 4] = aten.reshape(bitwise_right_shift_1, [-1, 8, 2, 4])
to_6: f32[2*s0, 8, 2, 4] = aten.to(reshape_10, f32)
sub_6: f32[2*s0, 8, 2, 4] = aten.sub(to_6, 8)
unsqueeze_9: i8[2*s0, 8, 2, 1] = aten.unsqueeze(index_5, -1)
to_7: f32[2*s0, 8, 2, 1] = aten.to(unsqueeze_9, f32)
sub_7: f32[2*s0, 8, 2, 4] = aten.sub(sub_6, to_7)
unsqueeze_10: f32[2*s0, 8, 2, 1] = aten.unsqueeze(index_4, -1)
mul_5: f32[2*s0, 8, 2, 4] = aten.mul(sub_7, unsqueeze_10)
reshape_11: f32[2*s0, 8, 8] = aten.reshape(mul_5, [-1, 8, 8])
reshape_12: f32[2*s0, 1, 8, 2] = aten.reshape(unsqueeze_6, [-1, 1, 8, 2])
select_2: f32[2*s0, 1, 8] = aten.select(reshape_12, -1, 0)
mul_6: f32[2*s0, 8, 8] = aten.mul(reshape_9, select_2)
select_3: f32[2*s0, 1, 8] = aten.select(reshape_12, -1, 1)
mul_7: f32[2*s0, 8, 8] = aten.mul(reshape_11, select_3)
add_1: f32[2*s0, 8, 8] = aten.add(mul_6, mul_7)
sum_2: f32[2*s0, 8] = aten.sum(add_1, [-1])
reshape_13: f32[2*s0, 1] = aten.reshape(reshape_2, [-1, 1])
mul_8: f32[2*s0, 8] = aten.mul(sum_2, reshape_13)
reshape_14: f32[s0, 2, 8] = aten.reshape(mul_8, [-1, 2, 8])
sum_3: f32[s0, 8] = aten.sum(reshape_14, [1])
return (sum_3,)
""",
    )
