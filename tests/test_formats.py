"""Weight formats: what the tensors hold, and that it is what torchao would store."""

import pytest
import torch
import torch.nn.functional as F

import moe_fx

PER_CHANNEL = [moe_fx.Int8WeightOnly(), moe_fx.Int8Dynamic(), moe_fx.Float8WeightOnly(), moe_fx.Float8Dynamic()]
INT4 = [moe_fx.Int4WeightOnly(8), moe_fx.Int4WeightOnly(8, symmetric=False)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(dtype=torch.float32):
    return torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_name(value):
    return "torchao" if callable(value) else str(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("form", PER_CHANNEL[:2], ids=by_name)
def test_every_int8_weight_is_within_half_a_step(form, dtype):
    original = weight(dtype)
    qdata, scale = form.quantize(original)
    assert (qdata.dtype, qdata.shape) == (torch.int8, original.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, original.shape[:-1])
    step = scale.unsqueeze(-1)
    # The largest weight of a channel is 127.5 steps, or a little more where the scale was rounded down.
    slack = 0.5 + 128 * torch.finfo(dtype).eps
    assert ((qdata.float() * step - original.float()).abs() <= (0.5 + slack) * step).all()
    inner = original.float().abs() < 127 * step
    assert ((qdata.float() * step - original.float()).abs() <= 0.5001 * step)[inner].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("form", PER_CHANNEL[2:], ids=by_name)
def test_every_float8_weight_is_the_nearest_of_its_channel(form, dtype):
    original = weight(dtype)
    qdata, scale = form.quantize(original)
    assert (qdata.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    # e4m3 has 3 bits behind the point, and subnormals of 2^-9.
    bound = (original.float().abs() * 2**-4).maximum(scale.unsqueeze(-1) * 2**-10) * 1.01
    assert ((form.dequantize(qdata, scale) - original.float()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("form", INT4, ids=by_name)
def test_every_int4_weight_is_within_a_step(form, dtype):
    original = weight(dtype)
    tensors = form.quantize(original)
    assert tensors[0].shape == (3, 6, 20)
    assert tensors[1].shape == (3, 6, 5)
    step = tensors[1].float().repeat_interleave(8, -1)
    # Symmetric: half a step, but a whole one for a group's largest. Zero points are rounded, too.
    assert ((form.dequantize(*tensors).float() - original.float()).abs() <= 1.1 * step).all()


def test_int4_packs_even_inputs_low_and_odd_inputs_high():
    row = torch.tensor([[[7.5, -7.5, 1.0, 2.0]]])
    qdata, scale = moe_fx.Int4WeightOnly(4).quantize(row)
    assert scale.item() == 1
    assert [(byte & 15, byte >> 4) for byte in qdata.flatten().tolist()] == [(7 + 8, -8 + 8), (1 + 8, 2 + 8)]


@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("form", PER_CHANNEL + INT4, ids=by_name)
def test_zeros_stay_exactly_zero_and_scales_finite(form, dtype):
    original = weight(dtype)
    original[1, 2] = 0  # a channel
    original[0] = 0  # an expert
    tensors = form.quantize(original)
    assert all(tensor.float().isfinite().all() for tensor in tensors)
    dequantized = form.dequantize(*tensors)
    assert (dequantized[0] == 0).all()
    assert (dequantized[1, 2] == 0).all()


@pytest.mark.parametrize("form", PER_CHANNEL + INT4, ids=by_name)
def test_a_linear_is_one_with_dequantized_operands(form):
    tensors = [tensor[1] for tensor in form.quantize(weight())]
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    expected = F.linear(rows, form.dequantize(*tensors))
    actual = form.linear(rows, *tensors)
    if not getattr(form, "dynamic", False):
        torch.testing.assert_close(actual, expected)
    else:
        largest = rows.abs().amax(-1, keepdim=True)
        bits = 2**-8 if form.dtype is torch.int8 else 2**-4
        reach = form.dequantize(*tensors).abs().sum(-1)
        assert ((actual - expected).abs() <= 1.01 * bits * largest * reach).all()
        assert not torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: moe_fx.Int4WeightOnly(group_size=0), r"group_size=0 is not a positive even number"),
        (lambda: moe_fx.Int4WeightOnly(group_size=33), r"group_size=33 is not a positive even number"),
        (lambda: moe_fx.Int4WeightOnly(group_size="128"), r"group_size='128' is not a positive even number"),
        (lambda: moe_fx.Int4WeightOnly(symmetric=1), r"symmetric=1 is not True or False"),
    ],
)
def test_unknown_options_are_errors(make, message):
    with pytest.raises(moe_fx.ConfigError, match=message):
        make()


def test_formats_with_equal_options_are_equal():
    assert moe_fx.Int4WeightOnly(32) == moe_fx.Int4WeightOnly(group_size=32) != moe_fx.Int4WeightOnly(64)
    assert len({moe_fx.Int8WeightOnly(), moe_fx.Int8WeightOnly(), moe_fx.Int8Dynamic()}) == 2


def torchao_weight(config, original):
    quantization = pytest.importorskip("torchao.quantization", reason="compares with torchao")
    linear = torch.nn.Linear(original.shape[1], original.shape[0], bias=False, dtype=original.dtype)
    linear.weight.data = original
    quantization.quantize_(linear, config(quantization))
    return linear.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize(
    ("form", "config"),
    [
        (moe_fx.Int8WeightOnly(), lambda ao: ao.Int8WeightOnlyConfig()),
        (moe_fx.Int8Dynamic(), lambda ao: ao.Int8DynamicActivationInt8WeightConfig()),
        (moe_fx.Float8WeightOnly(), lambda ao: ao.Float8WeightOnlyConfig()),
    ],
    ids=by_name,
)
def test_per_channel_weights_are_torchaos_bit_for_bit(form, config, dtype):
    qdata, scale = form.quantize(weight(dtype))
    for expert in range(3):
        theirs = torchao_weight(config, weight(dtype)[expert])
        assert torch.equal(theirs.qdata.view(torch.int8), qdata[expert].view(torch.int8))
        assert torch.equal(theirs.scale.squeeze(-1), scale[expert])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_weights_are_torchaos_bit_for_bit(symmetric, dtype):
    original = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    form = moe_fx.Int4WeightOnly(32, symmetric)
    tensors = form.quantize(original)
    for expert in range(2):
        theirs = torchao_weight(
            lambda ao: ao.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=ao.PerGroup(32),
                mapping_type=ao.MappingType.SYMMETRIC if symmetric else ao.MappingType.ASYMMETRIC,
            ),
            original[expert],
        )  # fmt: skip
        qdata = tensors[0][expert]
        steps = torch.stack([qdata & 15, qdata >> 4], -1).flatten(-2).to(torch.int8) - 8
        assert torch.equal(theirs.qdata, steps)
        assert torch.equal(theirs.scale, tensors[1][expert])
        if not symmetric:
            assert torch.equal(theirs.zero_point, tensors[2][expert])
