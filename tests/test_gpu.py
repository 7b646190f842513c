"""On a CUDA device: every lowering and format, eagerly and under Inductor, against the original on the CPU."""

import copy

import pytest
import torch
from models import FORMS, MAIN, NUM_LAYERS, build, relative_error, sqnr, token_ids
from test_format_product import FORMATS as QUANTIZED
from test_format_product import defined
from toys import Gathered, Grouped

import moe_fx
from moe_fx.kernels.grouped_mm import grouped_mm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LOWERINGS = ("grouped_mm", "linear", "gather")
INT8 = {"none": None, "int8": moe_fx.Int8WeightOnly()}
FORMATS = {"none": None} | {repr(form): form for form in QUANTIZED}
TOKEN_COUNTS = (37, 2, 300)


def rows(count, dtype, seed=0):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count + seed)).to(dtype)


def toy(layer, dtype):
    options = dict(dtype=dtype) if layer is Gathered else {}
    return layer(num_experts=8, top_k=2, hidden=64, inner=48, bias=True, **options)


def transformed(model, dtype, lowering, form, tokens=None):
    """The layer exported on the GPU with any number of tokens, or with one fixed number, and transformed."""
    dynamic = None if tokens else ({0: torch.export.Dim("tokens", min=2, max=512)},)
    with torch.no_grad():
        program = torch.export.export(
            copy.deepcopy(model).cuda().eval(), (rows(tokens or 37, dtype).cuda(),), dynamic_shapes=dynamic
        )
    return moe_fx.transform(program, moe_fx.Config(experts=lowering, quantize=form, require="all"))


def definition(model, form, x, only_up=False):
    """The layer on the CPU, row by row, with the format's own ``linear``."""
    # The choice of experts is the GPU's: a router rounds as its device does.
    ids, weights = (chosen.cpu() for chosen in copy.deepcopy(model).cuda().route(x.cuda()))
    twin = defined(model, form, "cuda", only_up)
    if form is None:
        twin.__class__ = type("Twin", (Gathered,), {})
    with torch.no_grad():
        return twin.experts(x, ids, weights)


def least_sqnr(dtype, form):
    """dB: what sums in another order leave in this dtype, and activations that take the other of two steps."""
    if dtype is torch.bfloat16:
        # Roundings of 2^-8 move one activation in ten by a step of e4m3: as much noise as e4m3 itself makes.
        return 22 if form == moe_fx.Float8Dynamic() else 35
    return 60 if getattr(form, "dynamic", False) else 110


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(Gathered, torch.float32), (Gathered, torch.bfloat16), (Grouped, torch.bfloat16)],
    ids=["gathered-f32", "gathered-bf16", "grouped-bf16"],
)
def test_layer_equals_its_definition(layer, dtype, lowering, compiled, form):
    model = toy(layer, dtype)
    run = transformed(model, dtype, lowering, form).module()
    if compiled:
        torch.compiler.reset()
        run = torch.compile(run, fullgraph=True)
    for count in TOKEN_COUNTS:
        x = rows(count, dtype)
        with torch.no_grad():
            actual = run(x.cuda()).cpu()
        assert sqnr(actual.float(), definition(model, form, x).float()) > least_sqnr(dtype, form)


@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("lowering", ["grouped_mm", "gather"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_bfloat16_layer_never_waits_for_the_host(lowering, form, tokens):
    model = toy(Gathered, torch.bfloat16)
    eager = transformed(model, torch.bfloat16, lowering, form, tokens).module()
    torch.compiler.reset()
    run = torch.compile(eager, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):  # recorded, then replayed with other routing
            x = rows(tokens, torch.bfloat16, seed)
            torch.compiler.cudagraph_mark_step_begin()
            actual = run(x.cuda()).cpu()
            assert sqnr(actual.float(), definition(model, form, x).float()) > least_sqnr(torch.bfloat16, form)
        x = x.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_float8_uses_the_scaled_op_on_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the op is for compute capability 9.0")
    model, form = toy(Gathered, torch.bfloat16), moe_fx.Float8Dynamic()
    # What enters the first projection is the same everywhere: nothing but the order of sums may differ.
    program = transformed(model, torch.bfloat16, "grouped_mm", {"*up": form})
    x = rows(37, torch.bfloat16)
    with torch.no_grad():
        actual = program.module()(x.cuda()).cpu()
    assert sqnr(actual.float(), definition(model, form, x, only_up=True).float()) > 35
    assert program.graph.find_nodes(op="call_function", target=torch.ops.aten._scaled_grouped_mm.default)
    assert moe_fx.report(program).layers[0].why == "as configured"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("offsets", [[3, 3, 8, 10], [0, 10, 10, 10], [1, 2, 3, 4]])
def test_grouped_mm_on_the_gpu_is_that_of_the_cpu(offsets, int8, dtype):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(10, 24, generator=generator).to(dtype)
    matrices = torch.randn(4, 40, 24, generator=generator)
    matrices = ((matrices * 20).to(torch.int8) if int8 else matrices.to(dtype)).mT
    ends = torch.tensor(offsets, dtype=torch.int32)
    poison = torch.full((1 << 20,), float("nan"), device="cuda")
    del poison
    actual = grouped_mm(left.cuda(), matrices.cuda(), ends.cuda()).cpu().double()
    expected = grouped_mm(left.double(), matrices if int8 else matrices.double(), ends)
    assert relative_error(actual, expected) < (1e-5 if dtype is torch.float32 else 2**-6)


@pytest.mark.parametrize("quantize", INT8.values(), ids=INT8)
@pytest.mark.parametrize("lowering", ["auto", *LOWERINGS])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAIN)
def test_backend_compiles_a_whole_model(family, form, lowering, quantize):
    pytest.importorskip("transformers", reason="the models come from transformers")
    torch.compiler.reset()
    model = copy.deepcopy(build(family, form)).cuda()
    backend = moe_fx.backend(moe_fx.Config(experts=lowering, quantize=quantize, require="all"))
    compiled = torch.compile(model, backend=backend)
    for shape in ((2, 9), (1, 5)):
        ids = token_ids(shape).cuda()
        with torch.no_grad():
            actual, expected = (each(input_ids=ids).logits.cpu() for each in (compiled, model))
        if quantize:
            assert sqnr(actual, expected) > 20
        else:
            assert relative_error(actual, expected) < 1e-5
    assert sum(len(report.layers) for report in backend.reports) >= NUM_LAYERS[family]


@pytest.mark.parametrize("family", MAIN)
def test_bfloat16_model_exports_and_compiles(family):
    pytest.importorskip("transformers", reason="the models come from transformers")
    torch.compiler.reset()
    model = copy.deepcopy(build(family, "grouped_mm", torch.bfloat16)).cuda()
    ids = token_ids((2, 9)).cuda()
    with torch.no_grad():
        program = torch.export.export(model, (), dict(input_ids=ids), strict=False)
        rewritten = moe_fx.transform(program, moe_fx.Config(experts="grouped_mm", require="all")).module()
        expected = program.module()(input_ids=ids).logits
        # The same ops in the same order: bit for bit. Compiled, roundings fall elsewhere.
        assert torch.equal(rewritten(input_ids=ids).logits, expected)
        compiled = torch.compile(rewritten, fullgraph=True)(input_ids=ids).logits
    assert sqnr(compiled.float(), expected.float()) > 25


@pytest.mark.parametrize("quantize", INT8.values(), ids=INT8)
@pytest.mark.parametrize("family", MAIN)
def test_model_with_loops_is_exported(family, quantize):
    pytest.importorskip("transformers", reason="the models come from transformers")
    model = copy.deepcopy(build(family, "eager")).cuda()
    ids = token_ids((2, 9)).cuda()
    auto = torch.export.Dim.AUTO
    with torch.no_grad():
        program = moe_fx.export(model, (), dict(input_ids=ids), dynamic_shapes={"input_ids": {0: auto, 1: auto}})
        config = moe_fx.Config(quantize=quantize, require=NUM_LAYERS[family])
        torch.compiler.reset()
        compiled = torch.compile(moe_fx.transform(program, config).module(), fullgraph=True)
        for shape in ((2, 9), (3, 5)):
            ids = token_ids(shape).cuda()
            expected = model(input_ids=ids).logits
            assert relative_error(program.module()(input_ids=ids).logits, expected) < 1e-5
            actual = compiled(input_ids=ids).logits
            assert sqnr(actual, expected) > 20 if quantize else relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_expert_on_every_token_is_raised(lowering, dtype):
    from test_raising_dense import Dense

    model = Dense(num_experts=8, top_k=2, hidden=64, inner=48, dtype=dtype)
    run = transformed(model, dtype, lowering, None).module()
    x = rows(37, dtype).cuda()
    with torch.no_grad():
        assert sqnr(run(x).float(), copy.deepcopy(model).cuda()(x).float()) > (110 if dtype is torch.float32 else 35)
