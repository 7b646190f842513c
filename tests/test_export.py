"""moe_fx.export: loops over the experts that were hit, exported without touching the model, or refused."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from models import FAMILIES, NUM_LAYERS, build, logits, relative_error, token_ids
from torch.export import Dim
from toys import Toy, interleaved_clamped_swiglu

import moe_fx
from moe_fx.printer import format_graph

AUTO = ({0: Dim.AUTO},)


def x(tokens=6, seed=0):
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens + seed))


class Looped(Toy):
    """Each expert that was hit takes its rows, and adds its results to the output."""

    def mask(self, ids):
        return F.one_hot(ids, self.E).permute(2, 1, 0)

    def hit(self, mask):
        return (mask.sum((-1, -2)) > 0).nonzero()

    def apply(self, rows, weight):
        return rows @ weight if self.transposed else F.linear(rows, weight)

    def expert(self, rows, e):
        h = self.apply(rows, self.up[e])
        h = self.activation(h + self.up_bias[e] if self.bias else h)
        y = self.apply(h, self.down[e])
        return y + self.down_bias[e] if self.bias else y

    def places(self, mask, e):
        slot, token = torch.where(mask[e])
        return token, slot

    def experts(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = self.mask(ids)
        for found in self.hit(mask):
            e = found[0]
            if e == self.E:
                continue
            token, slot = self.places(mask, e)
            out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


class TokensFirst(Looped):
    """The mask as [E, T, K]; a bias given to the linear; weights looked up flat."""

    def mask(self, ids):
        return F.one_hot(ids, self.E).permute(2, 0, 1)

    def places(self, mask, e):
        return torch.where(mask[e])

    def expert(self, rows, e):
        return F.linear(self.activation(F.linear(rows, self.up[e], self.up_bias[e])), self.down[e])


class Masked(Looped):
    """One class more than experts: tokens of it are left out."""

    def mask(self, ids):
        return F.one_hot(ids, self.E + 1).permute(2, 1, 0)


VARIANTS = {
    "swiglu": (Looped, {}),
    "bias": (Looped, dict(bias=True, activation=interleaved_clamped_swiglu)),
    "transposed": (Looped, dict(transposed=True)),
    "tokens first, fused bias": (TokensFirst, dict(bias=True)),
    "a class for masked tokens": (Masked, dict(bias=True)),
    "one expert per token": (Looped, dict(top_k=1)),
    "many experts": (Looped, dict(num_experts=64, gated=False, activation=F.relu)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loop_over_hit_experts_is_exported_and_transformed(variant):
    kind, options = VARIANTS[variant]
    model = kind(**options).eval()
    with torch.no_grad():
        program = moe_fx.export(model, (x(),), dynamic_shapes=AUTO)
        programs = [program] + [
            moe_fx.transform(program, moe_fx.Config(experts=lowering, require="all"))
            for lowering in ("grouped_mm", "linear", "gather")
        ]
        for count in (6, 11):
            for seed in range(3):  # other routing, with other idle experts
                expected = model(x(count, seed))
                for each in programs:
                    assert relative_error(each.module()(x(count, seed)), expected) < 1e-6


def test_the_exported_loop():
    with torch.no_grad():
        program = moe_fx.export(Looped(activation=F.relu, gated=False).eval(), (x(),), dynamic_shapes=AUTO)
    assert_expected_inline(
        format_graph(program.graph),
        """\
p_router: f32[4, 8]
p_up: f32[4, 16, 8]
p_down: f32[4, 8, 16]
x: f32[s0, 8]
linear: f32[s0, 4] = aten.linear(x, p_router)
softmax: f32[s0, 4] = aten.softmax(linear, -1)
topk = aten.topk(softmax, 2)
getitem: f32[s0, 2] = getitem(topk, 0)
getitem_1: i64[s0, 2] = getitem(topk, 1)
sum: f32[s0, 1] = aten.sum(getitem, [-1], True)
div: f32[s0, 2] = aten.div(getitem, sum)
reshape: i64[2*s0] = aten.reshape(getitem_1, [-1])
sort = aten.sort(reshape)
getitem_2: i64[2*s0] = getitem(sort, 0)
getitem_3: i64[2*s0] = getitem(sort, 1)
arange: i64[4] = aten.arange(4, dtype=i64)
searchsorted: i32[4] = aten.searchsorted(getitem_2, arange, out_int32=True, right=True)
floor_divide: i64[2*s0] = aten.floor_divide(getitem_3, 2)
index: f32[2*s0, 8] = aten.index(x, [floor_divide])
reshape_1: f32[2*s0] = aten.reshape(div, [-1])
index_1: f32[2*s0] = aten.index(reshape_1, [getitem_3])
transpose: f32[4, 8, 16] = aten.transpose(p_up, -2, -1)
grouped_mm: f32[2*s0, 16] = moe_fx.grouped_mm(index, transpose, searchsorted)
relu: f32[2*s0, 16] = aten.relu(grouped_mm)
transpose_1: f32[4, 16, 8] = aten.transpose(p_down, -2, -1)
grouped_mm_1: f32[2*s0, 8] = moe_fx.grouped_mm(relu, transpose_1, searchsorted)
reshape_2: f32[2*s0, 1] = aten.reshape(index_1, [-1, 1])
mul: f32[2*s0, 8] = aten.mul(grouped_mm_1, reshape_2)
sym_size = aten.sym_size(getitem_3, 0)
arange_1: i64[2*s0] = aten.arange(sym_size, dtype=i64)
zeros_like: i64[2*s0] = aten.zeros_like(getitem_3)
scatter: i64[2*s0] = aten.scatter(zeros_like, 0, getitem_3, arange_1)
index_2: f32[2*s0, 8] = aten.index(mul, [scatter])
reshape_3: f32[s0, 2, 8] = aten.reshape(index_2, [-1, 2, 8])
sum_1: f32[s0, 8] = aten.sum(reshape_3, [1])
return (sum_1,)
""",
    )


def test_the_trace_does_not_grow_with_the_number_of_experts():
    sizes = {}
    for experts in (4, 32):
        with torch.no_grad():
            program = moe_fx.export(Looped(num_experts=experts).eval(), (x(),), dynamic_shapes=AUTO)
        sizes[experts] = len(program.graph.nodes)
    assert sizes[4] == sizes[32]


def test_masked_tokens_stay_masked():
    class Given(Masked):
        def forward(self, x, ids, weights):
            return self.experts(x, ids, weights)

    model = Given().eval()
    ids = torch.tensor([[0, 4], [4, 4], [2, 1], [3, 3], [0, 1]])
    args = (x(5), ids, torch.rand(5, 2, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        program = moe_fx.export(model, args)
        for lowering in ("grouped_mm", "linear", "gather"):
            result = moe_fx.transform(program, moe_fx.Config(experts=lowering, require="all"))
            assert relative_error(result.module()(*args), model(*args)) < 1e-6


class Passing(Masked):
    """What is of the last class is passed on."""

    def forward(self, x, ids, weights):
        return self.experts(x, ids, weights)

    def experts(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = self.mask(ids)
        for found in self.hit(mask):
            e = found[0]
            token, slot = self.places(mask, e)
            rows = self.passed(x[token]) if e == self.E else self.expert(x[token], e)
            out.index_add_(0, token, rows * weights[token, slot, None])
        return out

    def passed(self, rows):
        return rows


def test_tokens_of_the_last_class_that_are_passed_on_are_weighted():
    model = Passing().eval()
    ids = torch.tensor([[0, 4], [4, 4], [2, 1], [3, 3], [0, 1]])
    none, weights = torch.zeros_like(ids), torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = moe_fx.transform(moe_fx.export(model, (x(5), ids, weights)), moe_fx.Config(require="all"))
        for each in (ids, none, none + 4):
            args = (x(5), each, weights)
            assert relative_error(result.module()(*args), model(*args)) < 1e-6


def test_refuses_a_last_class_that_is_not_left_out():
    class Summed(Passing):
        forward = Masked.forward

        def passed(self, rows):
            return rows.cumsum(0)

    assert "an op along other dimensions than the rows, found cumsum" in refusal(Summed())


def test_refuses_what_depends_on_how_many_experts_were_hit():
    class Averaged(Looped):
        def experts(self, x, ids, weights):
            out, mask = torch.zeros_like(x), self.mask(ids)
            hit = self.hit(mask)
            for found in hit:
                token, slot = self.places(mask, found[0])
                out.index_add_(0, token, self.expert(x[token], found[0]) * weights[token, slot, None])
            return out / len(hit)

    assert "something depends on how many experts were hit, which is asked for" in refusal(Averaged())


def test_refuses_what_happens_only_if_the_last_class_is_hit():
    class Doubling(Masked):
        def experts(self, x, ids, weights):
            out, factor = torch.zeros_like(x), 1.0
            mask = self.mask(ids)
            for found in self.hit(mask):
                e = found[0]
                if e == self.E:
                    factor = 2.0
                    continue
                token, slot = self.places(mask, e)
                out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
            return out * factor

    assert "or on whether the last class is among them" in refusal(Doubling())


def test_numbers_of_experts_may_be_read_as_items_and_asked_for_rows():
    class Careful(Looped):
        def experts(self, x, ids, weights):
            out = torch.zeros_like(x)
            mask = self.mask(ids)
            for e in self.hit(mask).squeeze(-1):
                e = e.item()
                token, slot = self.places(mask, e)
                if token.numel() == 0:
                    continue
                out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
            return out

    model = Careful().eval()
    with torch.no_grad():
        program = moe_fx.export(model, (x(),), dynamic_shapes=AUTO)
        assert relative_error(program.module()(x(9)), model(x(9))) < 1e-6


def test_an_exported_loop_is_saved_and_loaded(tmp_path):
    model = Looped(bias=True).eval()
    with torch.no_grad():
        torch.export.save(moe_fx.export(model, (x(),), dynamic_shapes=AUTO), tmp_path / "loop.pt2")
        loaded = torch.export.load(tmp_path / "loop.pt2")
        assert relative_error(loaded.module()(x(9)), model(x(9))) < 1e-6


def test_a_model_without_loops_is_exported_as_ever():
    model = torch.nn.Linear(8, 8)
    ours = moe_fx.export(model, (x(),), dynamic_shapes=AUTO)
    theirs = torch.export.export(model, (x(),), dynamic_shapes=AUTO)
    assert format_graph(ours.graph) == format_graph(theirs.graph)


def test_places_in_a_vector_that_is_none_of_experts_are_left_alone():
    class Chosen(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("wanted", torch.tensor([True, False, True, True]))

        def forward(self, x):
            return x[:, self.wanted.nonzero().squeeze(-1)]

    model = Chosen()
    program = moe_fx.export(model, (x(),), dynamic_shapes=AUTO)
    assert torch.equal(program.module()(x(9)), model(x(9)))


def refusal(model):
    with torch.no_grad(), pytest.raises(moe_fx.ExportError) as error:
        moe_fx.export(model.eval(), (x(),), dynamic_shapes=AUTO)
    return str(error.value)


def test_refuses_a_loop_that_counts_its_steps():
    class Fading(Looped):
        """Later experts weigh less: what an expert does depends on how many others were hit."""

        def experts(self, x, ids, weights):
            out = torch.zeros_like(x)
            mask = self.mask(ids)
            for step, found in enumerate(self.hit(mask)):
                token, slot = self.places(mask, found[0])
                rows = self.expert(x[token], found[0]) * 0.5**step
                out.index_add_(0, token, rows * weights[token, slot, None])
            return out

    assert "changes step with every step (0, then 1)" in refusal(Fading())


class Counting(Looped):
    """Looks at its experts until something that Python counts says that these were enough."""

    applied = 0

    def left(self, count):
        return False

    def skipped(self, count):
        return False

    def experts(self, x, ids, weights):
        out, count, self.applied = torch.zeros_like(x), 0, 0
        mask = self.mask(ids)
        for e in self.hit(mask).flatten():
            if self.left(count):
                break
            if not self.skipped(count):
                token, slot = self.places(mask, e)
                out.index_add_(0, token, self.expert(x[token], e) * weights[token, slot, None])
            count, self.applied = self.counted(count)
        return out

    def counted(self, count):
        return count + 1, 0


class LeftAfterTwo(Counting):
    def left(self, count):
        return count == 2


class LeftAfterThree(Counting):
    def left(self, count):
        return count == 3


class SkippingAfterThree(Counting):
    def skipped(self, count):
        return count > 2


class LeftByItsModule(Counting):
    def left(self, count):
        return self.applied == 3

    def counted(self, count):
        return 0, self.applied + 1


class DoubledForFour(Looped):
    def experts(self, x, ids, weights):
        hit = self.hit(self.mask(ids))
        out = super().experts(x, ids, weights)
        return 2 * out if len(hit) == 4 else out


class KeepingTwo(Looped):
    """Keeps the last two results only."""

    def experts(self, x, ids, weights):
        kept, mask = {}, self.mask(ids)
        for e in self.hit(mask).flatten():
            token, slot = self.places(mask, e)
            rows = self.expert(x[token], e) * weights[token, slot, None]
            kept[len(kept) % 2] = torch.zeros_like(x).index_add(0, token, rows)
        return kept[0] + kept[1]


SEEN = {"steps": 0}


class CountingElsewhere(Counting):
    def experts(self, x, ids, weights):
        SEEN["steps"], out, mask = 0, torch.zeros_like(x), self.mask(ids)
        for e in reversed(self.hit(mask).flatten()):
            token, slot = self.places(mask, e)
            rows = self.expert(x[token], e) * weights[token, slot, None]
            out = out if SEEN["steps"] == 3 else out.index_add(0, token, rows)
            SEEN["steps"] += 1
        return out


class FirstTwo(Looped):
    def experts(self, x, ids, weights):
        out, mask = torch.zeros_like(x), self.mask(ids)
        hit = self.hit(mask)
        for place in range(min(2, len(hit))):
            token, slot = self.places(mask, hit[place][0])
            out.index_add_(0, token, self.expert(x[token], hit[place][0]) * weights[token, slot, None])
        return out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LeftAfterTwo, "is left before the last of them"),
        (LeftAfterThree, "changes count with every step (1, then 2)"),
        (SkippingAfterThree, "changes count with every step (1, then 2)"),
        (LeftByItsModule, "changes self.applied with every step (1, then 2)"),
        (FirstTwo, "something depends on how many experts were hit, which is asked for"),
        (DoubledForFour, "something depends on how many experts were hit, which is asked for"),
        (KeepingTwo, "changes len(kept) with every step (1, then 2)"),
        (CountingElsewhere, "changes SEEN with every step"),
    ],
)
def test_refuses_a_loop_that_may_do_something_else_after_a_few_steps(kind, reason):
    assert reason in refusal(kind())


def test_a_loop_that_counts_for_nothing_is_traced_expert_by_expert():
    model = Counting().eval()
    with torch.no_grad():
        program = moe_fx.export(model, (x(),), dynamic_shapes=AUTO)
        for tokens in (6, 9):
            assert torch.allclose(program.module()(x(tokens)), model(x(tokens)), rtol=0, atol=1e-6)


def test_refuses_a_loop_whose_experts_read_the_sum():
    class Chained(Looped):
        def experts(self, x, ids, weights):
            out = torch.zeros_like(x)
            mask = self.mask(ids)
            for found in self.hit(mask):
                token, slot = self.places(mask, found[0])
                rows = self.expert(x[token] + out[token], found[0])
                out.index_add_(0, token, rows * weights[token, slot, None])
            return out

    assert "wanted a sum that nothing in the loop reads" in refusal(Chained())


def test_refuses_a_loop_that_carries_a_tensor_along():
    class Drifting(Looped):
        def experts(self, x, ids, weights):
            out = torch.zeros_like(x)
            mask = self.mask(ids)
            for found in self.hit(mask):
                token, slot = self.places(mask, found[0])
                out.index_add_(0, token, self.expert(x[token], found[0]) * weights[token, slot, None])
                x = x * 0.5
            return out

    assert "found steps that differ" in refusal(Drifting())


def test_refuses_a_loop_over_some_of_the_experts():
    class Few(Looped):
        """An expert with a single row is skipped."""

        def hit(self, mask):
            return (mask.sum((-1, -2)) > 1).nonzero()

    assert "wanted 0, found the literal 1" in refusal(Few())


def test_refuses_a_loop_over_what_another_mask_hits():
    class Other(Looped):
        def hit(self, mask):
            return super().hit(mask.flip(0))

    assert "wanted mask = permute (aten::transpose), as elsewhere in the layer, found flip" in refusal(Other())


def test_refuses_an_expert_that_is_treated_differently():
    class Special(Looped):
        def expert(self, rows, e):
            return rows if e == 0 else super().expert(rows, e)

    assert "found steps that differ" in refusal(Special())


def test_a_loop_that_starts_from_something_is_added_to_it():
    class Residual(Looped):
        def experts(self, x, ids, weights):
            out = x.clone()
            mask = self.mask(ids)
            for found in self.hit(mask):
                token, slot = self.places(mask, found[0])
                out.index_add_(0, token, self.expert(x[token], found[0]) * weights[token, slot, None])
            return out

    model = Residual().eval()
    with torch.no_grad():
        result = moe_fx.transform(moe_fx.export(model, (x(),), dynamic_shapes=AUTO), moe_fx.Config(require="all"))
        for rows in (x(), x(5), x(1)):
            assert relative_error(result.module()(rows), model(rows)) < 1e-6


def test_refuses_a_loop_that_leaks():
    class Counting(Looped):
        def experts(self, x, ids, weights):
            out = torch.zeros_like(x)
            mask = self.mask(ids)
            most = torch.zeros(())
            for found in self.hit(mask):
                token, slot = self.places(mask, found[0])
                out.index_add_(0, token, self.expert(x[token], found[0]) * weights[token, slot, None])
                most = most + mask[found[0]].sum()
            return out * most

    assert "cannot be proven to do the same to every expert" in refusal(Counting())


@pytest.mark.parametrize("region", ["no_grad", "autocast", "no autocast"])
def test_refuses_what_depends_on_how_many_experts_were_hit_in_a_region_of_its_own(region):
    class Counting(Looped):
        def experts(self, x, ids, weights):
            out = torch.zeros_like(x)
            mask = self.mask(ids)
            hit = self.hit(mask)
            for found in hit:
                token, slot = self.places(mask, found[0])
                out.index_add_(0, token, self.expert(x[token], found[0]) * weights[token, slot, None])
            if region == "no_grad":
                with torch.no_grad():
                    return out + x * float(len(hit))
            with torch.autocast("cpu", enabled=region == "autocast", dtype=torch.bfloat16):
                return out + x * float(len(hit))

    assert "something depends on how many experts were hit, which is asked for" in refusal(Counting())


#: a class for masked tokens, biases, a layer without experts; the rest is the exhaustive product
SOME = ("mixtral", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize(
    "family", [name if name in SOME else pytest.param(name, marks=pytest.mark.exhaustive) for name in FAMILIES]
)
def test_eager_models_are_exported_unedited(family):
    pytest.importorskip("transformers", reason="the models come from transformers")
    model = build(family, "eager")
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    with torch.no_grad():
        program = moe_fx.export(model, (), dict(input_ids=token_ids((2, 5))), dynamic_shapes=shapes)
    transformed = moe_fx.transform(program, moe_fx.Config(require=NUM_LAYERS[family]))
    assert moe_fx.report(transformed).misses == ()
    assert len(moe_fx.explain(program.run_decompositions()).layers) == NUM_LAYERS[family]
    for shape in ((2, 5), (3, 7)):
        for each in (program, transformed):
            assert relative_error(logits(each.module(), shape), logits(model, shape)) < 1e-5
