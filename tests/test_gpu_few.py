"""On a CUDA device: the kernels for few tokens, and the router's choice, against their references."""

import pytest
import torch
from test_gpu_fused import FORMATS, Layer, most, poison, pytestmark  # noqa: F401 (the marks are those of the module)
from toys import Gathered

import moe_fx
from moe_fx.kernels import fused_token
from moe_fx.kernels.fused_experts import fused_experts_reference
from moe_fx.kernels.fused_projection import Projection
from moe_fx.kernels.fused_token import run_token, takes_token, token_product
from moe_fx.kernels.top_k import top_k
from moe_fx.kernels.triton_blocks import split_blocks_reference
from moe_fx.kernels.triton_or_none import opaque
from moe_fx.kernels.triton_rows import quantize_rows_reference

PLAIN = [FORMATS["none"], FORMATS["transposed"], FORMATS["float8"]]
FLOAT8 = FORMATS["float8 dynamic"]
WHOLE = [FORMATS["int8"], moe_fx.Int4WeightOnly(64), FORMATS["int4"]]


def projections(layer):
    transposed = getattr(layer.form, "transposed", False)
    bias = () if layer.down_bias is None else (layer.down_bias,)
    up = Projection(layer.up, layer.form.name, transposed, layer.up_bias, layer.gated)
    return up, Projection(layer.down, layer.form.name, transposed, bias)


def relative_errors(layer, activation="silu", before=False):
    """Of the kernels for few tokens, and of the reference in the layer's own dtype."""
    exact = fused_experts_reference(*layer.arguments(activation, torch.float64, before))
    plain = fused_experts_reference(*layer.arguments(activation, before=before))
    poison()
    with opaque():
        actual = run_token(
            layer.tokens, layer.ids, layer.slot, *projections(layer), 6, activation, 1.702, 1.5, before, layer.dtype
        )
    return [float((each.double() - exact).norm() / exact.norm()) for each in (actual, plain)]


def allowed(form, plain):
    return most(form, plain) if form is FLOAT8 else plain + 1e-4


@pytest.mark.parametrize("how", ["all on one", "idle experts", "ids of no expert"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 8, 12, 32])
@pytest.mark.parametrize("form", [*PLAIN, *WHOLE, FLOAT8], ids=repr)
def test_sums_over_any_number_of_slots(form, top_k, how):
    layer = Layer(form, torch.bfloat16, tokens=3, top_k=top_k, how=how)
    ours, plain = relative_errors(layer)
    assert ours < allowed(form, plain)


@pytest.mark.parametrize("tokens", [2, 5])
@pytest.mark.parametrize("form", [*PLAIN[:2], *WHOLE[:2], FLOAT8], ids=repr)
def test_slots_that_take_the_same_columns_in_turn_make_the_same_to_the_bit(form, tokens, monkeypatch):
    layer = Layer(form, torch.bfloat16, tokens=tokens, top_k=3, hidden=192, inner=320, how="ids of no expert")
    results = []
    for together in (False, True):
        monkeypatch.setattr(fused_token, "reads_together", lambda *_, chosen=together: chosen)
        poison()
        with opaque():
            results.append(
                run_token(layer.tokens, layer.ids, layer.slot, *projections(layer), 6, "silu", 1, 1, False, layer.dtype)
            )
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", ["none", "gate_up", "up_gate", "interleaved", "two"])
@pytest.mark.parametrize(("hidden", "inner"), [(40, 24), (72, 200), (2880, 136), (1024, 1000)])
@pytest.mark.parametrize("form", PLAIN, ids=repr)
def test_every_layout_and_size(form, hidden, inner, gated, dtype):
    activation = "clamped_swiglu" if gated == "interleaved" else "gelu"
    for bias, before in ((True, False), (False, True)):
        layer = Layer(form, dtype, gated, tokens=1, hidden=hidden, inner=inner, bias=bias)
        ours, plain = relative_errors(layer, activation, before)
        assert ours < plain + 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", ["none", "gate_up", "up_gate", "interleaved", "two"])
@pytest.mark.parametrize(("hidden", "inner"), [(64, 128), (192, 320), (2880, 192), (1024, 4160)])
@pytest.mark.parametrize("form", [*WHOLE[:2], FLOAT8], ids=repr)
def test_every_layout_and_size_of_weights_read_by_sixteen_bytes(form, hidden, inner, gated, dtype):
    activation = "clamped_swiglu" if gated == "interleaved" else "gelu"
    for bias, before in ((True, False), (False, True)):
        layer = Layer(form, dtype, gated, tokens=2, hidden=hidden, inner=inner, bias=bias, how="ids of no expert")
        assert takes_token(layer.ids, 6, projections(layer), dtype)
        ours, plain = relative_errors(layer, activation, before)
        assert ours < allowed(form, plain)


@pytest.mark.parametrize("form", WHOLE, ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_result_in_digits_is_the_result_to_the_bit(dtype, form):
    layer = Layer(form, dtype, tokens=3, how="spread", inner=384)
    layer.tokens[0, :100] *= 1e-6
    layer.tokens[1] *= 1e4
    layer.up_bias[0][2:] = 0
    up, down = projections(layer)
    poison()
    with opaque():
        plain, _ = token_product(layer.tokens, None, up, layer.ids, 6, 2, dtype, activation="silu")
        digits, scales = token_product(layer.tokens, None, up, layer.ids, 6, 2, dtype, then=down, activation="silu")
    expected, exact = split_blocks_reference(plain, pairs_apart=down.kind == "int4")
    assert torch.equal(scales.isnan(), exact.isnan())
    assert torch.equal(scales.nan_to_num(0), exact.nan_to_num(0))
    finite = plain.isfinite().all(-1)
    assert finite.any()
    assert torch.equal(digits[finite], expected[finite])


@pytest.mark.parametrize("form", WHOLE, ids=repr)
def test_an_outlier_does_not_cost_other_blocks_their_precision(form):
    layer = Layer(form, torch.bfloat16, tokens=1)
    layer.tokens[:, 17] = 200.0
    # Beside it the rest would be invisible: it is one that the weights do not see.
    weight = form.dequantize(*layer.up)
    weight[..., 17] = 0
    layer.up = list(form.quantize(weight.bfloat16()))
    ours, plain = relative_errors(layer)
    assert ours < plain + 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", [*WHOLE, FLOAT8], ids=repr)
def test_a_row_that_is_not_finite_makes_no_numbers_and_leaves_the_others_theirs(form, value):
    layer = Layer(form, torch.bfloat16, tokens=3, how="all on one")
    layer.tokens[1, 5] = value
    with opaque():
        out = run_token(
            layer.tokens, layer.ids, layer.slot, *projections(layer), 6, "silu", 0.0, 0.0, False, torch.bfloat16
        )
    assert not out[1].isfinite().any()
    assert out[[0, 2]].isfinite().all()


def test_float8_rows_are_quantized_as_by_the_format():
    """To the step: with weights that pick single inputs, products are these, and sums of one term are exact."""
    form, size = FLOAT8, 64
    layer = Layer(form, torch.bfloat16, "none", tokens=3, experts=2, top_k=1, hidden=size, inner=size, bias=False)
    layer.tokens *= torch.tensor([[1.0], [1e-4], [300.0]], device="cuda", dtype=torch.bfloat16)
    layer.up = list(form.quantize(torch.eye(size, device="cuda").bfloat16().expand(2, size, size).contiguous()))
    with opaque():
        rows, largest = token_product(
            layer.tokens, None, projections(layer)[0], layer.ids, 2, 1, torch.bfloat16, then=projections(layer)[1]
        )
    values, scale = quantize_rows_reference(layer.tokens, torch.float8_e4m3fn)
    weight = layer.up[0].float().amax(-1)[0] / 256
    expected = values.float() * weight * (scale.unsqueeze(-1) * 256) * layer.up[1][0]
    assert torch.equal(rows, expected.bfloat16())
    assert torch.equal(largest.amax(-1), rows.float().abs().amax(-1))


def test_few_tokens_are_computed_by_them_where_they_are_faster():
    def taken(form, tokens, slots, experts=6, **sizes):
        layer = Layer(form, torch.bfloat16, tokens=tokens, top_k=slots, experts=experts, **sizes)
        return takes_token(layer.ids, experts, projections(layer), torch.bfloat16)

    assert taken(FORMATS["none"], 1, 2)
    assert taken(FORMATS["float8"], 1, 1)
    assert not taken(FORMATS["float8"], 1, 2)
    assert not taken(FORMATS["float8"], 2, 1)
    assert taken(FORMATS["int8"], 1, 2)
    assert not taken(FORMATS["int8"], 1, 2, hidden=40, inner=24)  # no blocks of 16
    assert taken(FLOAT8, 1, 2)
    assert not taken(FLOAT8, 1, 2, hidden=40, inner=24)  # no sixteen bytes at a time
    assert not taken(FORMATS["int8 dynamic"], 1, 1)
    assert taken(FORMATS["int4"], 1, 1)
    assert not taken(FORMATS["int4 of 32"], 1, 1)
    assert not taken(FORMATS["int4 asymmetric"], 1, 1)
    # What several slots read of the same expert is read once elsewhere.
    assert taken(FORMATS["int4"], 2, 2, experts=8)
    assert not taken(FORMATS["int4"], 8, 2, experts=8)
    assert taken(FORMATS["none"], 8, 1)
    assert not taken(FORMATS["none"], 9, 1)
    assert not taken(FORMATS["none"], 8, 1, hidden=2048, inner=2048)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("form", [None, WHOLE[0], WHOLE[1], FLOAT8], ids=repr)
def test_few_tokens_compiled(form, tokens):
    # A compiler makes constants of sizes.
    model = Gathered(num_experts=16, hidden=128, inner=192, dtype=torch.bfloat16).cuda()
    x = torch.randn(tokens, 128, device="cuda").bfloat16()
    with torch.no_grad():
        config = moe_fx.Config(experts="fused", quantize=form, require="all")
        module = moe_fx.transform(torch.export.export(model, (x,)), config).module()
        torch.compiler.reset()
        compiled, eager = torch.compile(module, fullgraph=True)(x), module(x)
    assert float((compiled - eager).float().norm() / eager.float().norm()) < (0.04 if form is FLOAT8 else 0.01)


SIZES = [(1, 1), (8, 2), (60, 4), (128, 8), (256, 8), (300, 6), (1000, 32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("experts", "k"), SIZES)
def test_choice_is_that_of_topk_ties_included(experts, k, dtype):
    scores = torch.randn(700, experts, device="cuda").to(dtype)
    scores[100:400] = scores[100:400].round()
    scores[400:500] = 0
    scores[450:500, ::2] = -0.0
    scores[500:520, experts // 2 :] = float("nan")
    scores[520:540, 1:] = -float("inf")
    scores[540:560, : experts // 2] = float("inf")
    poison()
    for given in (scores, scores.view(7, 100, experts), scores.mT.contiguous().mT):
        values, ids = top_k(given, k)
        expected_values, expected_ids = given.topk(k, dim=-1)
        assert values.shape == expected_values.shape
        torch.testing.assert_close(values, expected_values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(given.gather(-1, ids).nan_to_num(99), values.nan_to_num(99))
        # torch.topk leaves the order of equal scores open; which of them are chosen, it does not.
        assert torch.equal(ids.sort(-1).values, expected_ids.sort(-1).values)


def test_a_choice_among_no_rows():
    values, ids = top_k(torch.empty(0, 8, device="cuda"), 2)
    assert values.shape == ids.shape == (0, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_layer_chooses_by_the_kernel(dynamic):
    model = Gathered(num_experts=8, hidden=64, inner=96, dtype=torch.bfloat16).cuda()
    x = torch.randn(37, 64, device="cuda").bfloat16()
    shapes = ({0: torch.export.Dim("tokens", min=2, max=4096)},) if dynamic else None
    with torch.no_grad():
        program = moe_fx.transform(torch.export.export(model, (x,), dynamic_shapes=shapes))
        assert torch.ops.moe_fx.top_k.default in [node.target for node in program.graph.nodes]
        torch.compiler.reset()
        run = torch.compile(program.module(), fullgraph=True)
        for count in (37, 300) if dynamic else (37,):
            x = torch.randn(count, 64, device="cuda").bfloat16()
            assert float((run(x) - model(x)).float().norm() / model(x).float().norm()) < 0.02
