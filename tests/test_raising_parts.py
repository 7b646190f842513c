"""Rows sorted by expert, cut into parts by how many each expert has."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from test_raising import raised
from torch import nn
from torch.export import Dim
from toys import export

import moe_fx


class Parts(nn.Module):
    """Each expert takes a slice of the sorted rows; the results are joined and put back."""

    E, K = 4, 2

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.other = nn.Linear(8, self.E, bias=False), nn.Linear(8, self.E, bias=False)
        self.w1, self.w2 = nn.Parameter(torch.randn(self.E, 12, 8)), nn.Parameter(torch.randn(self.E, 8, 12))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.K, -1)
        order = self.order(ids, x)
        y = self.results(x[order // self.K], self.counted(ids, x))
        y = torch.empty_like(y).index_put((order,), y)
        return (y.view(*ids.shape, 8) * weights[..., None]).sum(1)

    def order(self, ids, x):
        return ids.flatten().argsort()

    def counted(self, ids, x):
        return F.one_hot(ids.flatten(), self.E).sum(0)

    def results(self, rows, counts):
        ends = counts.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return torch.cat([self.expert(rows[starts[e] : ends[e]], e) for e in range(self.E)])

    def expert(self, rows, e):
        return F.silu(rows @ self.w1[e].T) @ self.w2[e].T


class Split(Parts):
    def results(self, rows, counts):
        return torch.cat([self.expert(part, e) for e, part in enumerate(rows.split(counts.tolist()))])


class Histogram(Parts):
    """Starts and ends read from one vector of offsets."""

    def counted(self, ids, x):
        return torch.histc(ids.flatten().float(), self.E, 0, self.E - 1).long()

    def results(self, rows, counts):
        offsets = F.pad(counts.cumsum(0), (1, 0)).tolist()
        return torch.cat([self.expert(rows[offsets[e] : offsets[e + 1]], e) for e in range(self.E)])


class TwoLoops(Parts):
    """As GraniteMoe: the rows are joined between the linears."""

    def counted(self, ids, x):
        return torch.zeros(x.shape[0], self.E).scatter(1, ids, 1).long().sum(0)

    def linears(self, rows, weight, sizes):
        return torch.cat([F.linear(part, weight[e]) for e, part in enumerate(rows.split(sizes))])

    def results(self, rows, counts):
        sizes = counts.tolist()
        return self.linears(F.silu(self.linears(rows, self.w1, sizes)), self.w2, sizes)


class WeightCutToo(Parts):
    """The routing weight is cut like the rows, and multiplied within the expert."""

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.K, -1)
        order = self.order(ids, x)
        y = self.results(x[order // self.K], self.counted(ids, x), weights.flatten()[order])
        return torch.zeros_like(x).index_add(0, order // self.K, y)

    def results(self, rows, counts, weights):
        sizes = counts.tolist()
        parts = zip(rows.split(sizes), weights.split(sizes), strict=True)
        return torch.cat([self.expert(part, e) * weight[:, None] for e, (part, weight) in enumerate(parts)])


VARIANTS = {kind.__name__: kind for kind in (Parts, Split, Histogram, TwoLoops, WeightCutToo)}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_parts_of_sorted_rows_are_one_layer(variant, decomposed):
    model = VARIANTS[variant]().eval()
    program = export(model)
    if decomposed:
        program = program.run_decompositions()
    program = moe_fx.transform(program, moe_fx.Config(require="all"))
    (layer,) = moe_fx.report(program).layers
    assert (layer.source_form, layer.num_experts, layer.top_k) == ("sorted_parts", 4, 2)
    for tokens in (1, 6, 9):
        x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens))
        assert (program.module()(x) - model(x)).abs().max() <= 1e-6 * model(x).abs().max()


def test_parts_before_and_after():
    assert_expected_inline(
        raised(TwoLoops().eval(), export),
        """\
p_w1: f32[4, 12, 8]
p_w2: f32[4, 8, 12]
p_gate_weight: f32[4, 8]
x: f32[s0, 8]
linear: f32[s0, 4] = aten.linear(x, p_gate_weight)
softmax: f32[s0, 4] = aten.softmax(linear, -1)
topk = aten.topk(softmax, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
unsqueeze: f32[s0, 2, 1] = aten.unsqueeze(getitem, 2)
moe_body_0 = attribute
experts: f32[s0, 8] = experts(x, getitem_1, (unsqueeze,), (p_w1, p_w2), (), moe_body_0)
return (experts,)
moe_body_0:
    x
    s0
    p0
    p1
    linear = aten.linear(x, p0)
    silu = aten.silu(linear)
    linear_1 = aten.linear(silu, p1)
    mul = aten.mul(linear_1, s0)
    return mul
""",
    )


class OneRowLate(Parts):
    def results(self, rows, counts):
        ends = counts.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        parts = [self.expert(rows[starts[e] : ends[e]], e) for e in range(self.E - 1)]
        return torch.cat([*parts, self.expert(rows[starts[-1] :], 0)])


class Swapped(Parts):
    """The parts are joined in another order than the experts'."""

    def results(self, rows, counts):
        parts = [self.expert(part, e) for e, part in enumerate(rows.split(counts.tolist()))]
        return torch.cat([parts[1], parts[0], *parts[2:]])


class CountsOfOthers(Parts):
    """How many rows each expert has, by ids that the rows are not sorted by."""

    def counted(self, ids, x):
        return F.one_hot(self.other(x).topk(self.K, -1).indices.flatten(), self.E).sum(0)


class SortedByOthers(Parts):
    def order(self, ids, x):
        return self.other(x).topk(self.K, -1).indices.flatten().argsort()


class AcrossRows(Parts):
    def expert(self, rows, e):
        return super().expert(rows, e).softmax(0)


class NotAlike(Parts):
    def expert(self, rows, e):
        return super().expert(rows, e) * (e + 1)


REFUSALS = {
    OneRowLate: "rows of one expert",
    Swapped: "rows of expert 1 where those of the experts before it end",
    CountsOfOthers: "rows of one expert, between sums of how many rows the experts have",
    SortedByOthers: "rows of one expert, between sums of how many rows the experts have",
    AcrossRows: "an op along other dimensions than the rows",
    NotAlike: "a loop whose every step does the same to its expert",
}


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.__name__)
def test_parts_that_are_not_each_experts_own_rows_are_left_alone(kind):
    program = export(kind().eval())
    after = moe_fx.transform(program)
    assert [node.name for node in after.graph.nodes] == [node.name for node in program.graph.nodes]
    (miss,) = moe_fx.explain(program).misses
    assert REFUSALS[kind] in miss.wanted, miss


class OneForAll(Parts):
    """The same is made of every part, and added to its tokens."""

    def counted(self, ids, x):
        return torch.bincount(ids.flatten(), minlength=self.E)

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(self.K, -1)
        order, out, start = self.order(ids, x), torch.zeros_like(x), 0
        for count in self.counted(ids, x).tolist():
            at = order[start : start + count]
            out = out.index_add(0, at // self.K, F.relu(x[at // self.K]) * weights.flatten()[at, None])
            start = start + count
        return out


@pytest.mark.parametrize("decomposed", [False, True])
def test_parts_of_which_the_same_is_made_are_no_layer(decomposed):
    program = moe_fx.export(OneForAll(), (torch.randn(6, 8),), dynamic_shapes=({0: Dim.AUTO},))
    program = program.run_decompositions() if decomposed else program
    result = moe_fx.explain(program, moe_fx.Config(validate=False))
    assert result.layers == ()
    assert any("parameters that differ from expert to expert" in str(miss) for miss in result.misses)
