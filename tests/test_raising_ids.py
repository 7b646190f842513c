"""What becomes of an id on its way to its expert, and whether all experts are there: in every slot, and for any id."""

import pytest
import torch
import torch.nn.functional as F
from test_raising_dense import export
from toys import Toy

import moe_fx


class Slots(Toy):
    """Eight experts to choose from; ``change`` says which of the four each slot takes."""

    def __init__(self, change, put=sum):
        super().__init__(gated=False, activation=F.silu, transposed=True)
        self.choice, self.change, self.put = torch.nn.Linear(8, 8), change, put

    def forward(self, x):
        weights, ids = self.choice(x).softmax(-1).topk(2, dim=-1)
        out = []
        for k in range(2):
            own = self.change(ids[:, k], k)
            h = F.silu(torch.bmm(x[:, None], self.up[own]))
            out.append(torch.bmm(h, self.down[own])[:, 0] * weights[:, k, None])
        return self.put(out)


def stacked(parts):
    return torch.stack(parts, 1).sum(1)


def unchanged(model, lowerings=("grouped_mm", "linear", "gather")):
    """Whatever was raised, the numbers are the model's; returns how many layers were."""
    model = model.eval()
    program = export(model)
    for lowering in lowerings:
        after = moe_fx.transform(program, moe_fx.Config(experts=lowering))
        for tokens in (1, 2, 9, 30):
            x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens))
            with torch.no_grad():
                torch.testing.assert_close(after.module()(x), model(x))
    return len(moe_fx.report(after).layers)


CHANGES = {
    "both wrapped": lambda ids, slot: ids % 4,
    "both clamped": lambda ids, slot: ids.clamp(max=3),
    "clamped, wrapped": lambda ids, slot: ids % 4 if slot else ids.clamp(max=3),
    "wrapped, clamped": lambda ids, slot: ids.clamp(max=3) if slot else ids % 4,
}


@pytest.mark.parametrize("put", [sum, stacked])
@pytest.mark.parametrize("change", CHANGES)
def test_ids_are_changed_in_each_slot_as_they_were(change, put):
    unchanged(Slots(CHANGES[change], put))


class Indexed(Toy):
    def __init__(self, change):
        super().__init__()
        self.change = change
        self.register_buffer("table", torch.tensor([0, -1, -2, 3]))
        self.register_buffer("turned", torch.tensor([3, 1, 2, 0]))

    def forward(self, x):
        ids, weights = self.route(x)
        ids = self.change(self, x, ids)
        h = self.activation(torch.einsum("th,tknh->tkn", x, self.up[ids]))
        return (torch.einsum("tkn,tkhn->tkh", h, self.down[ids]) * weights[..., None]).sum(1)


NEGATIVE = {
    "not": lambda model, x, ids: ~ids,
    "xor": lambda model, x, ids: ids ^ -1,
    "rounded": lambda model, x, ids: (x[:, :2].tanh() * 3).round().long(),
    "sign": lambda model, x, ids: x[:, :2].sign().long(),
    "moved": lambda model, x, ids: (ids - 2).roll(1, 0),
    "joined": lambda model, x, ids: torch.cat([ids[:, :1] - 2, ids[:, 1:]], 1),
    "stacked": lambda model, x, ids: torch.stack([ids[:, 0], ids[:, 1] - 3], 1),
    "looked up": lambda model, x, ids: model.table[ids],
    "scattered": lambda model, x, ids: ids.scatter(1, torch.zeros_like(ids[:, :1]), -1),
    "padded": lambda model, x, ids: F.pad(ids[:, :1], (0, 1), value=-1),
    "cast": lambda model, x, ids: (ids * 64).to(torch.int8).long().div(64, rounding_mode="floor"),
    "clamped": lambda model, x, ids: (ids - 2).clamp(max=3),
}  # fmt: skip


@pytest.mark.parametrize("change", NEGATIVE)
def test_refuses_an_index_that_something_makes_negative(change):
    model = Indexed(NEGATIVE[change])
    assert unchanged(model, ["gather"]) == 0
    (miss,) = moe_fx.explain(export(model)).misses
    assert miss.wanted == "ids that are certainly not negative"


@pytest.mark.parametrize(
    "change",
    [
        lambda model, x, ids: model.turned[ids],
        lambda model, x, ids: (ids + 1).clamp(0, 3),
        lambda model, x, ids: torch.searchsorted(torch.tensor([-1.0, 0, 1]), x[:, :2].contiguous()),
        lambda model, x, ids: torch.cat([ids[:, 1:], ids[:, :1]], 1).flip(0),
    ],
)
def test_an_index_that_nothing_makes_negative_names_an_expert(change):
    assert unchanged(Indexed(change)) == 1


@pytest.mark.parametrize("cast", [torch.bool, torch.float16])
def test_ids_that_a_cast_makes_one_may_repeat(cast):
    class Cast(Toy):
        def forward(self, x):
            ids, weights = self.route(x)
            table = torch.zeros(x.shape[0], self.E).scatter(1, ids.to(cast).long(), weights)
            h = self.activation(torch.einsum("th,enh->ten", x, self.up))
            return torch.einsum("ten,ehn,te->th", h, self.down, table)

    assert unchanged(Cast()) == (cast is torch.float16)


class InTurn(Toy):
    """Each of some experts in turn on every token; ``base`` is what a token has that none of them takes."""

    def __init__(self, experts, base, top_k=1):
        super().__init__(top_k=top_k)
        self.experts, self.base = experts, base

    def one(self, x, e):
        return F.linear(self.activation(F.linear(x, self.up[e])), self.down[e])

    def forward(self, x):
        ids, weights = self.route(x)
        y = self.base(self, x)
        for e in self.experts:
            y = torch.where(ids == e, self.one(x, e), y)
        return y * weights


@pytest.mark.parametrize(
    "base", [lambda model, x: torch.zeros_like(x), lambda model, x: x.clone(), lambda model, x: model.one(x, 0)]
)
def test_rows_of_an_expert_that_none_selects_keep_what_they_had(base):
    assert unchanged(InTurn(range(3), base)) == 0


def test_the_last_expert_may_have_what_no_other_takes():
    assert unchanged(InTurn(range(3), lambda model, x: model.one(x, 3))) == 1


def test_refuses_a_sum_over_experts_of_a_stack_that_holds_another():
    class Short(InTurn):
        def forward(self, x):
            ids, weights = self.route(x)
            table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
            return sum(table[:, e, None] * self.one(x, e) for e in self.experts)

    assert unchanged(Short(range(3), None, top_k=2)) == 0
    assert unchanged(Short(range(4), None, top_k=2)) == 1


def test_scores_left_out_and_put_back_may_be_chosen_again():
    class Again(Toy):
        def forward(self, x):
            scores = F.linear(x, self.router)
            best = scores.argmax(-1, keepdim=True)
            again = scores.scatter(-1, best, -torch.inf).scatter(-1, best, 5.0)
            ids = torch.cat([best, again.argmax(-1, keepdim=True)], -1)
            table = torch.zeros_like(scores).scatter(1, ids, torch.rand(1, 2).expand_as(ids) * 0 + 1)
            h = self.activation(torch.einsum("th,enh->ten", x, self.up))
            return torch.einsum("ten,ehn,te->th", h, self.down, table)

    assert unchanged(Again()) == 0


def test_a_table_times_itself_is_a_table():
    class Squared(Toy):
        def forward(self, x):
            ids, weights = self.route(x)
            table = torch.zeros(x.shape[0], self.E).scatter(1, ids, weights)
            h = self.activation(torch.einsum("th,enh->ten", x, self.up))
            return torch.einsum("ten,ehn,te->th", h, self.down, table * table)

    assert unchanged(Squared()) == 1


def test_one_row_for_each_token_may_have_a_dimension_of_its_own():
    """A layer of one slot that ends before its bias: the rows are ``[T, 1, H]``."""

    class Before(Toy):
        def forward(self, x):
            _, ids = F.linear(x, self.router).max(-1)
            h = F.silu(torch.bmm(x[:, None], self.up[ids])[:, 0] + self.up_bias[ids])
            return torch.bmm(h[:, None], self.down[ids])[:, 0] + self.down_bias[3 - ids]

    assert unchanged(Before(gated=False, transposed=True, bias=True)) == 1


def test_refuses_several_rows_of_a_token_at_one_linear():
    class Halves(Toy):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Parameter(torch.randn(4, 4, 6))
            self.last = torch.nn.Parameter(torch.randn(4, 2, 6, 8))

        def forward(self, x):
            ids, weights = self.route(x)
            h = F.silu(torch.einsum("tch,tkhn->tkcn", x.view(-1, 2, 4), self.first[ids]))
            return (torch.einsum("tkcn,tkcnh->tkh", h, self.last[ids]) * weights[..., None]).sum(1)

    assert unchanged(Halves()) == 0


def test_a_number_of_tokens_that_an_op_fixes():
    """torch.export fixes it where take_along_dim broadcasts, and writes it as a symbol all the same."""

    class Taken(Toy):
        def forward(self, x):
            ids, weights = self.route(x)
            each = [F.linear(self.activation(F.linear(x, self.up[e])), self.down[e]) for e in range(self.E)]
            return (torch.take_along_dim(torch.stack(each, 1), ids[..., None], 1) * weights[..., None]).sum(1)

    model, x = Taken().eval(), torch.randn(6, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    after = moe_fx.transform(program, moe_fx.Config(require="all"))
    torch.testing.assert_close(after.module()(x), model(x))


class OfImages(torch.nn.Module):
    """One expert for all tokens of an image: named by the caller, or chosen by what the image is on average."""

    def __init__(self, wide=False):
        super().__init__()
        self.router, self.wide = torch.nn.Linear(8, 4), wide
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 6) for _ in range(4))

    def forward(self, x, ids=None):
        ids = self.router(x.mean(1, keepdim=True)).argmax(-1, keepdim=True) if ids is None else ids.view(-1, 1, 1)
        ids = ids.expand(*x.shape[:2], 1) if self.wide else ids
        out = torch.zeros_like(x[..., :6])
        for e, expert in enumerate(self.experts):
            out = out + expert(x) * (ids == e)
        return out


def of_images(model, *ids):
    batch, length = torch.export.Dim("B"), torch.export.Dim("S")
    shapes = ({0: batch, 1: length}, *({0: batch} for _ in ids))
    return moe_fx.transform(torch.export.export(model.eval(), (torch.randn(2, 5, 8), *ids), dynamic_shapes=shapes))


def test_refuses_an_expert_for_each_image_that_the_caller_names():
    report = moe_fx.report(of_images(OfImages(), torch.tensor([1, 3])))
    assert not report.layers
    assert ["adapters that the caller names, which are no MoE layer" in str(miss) for miss in report.misses] == [True]


def test_an_expert_chosen_for_each_image_is_a_layer_once_its_ids_are_expanded():
    report = moe_fx.report(of_images(OfImages()))
    assert not report.layers
    assert ["expand the ids to all tokens" in str(miss) for miss in report.misses] == [True]
    model = OfImages(wide=True)
    after = of_images(model)
    assert len(moe_fx.report(after).layers) == 1
    for batch, length in ((2, 5), (4, 7)):
        x = torch.randn(batch, length, 8)
        torch.testing.assert_close(after.module()(x), model(x))


class ExpertsLast(torch.nn.Module):
    """Weights [H, I, E] and [I, H, E], gathered along their last dimension."""

    def __init__(self, others=lambda ids: ids):
        super().__init__()
        self.router, self.others = torch.nn.Linear(8, 4), others
        self.up, self.down = torch.nn.Parameter(torch.randn(8, 16, 4)), torch.nn.Parameter(torch.randn(16, 8, 4))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        h = torch.einsum("th,hitk->tki", x, self.up[:, :, ids]).relu()
        return torch.einsum("tki,ihtk,tk->th", h, self.down[:, :, self.others(ids)], weights)


@pytest.mark.parametrize("quantize", [None, moe_fx.Int8WeightOnly()])
def test_weights_gathered_along_their_last_dimension_are_the_experts(quantize):
    model = ExpertsLast().eval()
    assert unchanged(model) == 1
    program, x = export(model), torch.randn(5, 8)
    for lowering in ("grouped_mm", "linear", "gather"):
        after = moe_fx.transform(program, moe_fx.Config(experts=lowering, quantize=quantize, require="all")).module()
        with torch.no_grad():
            assert (after(x) - model(x)).abs().max() <= (0.05 if quantize else 1e-5) * model(x).abs().max()


def test_refuses_weights_gathered_along_their_last_dimension_by_other_ids():
    model = ExpertsLast(lambda ids: ids.flip(-1))
    assert unchanged(model) == 0
    assert "as elsewhere in the layer, found flip" in str(moe_fx.explain(export(model)))
