"""Every MoE family of transformers, in every form its experts can be written: found, and equal.

Where a family is not found yet, its entry says why, in the words of the report: once it is found, the test asks for
the entry to go.
"""

import pytest
import torch
from models import relative_error
from zoo import build, exported, forms, inputs, module_of, num_layers, output
from zoo.families import FAMILIES

import moe_fx

pytest.importorskip("transformers", reason="the models come from transformers")
pytestmark = pytest.mark.exhaustive

CASES = [(family, form) for family in FAMILIES for form in forms(family)]
FOUND = [(family, form) for family, form in CASES if form not in FAMILIES[family].get("missed", {})]
#: the shape that was traced, the same again, and another; each on other ids
SHAPES = ((2, 5), (2, 5), (3, 7))


@pytest.fixture(autouse=True)
def known_family(request):
    family = request.node.callspec.params["family"]
    try:
        module_of(family)
    except ImportError:
        import transformers

        pytest.skip(f"transformers {transformers.__version__} has no {family}")


@pytest.mark.parametrize(("family", "form"), FOUND)
def test_every_layer_is_found_and_equal(family, form):
    program = moe_fx.transform(exported(family, form), moe_fx.Config(require=num_layers(family)))
    for seed, (batch, length) in enumerate(SHAPES):
        batch = SHAPES[0][0] if FAMILIES[family].get("one_batch") else batch
        kwargs = inputs(family, (batch, length), seed)
        assert relative_error(output(program.module(), kwargs), output(build(family, form), kwargs)) < 1e-5


@pytest.mark.parametrize(("family", "form"), [case for case in CASES if case not in FOUND])
def test_report_says_why_a_layer_is_missed(family, form):
    why = FAMILIES[family]["missed"][form]
    try:
        program = moe_fx.transform(exported(family, form), moe_fx.Config(require=None))
    except moe_fx.ExportError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert why in refusal
        return
    report = moe_fx.report(program)
    assert report.layers == ()
    assert [why in str(miss) for miss in report.misses] == [True] * num_layers(family) if why else not report.misses
    kwargs = inputs(family, SHAPES[0], seed=1)
    assert relative_error(output(program.module(), kwargs), output(build(family, form), kwargs)) < 1e-5


@pytest.mark.parametrize(("family", "form"), [case for case in FOUND if case[1] != "batched_mm"])
def test_every_layer_is_found_in_bfloat16(family, form):
    if not FAMILIES[family].get("bfloat16", True):
        pytest.skip("transformers cannot run it in bfloat16")
    program = moe_fx.transform(exported(family, form, torch.bfloat16), moe_fx.Config(require=num_layers(family)))
    kwargs = inputs(family, SHAPES[0], dtype=torch.bfloat16)
    expected = output(build(family, form, torch.bfloat16), kwargs)
    # bf16 keeps 8 bits: half a step is 2^-9 of the value, and a sum of two slots is rounded a few times.
    assert relative_error(output(program.module(), kwargs), expected) < 2**-6
