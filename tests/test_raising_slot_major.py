"""Rows sorted that stand slot after slot, and results written at parts of sorted places: before, after, and wrong."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from moe_fx.passes.normalize import normalize
from moe_fx.passes.raising import raise_layers
from styles.base import H
from styles.serving import PutAtParts
from styles.slot_major import Gathered
from torch.export import Dim

import moe_fx
from moe_fx.pipeline import Work
from moe_fx.printer import format_graph
from moe_fx.program import ExportedWork


class Whole(Gathered):
    """``wrong`` says what is not as it should be."""

    def __init__(self, wrong=""):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        ids, weights = self.router(x)
        flat, weights = ids.t().reshape(-1), (weights if self.wrong == "weights" else weights.t()).reshape(-1)
        flat = ids.reshape(-1) if self.wrong == "ids" else flat
        order = flat.argsort(stable=True)
        rows = x.repeat_interleave(self.K, 0) if self.wrong == "repeated" else x.repeat(self.K, 1)
        taken = {
            "token": lambda: x[order // self.K], "modulus": lambda: x[order % (x.shape[0] // 2)],
            "slots": lambda: x[order % self.K],
        }  # fmt: skip
        rows = taken[self.wrong]() if self.wrong in taken else rows[order]
        if self.wrong == "read":  # of other places than the rows are taken from
            rows = self.of_numbers(rows, ids.reshape(-1)[order])
        else:
            rows = self.experts(rows, ids.flip(-1).t().reshape(-1) if self.wrong == "sorted" else flat)
        out = torch.empty_like(rows)
        out[order] = rows * weights[order, None]
        return out.view(-1, self.K, H).sum(1) if self.wrong == "summed" else out.view(self.K, -1, H).sum(0)


class Put(PutAtParts):
    def __init__(self, wrong=""):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        ids, weights = self.router(x)
        flat = ids.reshape(-1)
        order, counts, start = flat.argsort(stable=True), F.one_hot(flat, self.E).sum(0), 0
        y = x.new_ones(flat.shape[0], H) if self.wrong == "ones" else x.new_zeros(flat.shape[0], H)
        for e, count in enumerate((counts.flip(0) if self.wrong == "counts" else counts).tolist()):
            at = order[start : start + count]
            rows = x[at // self.K] + (y.sum(0) if self.wrong == "before" else 0)
            if not (self.wrong in ("last", "ones") and e == self.E - 1):
                y[at] = self.expert(rows, (e + 1) % self.E if self.wrong == "expert" else e)
            start += count
        return (y.view(-1, self.K, H) * weights.unsqueeze(-1)).sum(1)


def exported(model, export=torch.export.export):
    return export(model, (torch.randn(6, H),), dynamic_shapes=({0: Dim.AUTO},))


def same_numbers(model, program):
    """Whatever the rules make of a program by themselves, for other routing and numbers of tokens."""
    after = moe_fx.transform(program, moe_fx.Config(validate=False))
    for seed, tokens in enumerate((6, 6, 10, 16)):
        x = torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed))
        expected = model(x)
        assert (after.module()(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    return moe_fx.report(after).layers


WRONG = ("token", "modulus", "slots", "weights", "ids", "repeated", "sorted", "summed", "read")


@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "core"])
@pytest.mark.parametrize("wrong", WRONG)
@torch.no_grad()
def test_of_slots_sorted_otherwise_only_what_each_row_meets_is_a_layer(wrong, decomposed):
    # Rows that gather their expert's weights are a layer of one slot each, wherever they come from.
    torch.manual_seed(0)
    model = Whole(wrong)
    program = exported(model)
    layers = same_numbers(model, program.run_decompositions() if decomposed else program)
    assert all(layer.top_k == 1 for layer in layers)


@torch.no_grad()
def test_as_many_tokens_as_slots_are_not_taken_for_one_another():
    # The order of tokens after tokens, and ids slot after slot: with T = K they have the same shape.
    class Both(Whole):
        def forward(self, x):
            ids, weights = self.router(x)
            flat = ids.t().reshape(-1)
            order = ids.reshape(-1).argsort(stable=True)
            rows = self.of_numbers(x.repeat(self.K, 1)[order], flat[order])
            out = torch.empty_like(rows)
            out[order] = rows
            return (out.view(self.K, -1, H) * weights.t().unsqueeze(-1)).sum(0)

    torch.manual_seed(0)
    model = Both()
    after = moe_fx.transform(torch.export.export(model, (torch.randn(2, H),)), moe_fx.Config(validate=False))
    for seed in range(6):
        x = torch.randn(2, H, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(after.module()(x), model(x))


@pytest.mark.parametrize("wrong", ["last", "ones", "counts", "before"])
@torch.no_grad()
def test_rows_written_otherwise_at_parts_of_sorted_places_are_no_layer(wrong):
    torch.manual_seed(0)
    model = Put(wrong)
    assert same_numbers(model, exported(model, moe_fx.export)) == ()


@torch.no_grad()
def test_rows_written_at_parts_by_experts_in_another_order_are_those_experts():
    torch.manual_seed(0)
    model = Put("expert")
    (layer,) = same_numbers(model, exported(model, moe_fx.export))
    assert (layer.num_experts, layer.top_k) == (4, 2)


def stages(model, export=torch.export.export):
    torch.manual_seed(0)
    work = Work(ExportedWork(exported(model, export)), moe_fx.Config())
    normalize(work)
    before = format_graph(work.program.graph)
    raise_layers(work)
    return f"{before}\n=>\n{format_graph(work.program.graph)}"


@torch.no_grad()
def test_rows_sorted_slot_after_slot():
    assert_expected_inline(
        stages(Whole()),
        """\
p_w_gate: f32[4, 16, 24]
p_w_up: f32[4, 16, 24]
p_w_down: f32[4, 24, 16]
p_router_linear_weight: f32[4, 16]
x: f32[s0, 16]
linear: f32[s0, 4] = aten.linear(x, p_router_linear_weight)
softmax: f32[s0, 4] = aten.softmax(linear, 1, f32)
topk = aten.topk(softmax, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
sum: f32[s0, 1] = aten.sum(getitem, [-1], True)
div: f32[s0, 2] = aten.div(getitem, sum)
transpose: i64[2, s0] = aten.transpose(getitem_1, -2, -1)
reshape: i64[2*s0] = aten.reshape(transpose, [-1])
transpose_1: f32[2, s0] = aten.transpose(div, -2, -1)
reshape_1: f32[2*s0] = aten.reshape(transpose_1, [-1])
argsort: i64[2*s0] = aten.argsort(reshape, stable=True)
repeat: f32[2*s0, 16] = aten.repeat(x, [2, 1])
index: f32[2*s0, 16] = aten.index(repeat, [argsort])
sort = aten.sort(reshape)
getitem_2: i64[2*s0] = getitem(sort, 0)
getitem_3: i64[2*s0] = getitem(sort, 1)
unsqueeze: f32[2*s0, 1, 16] = aten.unsqueeze(index, 1)
index_1: f32[2*s0, 16, 24] = aten.index(p_w_gate, [getitem_2])
bmm: f32[2*s0, 1, 24] = aten.bmm(unsqueeze, index_1)
index_2: f32[2*s0, 16, 24] = aten.index(p_w_up, [getitem_2])
bmm_1: f32[2*s0, 1, 24] = aten.bmm(unsqueeze, index_2)
silu: f32[2*s0, 1, 24] = aten.silu(bmm)
mul: f32[2*s0, 1, 24] = aten.mul(silu, bmm_1)
index_3: f32[2*s0, 24, 16] = aten.index(p_w_down, [getitem_2])
bmm_2: f32[2*s0, 1, 16] = aten.bmm(mul, index_3)
select: f32[2*s0, 16] = aten.select(bmm_2, 1, 0)
empty_like: f32[2*s0, 16] = aten.empty_like(select)
unsqueeze_1: f32[2*s0, 1] = aten.unsqueeze(reshape_1, 1)
index_4: f32[2*s0, 1] = aten.index(unsqueeze_1, [argsort])
mul_1: f32[2*s0, 16] = aten.mul(select, index_4)
index_put: f32[2*s0, 16] = aten.index_put(empty_like, [argsort], mul_1)
reshape_2: f32[2, s0, 16] = aten.reshape(index_put, [2, -1, 16])
sum_1: f32[s0, 16] = aten.sum(reshape_2, [0])
return (sum_1,)

=>
p_w_gate: f32[4, 16, 24]
p_w_up: f32[4, 16, 24]
p_w_down: f32[4, 24, 16]
p_router_linear_weight: f32[4, 16]
x: f32[s0, 16]
linear: f32[s0, 4] = aten.linear(x, p_router_linear_weight)
softmax: f32[s0, 4] = aten.softmax(linear, 1, f32)
topk = aten.topk(softmax, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
sum: f32[s0, 1] = aten.sum(getitem, [-1], True)
div: f32[s0, 2] = aten.div(getitem, sum)
moe_body_0 = attribute
experts: f32[s0, 16] = experts(x, getitem_1, (div,), (p_w_gate, p_w_up, p_w_down), (), moe_body_0)
return (experts,)
moe_body_0:
    x
    s0
    p0
    p1
    p2
    transpose = aten.transpose(p0, 0, 1)
    linear = aten.linear(x, transpose)
    reshape = aten.reshape(linear, [-1, 1, 24])
    silu = aten.silu(reshape)
    transpose_1 = aten.transpose(p1, 0, 1)
    linear_1 = aten.linear(x, transpose_1)
    reshape_1 = aten.reshape(linear_1, [-1, 1, 24])
    mul = aten.mul(silu, reshape_1)
    reshape_2 = aten.reshape(mul, [-1, 24])
    transpose_2 = aten.transpose(p2, 0, 1)
    linear_2 = aten.linear(reshape_2, transpose_2)
    reshape_3 = aten.reshape(linear_2, [-1, 1, 16])
    select = aten.select(reshape_3, -2, 0)
    reshape_4 = aten.reshape(s0, [-1, 1])
    mul_1 = aten.mul(select, reshape_4)
    return mul_1
""",
    )


class Clamped(Gathered):
    """Rows sorted by ids that may name no expert gather the weights of the last one then."""

    masked = False

    def forward(self, x):
        ids, weights = self.router(x)
        ids = torch.where(weights > 0.6, self.E, ids)
        flat = ids.reshape(-1)
        numbers, order = flat.sort(stable=True)
        rows = self.of_numbers(x[order // self.K], numbers.clamp(0, self.E - 1))
        if self.masked:
            rows = rows.masked_fill((numbers >= self.E).unsqueeze(-1), 0.0)
        out = torch.empty_like(rows)
        out[order] = rows * weights.reshape(-1)[order, None]
        return out.view(-1, self.K, H).sum(1)


class Masked(Clamped):
    masked = True


@pytest.mark.parametrize("kind", [Clamped, Masked])
@torch.no_grad()
def test_sorted_ids_that_are_clamped_mean_the_last_expert_unless_a_mask_says_none(kind):
    torch.manual_seed(0)
    model = kind()
    for decomposed in (False, True):
        program = exported(model)
        layers = same_numbers(model, program.run_decompositions() if decomposed else program)
        assert [layer.num_experts for layer in layers] == [4]
