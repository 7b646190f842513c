"""Bins of rows, and one-hot rows: raised where every row has a place, and refused where it may be dropped."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from lookalikes_bins_in_turn import LOOKALIKES
from lookalikes_bins_of_groups import GroupedBins
from styles import STYLES
from test_raising import raised
from test_styles import exported
from toys import Toy, export

import moe_fx


class Binned(Toy):
    """Rows in bins of ``capacity``, one after the other."""

    def capacity(self, flat):
        return flat.shape[0] // self.K

    def apply(self, rows, weight):
        return torch.bmm(rows, weight.transpose(1, 2))

    def place(self, flat):
        one_hot = F.one_hot(flat, self.E)
        return flat * self.capacity(flat) + ((one_hot.cumsum(0) - 1) * one_hot).sum(-1)

    def experts(self, x, ids, weights):
        flat = ids.reshape(-1)
        place, capacity = self.place(flat), self.capacity(flat)
        bins = x.new_zeros(self.E * capacity, x.shape[1]).index_put((place,), x.repeat_interleave(self.K, 0))
        h = self.apply(bins.view(self.E, capacity, -1), self.up)
        h = self.activation(h + self.up_bias[:, None] if self.bias else h)
        y = self.apply(h, self.down)
        y = (y + self.down_bias[:, None] if self.bias else y).view(-1, x.shape[1])[place]
        return (y.view(-1, self.K, x.shape[1]) * weights.unsqueeze(-1)).sum(1)


class OneHot(Toy):
    """Dispatch and combine are products with one-hot rows."""

    def nonzero(self, combine):
        return combine.bool()

    def experts(self, x, ids, weights):
        hot = F.one_hot(ids, self.E).transpose(0, 1).reshape(-1, self.E)
        rank = ((hot.cumsum(0) - 1) * hot).sum(-1).view(self.K, -1).t()
        places = (rank.unsqueeze(-1) == torch.arange(x.shape[0])).to(x.dtype)
        combine = torch.einsum("tk,tke,tkc->tec", weights, F.one_hot(ids, self.E).to(x.dtype), places)
        rows = torch.einsum("tec,th->ech", self.nonzero(combine).to(x.dtype), x)
        h = self.activation(torch.einsum("ech,eih->eci", rows, self.up))
        return torch.einsum("tec,ech->th", combine, torch.einsum("eci,ehi->ech", h, self.down))


VARIANTS = {
    "bins": (Binned, {}),
    "bins with biases": (Binned, dict(bias=True)),
    "bins for one expert per token": (Binned, dict(top_k=1)),
    "one hot": (OneHot, {}),
    "one hot, one expert per token": (OneHot, dict(top_k=1)),
    "one hot, no gate": (OneHot, dict(gated=False, activation=torch.cos)),
}


CASES = [(variant, decomposed) for decomposed in (False, True) for variant in VARIANTS]


@pytest.mark.parametrize(("variant", "decomposed"), CASES)
@torch.no_grad()
def test_every_variant_is_the_same_layer(variant, decomposed):
    toy, options = VARIANTS[variant]
    model = toy(**options).eval()
    program = export(model)
    if decomposed:
        program = program.run_decompositions()
    after = moe_fx.transform(program, moe_fx.Config(require="all"))
    (layer,) = moe_fx.report(after).layers
    assert layer.error < 1e-9
    for tokens in (6, 9):
        x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens))
        expected = model(x)
        assert (after.module()(x) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("toy", [Binned, OneHot])
def test_static_token_counts_small_and_large(toy):
    for tokens in (2, 6, 500):
        (layer,) = moe_fx.explain(export(toy(), tokens=tokens, dynamic=False)).layers
        assert layer.error < 1e-9


def test_bins_before_and_after():
    assert_expected_inline(
        raised(Binned(gated=False, activation=F.relu)),
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
unsqueeze: f32[s0, 2, 1] = aten.unsqueeze(div, -1)
moe_body_0 = attribute
experts: f32[s0, 8] = experts(x, getitem_1, (unsqueeze,), (p_up, p_down), (), moe_body_0)
return (experts,)
moe_body_0:
    x
    s0
    p0
    p1
    linear = aten.linear(x, p0)
    relu = aten.relu(linear)
    linear_1 = aten.linear(relu, p1)
    mul = aten.mul(linear_1, s0)
    return mul
""",
    )


def test_one_hot_dispatch_before_and_after():
    assert_expected_inline(
        raised(OneHot(gated=False, activation=F.relu)),
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
    linear = aten.linear(x, p0)
    relu = aten.relu(linear)
    linear_1 = aten.linear(relu, p1)
    reshape = aten.reshape(s0, [-1, 1])
    mul = aten.mul(reshape, linear_1)
    return mul
""",
    )


class Positive(OneHot):
    """Rows are dispatched where the weight is more than zero: of a negative one, the expert gets zeros."""

    def nonzero(self, combine):
        return combine > 0

    def route(self, x):
        ids, weights = super().route(x)
        return ids, weights - 0.5


@torch.no_grad()
def test_a_test_that_matters_stays_in_the_body():
    model = Positive().eval()
    after = moe_fx.transform(export(model), moe_fx.Config(require="all"))
    x = torch.randn(9, 8)
    assert (after.module()(x) - model(x)).abs().max() <= 1e-6


class ReadElsewhere(OneHot):
    """What is computed for the layer only in its einsums, a loss may read: here, what ``told`` says."""

    def told(self, combine, y):
        return combine.sum((0, 2))

    def experts(self, x, ids, weights):
        hot = F.one_hot(ids, self.E)
        ranks = ((hot.reshape(-1, self.E).cumsum(0) - 1).reshape(hot.shape) * hot).sum(-1)
        places = F.one_hot(ranks, x.shape[0]).to(x.dtype)
        combine = torch.einsum("tk,tke,tkc->tec", weights, hot.to(x.dtype), places)
        rows = torch.einsum("tec,th->ech", (combine != 0).to(x.dtype), x)
        h = self.activation(torch.einsum("ech,eih->eci", rows, self.up))
        y = torch.einsum("eci,ehi->ech", h, self.down)
        return torch.einsum("tec,ech->th", combine, y), self.told(combine, y)


class ResultsReadElsewhere(ReadElsewhere):
    def told(self, combine, y):
        return y.sum((0, 1))


@pytest.mark.parametrize("decomposed", [False, True])
@torch.no_grad()
def test_a_product_of_one_hot_rows_may_be_read_elsewhere(decomposed):
    model, x = ReadElsewhere().eval(), torch.randn(9, 8)
    program = torch.export.export(model, (x,))
    after = moe_fx.transform(program.run_decompositions() if decomposed else program, moe_fx.Config(require="all"))
    torch.testing.assert_close(after.module()(x), model(x))


@pytest.mark.parametrize("decomposed", [False, True])
@torch.no_grad()
def test_what_the_experts_make_may_not(decomposed):
    program = torch.export.export(ResultsReadElsewhere().eval(), (torch.randn(9, 8),))
    result = moe_fx.explain(program.run_decompositions() if decomposed else program)
    assert not result.layers
    assert "to be read inside the layer only" in result.misses[0].wanted


@pytest.mark.parametrize("model", [OneHot(), Positive()])
@torch.no_grad()
def test_one_hot_dispatch_is_the_same_decomposed(model):
    whole, decomposed = export(model.eval()), export(model).run_decompositions()
    before, after = (moe_fx.transform(each, moe_fx.Config(require="all")) for each in (whole, decomposed))
    (layer,), (other,) = moe_fx.report(before).layers, moe_fx.report(after).layers
    assert (layer.source_form, layer.top_k, layer.router) == (other.source_form, other.top_k, other.router)
    x = torch.randn(9, 8)
    torch.testing.assert_close(after.module()(x), model(x))


class Given(Binned):
    """Ids that may repeat within a token: an expert can get K rows of each."""

    def forward(self, x, ids, weights):
        return self.experts(x, ids, weights)


class GivenRoomForAll(Given):
    def capacity(self, flat):
        return flat.shape[0]


def given(model):
    args = (torch.randn(5, 8), torch.randint(4, (5, 2)), torch.rand(5, 2))
    with torch.no_grad():
        return moe_fx.explain(torch.export.export(model.eval(), args))


def test_ids_that_may_repeat_need_room_for_every_slot():
    (miss,) = given(Given()).misses
    assert miss.found == "tokens can be dropped: capacity 5 for up to 10 rows"
    (layer,) = given(GivenRoomForAll()).layers
    assert layer.error < 1e-9


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", ["one_hot_gsec_choice_by_choice_gshard", "one_hot_bsec_bins_of_all_groups_in_a_bmm"])
@torch.no_grad()
def test_a_batch_of_one_is_one_group(name, decomposed):
    model, program = exported(replace(STYLES[name], shape=(1, 5, 16), dynamic=False))
    after = moe_fx.transform(program.run_decompositions() if decomposed else program, moe_fx.Config(require="all"))
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(after.module()(x), model(x))


class Crossed(GroupedBins):
    """Dispatch and combine by these letters."""

    def __init__(self, put="gsec", read="gsec"):
        super().__init__()
        self.put, self.read = f"{put},gsm->egcm", f"{read},egcm->gsm"


@pytest.mark.parametrize(
    ("put", "read", "layers"),
    [("gsec", "gsec", 1), ("sgec", "gsec", 0), ("gsec", "sgec", 0), ("sgec", "sgec", 0), ("gesc", "gesc", 0),
     ("cseg", "gsec", 0)],
)  # fmt: skip
@torch.no_grad()
def test_groups_are_told_from_tokens_where_all_sizes_are_equal(put, read, layers):
    # As many groups, tokens of each, experts and places; the numbers are not compared.
    program = torch.export.export(Crossed(put, read).eval(), (torch.randn(4, 4, 16),))
    assert len(moe_fx.report(moe_fx.transform(program, moe_fx.Config(validate=False))).layers) == layers


REFUSALS = {
    "one_hot_bins_by_capacity_factor": "tokens can be dropped: capacity",
    "one_hot_bins_ranked_in_two_orders": "ranks counted in one order of the slots",
    "one_hot_bins_ranked_apart": "a count over all slots of all tokens",
    "one_hot_bins_counted_in_bfloat16": "counts in a dtype that holds every number of rows",
    "one_hot_bins_from_one_up": "ranks from 0 up",
    "one_hot_bins_softmax_over_places": "an op along other dimensions than the rows",
    "one_hot_weights_of_another_choice": "one-hot rows of getitem",
    "one_hot_groups_by_half_the_tokens": "tokens can be dropped: capacity",
    "one_hot_groups_ranked_over_the_batch": "tokens can be dropped: capacity",
    "one_hot_groups_ranked_across": "bins for each group of tokens within which ranks are counted",
    "one_hot_groups_in_the_same_bins": "bins for each group of tokens within which ranks are counted",
    "one_hot_groups_exchanged": "an op along other dimensions than the rows",
    "one_hot_groups_softmax_over_them": "an op along other dimensions than the rows",
    "one_hot_groups_scaled": "a number for each token",
    "one_hot_in_turn_half_the_tokens": "tokens can be dropped: capacity",
    "one_hot_in_turn_second_may_be_first": "tokens can be dropped: capacity",
    "one_hot_in_turn_places_exchanged": "ranks from 0 up among the rows of an expert",
    "one_hot_in_turn_groups_exchanged": "an op along other dimensions than the rows",
    "binned_by_ranks_within_a_sequence": "ranks counted over all tokens",
    "binned_with_capacity": "tokens can be dropped: capacity 2 for up to",
    "gshard_with_capacity": "tokens can be dropped: capacity 2 for up to 6 rows",
    "binned_by_ids_of_others": "a place in bins",
    "binned_read_at_the_next_place": "a place in bins",
    "binned_sorted_into_the_next_bins": "tokens can be dropped: capacity",
    "binned_sorted_from_the_end": "a place in bins",
    "binned_added_to_the_last_bins": "tokens can be dropped: capacity 12 for up to",
    "binned_mean_of_a_bin": "to be read inside the layer only",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_may_drop_or_mix_rows_is_refused_with_the_reason(name):
    (miss,) = moe_fx.explain(exported(LOOKALIKES[name])[1]).misses
    assert REFUSALS[name] in f"wanted {miss.wanted}, found {miss.found}"
