"""torchao's configurations, and any function that quantizes a linear, as formats of experts."""

import copy
import io

import pytest
import torch
from models import sqnr
from toys import Gathered, export

import moe_fx

LOWERINGS = ("grouped_mm", "linear", "gather")


def layer(dtype=torch.float32):
    return Gathered(dtype=dtype, hidden=32, inner=32, bias=True)


def x(tokens, dtype=torch.float32):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens)).to(dtype)


class Modules(Gathered):
    """The layer with a quantized module for each expert."""

    def apply(self, rows, weight, ids):
        modules = [linear(matrix, self.technique) for matrix in weight]
        return torch.cat([modules[e](row.unsqueeze(0)) for row, e in zip(rows, ids.tolist(), strict=True)])


def linear(matrix, technique):
    module = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    module.weight = torch.nn.Parameter(matrix.detach().clone(), requires_grad=False)
    return technique(module) or module


def with_modules(model, technique):
    twin = copy.copy(model)
    twin.__class__, twin.technique = Modules, technique
    return twin


def to_eighths(module):
    """A technique in one line: weights in steps of an eighth."""
    module.weight.data = (module.weight * 8).round() / 8


class Int8Linear(torch.nn.Module):
    """A module that takes the linear's place."""

    def __init__(self, module):
        super().__init__()
        self.register_buffer("steps", (module.weight * 8).round().to(torch.int8))

    def forward(self, rows):
        return torch.nn.functional.linear(rows, self.steps.to(rows.dtype) / 8)


def replace_by_int8(module):
    return Int8Linear(module)


def torchao():
    return pytest.importorskip("torchao.quantization", reason="the techniques are torchao's")


TECHNIQUES = {
    "int8 activations, int4 weights": lambda ao: ao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=ao.PerGroup(32)
    ),
    "int5 weights": lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int5, granularity=ao.PerGroup(16)),
    "int8 in groups": lambda ao: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)),
}


@pytest.mark.parametrize("technique", [to_eighths, replace_by_int8])
def test_a_function_of_a_linear_is_a_format(technique):
    model = layer()
    program = moe_fx.transform(export(model, hidden=32), moe_fx.Config(quantize=technique, require="all"))
    for tokens in (2, 9):
        with torch.no_grad():
            assert sqnr(program.module()(x(tokens)), with_modules(model, technique)(x(tokens))) > 120
    (report,) = moe_fx.report(program).layers
    assert (report.format, report.lowering) == (technique.__name__, "linear")
    assert report.why == f"{technique.__name__} is a technique for linears"


def test_a_module_in_place_of_the_linear_brings_its_own_tensors():
    program = moe_fx.transform(export(layer(), hidden=32), moe_fx.Config(quantize={"*up": replace_by_int8}))
    assert program.state_dict["up_steps"].dtype is torch.int8
    assert program.state_dict["up_steps"].shape == (4, 64, 32)
    assert "up" not in program.state_dict
    assert moe_fx.report(program).layers[0].format == "up: replace_by_int8, down: none"


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_torchaos_other_configurations_are_techniques(technique):
    ao, model = torchao(), layer()
    config = TECHNIQUES[technique](ao)
    program = moe_fx.transform(export(model, hidden=32), moe_fx.Config(quantize=config, require="all"))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for tokens in (2, 9):
        with torch.no_grad():
            expected = with_modules(model, lambda module: ao.quantize_(module, config))(x(tokens))
            assert sqnr(program.module()(x(tokens)), expected) > 60
            assert torch.equal(loaded.module()(x(tokens)), program.module()(x(tokens)))
    assert all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in program.state_dict.values())
    assert moe_fx.report(program).layers[0].lowering == "linear"


@pytest.mark.slow  # Inductor compiles a layer
def test_a_technique_compiles_in_one_graph():
    program = moe_fx.transform(export(layer(), hidden=32), moe_fx.Config(quantize=replace_by_int8)).module()
    torch.compiler.reset()
    with torch.no_grad():
        assert sqnr(torch.compile(program, fullgraph=True)(x(9)), program(x(9))) > 120


SAME_MEANING = {
    "int8": (moe_fx.Int8WeightOnly(), lambda ao: ao.Int8WeightOnlyConfig()),
    "int8 dynamic": (moe_fx.Int8Dynamic(), lambda ao: ao.Int8DynamicActivationInt8WeightConfig()),
    "float8": (moe_fx.Float8WeightOnly(), lambda ao: ao.Float8WeightOnlyConfig()),
    "float8 dynamic": (
        moe_fx.Float8Dynamic(),
        lambda ao: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
    ),
    "int4": (
        moe_fx.Int4WeightOnly(16),
        lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(16)),
    ),
}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", SAME_MEANING)
def test_a_torchao_configuration_of_the_same_meaning_gives_the_same_program(name, lowering):
    form, config = SAME_MEANING[name]
    program = export(layer(), hidden=32)
    ours = moe_fx.transform(program, moe_fx.Config(experts=lowering, quantize=form))
    theirs = moe_fx.transform(program, moe_fx.Config(experts=lowering, quantize=config(torchao())))
    assert set(ours.state_dict) == set(theirs.state_dict)
    for fqn, tensor in ours.state_dict.items():
        assert torch.equal(tensor.view(torch.uint8), theirs.state_dict[fqn].view(torch.uint8)), fqn
    assert [str(node.target) for node in ours.graph.nodes] == [str(node.target) for node in theirs.graph.nodes]
    (report,) = moe_fx.report(theirs).layers
    assert (report.format, report.lowering) == (form.name, lowering)


def refused(technique):
    with pytest.raises(moe_fx.ProgramError) as error:
        moe_fx.transform(export(layer(), hidden=32), moe_fx.Config(quantize=technique))
    return str(error.value)


def test_a_technique_that_does_nothing_is_an_error():
    def skip(module):
        pass

    assert refused(skip) == "skip left a linear of (64, 32) as it was: nothing was quantized"


def test_a_torchao_configuration_that_skips_the_linear_is_an_error():
    # Its groups of 128 do not divide 32 inputs: torchao leaves such a linear alone, without a word in the result.
    assert "torchao.Int4WeightOnlyConfig" in refused(torchao().Int4WeightOnlyConfig(group_size=128))


def test_a_technique_that_fails_is_an_error_that_names_it():
    def broken(module):
        raise ValueError("no such dtype")

    assert refused(broken) == "broken cannot quantize a linear of (64, 32): no such dtype"
