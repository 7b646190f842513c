"""Layers within torch.no_grad and torch.autocast, which torch.export keeps as modules of their own."""

import pytest
import torch
from expecttest import assert_expected_inline
from moe_fx.passes.normalize import inline_regions
from torch.export import Dim
from toys import Gathered

import moe_fx
from moe_fx.printer import format_graph


class Within(torch.nn.Module):
    """A layer, or parts of it, in a region."""

    def __init__(self, where, **options):
        super().__init__()
        self.layer, self.where = Gathered(**options), where

    def forward(self, x):
        if self.where == "no_grad":
            with torch.no_grad():
                y = self.layer(x)
        elif self.where == "no_grad around the router":
            with torch.no_grad():
                ids, weights = self.layer.route(x)
            y = self.layer.experts(x, ids, weights)
        elif self.where == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.layer(x)
        elif self.where == "autocast around the experts":
            ids, weights = self.layer.route(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.layer.experts(x, ids, weights)
        elif self.where == "no autocast around the router":
            with torch.autocast("cpu", enabled=False):
                ids, weights = self.layer.route(x)
            y = self.layer.experts(x, ids, weights)
        elif self.where == "both":
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.layer(x)
        return y + 1


WHERE = [
    "no_grad", "no_grad around the router", "autocast", "autocast around the experts",
    "no autocast around the router", "both",
]  # fmt: skip


def exported(model):
    torch.manual_seed(1)
    return torch.export.export(model.eval(), (torch.randn(7, 8),), dynamic_shapes=({0: Dim.AUTO},))


def close(program, model, quantized=False):
    for rows in (7, 12):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            actual, expected = program.module()(x), model(x)
        assert actual.dtype is expected.dtype
        # Within autocast a row is rounded to bfloat16 at the same places, but for the sum.
        tolerance = 2**-6 if "cast" in model.where or model.where == "both" else 1e-6
        assert (actual - expected).abs().max() <= (0.05 if quantized else tolerance) * expected.abs().max()


@pytest.mark.parametrize("decomposed", [False, True], ids=["training IR", "core ATen"])
@pytest.mark.parametrize("where", WHERE)
def test_a_layer_in_a_region_is_found(where, decomposed):
    torch.manual_seed(0)
    model = Within(where, bias=True)
    program = exported(model)
    program = program.run_decompositions() if decomposed else program
    after = moe_fx.transform(program, moe_fx.Config(require="all"))
    assert len(moe_fx.report(after).layers) == 1
    close(after, model)


@pytest.mark.parametrize("lowering", ["grouped_mm", "gather", "linear"])
def test_weights_within_autocast_are_quantized(lowering):
    torch.manual_seed(0)
    model = Within("autocast", num_experts=4)
    config = moe_fx.Config(quantize=moe_fx.Int8WeightOnly(), experts=lowering, require="all")
    after = moe_fx.transform(exported(model), config)
    assert {name for name in after.state_dict if "up" in name} == {"layer.up_qdata", "layer.up_scale"}
    assert after.state_dict["layer.up_qdata"].dtype is torch.int8
    close(after, model, quantized=True)


class NormThenAttention(torch.nn.Module):
    """Mixed dtypes that an op takes as they are, ops that autocast casts, and ops that it leaves alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.linear(x)
            h = self.norm(h) + x
            scores = (h @ h.mT).softmax(-1)
            return torch.cat([scores @ h, x], 1)


def test_the_same_bits_come_out_of_an_inlined_region():
    torch.manual_seed(0)
    model = NormThenAttention().eval()
    program = torch.export.export(model, (torch.randn(5, 8),))
    x = torch.randn(5, 8)
    with torch.no_grad():
        expected = model(x)
        module = program.module()
        inline_regions(module)
        module.recompile()
        assert torch.equal(module(x), expected)


def test_a_region_before_and_after():
    class Model(torch.nn.Module):
        def forward(self, x, w):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.nn.functional.linear(x, w) * x

    module = torch.export.export(Model(), (torch.randn(2, 3), torch.randn(4, 3)[:3])).graph_module
    inline_regions(module)
    assert_expected_inline(
        format_graph(module),
        """\
x: f32[2, 3]
w: f32[3, 3]
to: bf16[2, 3] = aten.to(x, bf16)
to_1: bf16[3, 3] = aten.to(w, bf16)
linear: bf16[2, 3] = aten.linear(to, to_1)
mul: f32[2, 3] = aten.mul(linear, x)
return (mul,)
""",
    )


def test_a_program_with_regions_and_no_layer_stays_as_it_is():
    program = torch.export.export(NormThenAttention().eval(), (torch.randn(5, 8),))
    after = moe_fx.transform(program)
    assert [node.name for node in after.graph.nodes] == [node.name for node in program.graph.nodes]


class ConvolutionOfRows(torch.nn.Module):
    """Of which torch, when asked, tells one algorithm for a few rows and another for many."""

    def __init__(self):
        super().__init__()
        self.layer, self.conv = Gathered(), torch.nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            neighbours = self.conv(x.t()[None])
        return self.layer(x), neighbours


def test_a_convolution_under_autocast_sets_no_limit_to_the_number_of_rows():
    model = ConvolutionOfRows()
    after = moe_fx.transform(exported(model), moe_fx.Config(require="all"))
    x = torch.randn(3000, 8)
    with torch.no_grad():
        (want, neighbours), (have, have_neighbours) = model(x), after.module()(x)
    assert (have - want).abs().max() <= 1e-6 * want.abs().max()
    assert torch.equal(have_neighbours, neighbours)
