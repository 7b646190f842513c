"""On a CUDA device: every lowering and format, eagerly and under Inductor, against the original on the CPU."""

import copy

import pytest
import torch
from models import FORMS, MAIN, NUM_LAYERS, build, relative_error, sqnr, token_ids
from toys import Gathered, Grouped

import moe_fx
from moe_fx.kernels.grouped_mm import grouped_mm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LOWERINGS = ("grouped_mm", "linear", "gather")
FORMATS = {"none": None, "int8": moe_fx.Int8WeightOnly()}
#: float32 rounds sums of a hundred products; bf16 keeps 8 bits, and the body rounds a few times
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
TOKEN_COUNTS = (37, 2, 300)


def rows(count, dtype):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count)).to(dtype)


def on_device(model, dtype):
    """The layer exported on the GPU with any number of tokens, in eval mode."""
    x = rows(37, dtype).cuda()
    dynamic = ({0: torch.export.Dim("tokens", min=2, max=512)},)
    with torch.no_grad():
        return torch.export.export(copy.deepcopy(model).cuda().eval(), (x,), dynamic_shapes=dynamic)


def reference(model, program, x):
    """The original's definition on the CPU in float64, with the weights that the program stands for."""
    original = copy.deepcopy(model).double()
    for name, parameter in original.named_parameters():
        if f"{name}_qdata" in program.state_dict:
            tensors = [program.state_dict[f"{name}_{part}"].cpu().double() for part in ("qdata", "scale")]
            weight = moe_fx.Int8WeightOnly().dequantize(*tensors)
            parameter.data = weight if weight.shape == parameter.shape else weight.mT
    with torch.no_grad():
        # The choice of experts is the program's: a router rounds as its dtype and device do.
        ids, weights = (chosen.cpu() for chosen in copy.deepcopy(model).cuda().route(x.cuda()))
        gathered = original if isinstance(original, Gathered) else as_gathered(original)
        return gathered.experts(x.double(), ids, weights.double())


def as_gathered(model):
    """The same layer written with gathered weights: the definition, in any dtype."""
    twin = copy.copy(model)
    twin.__class__ = type("Twin", (Gathered,), {})
    return twin


@pytest.mark.parametrize("quantize", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(Gathered, torch.float32), (Gathered, torch.bfloat16), (Grouped, torch.bfloat16)],
    ids=["gathered-f32", "gathered-bf16", "grouped-bf16"],
)
def test_layer_equals_its_definition(layer, dtype, lowering, compiled, quantize):
    options = dict(dtype=dtype) if layer is Gathered else {}
    model = layer(num_experts=8, top_k=2, hidden=64, inner=48, bias=True, **options)
    program = moe_fx.transform(
        on_device(model, dtype), moe_fx.Config(experts=lowering, quantize=quantize, require="all")
    )
    run = program.module()
    if compiled:
        torch.compiler.reset()
        run = torch.compile(run, fullgraph=True)
    for count in TOKEN_COUNTS:
        x = rows(count, dtype)
        with torch.no_grad():
            actual = run(x.cuda()).cpu().double()
        assert relative_error(actual, reference(model, program, x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("lowering", ["grouped_mm", "gather"])
@pytest.mark.parametrize("quantize", FORMATS.values(), ids=FORMATS)
def test_bfloat16_layer_never_waits_for_the_host(lowering, quantize):
    model = Gathered(num_experts=8, top_k=2, hidden=64, inner=48, dtype=torch.bfloat16)
    config = moe_fx.Config(experts=lowering, quantize=quantize, require="all")
    program = moe_fx.transform(on_device(model, torch.bfloat16), config)
    torch.compiler.reset()
    run = torch.compile(program.module(), fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):  # recorded, then replayed with other routing
            x = torch.randn(37, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
            torch.compiler.cudagraph_mark_step_begin()
            actual = run(x.cuda()).cpu().double()
            assert relative_error(actual, reference(model, program, x)) < TOLERANCE[torch.bfloat16]
    run, x = program.module(), x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            run(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
    assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("quantize", FORMATS.values(), ids=FORMATS)
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
