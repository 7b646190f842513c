"""On a CUDA device: rows in digits, and inputs parted among programs, against their references."""

import pytest
import torch
from test_gpu_fused import DTYPES, FORMATS, Layer, poison, pytestmark  # noqa: F401 (the marks are those of the module)

from moe_fx.kernels import fused_launch, fused_projection, fused_tiles
from moe_fx.kernels.fused_experts import fused_experts_reference
from moe_fx.kernels.fused_projection import Projection, Routing
from moe_fx.kernels.triton_digits import split_digits, split_digits_reference

WHOLE = [FORMATS["int8"], FORMATS["int4"]]


@pytest.fixture(autouse=True)
def _in_tiles(monkeypatch):
    # Few tokens have kernels of their own (test_gpu_few.py), which do without.
    monkeypatch.setattr(fused_launch, "takes_token", lambda *_: False)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [2, 100, 2880, 14336])
def test_digits_to_the_bit(width, dtype, apart):
    rows = torch.randn(70, width, device="cuda") * torch.logspace(-30, 30, 70, device="cuda").unsqueeze(-1)
    rows = rows.to(dtype)
    rows[3] = 0
    rows[4, 0] = 1e-40
    rows[5, -1] = torch.finfo(dtype).max
    rows[6, 0], rows[7, -1], rows[8, 0] = float("nan"), float("inf"), -float("inf")
    finite = rows.isfinite().all(-1)
    poison()
    (digits, scale), (expected, exact) = split_digits(rows, apart), split_digits_reference(rows, apart)
    assert not finite.all()
    assert scale[~finite].isnan().all()
    assert torch.equal(scale[finite], exact[finite])
    assert torch.equal(digits[finite], expected[finite])


def taken(layer):
    """The rows per tile of a layer; below 8 they are in digits."""
    up, down = Projection(layer.up, layer.form.name, gated=layer.gated), Projection(layer.down, layer.form.name)
    return Routing.of(layer.ids, 6, (up, down), layer.dtype).block


@pytest.mark.parametrize("how", ["all on one", "idle experts", "ids of no expert"])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 2), (1, 8), (2, 1), (5, 2), (40, 1)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", WHOLE, ids=repr)
def test_layers_of_few_rows(form, dtype, tokens, top_k, how, monkeypatch):
    # However many there are, tiles of digits hold them; how many is a matter of speed.
    monkeypatch.setattr(fused_projection, "block_of_digits", lambda tokens, *_: 1 if tokens == 1 else 4)
    for gated, bias, hidden, inner in (("gate_up", True, 384, 256), ("two", False, 1152, 640)):
        layer = Layer(form, dtype, gated, tokens, top_k=top_k, how=how, bias=bias, hidden=hidden, inner=inner)
        assert taken(layer) < 8
        layer.check()
    layer = Layer(form, dtype, "interleaved", tokens, top_k=top_k, how=how)
    layer.check("clamped_swiglu")
    layer.check("gelu_tanh", before=True)


@pytest.mark.parametrize("form", [FORMATS["int8"]], ids=repr)
@pytest.mark.parametrize(("hidden", "inner"), [(40, 24), (72, 200), (2880, 136), (1024, 1000)])
@pytest.mark.parametrize("tokens", [1, 3])
def test_sizes_that_fit_no_tile(tokens, hidden, inner, form):
    for bias in (True, False):
        Layer(form, torch.bfloat16, tokens=tokens, hidden=hidden, inner=inner, bias=bias).check()


@pytest.mark.parametrize("form", WHOLE, ids=repr)
@pytest.mark.parametrize("tokens", [1, 3])
def test_an_outlier_does_not_cost_the_other_inputs_their_precision(tokens, form):
    layer = Layer(form, torch.bfloat16, tokens=tokens)
    layer.tokens[:, 17] = 3000.0
    # Beside it the rest would be invisible: it is one that the weights do not see.
    weight = form.dequantize(*layer.up)
    weight[..., 17] = 0
    layer.up = list(form.quantize(weight.bfloat16()))
    layer.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [3, 300, 2500])
@pytest.mark.parametrize("form", ["int8", "int4", "int8 dynamic", "float8 dynamic"])
def test_a_row_that_is_not_finite_makes_no_numbers_and_leaves_the_others_theirs(form, tokens, value):
    layer = Layer(FORMATS[form], torch.bfloat16, tokens=tokens, how="all on one")
    layer.tokens[1, 5] = value
    out = torch.ops.moe_fx.fused_experts_any(*layer.arguments("silu"))
    assert not out[1].isfinite().any()
    assert out[torch.arange(tokens, device="cuda") != 1].isfinite().all()


PARTED = ["int8", "int8 dynamic", "float8 dynamic", "int4", "int4 asymmetric", "int4 of 32"]


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("form", PARTED)
def test_inputs_parted_among_programs(form, top_k, parts, monkeypatch):
    monkeypatch.setattr(fused_launch, "parts_of", lambda programs, steps: parts)
    for inner in (128, 1152, 4096):  # of which some programs have none
        layer = Layer(FORMATS[form], torch.bfloat16, tokens=1, top_k=top_k, inner=inner, bias=False)
        layer.check()
        layer.check(before=True)


def test_only_what_is_too_few_programs_is_parted():
    assert fused_tiles.parts_of(80, 64) == 4
    assert fused_tiles.parts_of(80, 8) == 2
    assert fused_tiles.parts_of(512, 64) == 1


def test_a_result_that_is_parted_is_the_same():
    layer = Layer(FORMATS["int4"], torch.bfloat16, tokens=1, top_k=2, hidden=256, inner=8192, bias=False)
    exact = fused_experts_reference(*layer.arguments("silu", torch.float64))
    poison()
    once, again = (torch.ops.moe_fx.fused_experts_any(*layer.arguments("silu")) for _ in range(2))
    assert torch.equal(once, again)
    assert float((once.double() - exact).norm() / exact.norm()) < 0.01
