"""Unrolled loops over stacked weights, as torch.export traces them."""

import pytest
import torch
import torch.nn.functional as F
from test_export import Looped
from toys import export

import moe_fx


class Unrolled(Looped):
    """Every expert in turn, whether it was hit or not."""

    def steps(self):
        return range(self.E)

    def places(self, ids, e):
        return torch.where(ids == e)

    def add(self, out, token, rows):
        return out.index_add(0, token, rows)

    def experts(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in self.steps():
            token, slot = self.places(ids, e)
            out = self.add(out, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


class ByMask(Unrolled):
    def places(self, ids, e):
        slot, token = torch.where(F.one_hot(ids, self.E).permute(2, 1, 0)[e])
        return token, slot


class InPlace(Unrolled):
    def add(self, out, token, rows):
        return out.index_put_((token,), rows, accumulate=True)


class Compared(Unrolled):
    """One-hot by comparison, as decompositions write it: an id that is none of the numbers is no error."""

    def numbers(self):
        return torch.arange(self.E)

    def places(self, ids, e):
        return torch.where((ids.unsqueeze(-1) == self.numbers()).to(torch.int64).permute(2, 0, 1)[e])


VARIANTS = {"ids": (Unrolled, {}), "bias": (Unrolled, dict(bias=True)), "mask": (ByMask, {}), "put": (InPlace, {}),
            "compared": (Compared, {})}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unrolled_loop_is_one_layer(variant):
    kind, options = VARIANTS[variant]
    model = kind(**options).eval()
    lowering = ("grouped_mm", "linear", "gather")[list(VARIANTS).index(variant) % 3]
    program = moe_fx.transform(export(model), moe_fx.Config(experts=lowering, require="all"))
    (layer,) = moe_fx.report(program).layers
    assert (layer.source_form, layer.num_experts, layer.top_k) == ("expert_loop", 4, 2)
    for tokens in (6, 9):
        x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            assert (program.module()(x) - model(x)).abs().max() <= 1e-6 * model(x).abs().max()


def refusal(model):
    result = moe_fx.explain(export(model))
    assert result.layers == ()
    return result.misses[0].found


def test_refuses_a_loop_that_misses_an_expert():
    class Short(Unrolled):
        def steps(self):
            return range(self.E - 1)

    assert refusal(Short()) == "experts 0, 1, 2"


def test_refuses_a_loop_that_visits_an_expert_twice():
    class Twice(Unrolled):
        def steps(self):
            return [0, 1, 2, 3, 3]

    assert refusal(Twice()) == "experts 0, 1, 2, 3, 3"


def test_refuses_a_loop_whose_steps_differ():
    class Fading(Unrolled):
        def expert(self, rows, e):
            return super().expert(rows, e) * 0.5**e

    assert refusal(Fading()) == "steps that differ"


def test_weights_in_another_order_are_stacked_in_that_order():
    class Crossed(Unrolled):
        def expert(self, rows, e):
            h = self.activation(F.linear(rows, self.up[e]))
            return F.linear(h, self.down[self.E - 1 - e])

    model, x = Crossed().eval(), torch.randn(7, 8)
    program = moe_fx.transform(export(model), moe_fx.Config(require="all"))
    with torch.no_grad():
        assert (program.module()(x) - model(x)).abs().max() <= 1e-6 * model(x).abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_unrolled_loop_is_found_decomposed(variant):
    kind, options = VARIANTS[variant]
    (layer,) = moe_fx.explain(export(kind(**options)).run_decompositions()).layers
    assert (layer.source_form, layer.num_experts, layer.top_k) == ("expert_loop", 4, 2)


@pytest.mark.parametrize("lowering", ["grouped_mm", "gather", "linear"])
@pytest.mark.parametrize("kind", [Unrolled, Compared])
def test_an_id_that_names_no_expert_adds_nothing(kind, lowering):
    class GivenIds(kind):
        def forward(self, x, ids, weights):
            return self.experts(x, ids, weights)

    model = GivenIds().eval()
    given = torch.randn(4, 8), torch.tensor([[0, 4], [-1, 7], [2, 2], [3, -9]]), torch.rand(4, 2)
    with torch.no_grad():
        program = torch.export.export(model, given)
        after = moe_fx.transform(program, moe_fx.Config(experts=lowering, require="all"))
        torch.testing.assert_close(after.module()(*given), model(*given))
        if lowering == "grouped_mm":  # read again, as what any other program is
            after.graph_module.meta["custom"].pop("moe_fx")
            again = moe_fx.transform(after, moe_fx.Config(experts="gather", require="all"))
            torch.testing.assert_close(again.module()(*given), model(*given))


def test_refuses_numbers_that_are_fewer_than_the_experts():
    class Fewer(Compared):
        def numbers(self):
            return torch.arange(self.E - 1)

        def steps(self):
            return range(self.E - 1)

    result = moe_fx.explain(export(Fewer()))
    assert (result.layers, result.misses[0].found) == ((), "3 classes")


def test_refuses_numbers_in_another_order():
    class Backwards(Compared):
        def numbers(self):
            return torch.arange(self.E).flip(0)

    assert moe_fx.explain(export(Backwards())).layers == ()


@pytest.mark.parametrize("part", [slice(None, 1), slice(-1, None)], ids=["first", "last"])
@pytest.mark.parametrize("what", ["rows", "places", "weights"])
def test_refuses_one_row_of_those_that_hit_an_expert_as_all_of_them(what, part):
    """torch.export asserts that the one row is all of them where it is broadcast, which is not true of the model."""

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = torch.nn.Linear(8, 4, bias=False)
            self.up = torch.nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
            out = torch.zeros_like(x)
            for e in range(4):
                token, slot = torch.where(ids == e)
                rows, weight = x[token], weights[token, slot]
                if what == "rows":
                    rows = rows - rows[part]
                elif what == "places":
                    rows = rows - x[token[part]]
                else:
                    weight = weight - weight[part]
                out = out.index_add(0, token, rows @ self.up[e] * weight[:, None])
            return out

    program = torch.export.export(One(), (torch.randn(6, 8),))
    assert moe_fx.explain(program).layers == ()


class ByMaskOfSlots(Unrolled):
    """The weights of an expert by a mask of slots, beside rows by a mask of tokens."""

    def chosen(self, ids, e):
        return ids == e

    def repeat(self, ids):
        return ids

    def experts(self, x, ids, weights):
        ids, out = self.repeat(ids), torch.zeros_like(x)
        for e in self.steps():
            rows = (ids == e).any(1)
            weight = weights[self.chosen(ids, e)]
            out = out.index_put((rows,), out[rows] + self.expert(x[rows], e) * weight[:, None])
        return out


def test_refuses_weights_by_a_mask_of_slots_where_ids_may_repeat():
    class Repeated(ByMaskOfSlots):
        def repeat(self, ids):
            return ids // 2

    assert moe_fx.explain(export(ByMaskOfSlots())).layers
    assert "may repeat" in refusal(Repeated())


def test_refuses_weights_by_the_mask_of_another_expert():
    class Another(ByMaskOfSlots):
        def chosen(self, ids, e):
            return ids == (e + 1) % self.E

    assert moe_fx.explain(export(Another())).layers == ()


def test_refuses_weights_by_a_mask_in_another_order_than_the_rows():
    class SlotsFirst(Unrolled):
        def experts(self, x, ids, weights):
            masks, out = F.one_hot(ids, self.E).permute(2, 1, 0).bool(), torch.zeros_like(x)
            for e in self.steps():
                _, token = torch.where(masks[e])
                weight = self.flat(weights)[masks[e].reshape(-1)]
                out = out.index_add(0, token, self.expert(x[token], e) * weight[:, None])
            return out

        def flat(self, weights):
            return weights.reshape(-1)

    assert moe_fx.explain(export(SlotsFirst())).layers == ()


class IdleFirstToken(torch.nn.Module):
    """The last expert returns its tokens, but for the first: a part of its mask is written in place."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(8, 3, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2)
        out = x
        for e in range(3):
            mask = ids == e
            if e == 2:
                mask[0].fill_(False)
            token, slot = torch.where(mask)
            rows = self.experts[e](x[token]) if e < 2 else x[token]
            out = out.index_add(0, token, rows * weights[token, slot, None])
        return out


def test_an_expert_without_parameters_whose_mask_is_written_in_part_stays():
    model = IdleFirstToken().eval()
    program = torch.export.export(model, (torch.randn(12, 8),))
    after = moe_fx.transform(program, moe_fx.Config(require=1)).module()
    for seed in range(6):
        x = torch.randn(12, 8, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(after(x), model(x))
