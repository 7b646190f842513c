"""The CPU kernel of grouped_mm beside plain products, where this machine can run it."""

import re

import pytest
import torch

import moe_fx
from moe_fx.kernels import grouped_amx
from moe_fx.kernels.grouped_amx import grouped_mm_amx, unfit

needs_amx = pytest.mark.skipif(grouped_amx.unavailable() is not None, reason=str(grouped_amx.unavailable()))

#: rows of each expert: none, few, one tile, several with a rest; all on one; none at all
GROUPS = ([0, 1, 2, 3, 4, 5, 0], [16, 17, 33, 0, 70, 9, 8], [0, 0, 150, 0, 0, 0, 0], [0] * 7)
#: outputs and inputs: whole blocks, and a rest of half a block
SIZES = ((64, 128), (48, 96))
#: int4 groups that divide both
GROUP_SIZE = 32


def operands(bits, symmetric, outputs, inputs, groups):
    """Rows, the weights as stored, their float32 values, and the other arguments."""
    torch.manual_seed(sum(groups))
    rows = torch.randn(sum(groups) + 3, inputs).bfloat16()
    weight = torch.randn(len(groups), outputs, inputs).bfloat16()
    offsets = torch.tensor(groups).cumsum(0).int()
    if bits == 16:
        return rows, weight, weight.float(), offsets, ()
    if bits == 8:
        weight = torch.randint(-128, 128, weight.shape, dtype=torch.int8)
        return rows, weight, weight.float(), offsets, ()
    form = moe_fx.Int4WeightOnly(GROUP_SIZE, symmetric=symmetric)
    weight, *others = form.quantize(weight)
    return rows, weight, form.dequantize(weight, *others).float(), offsets, others


@needs_amx
@pytest.mark.parametrize(("bits", "symmetric"), [(16, True), (8, True), (4, True), (4, False)])
@pytest.mark.parametrize("few", [None, 0], ids=["dot products", "tiles"])
@pytest.mark.parametrize("many", [100, 1000], ids=["torch.mm", "tiles only"])
def test_the_kernel_gives_what_float64_products_give_up_to_one_rounding(bits, symmetric, few, many, monkeypatch):
    if few is not None:
        monkeypatch.setitem(grouped_amx.FEW_ROWS, bits, few)
    monkeypatch.setitem(grouped_amx.MANY_ROWS, bits, many)
    for groups in GROUPS:
        for outputs, inputs in SIZES:
            rows, weight, values, offsets, others = operands(bits, symmetric, outputs, inputs, groups)
            out = torch.full((rows.shape[0], outputs), float("nan"), dtype=torch.bfloat16)
            assert unfit(rows, weight, GROUP_SIZE if bits == 4 else None) is None
            grouped_mm_amx(rows, weight, offsets, out, *others)
            expert = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
            exact = torch.einsum("sk,snk->sn", rows[: sum(groups)].double(), values[expert].double())
            # bfloat16 keeps 8 bits; sums are of up to 128 products, in float32.
            terms = torch.einsum("sk,snk->sn", rows[: sum(groups)].double().abs(), values[expert].double().abs())
            assert ((out[: sum(groups)].double() - exact).abs() <= exact.abs() / 2**8 + terms * 2e-6).all()
            assert out[sum(groups) :].isnan().all()


@needs_amx
@pytest.mark.parametrize("form", [None, moe_fx.Int8WeightOnly(), moe_fx.Int4WeightOnly(32)], ids=str)
def test_the_ops_take_the_kernel_and_give_zero_for_rows_of_no_expert(form, monkeypatch):
    calls = []
    weight = torch.randn(4, 32, 64).bfloat16()
    rows, offsets = torch.randn(9, 64).bfloat16(), torch.tensor([2, 2, 5, 7], dtype=torch.int32)
    for module in ("grouped_mm", "grouped_int4"):
        name = f"moe_fx.kernels.{module}.grouped_mm_amx"
        monkeypatch.setattr(name, lambda *given: calls.append(given) or grouped_mm_amx(*given))
    if isinstance(form, moe_fx.Int4WeightOnly):
        qdata, scale = form.quantize(weight)
        out = torch.ops.moe_fx.grouped_mm_int4(rows, qdata, scale, None, offsets)
        values = form.dequantize(qdata, scale)
    else:
        values = weight if form is None else form.quantize(weight)[0]
        out = torch.ops.moe_fx.grouped_mm(rows, values.mT, offsets)
    assert len(calls) == 1
    expected = [rows[a:b].float() @ values[e].float().T for e, (a, b) in enumerate([(0, 2), (2, 2), (2, 5), (5, 7)])]
    torch.testing.assert_close(out[:7].float(), torch.cat(expected), rtol=2**-7, atol=1e-3)
    assert not out[7:].any()


@pytest.mark.parametrize(
    ("rows", "weights", "group", "reason"),
    [
        (torch.zeros(2, 64), torch.zeros(4, 32, 64), None, "multiplies bfloat16 rows, not torch.float32"),
        (torch.zeros(2, 64).bfloat16(), torch.zeros(4, 64, 32).bfloat16().mT, None, "contiguous"),
        (torch.zeros(2, 64).bfloat16(), torch.zeros(4, 24, 64).bfloat16(), None, "16 outputs.* not 24 x 64"),
        (torch.zeros(2, 64).bfloat16(), torch.zeros(4, 32, 32).byte(), 16, "not 32 x 64 in groups of 16"),
    ],
)  # fmt: skip
def test_what_the_kernel_does_not_take_is_said(rows, weights, group, reason):
    assert re.search(reason, unfit(rows, weights, group))


def test_without_a_compiler_the_reason_is_said(monkeypatch, tmp_path):
    features = grouped_amx._features()
    if not set(features.split()) >= grouped_amx.NEEDED:
        pytest.skip("this CPU has no AMX")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    grouped_amx._library.cache_clear()
    try:
        assert "could not be built" in grouped_amx.unavailable()
    finally:
        grouped_amx._library.cache_clear()
