"""transform(): what it promises about its input, its output and its errors."""

import copy

import pytest
import torch
from toys import Gathered, Grouped, Toy, export

import moe_fx
from moe_fx.printer import format_graph

INT8 = moe_fx.Int8WeightOnly()


def inputs(tokens=6, dtype=torch.float32):
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


def test_input_program_is_unchanged():
    program = export(Gathered())
    before, state = format_graph(program.graph_module), copy.deepcopy(program.state_dict)
    moe_fx.transform(program, moe_fx.Config(quantize=INT8))
    assert format_graph(program.graph_module) == before
    assert list(program.state_dict) == list(state)
    assert all(torch.equal(program.state_dict[name], state[name]) for name in state)
    assert moe_fx.report(program) is None


def test_program_without_moe_is_unchanged_node_for_node():
    program = export(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(inplace=True)))
    result = moe_fx.transform(program)
    assert [node.format_node() for node in result.graph.nodes] == [node.format_node() for node in program.graph.nodes]
    assert moe_fx.report(result).layers == ()


def test_transforming_twice_changes_nothing_more():
    config = moe_fx.Config(quantize=INT8)
    once = moe_fx.transform(export(Gathered()), config)
    twice = moe_fx.transform(once, config)
    assert format_graph(twice.graph_module) == format_graph(once.graph_module)
    assert moe_fx.report(twice) == moe_fx.report(once)


def test_another_configuration_on_a_transformed_program_is_an_error():
    once = moe_fx.transform(export(Gathered()))
    with pytest.raises(moe_fx.ProgramError, match="already transformed, with Config"):
        moe_fx.transform(once, moe_fx.Config(quantize=INT8))


def test_quantized_state_dict_has_the_new_names_and_not_the_old():
    program = moe_fx.transform(export(Gathered()), moe_fx.Config(quantize=INT8))
    assert sorted(program.state_dict) == ["down_qdata", "down_scale", "router", "up_qdata", "up_scale"]
    assert program.state_dict["up_qdata"].dtype is torch.int8


def test_storage_per_expert_names_one_tensor_per_expert():
    program = moe_fx.transform(export(Gathered()), moe_fx.Config(quantize={"*up": INT8}, storage="per_expert"))
    names = {f"{e}.{n}" for e in range(4) for n in ("up_qdata", "up_scale", "down")}
    assert set(program.state_dict) == names | {"router"}
    (layer,) = moe_fx.report(program).layers
    assert (layer.storage, layer.lowering) == ("per_expert", "linear")


def test_formats_by_name_pattern_differ_within_a_layer():
    program = moe_fx.transform(export(Gathered()), moe_fx.Config(quantize={"*": INT8, "down": None}))
    (layer,) = moe_fx.report(program).layers
    assert layer.format == "up: int8_weight_only, down: none"
    assert program.state_dict["down"].dtype is torch.float32


def test_pattern_that_matches_nothing_is_an_error_that_lists_the_parameters():
    with pytest.raises(moe_fx.ConfigError, match=r"'model\.\*' matches no expert parameter; .*: up, down"):
        moe_fx.transform(export(Gathered()), moe_fx.Config(quantize={"model.*": INT8}))


def test_something_else_than_a_program_is_an_error():
    with pytest.raises(moe_fx.ProgramError, match=r"takes a torch\.export\.ExportedProgram, not Gathered"):
        moe_fx.transform(Gathered())


def test_training_mode_with_dropout_is_an_error():
    class Dropped(Gathered):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x), 0.1, training=True)

    with pytest.raises(moe_fx.ProgramError, match=r"dropout drops out with p=0\.1; call model\.eval\(\)"):
        moe_fx.transform(export(Dropped()))


@pytest.mark.parametrize("require", [2, "all"])
def test_requirement_not_met_is_an_error_with_the_report(require):
    program = export(torch.nn.Linear(8, 8) if require == "all" else Gathered())
    with pytest.raises(moe_fx.RequirementError, match=r"Config\.require=.* found [01]") as error:
        moe_fx.transform(program, moe_fx.Config(require=require))
    assert isinstance(error.value.report, moe_fx.Report)


def test_without_validation_no_error_is_reported():
    (layer,) = moe_fx.report(moe_fx.transform(export(Gathered()), moe_fx.Config(validate=False))).layers
    assert layer.error is None


class GivenRouting(Toy):
    """Ids come from outside: they may repeat within a token, and may name no expert."""

    def forward(self, x, ids, weights):
        return self.experts(x, ids, weights)


class GatheredGiven(GivenRouting, Gathered):
    pass


class GroupedGiven(GivenRouting, Grouped):
    pass


@pytest.mark.parametrize("lowering", ["grouped_mm", "linear", "gather"])
@pytest.mark.parametrize("toy", [GatheredGiven, GroupedGiven])
def test_given_ids_may_repeat_and_name_no_expert(toy, lowering):
    model = toy(bias=True).eval()
    dtype = model.up.dtype
    ids = torch.tensor([[0, 0], [1, 2], [2, 2], [3, 1], [0, 3]])
    if toy is GroupedGiven:
        ids[4, 1] = 4  # no expert: the gathered form has no such convention
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(3)).to(dtype)
    args = (inputs(5, dtype), ids, weights)
    with torch.no_grad():
        program = moe_fx.transform(torch.export.export(model, args), moe_fx.Config(experts=lowering, require=1))
        actual, expected = program.module()(*args).float(), model(*args).float()
    tolerance = 1e-6 if dtype is torch.float32 else 2**-7
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("lowering", ["grouped_mm", "linear", "gather"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes(dtype, lowering):
    model = Gathered(dtype=dtype).eval()
    program = moe_fx.transform(export(model), moe_fx.Config(experts=lowering, require=1))
    with torch.no_grad():
        actual, expected = program.module()(inputs(9, dtype)).double(), model(inputs(9, dtype)).double()
    # A handful of roundings, each of at most half a unit in the last place.
    assert (actual - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_in_place_write_to_the_layers_input_is_refused():
    class Cached(Gathered):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(6, 8))

        def forward(self, x):
            self.cache.copy_(x)
            return super().forward(self.cache)

    program = export(Cached(), dynamic=False)
    result = moe_fx.explain(program)
    assert result.layers == ()
    assert "whose memory is written" in result.misses[0].found
