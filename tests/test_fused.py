"""The lowering fused on a CPU: its references, what it writes, and what it says where it cannot be used."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import MAIN, exported, relative_error, sqnr
from test_format_product import FORMATS, defined, layer, x
from toys import Gathered, export, interleaved_clamped_swiglu, relu_squared

import moe_fx
from moe_fx.kernels import fused_tiles
from moe_fx.kernels.triton_blocks import split_blocks_reference
from moe_fx.kernels.triton_digits import split_digits_reference
from moe_fx.kernels.triton_routing import max_tiles, route_reference
from moe_fx.kernels.triton_rows import (
    quantize_rows_reference,
    sort_rows_reference,
    split_pairs_reference,
    sum_slots_reference,
)
from moe_fx.kernels.triton_widen import widen_int4_reference, widen_reference


@pytest.fixture
def anywhere(monkeypatch):
    """The lowering is written for the CPU too, where its ops are their references."""
    monkeypatch.setattr("moe_fx.passes.lowering.table.unavailable", lambda device: None)


def fused(model, dynamic=True, quantize=None, hidden=8):
    program = export(model, dynamic=dynamic, hidden=hidden)
    return moe_fx.transform(program, moe_fx.Config(experts="fused", quantize=quantize, require=1))


def targets(program):
    return [str(node.target) for node in program.graph.nodes if "moe_fx" in str(node.target)]


def geglu(h):
    gate, up = h.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def up_then_gate(h):
    up, gate = h.chunk(2, dim=-1)
    return up * F.silu(gate)


def mish_glu(h):
    gate, up = h.chunk(2, dim=-1)
    return F.mish(gate) * up


KNOWN = {
    "swiglu": dict(bias=True),
    "geglu": dict(activation=geglu),
    "up before gate": dict(activation=up_then_gate),
    "interleaved and clamped, transposed": dict(activation=interleaved_clamped_swiglu, bias=True, transposed=True),
    "no gate": dict(activation=relu_squared, gated=False),
    "no activation but gelu": dict(activation=F.gelu, gated=False, bias=True),
    "weight before": dict(weight_before=True, bias=True),
}


@pytest.mark.parametrize("options", KNOWN.values(), ids=KNOWN)
def test_a_known_body_is_one_op(options, anywhere):
    model = Gathered(dtype=torch.bfloat16, **options)
    program = fused(model)
    assert targets(program) == ["moe_fx.fused_experts_any.default"]
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(7)).bfloat16()
    with torch.no_grad():
        assert sqnr(program.module()(rows).float(), model.float()(rows.float())) > 35


def test_gate_and_up_of_two_weights_are_one_op(anywhere):
    class Two(Gathered):
        def __init__(self, **options):
            super().__init__(gated=False, **options)
            self.gate = torch.nn.Parameter(torch.randn_like(self.up))
            if self.bias:
                self.gate_bias = torch.nn.Parameter(torch.randn_like(self.up_bias))

        def experts(self, x, ids, weights):
            flat = ids.reshape(-1)
            rows, slot = x.repeat_interleave(self.K, 0), weights.reshape(-1, 1)
            gate, up = self.apply(rows, self.gate, flat), self.apply(rows, self.up, flat)
            gate, up = gate + self.gate_bias[flat], up + self.up_bias[flat]
            y = self.apply(F.silu(gate) * up, self.down, flat) + self.down_bias[flat]
            return (y * slot).view(-1, self.K, y.shape[-1]).sum(1)

    model = Two(dtype=torch.bfloat16, bias=True)
    program = fused(model)
    assert targets(program) == ["moe_fx.fused_experts_any.default"]
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(7)).bfloat16()
    with torch.no_grad():
        assert sqnr(program.module()(rows).float(), model.float()(rows.float())) > 35


def test_a_fixed_number_of_tokens_takes_the_op_that_compilers_see_through(anywhere):
    assert targets(fused(Gathered(dtype=torch.bfloat16), dynamic=False)) == ["moe_fx.fused_experts.default"]


@pytest.mark.parametrize("bias", [False, True])
def test_any_other_body_keeps_its_own_ops_between_fused_linears(bias, anywhere):
    model = Gathered(dtype=torch.bfloat16, activation=mish_glu, bias=bias)
    program = fused(model)
    assert targets(program) == ["moe_fx.slot_linear_any.default"] * 2
    why = moe_fx.report(program).layers[0].why
    assert why.startswith("as configured; the body is not fused as a whole: ")
    rows = torch.randn(7, 8, generator=torch.Generator().manual_seed(7)).bfloat16()
    with torch.no_grad():
        assert sqnr(program.module()(rows).float(), model.float()(rows.float())) > 35


@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_every_format_equals_its_definition(form, anywhere):
    model = layer(torch.bfloat16)
    program = fused(model, quantize=form, hidden=32)
    small_groups = isinstance(form, moe_fx.Int4WeightOnly)  # of 16 and 8 inputs, for which there is no kernel
    assert bool(targets(program)[0].startswith("moe_fx.fused_experts")) is not small_groups
    with torch.no_grad():
        actual, expected = (each(x(6, torch.bfloat16)) for each in (program.module(), defined(model, form)))
    assert sqnr(actual, expected) > 35


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_groups_of_32_are_fused(symmetric, anywhere):
    model, form = Gathered(dtype=torch.bfloat16, hidden=64, inner=32), moe_fx.Int4WeightOnly(32, symmetric)
    program = fused(model, quantize=form, hidden=64)
    assert targets(program) == ["moe_fx.fused_experts_any.default"]
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(6)).bfloat16()
    with torch.no_grad():
        assert sqnr(program.module()(rows), defined(model, form)(rows)) > 35


@pytest.mark.parametrize("family", MAIN)
def test_models_are_fused_whole(family, anywhere):
    pytest.importorskip("transformers", reason="the models come from transformers")
    program = exported(family, "grouped_mm", torch.bfloat16)
    result = moe_fx.transform(program, moe_fx.Config(experts="fused", require="all", validate=False))
    assert set(targets(result)) == {"moe_fx.fused_experts_any.default"}
    ids = torch.arange(3, 17).reshape(2, 7)
    with torch.no_grad():
        actual, expected = (each.module()(input_ids=ids).logits.float() for each in (result, program))
    assert sqnr(actual, expected) > 12  # rounded to bfloat16 at other places, which the routers behind amplify


def refusal(dtype=torch.bfloat16, **options):
    program = fused(Gathered(dtype=dtype, **options))
    assert not [target for target in targets(program) if "fused" in target or "slot_linear" in target]
    (layer,) = moe_fx.report(program).layers
    assert layer.lowering == "grouped_mm"
    return layer.why


def test_on_a_cpu_grouped_mm_is_written_and_the_report_says_why():
    assert refusal().startswith(
        "as configured; the fused kernels need a GPU of compute capability 9.0, not cpu: grouped_mm"
    )


def test_without_triton_grouped_mm_is_written_and_the_report_says_why(monkeypatch):
    from moe_fx.kernels import triton_or_none

    monkeypatch.setattr(triton_or_none, "AVAILABLE", False)
    assert triton_or_none.unavailable(torch.device("cuda")) == "the fused kernels need Triton, which is not installed"


def test_float32_is_refused(anywhere):
    assert "the fused kernels multiply in bfloat16 and float16, not float32: grouped_mm" in refusal(torch.float32)


def test_routing_reference():
    ids = torch.tensor([[2, 0], [2, 5], [2, -1], [0, 2]])
    slots, tile_expert, tile_group, tile_count = route_reference(ids, 4, 2)
    assert slots.shape == (max_tiles(8, 4, 2), 2) == (8, 2)
    assert slots[:3].tolist() == [[1, 6], [0, 2], [4, 7]]
    assert tile_expert[:3].tolist() == [0, 2, 2]
    assert tile_group[:3].tolist() == [[0, 1], [1, 2], [1, 2]]
    assert tile_count.tolist() == [3]


def test_every_routing_fits_into_max_tiles():
    for generator in (torch.Generator().manual_seed(seed) for seed in range(50)):
        num_slots, experts, block = (int(torch.randint(1, most, (), generator=generator)) for most in (200, 20, 33))
        count = torch.randint(0, experts, (num_slots,), generator=generator).bincount(minlength=experts)
        assert int(((count + block - 1) // block).sum()) <= max_tiles(num_slots, experts, block)


def test_sum_over_slots_leaves_out_what_names_no_expert():
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    rows[2] = float("nan")
    ids = torch.tensor([[0, 1], [4, 3], [2, 2]])
    assert torch.equal(
        sum_slots_reference(rows, ids, 4, torch.float32), torch.stack([rows[0] + rows[1], rows[3], rows[4] + rows[5]])
    )


def test_quantized_rows_stand_for_the_rows():
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scale = quantize_rows_reference(rows, torch.int8)
    assert relative_error(values * scale.unsqueeze(-1), rows.float()) < 0.5 / 127


def test_pairs_apart_and_their_sums():
    rows = torch.arange(16.0).reshape(2, 8)
    apart, sums = split_pairs_reference(rows, 2)
    assert apart[0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert sums[0].tolist() == [2, 10, 4, 12]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_digits_stand_for_the_rows(dtype):
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[1], rows[2], rows[3, 0] = 0, rows[2] * 1e-6, 3e4
    rows[4, 1] = float("inf")
    digits, scale = split_digits_reference(rows, pairs_apart=True)
    apart, _ = split_pairs_reference(rows, 2)
    high, middle, low = digits.double().chunk(3, -1)
    whole = (65536 * high + 256 * middle + low) * scale.double().unsqueeze(-1)
    assert scale[4].isnan()
    finite = [0, 1, 2, 3, 5]
    # All of what a row's largest number leaves room for, which in the fourth is not all.
    largest = apart[finite].double().abs().amax(-1, keepdim=True)
    assert (whole[finite] - apart[finite].double()).abs().le(2**-22 * largest).all()
    assert torch.equal(whole[[0, 1, 2, 5]], apart[[0, 1, 2, 5]].double())


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 4)])
def test_digits_of_blocks_stand_for_the_rows(dtype, bits):
    rows = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[1], rows[2], rows[3, 0], rows[4, 17] = 0, rows[2] * 1e-6, 3e4, float("nan")
    digits, scale = split_blocks_reference(rows, pairs_apart=False)
    high, low = digits.double().chunk(2, -1)
    whole = (256 * high + low % 256).unflatten(-1, (-1, 16)) * scale.double().unsqueeze(-1)
    blocks = rows.double().unflatten(-1, (-1, 16))
    assert scale[4].isnan().tolist() == [False, True, False, False]
    finite = [0, 1, 2, 3, 5]
    largest = blocks.abs().amax(-1, keepdim=True)
    error = (whole - blocks).abs()
    assert error[finite].le(2**-15 * largest[finite]).all()
    assert error[finite][blocks[finite].abs() >= 2**-bits * largest[finite]].eq(0).all()
    apart, same = split_blocks_reference(rows, pairs_apart=True)
    assert torch.equal(same.nan_to_num(0), scale.nan_to_num(0))
    assert torch.equal(apart[:, :32], digits[:, :64:2])
    assert torch.equal(apart[:, 32:64], digits[:, 1:64:2])
    assert torch.equal(apart[:, 64:96], digits[:, 64::2])


def test_rows_in_the_order_of_tiles():
    rows = torch.arange(8.0).reshape(4, 2)
    slots = torch.tensor([[3, 8], [7, 0]])
    assert sort_rows_reference(rows, slots, 2, 8).tolist() == [[2, 3], [0, 0], [6, 7], [0, 1]]
    wide = torch.arange(16).view(4, 4)
    assert sort_rows_reference(wide, slots, 2, 8, pairs_apart=True)[2:].tolist() == [[12, 14, 13, 15], [0, 2, 1, 3]]


@pytest.mark.parametrize("form", [moe_fx.Int8WeightOnly(), moe_fx.Float8WeightOnly()], ids=repr)
def test_widened_weights_are_still_to_be_scaled(form):
    qdata, scale = form.quantize(torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(widen_reference(qdata, torch.float32) * scale.unsqueeze(-1), form.dequantize(qdata, scale))


def test_widened_int4_is_the_formats_own():
    form = moe_fx.Int4WeightOnly(32, symmetric=False)
    tensors = form.quantize(torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(widen_int4_reference(tensors, torch.float32), form.dequantize(*tensors))


def test_no_two_functions_of_kernels_have_the_same_name():
    # torch.compile copies what a kernel calls into one module, by name: of two, one would be called for the other.
    where = {}
    for path in Path(fused_tiles.__file__).parent.glob("triton_*.py"):
        for each in ast.parse(path.read_text()).body:
            if isinstance(each, ast.FunctionDef) and any("jit" in ast.unparse(by) for by in each.decorator_list):
                assert where.setdefault(each.name, path.name) == path.name, each.name
    assert "token_kernel" in where


def test_there_is_a_tile_for_every_product():
    kinds = {kind for kind, _, _ in fused_tiles.TILES}
    for slots in (1, 8, 64, 500, 4096, 131072):
        for experts in (1, 8, 128):
            for kind in kinds:
                blocks = [fused_tiles.block_of_rows("plain" if kind == "columns" else kind, slots, experts)]
                if kind in ("widened", "int4"):
                    blocks += [fused_tiles.block_of_digits(tokens, slots, experts) or 8 for tokens in (1, slots)]
                for two in (False, True):
                    for block in blocks:
                        product = fused_tiles.Product(kind, two, block, 768, 2048)
                        assert fused_tiles.tile_of(product, min(slots, experts))
                        if kind != "columns":
                            large = fused_tiles.large_tile_of(product, slots / experts)
                            # What is widened in registers is the left operand.
                            assert large.swap or kind not in ("widened", "int4")
                        for gathered in (False, True) if two and kind in ("plain", "dynamic") else ():
                            # Rows are the left operand of gate and up in one.
                            joined = replace(product, joined=True)
                            assert not fused_tiles.large_tile_of(joined, slots / experts, gathered).swap
                    if kind in ("widened", "int4") and fused_tiles.loads_by_descriptor(kind, slots, experts, True):
                        block = fused_tiles.block_of_rows(kind, slots, experts, True)
                        assert (kind, two, block) in fused_tiles.IN_REGISTERS or block == 128


def test_weights_are_read_for_each_slot_where_few_are_read_twice():
    megabytes = 1e6
    # One token's experts are distinct, however large they are.
    assert fused_tiles.reads_apart("plain", 176 * megabytes, 1, 2, 8)
    assert fused_tiles.reads_apart("int4", 91 * megabytes, 1, 8, 8)
    assert not fused_tiles.reads_apart("plain", 176 * megabytes, 2, 2, 8)
    assert fused_tiles.reads_apart("plain", 4.7 * megabytes, 4, 8, 128)
    assert fused_tiles.reads_apart("int4", 91 * megabytes, 2, 2, 8)
    assert not fused_tiles.reads_apart("int4", 91 * megabytes, 4, 2, 8)
    assert fused_tiles.reads_apart("plain", 6.3 * megabytes, 4, 8, 64)
    assert not fused_tiles.reads_apart("plain", 6.3 * megabytes, 8, 8, 64)


def test_slots_take_the_same_columns_in_turn_where_they_share_many_weights():
    megabytes = 1e6
    assert not fused_tiles.reads_together("plain", 176 * megabytes, 1, 2, 8)  # one token shares nothing
    assert not fused_tiles.reads_together("plain", 4.7 * megabytes, 4, 8, 128)
    assert fused_tiles.reads_together("plain", 6.3 * megabytes, 4, 8, 64)
    # 22 MB read anew: int4, whose weights take longer to unpack than to read, goes on slot by slot.
    assert fused_tiles.reads_together("plain", 44 * megabytes, 2, 2, 8)
    assert not fused_tiles.reads_together("int4", 44 * megabytes, 2, 2, 8)
    assert fused_tiles.reads_together("int4", 91 * megabytes, 2, 2, 8)


def test_tuned_tiles_are_saved_loaded_and_used(tmp_path, monkeypatch):
    from moe_fx.kernels import tuning

    for table in ("TUNED", "TUNED_LARGE"):
        monkeypatch.setattr(fused_tiles, table, {})
        monkeypatch.setattr(tuning, table, getattr(fused_tiles, table))
    small, large = (fused_tiles.Product("plain", True, rows, 96, 64) for rows in (16, 256))
    tiles = {small: fused_tiles.Tile(32, 64, 2, 4), large: fused_tiles.LargeTile(64, 3, 4, half=True)}
    tuning.save(tiles, tmp_path / "tiles.json")
    assert tuning.load(tmp_path / "tiles.json") == tiles
    tuning.use(tiles)
    assert fused_tiles.tile_of(small, 4) == tiles[small]
    assert fused_tiles.large_tile_of(fused_tiles.Product("plain", True, 128, 96, 64), 250.0) == tiles[large]
    (tmp_path / "other.json").write_text('[{"tile": 3}]')
    with pytest.raises(moe_fx.ConfigError, match=r"other\.json holds no tiles"):
        tuning.load(tmp_path / "other.json")


def test_nothing_is_tuned_where_the_kernels_do_not_run(monkeypatch):
    from moe_fx.kernels import triton_or_none, tuning

    monkeypatch.setattr(triton_or_none, "AVAILABLE", False)
    with pytest.raises(moe_fx.ConfigError, match="nothing can be tuned here: the fused kernels need Triton"):
        tuning.tune(num_experts=4, top_k=2, hidden=64, inner=64, tokens=[1])


@pytest.mark.parametrize("op", ["fused_experts", "fused_experts_any"])
def test_with_gradients_a_forward_pass_runs_and_a_backward_pass_says_why_not(op):
    up, down = torch.randn(4, 12, 8, requires_grad=True), torch.randn(4, 8, 6, requires_grad=True)
    tokens, ids = torch.randn(3, 8), torch.randint(0, 4, (3, 2))

    def layer():
        return getattr(torch.ops.moe_fx, op)(
            tokens, ids, None, [up], [], "none", False, [down], None, "none", False, "gate_up", "silu", 0.0, 0.0, False,
            torch.float32,
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="the fused expert kernels have no gradient"):
        layer().sum().backward()


def test_the_ops_keep_their_promises_to_the_compiler():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 8, generator=generator)
    up, down = torch.randn(4, 12, 8, generator=generator), torch.randn(4, 8, 6, generator=generator)
    ids, slot = torch.randint(0, 4, (3, 2), generator=generator), torch.rand(3, 2, generator=generator)
    whole = (
        tokens, ids, slot, [up], [], "none", False, [down], None, "none", False,
        "gate_up", "silu", 0.0, 0.0, False, torch.bfloat16,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.moe_fx.fused_experts_any.default, whole, test_utils=checks)
    torch.library.opcheck(
        torch.ops.moe_fx.slot_linear_any.default, (tokens, ids, [up], "none", False), test_utils=checks
    )
