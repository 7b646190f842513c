"""Out the other end: Inductor, AOTInductor, save and load, and the torch.compile backend, on whole models."""

import io

import pytest
import torch
from models import MAIN, NUM_LAYERS, build, exported, logits, relative_error

import moe_fx

pytest.importorskip("transformers", reason="the models come from transformers")

SHAPES = ((2, 5), (3, 7))

#: each family once, with the forms and lowerings spread over them: a compilation takes tens of seconds
CASES = dict(
    zip(
        MAIN,
        [("grouped_mm", "grouped_mm"), ("batched_mm", "linear"), ("grouped_mm", "gather"),
         ("batched_mm", "grouped_mm"), ("grouped_mm", "linear")],
        strict=True,
    )
)  # fmt: skip


def transformed(family, quantize=None):
    form, lowering = CASES[family]
    return moe_fx.transform(exported(family, form), moe_fx.Config(experts=lowering, quantize=quantize, require="all"))


def assert_equal_to_original(callable_model, family, form):
    for shape in SHAPES:
        assert relative_error(logits(callable_model, shape), logits(build(family, form), shape)) < 1e-5


@pytest.mark.slow  # Inductor compiles a whole model
@pytest.mark.parametrize("quantize", [None, moe_fx.Int8WeightOnly()], ids=["none", "int8"])
@pytest.mark.parametrize("family", MAIN)
def test_inductor_compiles_the_whole_graph(family, quantize):
    program = transformed(family, quantize)
    with torch.no_grad():
        compiled = torch.compile(program.module(), fullgraph=True)
        for shape in SHAPES:
            assert relative_error(logits(compiled, shape), logits(program.module(), shape)) < 1e-5


@pytest.mark.slow  # AOTInductor builds a package with a C++ compiler
@pytest.mark.parametrize("family", MAIN)
def test_aot_inductor_package_is_built_loaded_and_run(family, tmp_path):
    program = transformed(family, moe_fx.Int8WeightOnly())
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for shape in SHAPES:
        assert relative_error(logits(loaded, shape), logits(program.module(), shape)) < 1e-5


@pytest.mark.slow  # Dynamo and Inductor compile a whole model
@pytest.mark.parametrize("family", MAIN)
def test_backend_under_torch_compile(family):
    torch._dynamo.reset()
    form, lowering = CASES[family]
    backend = moe_fx.backend(moe_fx.Config(experts=lowering, require="all"))
    compiled = torch.compile(build(family, form), backend=backend, dynamic=True)
    assert_equal_to_original(compiled, family, form)
    assert sum(len(report.layers) for report in backend.reports) >= NUM_LAYERS[family]


@pytest.mark.parametrize("quantize", [None, moe_fx.Int8WeightOnly()], ids=["none", "int8"])
@pytest.mark.parametrize("family", MAIN)
def test_save_and_load_keep_program_and_report(family, quantize):
    program = transformed(family, quantize)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    for shape in SHAPES:
        assert torch.equal(logits(loaded.module(), shape), logits(program.module(), shape))
    assert moe_fx.report(loaded) == moe_fx.report(program)
    assert set(loaded.state_dict) == set(program.state_dict)
