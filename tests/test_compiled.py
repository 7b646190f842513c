"""Out the other end: Inductor, AOTInductor, save and load, and the torch.compile backend, on whole models."""

import io
import itertools

import pytest
import torch
from models import FORMS, MAIN, NUM_LAYERS, build, exported, logits, relative_error

import moe_fx

pytest.importorskip("transformers", reason="the models come from transformers")

SHAPES = ((2, 5), (3, 7))

LOWERINGS = ("grouped_mm", "linear", "gather")
FORMATS = {"none": None, "int8": moe_fx.Int8WeightOnly()}

#: each family once, with the forms and lowerings spread over them
CASES = {
    "mixtral": ("grouped_mm", "grouped_mm"),
    "qwen3_moe": ("batched_mm", "linear"),
    "olmoe": ("grouped_mm", "gather"),
    "gpt_oss": ("batched_mm", "grouped_mm"),
    "deepseek_v3": ("grouped_mm", "linear"),
}


def every_combination(some, formats=("none",)):
    """All of them; but for ``some``, by family and format, exhaustive: a compilation takes tens of seconds."""
    product = itertools.product(MAIN, FORMS, LOWERINGS, formats)
    return pytest.mark.parametrize(
        ("family", "form", "lowering", "quantize"),
        [
            pytest.param(
                *each, marks=[] if CASES[each[0]] == each[1:3] and each[::3] in some else pytest.mark.exhaustive
            )
            for each in product
        ],
    )  # fmt: skip


def transformed(family, form, lowering, quantize):
    config = moe_fx.Config(experts=lowering, quantize=FORMATS[quantize], require="all")
    return moe_fx.transform(exported(family, form), config)


def assert_equal_at_every_shape(actual, expected):
    for shape in SHAPES:
        assert relative_error(logits(actual, shape), logits(expected, shape)) < 1e-5


@pytest.mark.slow  # Inductor compiles a whole model
@every_combination([("olmoe", "none"), ("gpt_oss", "none"), ("deepseek_v3", "int8")], FORMATS)
def test_inductor_compiles_the_whole_graph(family, form, lowering, quantize):
    program = transformed(family, form, lowering, quantize)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(program.module(), fullgraph=True)
        assert_equal_at_every_shape(compiled, program.module() if quantize != "none" else build(family, form))


@pytest.mark.slow  # AOTInductor builds a package with a C++ compiler
@every_combination([("mixtral", "int8"), ("olmoe", "int8"), ("qwen3_moe", "int8")], ["int8"])
def test_aot_inductor_package_is_built_loaded_and_run(family, form, lowering, quantize, tmp_path):
    program = transformed(family, form, lowering, quantize)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_equal_at_every_shape(torch._inductor.aoti_load_package(package), program.module())


@pytest.mark.slow  # Dynamo and Inductor compile a whole model
@every_combination([("mixtral", "none"), ("gpt_oss", "none"), ("deepseek_v3", "none")])
def test_backend_under_torch_compile(family, form, lowering, quantize):
    torch.compiler.reset()
    backend = moe_fx.backend(moe_fx.Config(experts=lowering, quantize=FORMATS[quantize], require="all"))
    compiled = torch.compile(build(family, form), backend=backend, dynamic=True)
    assert_equal_at_every_shape(compiled, build(family, form))
    assert sum(len(report.layers) for report in backend.reports) >= NUM_LAYERS[family]


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("family", MAIN)
def test_save_and_load_keep_program_and_report(family, quantize):
    program = transformed(family, *CASES[family], quantize)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for shape in SHAPES:
        assert torch.equal(logits(loaded.module(), shape), logits(program.module(), shape))
    assert moe_fx.report(loaded) == moe_fx.report(program)
    assert set(loaded.state_dict) == set(program.state_dict)
