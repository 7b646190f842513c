"""Int8WeightOnly: symmetric, one scale per output channel."""

import pytest
import torch

import moe_fx

INT8 = moe_fx.Int8WeightOnly()


def weight(dtype=torch.float32):
    return torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_within_half_a_step(dtype):
    original = weight(dtype)
    qdata, scale = INT8.quantize(original)
    assert (qdata.dtype, qdata.shape, scale.shape) == (torch.int8, original.shape, original.shape[:-1])
    assert scale.dtype is dtype
    step = scale.float().unsqueeze(-1)
    # The scale's own rounding moves the largest weight of a channel by up to 127 times its error.
    slack = 127 * torch.finfo(dtype).eps
    assert ((qdata.float() * step - original.float()).abs() <= (0.5 + slack) * step).all()
    assert qdata.abs().max() == 127


def test_a_channel_of_zeros_stays_exactly_zero():
    original = weight()
    original[1, 2] = 0
    tensors = INT8.quantize(original)
    assert (INT8.dequantize(*tensors)[1, 2] == 0).all()
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_an_expert_of_zeros_survives():
    original = weight()
    original[0] = 0
    assert (INT8.dequantize(*INT8.quantize(original))[0] == 0).all()


def test_ties_go_to_even_and_the_range_is_symmetric():
    qdata, _ = INT8.quantize(torch.tensor([[[127.0, -127.0, 0.5, 1.5, -0.5, -2.5]]]))
    assert qdata.tolist() == [[[127, -127, 0, 2, 0, -2]]]


def test_formats_with_equal_options_are_equal():
    assert moe_fx.Int8WeightOnly() == INT8
    assert len({moe_fx.Int8WeightOnly(), INT8}) == 1
