"""Whole transformers models through transform, eagerly: every form, lowering and format."""

import pytest
import torch
from models import FAMILIES, FORMS, MAIN, NUM_LAYERS, build, exported, logits, relative_error, sqnr

import moe_fx

pytest.importorskip("transformers", reason="the models come from transformers")

LOWERINGS = ("grouped_mm", "linear", "gather")
#: the shape that was traced, and another
SHAPES = ((2, 5), (3, 7))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN)
def test_float32_model_is_equal_in_every_lowering(family, form, lowering):
    program = moe_fx.transform(exported(family, form), moe_fx.Config(experts=lowering, require=NUM_LAYERS[family]))
    for shape in SHAPES:
        assert relative_error(logits(program.module(), shape), logits(build(family, form), shape)) < 1e-5
    layers = moe_fx.report(program).layers
    assert [layer.lowering for layer in layers] == [lowering] * NUM_LAYERS[family]
    assert all(layer.error < 1e-9 for layer in layers)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN)
def test_int8_model_keeps_its_signal_in_every_lowering(family, form, lowering):
    config = moe_fx.Config(experts=lowering, quantize=moe_fx.Int8WeightOnly(), require=NUM_LAYERS[family])
    program = moe_fx.transform(exported(family, form), config)
    dequantized = build_with_dequantized_experts(program, family, form)
    for shape in SHAPES:
        # The same weights in float: what is left is rounding of sums, not of weights.
        assert relative_error(logits(program.module(), shape), logits(dequantized, shape)) < 1e-5
    assert sqnr(logits(program.module(), SHAPES[0]), logits(build(family, form), SHAPES[0])) > 20
    for layer in moe_fx.report(program).layers:
        assert layer.format == "int8_weight_only"
        assert layer.bytes_after < 0.4 * layer.bytes_before


def build_with_dequantized_experts(program, family, form):
    """The original model with the weights that the quantized program stands for."""
    import copy

    model = copy.deepcopy(build(family, form))
    state = program.state_dict
    for name in [name.removesuffix("_qdata") for name in state if name.endswith("_qdata")]:
        weight = moe_fx.Int8WeightOnly().dequantize(state[name + "_qdata"], state[name + "_scale"])
        parameter = model.get_parameter(name)
        parameter.data = weight if weight.shape == parameter.shape else weight.transpose(-2, -1)
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN)
def test_bfloat16_model_is_within_rounding(family, form):
    program = moe_fx.transform(exported(family, form, torch.bfloat16), moe_fx.Config(require=NUM_LAYERS[family]))
    expected = logits(build(family, form, torch.bfloat16), SHAPES[0])
    # bf16 keeps 8 bits: half a step is 2^-9 of the value, and a sum of two slots is rounded a few times.
    assert relative_error(logits(program.module(), SHAPES[0]), expected) < 2**-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN)
def test_decomposed_program_is_raised_as_well(family, form):
    decomposed = exported(family, form).run_decompositions()
    program = moe_fx.transform(decomposed, moe_fx.Config(require=NUM_LAYERS[family]))
    for shape in SHAPES:
        assert relative_error(logits(program.module(), shape), logits(build(family, form), shape)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in MAIN])
def test_families_that_no_rule_was_written_for(family, form):
    program = moe_fx.transform(exported(family, form), moe_fx.Config(require=NUM_LAYERS[family]))
    assert moe_fx.report(program).misses == ()
    for shape in SHAPES:
        assert relative_error(logits(program.module(), shape), logits(build(family, form), shape)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_static_shapes(form):
    program = moe_fx.transform(exported("mixtral", form, dynamic=False), moe_fx.Config(require="all"))
    expected = logits(build("mixtral", form), SHAPES[0])
    assert relative_error(logits(program.module(), SHAPES[0]), expected) < 1e-5
    assert "10 tokens" in moe_fx.report(program).layers[0].why


def test_report_describes_the_router():
    routers = {name: moe_fx.explain(exported(name, "grouped_mm")).layers[-1].router for name in MAIN}
    assert routers["mixtral"] == "softmax, topk 2, renormalised, float32 of model.layers.1.mlp.gate.weight"
    assert routers["gpt_oss"].startswith("softmax after choice, topk 2")
    assert routers["deepseek_v3"].startswith("sigmoid, topk 2 within groups, renormalised, times 2.5")
