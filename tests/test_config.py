"""Config: what it accepts, and what it says otherwise."""

import dataclasses

import pytest

import moe_fx
from moe_fx.config import FormatRules

INT8 = moe_fx.Int8WeightOnly()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"experts": "groupedmm"},
            "Config.experts='groupedmm' is not one of 'auto', 'grouped_mm', 'linear', 'gather', 'fused'",
        ),
        ({"storage": "split"}, "Config.storage='split' is not one of 'auto', 'stacked', 'per_expert'"),
        ({"expert": "auto"}, "Config has no option 'expert'; the options are experts, quantize, linears"),
        ({"quantize": "int8"}, "Config.quantize='int8' is not a weight format"),
        ({"quantize": moe_fx.Int8WeightOnly}, "did you mean to call it?"),
        ({"quantize": {"*": 8}}, "Config.quantize['*']=8 is not a weight format"),
        ({"require": "some"}, "Config.require='some' is not None, 'all' or a number of layers"),
        ({"require": True}, "Config.require=True"),
        ({"validate": 1}, "Config.validate=1 is not True or False"),
        ({"consume": None}, "Config.consume=None is not True or False"),
        ({"linears": {"*": 8}}, "Config.linears['*']=8 is not a weight format"),
        ({"storage": "per_expert", "experts": "gather"}, "needs experts='linear' (or 'auto'), not 'gather'"),
    ],
)
def test_bad_input_is_named_with_the_valid_choices(options, message):
    with pytest.raises(moe_fx.ConfigError) as error:
        moe_fx.Config(**options)
    assert message in str(error.value)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        moe_fx.Config().experts = "linear"


def formats(rules, *fqns):
    question = FormatRules(moe_fx.Config(quantize=rules))
    return [question.format_of(fqn, "model.layers.0.mlp.experts") for fqn in fqns]


def test_the_most_specific_pattern_wins_whatever_the_order():
    rules = {"*.down_proj": None, "*": INT8}
    assert formats(rules, "model.up_proj", "model.down_proj") == [INT8, None]
    assert formats(dict(reversed(rules.items())), "model.up_proj", "model.down_proj") == [INT8, None]


def test_among_equally_specific_patterns_the_later_wins():
    assert formats({"a*": INT8, "*a": None}, "aa") == [None]


def test_a_pattern_may_name_the_layer():
    assert formats({"model.layers.0.*": INT8}, "elsewhere.up_proj") == [INT8]


def test_one_format_takes_everything_and_none_nothing():
    assert formats(INT8, "up") == [INT8]
    assert formats(None, "up") == [None]
