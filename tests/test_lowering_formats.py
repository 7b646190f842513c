"""What each lowering writes for quantized weights."""

import copy
import itertools

import pytest
import torch
from expecttest import assert_expected_inline
from test_lowering import lowered
from toys import Gathered, export, swiglu

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
unbind_2 = aten.unbind(b_up_qdata, 0)
unbind_3 = aten.unbind(b_up_scale, 0)
unbind_4 = aten.unbind(b_down_qdata, 0)
unbind_5 = aten.unbind(b_down_scale, 0)
getitem_2: i8[16, 8] = getitem(unbind_2, 0)
getitem_3: f32[16] = getitem(unbind_3, 0)
getitem_4: i8[8, 16] = getitem(unbind_4, 0)
getitem_5: f32[8] = getitem(unbind_5, 0)
getitem_6: f32[s0] = getitem(unbind, 0)
kept: i8[16, 8] = moe_fx.kept(getitem_2)
to: f32[16, 8] = aten.to(kept, f32)
linear_1: f32[s0, 16] = aten.linear(x, to)
mul: f32[s0, 16] = aten.mul(linear_1, getitem_3)
relu: f32[s0, 16] = aten.relu(mul)
square: f32[s0, 16] = aten.square(relu)
kept_1: i8[8, 16] = moe_fx.kept(getitem_4)
to_1: f32[8, 16] = aten.to(kept_1, f32)
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
kept_2: i8[16, 8] = moe_fx.kept(getitem_8)
to_2: f32[16, 8] = aten.to(kept_2, f32)
linear_3: f32[s0, 16] = aten.linear(x, to_2)
mul_3: f32[s0, 16] = aten.mul(linear_3, getitem_9)
relu_1: f32[s0, 16] = aten.relu(mul_3)
square_1: f32[s0, 16] = aten.square(relu_1)
kept_3: i8[8, 16] = moe_fx.kept(getitem_10)
to_3: f32[8, 16] = aten.to(kept_3, f32)
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
to: f32[2*s0, 16, 8] = aten.to(index, f32)
unsqueeze_1: f32[2*s0, 1, 8] = aten.unsqueeze(clamp, -2)
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
to_1: f32[2*s0, 8, 16] = aten.to(index_2, f32)
unsqueeze_2: f32[2*s0, 1, 16] = aten.unsqueeze(clamp_1, -2)
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
unbind_2 = aten.unbind(b_up_qdata, 0)
unbind_3 = aten.unbind(b_up_scale, 0)
unbind_4 = aten.unbind(b_down_qdata, 0)
unbind_5 = aten.unbind(b_down_scale, 0)
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
kept: f8[16, 8] = moe_fx.kept(getitem_2)
to_2: f32[16, 8] = aten.to(kept, f32)
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
kept_1: f8[8, 16] = moe_fx.kept(getitem_4)
to_5: f32[8, 16] = aten.to(kept_1, f32)
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
kept_2: f8[16, 8] = moe_fx.kept(getitem_8)
to_6: f32[16, 8] = aten.to(kept_2, f32)
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
kept_3: f8[8, 16] = moe_fx.kept(getitem_10)
to_9: f32[8, 16] = aten.to(kept_3, f32)
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
arange: u8[2] = aten.arange(0, 8, 4, dtype=u8)
unsqueeze_1: u8[2*s0, 16, 4, 1] = aten.unsqueeze(index, -1)
bitwise_right_shift: u8[2*s0, 16, 4, 2] = aten.bitwise_right_shift(unsqueeze_1, arange)
bitwise_and: u8[2*s0, 16, 4, 2] = aten.bitwise_and(bitwise_right_shift, 15)
reshape_3: u8[2*s0, 16, 1, 8] = aten.reshape(bitwise_and, [-1, 16, 1, 8])
to: f32[2*s0, 16, 1, 8] = aten.to(reshape_3, f32)
sub: f32[2*s0, 16, 1, 8] = aten.sub(to, 8)
unsqueeze_2: i8[2*s0, 16, 1, 1] = aten.unsqueeze(index_2, -1)
to_1: f32[2*s0, 16, 1, 1] = aten.to(unsqueeze_2, f32)
sub_1: f32[2*s0, 16, 1, 8] = aten.sub(sub, to_1)
unsqueeze_3: f32[2*s0, 16, 1, 1] = aten.unsqueeze(index_1, -1)
mul: f32[2*s0, 16, 1, 8] = aten.mul(sub_1, unsqueeze_3)
reshape_4: f32[2*s0, 16, 8] = aten.reshape(mul, [-1, 16, 8])
unsqueeze_4: f32[2*s0, 1, 8] = aten.unsqueeze(reshape_1, -2)
mul_1: f32[2*s0, 16, 8] = aten.mul(reshape_4, unsqueeze_4)
sum_1: f32[2*s0, 16] = aten.sum(mul_1, [-1])
relu: f32[2*s0, 16] = aten.relu(sum_1)
square: f32[2*s0, 16] = aten.square(relu)
index_3: u8[2*s0, 8, 8] = aten.index(b_down_qdata, [reshape])
index_4: f32[2*s0, 8, 2] = aten.index(b_down_scale, [reshape])
index_5: i8[2*s0, 8, 2] = aten.index(b_down_zero, [reshape])
arange_1: u8[2] = aten.arange(0, 8, 4, dtype=u8)
unsqueeze_5: u8[2*s0, 8, 8, 1] = aten.unsqueeze(index_3, -1)
bitwise_right_shift_1: u8[2*s0, 8, 8, 2] = aten.bitwise_right_shift(unsqueeze_5, arange_1)
bitwise_and_1: u8[2*s0, 8, 8, 2] = aten.bitwise_and(bitwise_right_shift_1, 15)
reshape_5: u8[2*s0, 8, 2, 8] = aten.reshape(bitwise_and_1, [-1, 8, 2, 8])
to_2: f32[2*s0, 8, 2, 8] = aten.to(reshape_5, f32)
sub_2: f32[2*s0, 8, 2, 8] = aten.sub(to_2, 8)
unsqueeze_6: i8[2*s0, 8, 2, 1] = aten.unsqueeze(index_5, -1)
to_3: f32[2*s0, 8, 2, 1] = aten.to(unsqueeze_6, f32)
sub_3: f32[2*s0, 8, 2, 8] = aten.sub(sub_2, to_3)
unsqueeze_7: f32[2*s0, 8, 2, 1] = aten.unsqueeze(index_4, -1)
mul_2: f32[2*s0, 8, 2, 8] = aten.mul(sub_3, unsqueeze_7)
reshape_6: f32[2*s0, 8, 16] = aten.reshape(mul_2, [-1, 8, 16])
unsqueeze_8: f32[2*s0, 1, 16] = aten.unsqueeze(square, -2)
mul_3: f32[2*s0, 8, 16] = aten.mul(reshape_6, unsqueeze_8)
sum_2: f32[2*s0, 8] = aten.sum(mul_3, [-1])
reshape_7: f32[2*s0, 1] = aten.reshape(reshape_2, [-1, 1])
mul_4: f32[2*s0, 8] = aten.mul(sum_2, reshape_7)
reshape_8: f32[s0, 2, 8] = aten.reshape(mul_4, [-1, 2, 8])
sum_3: f32[s0, 8] = aten.sum(reshape_8, [1])
return (sum_3,)
""",
    )


LOWERINGS = ("grouped_mm", "linear", "gather")
FORMATS = (
    moe_fx.Int8WeightOnly(), moe_fx.Int8Dynamic(), moe_fx.Float8WeightOnly(), moe_fx.Float8Dynamic(),
    moe_fx.Int4WeightOnly(16), moe_fx.Int4WeightOnly(8, symmetric=False),
)  # fmt: skip


def layer(dtype, activation=swiglu):
    return Gathered(dtype=dtype, hidden=32, inner=48, bias=True, activation=activation)


class Defined(Gathered):
    """The layer as the format's own ``linear`` defines it, row by row."""

    def apply(self, rows, weight, ids):
        if weight is self.down and self.only_up:
            return super().apply(rows, weight, ids)
        # On the device of the program: a division rounds as the device does, and a weight between two steps follows.
        stored = [tensor.cpu() for tensor in self.form.quantize(weight.to(self.device))]
        return torch.cat(
            [
                self.form.linear(row.unsqueeze(0), *(tensor[e] for tensor in stored))
                for row, e in zip(rows, ids, strict=True)
            ]
        )


def defined(model, form, device="cpu", only_up=False):
    twin = copy.copy(model)
    twin.__class__, twin.form, twin.device, twin.only_up = Defined, form, device, only_up
    return twin


def x(tokens, dtype):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def sqnr(actual, expected):
    actual, expected = actual.double(), expected.double()
    return float(10 * torch.log10(expected.pow(2).mean() / (actual - expected).pow(2).mean()))


def rounding(form):
    """dB that float32 sums in another order leave; an activation between two steps may then take the other one."""
    return 60 if getattr(form, "dynamic", False) else 120


@pytest.mark.parametrize("form", FORMATS, ids=repr)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_format_in_every_lowering_equals_its_definition(lowering, form):
    model = layer(torch.float32)
    program = moe_fx.transform(
        export(model, hidden=32), moe_fx.Config(experts=lowering, quantize=form, require="all")
    ).module()
    for tokens in (6, 11):
        with torch.no_grad():
            actual, expected = program(x(tokens, torch.float32)), defined(model, form)(x(tokens, torch.float32))
        assert sqnr(actual, expected) > rounding(form)


@pytest.mark.parametrize("form", FORMATS, ids=repr)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_format_in_bfloat16_is_within_rounding(lowering, form):
    model = layer(torch.bfloat16)
    program = moe_fx.transform(
        export(model, hidden=32), moe_fx.Config(experts=lowering, quantize=form, require="all")
    ).module()
    with torch.no_grad():
        actual, expected = program(x(6, torch.bfloat16)), defined(model, form)(x(6, torch.bfloat16))
    assert actual.dtype is torch.bfloat16
    assert sqnr(actual, expected) > 35


@pytest.mark.slow  # Inductor compiles a layer
@pytest.mark.parametrize(
    ("lowering", "form"),
    [
        # Each lowering and each format once; the rest is the exhaustive product.
        pytest.param(lowering, form, marks=[] if (i - j) % 3 == 0 else pytest.mark.exhaustive)
        for (i, lowering), (j, form) in itertools.product(enumerate(LOWERINGS), enumerate(FORMATS))
    ],
    ids=repr,
)
def test_every_format_compiles_in_one_graph(lowering, form):
    program = moe_fx.transform(
        export(layer(torch.float32), hidden=32), moe_fx.Config(experts=lowering, quantize=form, require="all")
    ).module()
    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True)
    for tokens in (6, 11):
        with torch.no_grad():
            actual, expected = compiled(x(tokens, torch.float32)), program(x(tokens, torch.float32))
        assert sqnr(actual, expected) > rounding(form)


def test_a_group_size_that_does_not_fit_is_an_error_that_says_what_fits():
    with pytest.raises(moe_fx.ProgramError) as error:
        moe_fx.transform(export(layer(torch.float32), hidden=32), moe_fx.Config(quantize=moe_fx.Int4WeightOnly(128)))
    assert str(error.value) == (
        "up cannot be stored as Int4WeightOnly(group_size=128, symmetric=True): its 32 inputs are not a multiple of "
        "group_size=128; those that fit are 32, 16, 8"
    )


def test_float8_on_a_cpu_says_why_the_scaled_op_is_not_used():
    config = moe_fx.Config(experts="grouped_mm", quantize=moe_fx.Float8Dynamic())
    why = moe_fx.report(moe_fx.transform(export(layer(torch.bfloat16), hidden=32), config)).layers[0].why
    assert "torch._scaled_grouped_mm needs a GPU of compute capability 9.0, not cpu" in why


@pytest.mark.slow  # Inductor compiles a layer
@pytest.mark.parametrize("form", [moe_fx.Int8WeightOnly(), moe_fx.Int4WeightOnly(16)], ids=repr)
def test_freezing_does_not_widen_weights(form, monkeypatch):
    import torch._inductor.config as inductor
    from torch._inductor import constant_folding, freezing

    folded = []
    original = constant_folding.replace_node_with_constant

    def replace(module, node, constant=None, name=None):
        if constant is not None:
            folded.append(constant)
        return original(module, node, constant, name)

    monkeypatch.setattr(constant_folding, "replace_node_with_constant", replace)
    monkeypatch.setattr(freezing, "replace_node_with_constant", replace)
    program = moe_fx.transform(export(layer(torch.float32), hidden=32), moe_fx.Config(experts="linear", quantize=form))
    torch.compiler.reset()
    with inductor.patch(freezing=True), torch.no_grad():
        actual = torch.compile(program.module(), fullgraph=True)(x(6, torch.float32))
        assert sqnr(actual, program.module()(x(6, torch.float32))) > 120
    assert folded  # the hook is still where it was
    weights = {tuple(program.state_dict[name].shape[1:]) for name in ("up_qdata", "down_qdata")} | {(96, 32), (32, 48)}
    wide = [tensor.shape for tensor in folded if tensor.dtype.itemsize > 1]
    assert not weights & {tuple(shape) for shape in wide} | weights & {tuple(reversed(shape)) for shape in wide}
