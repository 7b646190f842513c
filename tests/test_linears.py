"""Config.linears: the program's other linears in the formats of the experts."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from models import exported, logits, sqnr
from test_format_product import FORMATS
from toys import Gathered, export

import moe_fx
from moe_fx.printer import format_graph

INT8 = moe_fx.Int8WeightOnly()


class Block(torch.nn.Module):
    """A linear before the layer, a shared expert beside it, and a head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.before = torch.nn.Linear(8, 8, dtype=dtype)
            self.moe = Gathered(dtype=dtype, activation=F.relu, gated=False, num_experts=2)
            self.shared = torch.nn.Linear(8, 8, bias=False, dtype=dtype)
            self.head = torch.nn.Linear(8, 16, dtype=dtype)

    def forward(self, x):
        x = self.before(x)
        return self.head(self.moe(x) + self.shared(x))


def transformed(linears, **options):
    return moe_fx.transform(export(Block()), moe_fx.Config(linears=linears, **options))


def taken(program):
    return [linear.fqn for linear in moe_fx.report(program).linears]


def test_a_linear_in_int8():
    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 4)

        def forward(self, x):
            return self.inner(x).relu()

    program = torch.export.export(One().eval(), (torch.randn(2, 3, 8),))
    result = moe_fx.transform(program, moe_fx.Config(linears=INT8))
    assert_expected_inline(
        format_graph(result.graph),
        """\
p_inner_bias: f32[4]
b_inner_weight_qdata: i8[4, 8]
b_inner_weight_scale: f32[4]
x: f32[2, 3, 8]
reshape: f32[6, 8] = aten.reshape(x, [-1, 8])
kept: i8[4, 8] = moe_fx.kept(b_inner_weight_qdata)
kept_1: f32[4] = moe_fx.kept(b_inner_weight_scale)
to: f32[4, 8] = aten.to(kept, f32)
linear: f32[6, 4] = aten.linear(reshape, to)
mul: f32[6, 4] = aten.mul(linear, kept_1)
reshape_1: f32[2, 3, 4] = aten.reshape(mul, [2, 3, 4])
add: f32[2, 3, 4] = aten.add(reshape_1, p_inner_bias)
relu: f32[2, 3, 4] = aten.relu(add)
return (relu,)
""",
    )


def test_a_format_takes_all_but_routers_and_heads():
    assert taken(transformed(INT8)) == ["before.weight", "shared.weight"]


def test_wildcards_do_not_reach_routers_and_heads():
    assert taken(transformed({"*": INT8})) == ["before.weight", "shared.weight"]
    assert taken(transformed({"*": None, "shared*": INT8})) == ["shared.weight"]


def test_routers_and_heads_are_taken_by_name():
    assert taken(transformed({"*.router": INT8, "head.weight": INT8})) == ["moe.router", "head.weight"]
    assert taken(transformed({"head": INT8})) == ["head.weight"]


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(moe_fx.ConfigError) as error:
        transformed({"*.q_proj": INT8})
    assert str(error.value) == (
        "Config.linears pattern '*.q_proj' matches no linear; the parameters found are: before.weight, moe.router, "
        "shared.weight, head.weight"
    )


def test_a_weight_that_an_embedding_reads_too_stays_beside_its_quantized_form():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(16, 8)
            self.head = torch.nn.Linear(8, 16, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.embedding(ids))

    model = Tied().eval()
    ids = torch.arange(6)
    program = torch.export.export(model, (ids,))
    result = moe_fx.transform(program, moe_fx.Config(linears={"head": INT8}))
    with torch.no_grad():
        assert sqnr(result.module()(ids), model(ids)) > 40


@pytest.mark.parametrize("form", [*FORMATS[:4], moe_fx.Int4WeightOnly(8), moe_fx.Int4WeightOnly(8, False)], ids=repr)
def test_every_format_equals_its_definition(form):
    block = Block()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    program = transformed({"before": form, "shared": form})
    with torch.no_grad():
        h = form.linear(x, *(t[0] for t in form.quantize(block.before.weight.unsqueeze(0)))) + block.before.bias
        shared = form.linear(h, *(t[0] for t in form.quantize(block.shared.weight.unsqueeze(0))))
        expected = block.head(block.moe(h) + shared)
        assert sqnr(program.module()(x), expected) > (60 if getattr(form, "dynamic", False) else 110)


def test_a_technique_takes_rows_of_any_rank():
    def halve(linear):
        return torch.nn.Sequential(linear, Half())

    class Half(torch.nn.Module):
        def forward(self, x):
            return x * 0.5

    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval()
    x = torch.randn(2, 3, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    result = moe_fx.transform(program, moe_fx.Config(linears=halve))
    with torch.no_grad():
        for count in (2, 5):
            x = torch.randn(count, 3, 8)
            expected = (F.linear(x, model[0].weight) * 0.5 + model[0].bias).relu()
            assert (result.module()(x) - expected).abs().max() < 1e-6


def test_a_whole_model():
    pytest.importorskip("transformers", reason="the models come from transformers")
    original = exported("mixtral", "grouped_mm")
    program = moe_fx.transform(original, moe_fx.Config(quantize=INT8, linears=INT8))
    names = taken(program)
    assert len(names) == 2 * 4
    assert all("self_attn" in name for name in names)
    for shape in ((2, 5), (3, 7)):
        assert sqnr(logits(program.module(), shape), logits(original.module(), shape)) > 25
    comparison = moe_fx.compare(original, program, dict(input_ids=torch.arange(3, 13).view(2, 5)))
    assert set(comparison.linears) == set(names)
    assert all(value > 35 for value in comparison.linears.values())
    assert "other linears: 8" in str(comparison)
    assert "other linears: 8 as int8_weight_only" in str(moe_fx.report(program))


def test_the_backend_takes_linears_too():
    torch.compiler.reset()
    block = Block().eval()
    backend = moe_fx.backend(moe_fx.Config(linears=INT8))
    x = torch.randn(5, 8)
    with torch.no_grad():
        actual, expected = torch.compile(block, backend=backend)(x), block(x)
    assert [linear.fqn for linear in backend.reports[0].linears] == ["before.weight", "shared.weight"]
    assert sqnr(actual, expected) > 35
