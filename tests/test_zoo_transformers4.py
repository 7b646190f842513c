"""Every Mixture-of-Experts family of transformers 4.57 through moe_fx.export and transform, eagerly."""

import copy
import functools

import pytest
import torch
from models import relative_error
from torch.export import Dim
from zoo4.families import FAMILIES, build, inputs, output

import moe_fx

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(
        not transformers.__version__.startswith("4.57."), reason="the experts of transformers 4.57 are meant"
    ),
]

#: what is not found yet, and why
MISSED = {
    "vitpose": "an expert for each image that the caller names, as adapters are: no router, and so no MoE layer",
}
#: what torch.export takes for one shape only: a state space model that loops over the sequence, one that takes along
#: a dimension
STATIC = ("jamba", "doge")
#: what torch.export takes as it is
PLAIN = (
    "flex_olmo", "granitemoe", "granitemoehybrid", "granitemoeshared", "jetmoe", "llama4", "olmoe", "qwen3_vl_moe",
)  # fmt: skip
#: experts of attention, which are no layer of their own, but look like one
NEAR_MISSES = ("jetmoe",)


def dynamic_shapes(given):
    """Batch and sequence dynamic."""
    return {name: dict.fromkeys(range(2 if 1 < value.dim() < 4 else 1), Dim.AUTO) for name, value in given.items()}


def families():
    errors = (moe_fx.MoeFxError, RuntimeError)
    for name in FAMILIES:
        missed = [pytest.mark.xfail(reason=MISSED[name], raises=errors, strict=True)] if name in MISSED else []
        yield pytest.param(name, marks=missed)


def check(exporter, family):
    model, given = build(family), inputs(family)
    shapes = None if family in STATIC else dynamic_shapes(given)
    with torch.no_grad():
        exported = exporter(model, (), given, dynamic_shapes=shapes)
    program = moe_fx.transform(exported, moe_fx.Config(require=FAMILIES[family].layers))
    others = [inputs(family, seed=1), alike(inputs(family, seed=2))]
    if shapes is not None:
        others += [inputs(family, (3, 7), seed=3), inputs(family, (2, 3), seed=4)]
    for other in (given, *others):
        assert relative_error(output(program.module(), other), output(model, other)) < 1e-5
    report = moe_fx.report(program)
    assert len(report.layers) == FAMILIES[family].layers
    assert bool(report.misses) == (family in NEAR_MISSES)


def alike(given):
    """Tokens that are all the same, so that experts stay idle."""
    return {name: value[(slice(1),) * min(2, value.dim())].expand_as(value).clone() for name, value in given.items()}


@pytest.mark.parametrize("family", families())
def test_family_is_found_and_equal(family):
    check(moe_fx.export, family)


@pytest.mark.parametrize("family", PLAIN)
def test_family_is_found_as_torch_exports_it(family):
    check(functools.partial(torch.export.export, strict=False), family)


def test_gpt_oss_as_it_is_written_for_other_devices():
    # Every expert on every token, where the CPU loops over the experts that were hit.
    layer = next(module for module in build("gpt_oss").modules() if type(module).__name__ == "GptOssMLP")
    rows = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    elsewhere = copy.deepcopy(layer).to("meta")
    shapes = {"hidden_states": {0: Dim.AUTO, 1: Dim.AUTO}}
    with torch.no_grad():
        exported = moe_fx.export(elsewhere, (), dict(hidden_states=rows.to("meta")), dynamic_shapes=shapes)
        program = moe_fx.transform(exported, moe_fx.Config(require=1))
        program = moe_fx.fill(program, layer.state_dict())
        assert relative_error(program.module()(hidden_states=rows)[0], layer(rows)[0]) < 1e-5
