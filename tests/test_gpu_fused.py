"""On a CUDA device: the fused kernels against their references, and whole layers through every road to the compiler."""

import copy
from dataclasses import replace

import pytest
import torch
from models import MAIN, build, sqnr, token_ids
from test_format_product import defined
from test_fused import KNOWN, mish_glu
from toys import Gathered

import moe_fx
from moe_fx.formats import Unquantized
from moe_fx.kernels import fused_experts as ops
from moe_fx.kernels import fused_large, fused_launch, fused_tiles, triton_or_none, triton_rows, triton_widen, tuning
from moe_fx.kernels.triton_routing import route, route_and_places, route_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        triton_or_none.unavailable(torch.device("cuda")) is not None, reason="needs a CUDA device the kernels run on"
    ),
]

FORMATS = {
    "none": Unquantized(), "transposed": Unquantized(transposed=True), "int8": moe_fx.Int8WeightOnly(),
    "int8 dynamic": moe_fx.Int8Dynamic(), "float8": moe_fx.Float8WeightOnly(), "float8 dynamic": moe_fx.Float8Dynamic(),
    "int4": moe_fx.Int4WeightOnly(128), "int4 of 32": moe_fx.Int4WeightOnly(32),
    "int4 asymmetric": moe_fx.Int4WeightOnly(64, symmetric=False),
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def poison():
    """What is allocated next holds NaN."""
    for size in (1 << 24, 1 << 20, 1 << 16, 1 << 12):
        kept = [torch.full((size,), float("nan"), device="cuda") for _ in range(3)]
        del kept


def routed(tokens, experts, top_k, how, generator):
    if how == "all on one":
        return torch.full((tokens, top_k), experts - 1, device="cuda")
    ids = torch.randint(0, experts, (tokens, top_k), device="cuda", generator=generator)
    if how == "idle experts":
        ids = ids // 2 * 2
    if how == "ids of no expert" and tokens:
        ids[0, 0], ids[-1, -1] = experts, -1
    return ids


def most(form, error):
    """The error allowed where the same ops one by one have this one.

    A quantized activation between two steps may take the other one, and all of a row where that is its largest; both
    are then as far from the truth. A float8 step is 2^-3 to 2^-4 of a number: rounded to it, it is off by 0.027 (rms),
    and two that were rounded by other scales differ by 0.038.
    """
    if form.name == "float8_dynamic":
        return max(2 * error, 0.038) + 5e-4
    return (2 if form.name == "int8_dynamic" else 1.3) * error + 5e-4


class Layer:
    """Random operands of one fused layer; ``hidden`` and ``inner`` fit no tile unless asked."""

    def __init__(self, form, dtype, gated="gate_up", tokens=37, experts=6, top_k=2, hidden=384, inner=256, bias=True,
                 how="idle experts", seed=0):  # fmt: skip
        generator = torch.Generator("cuda").manual_seed(seed)

        def random(*shape, scale=1.0):
            return (torch.randn(*shape, device="cuda", generator=generator) * scale).to(dtype)

        self.form, self.dtype, self.gated = form, dtype, gated
        self.tokens = random(tokens, hidden)
        self.ids = routed(tokens, experts, top_k, how, generator)
        self.slot = torch.rand(tokens, top_k, device="cuda", generator=generator).to(dtype)
        wide = inner if gated in ("none", "two") else 2 * inner
        count = 2 if gated == "two" else 1
        transposed = getattr(form, "transposed", False)

        def stored(weight):
            if transposed:
                return [weight.mT.contiguous()]
            return [weight] if isinstance(form, Unquantized) else list(form.quantize(weight))

        self.up = [each for _ in range(count) for each in stored(random(experts, wide, hidden, scale=hidden**-0.5))]
        self.down = stored(random(experts, hidden, inner, scale=inner**-0.5))
        self.up_bias = [random(experts, wide) for _ in range(count)] if bias else []
        self.down_bias = random(experts, hidden) if bias else None

    def arguments(self, activation, dtype=None, before=False):
        def to(tensor):
            return tensor.to(dtype) if dtype is not None and tensor.dtype is self.dtype else tensor

        transposed = getattr(self.form, "transposed", False)
        return (
            to(self.tokens), self.ids, to(self.slot), [to(each) for each in self.up],
            [to(each) for each in self.up_bias],
            self.form.name, transposed, [to(each) for each in self.down],
            None if self.down_bias is None else to(self.down_bias), self.form.name, transposed, self.gated, activation,
            1.702, 1.5, before, dtype or self.dtype,
        )  # fmt: skip

    def check(self, activation="silu", before=False):
        poison()
        actual = torch.ops.moe_fx.fused_experts_any(*self.arguments(activation, before=before))
        exact = ops.fused_experts_reference(*self.arguments(activation, torch.float64, before))
        again = torch.ops.moe_fx.fused_experts(*self.arguments(activation, before=before))
        assert actual.dtype is again.dtype is self.dtype
        if not actual.numel():
            return
        # As exact as the same ops one by one in this dtype, which round more often.
        plain = ops.fused_experts_reference(*self.arguments(activation, before=before))
        size = exact.norm().clamp_min(1e-6)
        opaque, transparent, error = (float((each.double() - exact).norm() / size) for each in (actual, again, plain))
        assert opaque < most(self.form, error), (opaque, error)
        assert transparent < most(self.form, error), (transparent, error)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 3, 37, 300, 2500])
def test_every_format_at_every_number_of_tokens(tokens, dtype, form):
    Layer(form, dtype, tokens=tokens, seed=tokens).check()


@pytest.mark.parametrize("form", [FORMATS["none"], FORMATS["int8"], FORMATS["int4"]], ids=repr)
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("gated", ops.GATED)
def test_every_layout_of_gate_and_up(gated, tokens, form):
    Layer(form, torch.bfloat16, gated, tokens).check("relu" if gated == "none" else "silu")


@pytest.mark.parametrize("activation", [*ops.ACTIVATIONS, "clamped_swiglu"])
@pytest.mark.parametrize("gated", ["none", "interleaved", "gate_up"])
def test_every_activation(gated, activation):
    if gated == "none" and activation == "clamped_swiglu":
        pytest.skip("of gate and up only")
    Layer(FORMATS["none"], torch.bfloat16, gated).check(activation)


@pytest.mark.parametrize("how", ["all on one", "idle experts", "ids of no expert"])
@pytest.mark.parametrize("form", [FORMATS["none"], FORMATS["float8 dynamic"], FORMATS["int4"]], ids=repr)
@pytest.mark.parametrize("tokens", [1, 60, 400, 5000])
def test_every_routing(tokens, form, how):
    Layer(form, torch.bfloat16, tokens=tokens, how=how).check()


@pytest.mark.parametrize(("hidden", "inner"), [(40, 24), (72, 200), (2880, 136), (64, 1000), (320, 192)])
@pytest.mark.parametrize("form", list(FORMATS.values())[:6], ids=list(FORMATS)[:6])
@pytest.mark.parametrize("tokens", [3, 150, 700])
def test_sizes_that_are_no_multiple_of_a_tile(tokens, form, hidden, inner):
    Layer(form, torch.bfloat16, tokens=tokens, hidden=hidden, inner=inner).check()
    Layer(form, torch.bfloat16, "interleaved", tokens=tokens, hidden=hidden, inner=inner).check("clamped_swiglu")


@pytest.mark.parametrize("form", [FORMATS["none"], FORMATS["float8 dynamic"]], ids=repr)
def test_routing_weight_on_the_rows(form):
    Layer(form, torch.bfloat16, top_k=1).check(before=True)


@pytest.mark.parametrize("form", [FORMATS["none"], FORMATS["float8 dynamic"], FORMATS["int4"]], ids=repr)
@pytest.mark.parametrize("tokens", [8, 16, 17, 60, 64, 65])
def test_few_slots_for_fewer_experts(tokens, form):
    Layer(form, torch.bfloat16, tokens=tokens, experts=1, top_k=1).check()
    Layer(form, torch.bfloat16, tokens=tokens, experts=2).check()


@pytest.fixture(params=["half tiles", "whole tiles", "one tile after another"])
def tiles(request, monkeypatch):
    def chosen(product, rows, gathered):
        joined, large = fused_tiles.JOINED, fused_tiles.LARGE
        tile = (joined[product.kind] if product.joined else large[product.kind, product.two])[-1][1]
        if request.param == "one tile after another" and product.kind in joined:
            if not product.two:
                return fused_tiles.SHORT
            return fused_tiles.JOINED_SORTED if product.joined and product.kind == "dynamic" else tile
        return replace(tile, persistent=0, half=request.param == "half tiles")

    monkeypatch.setattr(fused_large, "large_tile_of", chosen)


@pytest.mark.parametrize("gated", ["none", "gate_up", "up_gate", "interleaved", "two"])
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "gathered"])
@pytest.mark.parametrize("form", ["none", "int8", "int8 dynamic", "float8", "float8 dynamic", "int4"])
def test_many_rows_per_expert(form, sort, gated, tiles, monkeypatch):
    calls = []
    monkeypatch.setattr(fused_tiles, "SORT_ABOVE", 0 if sort else 1 << 30)
    monkeypatch.setattr(fused_tiles, "SORT_DYNAMIC_ABOVE", 1 << 30)
    monkeypatch.setattr(fused_launch, "run_large", lambda *each: calls.append(each) or fused_large.run_large(*each))
    layer = Layer(FORMATS[form], torch.bfloat16, gated, 2500, how="ids of no expert")
    layer.check("relu" if gated == "none" else "silu")
    layer = Layer(FORMATS[form], torch.bfloat16, gated, 4300, top_k=1, hidden=128, inner=384)
    layer.check("relu" if gated == "none" else "silu", before=True)
    assert len(calls) == 2


@pytest.mark.parametrize("form", ["none", "int8", "float8", "float8 dynamic", "int4", "int4 of 32", "int4 asymmetric"])
@pytest.mark.parametrize("tokens", [9, 25, 45, 75, 160, 600, 1200])
def test_the_tiles_of_all_numbers_of_rows(tokens, form):
    layer = Layer(FORMATS[form], torch.bfloat16, tokens=tokens, experts=5, hidden=2048, inner=1920)
    layer.check()
    # What is still read when it is written differs from one time to the next.
    for op in (torch.ops.moe_fx.fused_experts_any, torch.ops.moe_fx.fused_experts):
        first, *others = [op(*layer.arguments("silu")) for _ in range(4)]
        assert all(torch.equal(first, each) for each in others)


@pytest.mark.parametrize("form", [FORMATS["int8"], FORMATS["int4"], moe_fx.Int4WeightOnly(64)], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("gated", ["none", "gate_up", "up_gate", "two", "interleaved"])
def test_weights_widened_in_registers(gated, dtype, form, monkeypatch):
    taken = []
    whole = fused_large.large_gemm_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*operands, **constants):
                taken.append((constants["BITS"], constants["BM"]))
                return whole[grid](*operands, **constants)

            return launch

    monkeypatch.setattr(fused_large, "large_gemm_kernel", Spy())
    bits, blocks = (8, (32, 64, 128)) if form is FORMATS["int8"] else (4, (16, 32, 64, 128))
    blocks = (64, 128) if form == moe_fx.Int4WeightOnly(64) else blocks  # steps of half the length
    for tokens, experts in ((19, 4), (55, 6), (130, 6), (900, 6), (450, 2)):
        layer = Layer(form, dtype, gated, tokens, experts=experts, hidden=1024, inner=640)
        layer.check("relu" if gated == "none" else "silu")
        layer.check("relu" if gated == "none" else "silu", before=True)
    assert {each[0] for each in taken} == {bits}
    assert {each[1] for each in taken} == set(blocks)


def test_weights_may_lie_anywhere():
    layer = Layer(FORMATS["none"], torch.bfloat16, tokens=2500)
    arguments = list(layer.arguments("silu"))
    expected = torch.ops.moe_fx.fused_experts_any(*arguments)
    store = torch.empty(layer.up[0].numel() + 1, dtype=torch.bfloat16, device="cuda")
    store[1:] = layer.up[0].flatten()
    arguments[3] = [store[1:].view(layer.up[0].shape)]  # at no multiple of 16 bytes
    actual = torch.ops.moe_fx.fused_experts_any(*arguments)
    torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("form", ["none", "int8", "float8 dynamic", "int4"])
@pytest.mark.parametrize("tokens", [1, 4, 16, 60])
def test_kernels_set_up_while_the_one_before_runs_give_what_kernels_in_turn_give(tokens, form):
    layers = [
        Layer(
            FORMATS[form], torch.bfloat16, tokens=tokens, hidden=1024, inner=768, experts=32, top_k=4, how=how, seed=i
        )
        for i, how in enumerate(["all on one", "idle experts", "ids of no expert"])
    ]
    layers[-1].ids = layers[-1].ids if tokens > 1 else torch.full_like(layers[-1].ids, -1)
    expected = [torch.ops.moe_fx.fused_experts(*layer.arguments("silu")) for layer in layers]
    torch.cuda.synchronize()
    results = [torch.ops.moe_fx.fused_experts_any(*layer.arguments("silu")) for _ in range(60) for layer in layers]
    assert all(torch.equal(result, expected[i % 3]) for i, result in enumerate(results))


def test_rows_need_not_be_contiguous():
    layer = Layer(FORMATS["none"], torch.bfloat16)
    for tokens in (layer.tokens.mT.contiguous().mT, torch.cat([layer.tokens] * 2, 1)[:, : layer.tokens.shape[1]]):
        assert not tokens.is_contiguous()
        arguments = list(layer.arguments("silu"))
        expected = torch.ops.moe_fx.fused_experts_any(*arguments)
        arguments[0] = tokens
        arguments[1] = layer.ids.mT.contiguous().mT
        assert torch.equal(torch.ops.moe_fx.fused_experts_any(*arguments), expected)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("tokens", [3, 300, 2500])
def test_linears_of_slots(tokens, form):
    layer = Layer(form, torch.bfloat16, tokens=tokens)
    transposed = getattr(form, "transposed", False)
    by_token = layer.tokens
    by_slot = by_token.repeat_interleave(2, 0)
    for rows in (by_token, by_slot):
        poison()
        actual = torch.ops.moe_fx.slot_linear_any(rows, layer.ids, layer.up, form.name, transposed)
        weights = [each.double() if each.dtype is torch.bfloat16 else each for each in layer.up]
        exact = ops.slot_linear_reference(rows.double(), layer.ids, weights, form.name, transposed)
        assert float((actual.double() - exact).norm() / exact.norm()) < (2**-5 if "dynamic" in form.name else 2**-8)


@pytest.mark.parametrize("block", [4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("slots", [1, 30, 1000, 2048, 2049, 50000])
@pytest.mark.parametrize("experts", [1, 8, 130])
def test_routing(experts, slots, block):
    generator = torch.Generator("cuda").manual_seed(slots)
    ids = torch.randint(-1, experts + 1, (slots, 1), device="cuda", generator=generator)
    poison()
    actual, expected = route(ids, experts, block), route_reference(ids.cpu(), experts, block)
    count = int(expected[3])
    assert int(actual[3]) == count
    assert torch.equal(actual[1][:count].cpu(), expected[1][:count])
    assert torch.equal(actual[2][:count].cpu(), expected[2][:count])
    # Which of an expert's tiles holds a slot is left open.
    for expert in range(experts):
        mine = expected[1][:count] == expert
        assert torch.equal(
            actual[0][:count].cpu()[mine].flatten().sort().values, expected[0][:count][mine].flatten().sort().values
        )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("width", [1, 100, 768, 2880, 5120, 14336])
@pytest.mark.parametrize("count", [33, 1040])
def test_quantized_rows_to_the_bit(count, width, dtype):
    rows = torch.randn(count, width, device="cuda").bfloat16()
    rows = rows * torch.logspace(-6, 3, count, device="cuda").unsqueeze(-1)
    rows[5] = 0
    rows = rows.bfloat16()
    poison()
    # On a GPU, torch divides by a number as it multiplies by its reciprocal: what is exact is the CPU.
    actual, expected = triton_rows.quantize_rows(rows, dtype), triton_rows.quantize_rows_reference(rows.cpu(), dtype)
    assert torch.equal(actual[1].cpu(), expected[1])
    assert torch.equal(actual[0].float().cpu(), expected[0].float())


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_sum_over_slots(top_k, parts):
    rows = torch.randn(45 * top_k * parts, 1000, device="cuda").bfloat16()
    ids = torch.randint(-1, 5, (45, top_k), device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        actual = triton_rows.sum_slots(rows, ids, 4, dtype)
        expected = triton_rows.sum_slots_reference(rows, ids, 4, dtype)
        torch.testing.assert_close(actual, expected, rtol=1e-6 if dtype is torch.float32 else 2**-8, atol=1e-6)


@pytest.mark.parametrize("block", [0, 16, 64])
def test_pairs_apart(block):
    rows = torch.randn(5, 2944, device="cuda").bfloat16()[:, : 2 * 1408 if block == 64 else 2880]
    poison()
    (actual, sums), (expected, exact) = (
        triton_rows.split_pairs(rows, block),
        triton_rows.split_pairs_reference(rows, block or 16),
    )
    assert torch.equal(actual, expected)
    if block:
        torch.testing.assert_close(sums, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("tokens", [40, 3000])
def test_rows_in_the_order_of_tiles(tokens, top_k):
    rows = torch.randn(tokens, 5000, device="cuda").bfloat16()
    count = tokens * top_k
    (slots, _, _, tiles), places = route_and_places(torch.randint(-1, 6, (tokens, top_k), device="cuda"), 5, 128)
    slots[int(tiles) :] = count
    there = (slots < count).flatten()
    for pairs_apart in (False, True):
        poison()
        actual = triton_rows.sort_rows(rows, places, slots.numel(), pairs_apart)
        expected = triton_rows.sort_rows_reference(rows, slots, top_k, count, pairs_apart)
        assert torch.equal(actual[there], expected[there])
    poison()
    actual, scale = triton_rows.quantize_rows(rows, torch.int8, places=places, num_places=slots.numel())
    values, expected = triton_rows.quantize_rows(rows, torch.int8)
    assert torch.equal(scale, expected)
    assert torch.equal(actual[there], triton_rows.sort_rows_reference(values, slots, top_k, count)[there])


def test_quantized_rows_of_slots():
    rows = torch.randn(3000, 768, device="cuda").bfloat16()
    slots = torch.randint(0, 4000, (3000,), device="cuda", dtype=torch.int32)
    poison()
    actual = triton_rows.quantize_rows(rows, torch.float8_e4m3fn, slots, 2000)
    expected = triton_rows.quantize_rows(rows, torch.float8_e4m3fn)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one.float()[slots < 2000], other.float()[slots < 2000])


@pytest.mark.parametrize("form", [moe_fx.Int8WeightOnly(), moe_fx.Float8WeightOnly()], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_widened(form, dtype):
    weight = form.quantize(torch.randn(3, 50, 1000, device="cuda"))[0]
    poison()
    assert torch.equal(triton_widen.widen(weight, dtype), triton_widen.widen_reference(weight, dtype))


@pytest.mark.parametrize("symmetric", [True, False])
def test_widened_int4(symmetric):
    tensors = moe_fx.Int4WeightOnly(32, symmetric).quantize(torch.randn(3, 50, 4160, device="cuda").bfloat16())
    assert torch.equal(
        triton_widen.widen_int4(tensors, torch.bfloat16), triton_widen.widen_int4_reference(tensors, torch.bfloat16)
    )


# Whole layers ------------------------------------------------------------------------------------------------------

LAYER_FORMATS = {
    "none": None, "int8": moe_fx.Int8WeightOnly(), "float8 dynamic": moe_fx.Float8Dynamic(),
    "int4": moe_fx.Int4WeightOnly(32),
}  # fmt: skip


def rows(count, seed=0):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count + seed)).bfloat16()


def transformed(model, form, tokens=None):
    dynamic = None if tokens else ({0: torch.export.Dim("tokens", min=2, max=4096)},)
    with torch.no_grad():
        program = torch.export.export(
            copy.deepcopy(model).cuda().eval(), (rows(tokens or 37).cuda(),), dynamic_shapes=dynamic
        )
    result = moe_fx.transform(program, moe_fx.Config(experts="fused", quantize=form, require="all"))
    assert [node for node in result.graph.nodes if "moe_fx.fused_experts" in str(node.target)]
    return result


def expected_of(model, form, x):
    ids, weights = (chosen.cpu() for chosen in copy.deepcopy(model).cuda().route(x.cuda()))
    twin = defined(model, form, "cuda") if form else copy.deepcopy(model).float()
    with torch.no_grad():
        return twin.experts(x if form else x.float(), ids, weights if form else weights.float())


def least(form):
    return 22 if form == moe_fx.Float8Dynamic() else 35


@pytest.mark.parametrize("form", LAYER_FORMATS.values(), ids=LAYER_FORMATS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
@pytest.mark.parametrize("tokens", [None, 1, 37, 300])
def test_layer(tokens, compiled, form):
    model = Gathered(num_experts=8, hidden=64, inner=96, bias=True, dtype=torch.bfloat16)
    run = transformed(model, form, tokens).module()
    if compiled:
        torch.compiler.reset()
        run = torch.compile(run, fullgraph=True)
    for count in (tokens,) if tokens else (37, 2, 300, 4000):
        x = rows(count)
        with torch.no_grad():
            actual = run(x.cuda()).cpu()
        assert sqnr(actual.float(), expected_of(model, form, x).float()) > least(form)


@pytest.mark.parametrize("form", LAYER_FORMATS.values(), ids=LAYER_FORMATS)
@pytest.mark.parametrize("tokens", [1, 37, 700])
def test_layer_in_a_cuda_graph_waits_for_nobody(tokens, form):
    model = Gathered(num_experts=8, hidden=64, inner=96, dtype=torch.bfloat16)
    eager = transformed(model, form, tokens).module()
    torch.compiler.reset()
    run = torch.compile(eager, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(5):
            x = rows(tokens, seed)
            torch.compiler.cudagraph_mark_step_begin()
            actual = run(x.cuda()).cpu()
            assert sqnr(actual.float(), expected_of(model, form, x).float()) > least(form)
        x = x.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            eager(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", KNOWN.values(), ids=KNOWN)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "inductor"])
def test_known_bodies(options, compiled):
    model = Gathered(num_experts=8, hidden=64, inner=96, dtype=torch.bfloat16, **options)
    run = transformed(model, None, 37).module()
    torch.compiler.reset()
    run = torch.compile(run, fullgraph=True) if compiled else run
    x = rows(37)
    with torch.no_grad():
        assert sqnr(run(x.cuda()).cpu().float(), expected_of(model, None, x)) > 35


@pytest.mark.parametrize("form", LAYER_FORMATS.values(), ids=LAYER_FORMATS)
@pytest.mark.parametrize("tokens", [None, 37])
def test_any_other_body_compiles_between_fused_linears(tokens, form):
    model = Gathered(num_experts=8, hidden=64, inner=96, bias=True, dtype=torch.bfloat16, activation=mish_glu)
    dynamic = None if tokens else ({0: torch.export.Dim("tokens", min=2, max=4096)},)
    with torch.no_grad():
        program = torch.export.export(copy.deepcopy(model).cuda(), (rows(37).cuda(),), dynamic_shapes=dynamic)
    program = moe_fx.transform(program, moe_fx.Config(experts="fused", quantize=form, require="all"))
    assert [node for node in program.graph.nodes if "moe_fx.slot_linear" in str(node.target)]
    torch.compiler.reset()
    for run in (program.module(), torch.compile(program.module(), fullgraph=True)):
        for count in (37,) if tokens else (37, 300):
            x = rows(count)
            with torch.no_grad():
                assert sqnr(run(x.cuda()).cpu().float(), expected_of(model, form, x).float()) > least(form)


@pytest.mark.parametrize("tokens", [1, 300, 3000])
def test_auto_takes_the_kernels(tokens):
    model = Gathered(num_experts=8, hidden=64, inner=128, dtype=torch.bfloat16).cuda()
    program = torch.export.export(model, (rows(tokens).cuda(),))
    result = moe_fx.transform(program, moe_fx.Config(require="all"))
    assert moe_fx.report(result).layers[0].lowering == "fused"
    run = torch.compile(result.module(), fullgraph=True)  # with gradients enabled
    x = rows(tokens)
    assert sqnr(run(x.cuda()).detach().cpu().float(), expected_of(model.cpu(), None, x)) > 35


def test_what_is_trained_keeps_its_gradient():
    model = Gathered(num_experts=8, hidden=64, inner=96, dtype=torch.bfloat16).cuda()
    torch.compiler.reset()
    backend = moe_fx.backend()
    torch.compile(model, backend=backend)(rows(37).cuda()).sum().backward()
    assert backend.reports[0].layers[0].lowering == "grouped_mm"
    assert "no gradient" in backend.reports[0].layers[0].why
    assert model.down.grad is not None


def test_gradients_pass_through_frozen_experts():
    model = Gathered(num_experts=8, hidden=64, inner=96, dtype=torch.bfloat16).cuda().requires_grad_(False)
    torch.compiler.reset()
    x = rows(37).cuda().requires_grad_()
    torch.compile(model, backend=moe_fx.backend())(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("quantize", [None, moe_fx.Int4WeightOnly(32), moe_fx.Float8Dynamic()], ids=repr)
def test_tuned(quantize):
    found = tuning.tune(
        num_experts=4, top_k=2, hidden=256, inner=384, tokens=[20, 500], quantize=quantize, gated="gate_up"
    )
    assert {product.two for product in found} == {True, False}
    assert len(found) == 4


def test_compiled_weights_are_read_where_they_lie():
    """A compiler that thought that a kernel writes its operands would copy the weights at every call."""
    model = Gathered(num_experts=8, hidden=1024, inner=2048, dtype=torch.bfloat16).cuda()
    x = torch.randn(37, 1024, device="cuda").bfloat16()
    with torch.no_grad():
        program = moe_fx.transform(torch.export.export(model, (x,)), moe_fx.Config(experts="fused", require="all"))
        torch.compiler.reset()
        run = torch.compile(program.module(), fullgraph=True)
        run(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(x)
    assert torch.cuda.max_memory_allocated() - before < model.down.numel() * 2 / 4


@pytest.mark.parametrize("quantize", [None, moe_fx.Int8WeightOnly()], ids=["none", "int8"])
@pytest.mark.parametrize("family", MAIN)
def test_whole_models(family, quantize):
    pytest.importorskip("transformers", reason="the models come from transformers")
    torch.compiler.reset()
    model = copy.deepcopy(build(family, "grouped_mm", torch.bfloat16)).cuda()
    backend = moe_fx.backend(moe_fx.Config(experts="fused", quantize=quantize, require="all"))
    compiled = torch.compile(model, backend=backend)
    for shape in ((2, 9), (1, 5)):
        ids = token_ids(shape).cuda()
        with torch.no_grad():
            actual, expected = compiled(input_ids=ids).logits.float(), model(input_ids=ids).logits.float()
        assert sqnr(actual, expected) > 12  # rounded at other places, which the routers behind amplify
    assert all("the fused kernels" not in layer.why for report in backend.reports for layer in report.layers)


def test_saved_and_loaded(tmp_path):
    model = Gathered(num_experts=8, hidden=64, inner=96, dtype=torch.bfloat16)
    program = transformed(model, moe_fx.Int8WeightOnly())
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    with torch.no_grad():
        assert torch.equal(loaded.module()(rows(20).cuda()), program.module()(rows(20).cuda()))
