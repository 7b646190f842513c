"""moe_fx.compare: per layer and at the output, against numbers computed by hand."""

import io

import pytest
import torch
from test_weights import ExpertsLast
from toys import Gathered, export

import moe_fx


class TwoLayers(torch.nn.Module):
    """Two MoE layers, and logits."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Gathered(), Gathered(num_experts=6)
        generator = torch.Generator().manual_seed(7)
        self.head = torch.nn.Parameter(torch.randn(10, 8, generator=generator))

    def forward(self, x):
        x = x + self.first(x)
        x = x + self.second(x)
        return torch.nn.functional.linear(x, self.head)


def x(tokens, seed=0):
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def program():
    return export(TwoLayers())


def test_unquantized_layers_differ_by_rounding_only(program):
    result = moe_fx.compare(program, moe_fx.transform(program, moe_fx.Config(experts="gather")), (x(6),))
    assert [layer.fqn for layer in result.layers] == ["first", "second"]
    for layer in result.layers:
        assert layer.output_sqnr > 120
        assert layer.router_agreement == 1
        assert set(layer.weight_sqnr.values()) == {float("inf")}
    assert result.kl_divergence < 1e-9
    assert result.top1_agreement == 1


@pytest.mark.parametrize("lowering", ["grouped_mm", "linear", "gather"])
def test_each_number_is_what_it_says(program, lowering):
    form = moe_fx.Int4WeightOnly(8)
    quantized = moe_fx.transform(program, moe_fx.Config(experts=lowering, quantize={"second": form}))
    result = moe_fx.compare(program, quantized, [(x(6),), (x(3, seed=1),)])
    first, second = result.layers
    up = program.state_dict["second.up"]
    error = form.dequantize(*form.quantize(up)) - up
    by_hand = float(10 * torch.log10(up.square().sum() / error.square().sum()))
    assert second.weight_sqnr["second.up"] == pytest.approx(by_hand, abs=1e-3)
    assert set(first.weight_sqnr.values()) == {float("inf")}
    assert first.output_sqnr > 120
    assert 10 < second.output_sqnr < 40
    rows = torch.cat([x(6), x(3, seed=1)])
    with torch.no_grad():
        expected, actual = program.module()(rows), quantized.module()(rows)
    p, q = expected.double().softmax(-1), actual.double().softmax(-1)
    assert result.kl_divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-4)
    assert result.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_a_changed_router_and_idle_experts_are_seen(program):
    quantized = moe_fx.transform(program, moe_fx.Config(quantize={"first": moe_fx.Int4WeightOnly(8)}))
    few = moe_fx.compare(program, quantized, (x(2),))
    assert few.layers[1].idle_experts >= 2  # four slots at most, for six experts
    many = moe_fx.compare(program, quantized, (x(300),))
    assert many.layers[1].idle_experts == 0
    assert many.layers[0].router_agreement == 1
    assert 0.8 < many.layers[1].router_agreement < 1


def test_a_loaded_program_gives_the_same_numbers_and_so_does_a_second_run(program):
    quantized = moe_fx.transform(program, moe_fx.Config(quantize=moe_fx.Int8WeightOnly()))
    buffer = io.BytesIO()
    torch.export.save(quantized, buffer)
    buffer.seek(0)
    result = moe_fx.compare(program, quantized, (x(6),))
    assert moe_fx.compare(program, torch.export.load(buffer), (x(6),)) == result
    assert moe_fx.compare(program, quantized, (x(6),)) == result


def test_text_and_dict_hold_every_layer(program):
    result = moe_fx.compare(
        program, moe_fx.transform(program, moe_fx.Config(quantize=moe_fx.Int8WeightOnly())), (x(6),)
    )
    head, _, first, second, output = str(result).splitlines()
    assert head.split("  ")[0] == "layer"
    assert first.startswith("first")
    assert second.startswith("second")
    assert "KL divergence" in output
    assert result.to_dict()["layers"][0]["weight_sqnr"]["first.up"] > 30


def test_what_cannot_be_compared_is_an_error(program):
    with pytest.raises(moe_fx.ProgramError, match="original is an ExportedProgram, not TwoLayers"):
        moe_fx.compare(TwoLayers(), program, (x(6),))
    with pytest.raises(moe_fx.ProgramError, match="nothing of `transformed` was written by moe_fx"):
        moe_fx.compare(program, program, (x(6),))


@pytest.mark.parametrize("quantize", [None, moe_fx.Int8WeightOnly()])
def test_weights_are_compared_whatever_the_order_of_their_dimensions(quantize):
    program = export(ExpertsLast())
    after = moe_fx.transform(program, moe_fx.Config(quantize=quantize, require=1))
    (layer,) = moe_fx.compare(program, after, [(x(6),)]).layers
    assert set(layer.weight_sqnr) == {"up", "down"}
    for quality in layer.weight_sqnr.values():
        assert quality == float("inf") if quantize is None else 35 < quality < 60
