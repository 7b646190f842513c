"""moe_fx.export: loops over a list of modules that ask which experts were hit, or whether one has rows."""

import pytest
import torch
import torch.nn.functional as F
from test_raising_modules import HIDDEN, NUM_EXPERTS, Model, error
from torch.export import Dim

import moe_fx


class Asking(Model):
    """Leaves out an expert without rows."""

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if self.empty(token, ids == e):
                if self.otherwise(e):
                    break
                continue
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return self.end(out)

    def empty(self, token, mask):
        return token.numel() == 0

    def otherwise(self, e):
        return False

    def end(self, out):
        return out


class AskingForShape(Asking):
    def empty(self, token, mask):
        return token.shape[0] < 1


class AskingForAny(Asking):
    def empty(self, token, mask):
        return not mask.any()


class AskingTheSum(Asking):
    def empty(self, token, mask):
        return mask.sum() == 0


class Hit(Model):
    """Visits the experts that were hit; which module, a tensor says."""

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0)
        for e in torch.greater(mask.sum((-1, -2)), 0).nonzero():
            slot, token = torch.where(mask[e].squeeze(0))
            rows = x[None, token].reshape(-1, HIDDEN)
            out.index_add_(0, token, self.experts[e](rows) * weights[token, slot, None])
        return out


def exported(model):
    x = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return moe_fx.export(model.eval(), (x,), dynamic_shapes=({0: Dim.AUTO},))


@pytest.mark.parametrize("kind", [Asking, AskingForShape, AskingForAny, AskingTheSum, Hit])
def test_a_loop_over_modules_is_exported(kind):
    model = kind()
    program = exported(model)
    (layer,) = moe_fx.explain(program, moe_fx.Config(require="all")).layers
    assert (layer.fqn, layer.num_experts, layer.top_k) == ("experts", NUM_EXPERTS, 2)
    assert error(program, model) < 1e-6
    with torch.no_grad():  # a single token leaves experts without rows
        for seed in range(3):
            x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_attempts_that_fail_say_nothing(capsys):
    exported(Asking())
    assert "def forward" not in capsys.readouterr().err


class FirstResult(Model):
    """No sum to begin with: the first expert that has rows begins it."""

    def begun(self, part):
        return part

    def forward(self, x):
        weights, ids = self.routed(x)
        out = None
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                continue
            part = torch.zeros_like(x).index_add(0, token, expert(x[token]) * weights[token, slot, None])
            out = self.begun(part) if out is None else out + part
        return self.end(out)

    def routed(self, x):
        return self.router(x).softmax(-1).topk(2, -1)

    def end(self, out):
        return out


def test_the_first_expert_that_has_rows_may_begin_the_sum():
    class Added(FirstResult):  # Python has no sum of None and a tensor
        def end(self, out):
            return out + 1

    for kind in (FirstResult, Added):
        model = kind()
        program = exported(model)
        (layer,) = moe_fx.explain(program, moe_fx.Config(require="all")).layers
        assert layer.num_experts == NUM_EXPERTS
        assert error(program, model) < 1e-6


def refusal(model):
    with pytest.raises(moe_fx.ExportError) as refused:
        exported(model)
    return str(refused.value)


def test_refuses_a_loop_that_ends_at_an_idle_expert():
    class Ends(Asking):
        def otherwise(self, e):
            return True

    assert "if it has none, does something else than leave it out" in refusal(Ends())


def test_refuses_a_sum_whose_first_term_is_another():
    class Twice(FirstResult):
        def begun(self, part):
            return part * 2

    assert "the program would be wrong for other routing" in refusal(Twice())


def test_refuses_a_sum_that_none_may_have_begun():
    class Masked(FirstResult):  # tokens may be nobody's, and then the model yields something else than zeros
        def routed(self, x):
            weights, ids = super().routed(x)
            return weights, ids.masked_fill(weights < 0.3, NUM_EXPERTS)

        def end(self, out):
            return torch.ones(1) if out is None else out

    assert "if it has none, does something else than leave it out" in refusal(Masked())


def test_refuses_a_loop_that_counts_the_experts_with_rows():
    class Counts(Asking):
        def forward(self, x):
            self.count = 0
            return super().forward(x)

        def empty(self, token, mask):
            none = super().empty(token, mask)
            self.count += not none
            return none

        def end(self, out):
            return out / max(self.count, 1)

    assert "if it has none, does something else than leave it out" in refusal(Counts())


def test_refuses_a_question_about_something_else_than_rows():
    class Pruned(Asking):
        """Leaves out the experts that are not wanted, whatever the routing says."""

        def __init__(self):
            super().__init__()
            self.register_buffer("wanted", torch.tensor([[1], [0], [1], [1]]))

        def forward(self, x):
            weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                token, slot = torch.where(ids == e)
                if self.wanted[e].any():
                    out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
            return out

    assert "rows of expert 0, after the question whether there are others" in refusal(Pruned())


def test_refuses_a_question_about_another_expert():
    class Neighbour(Asking):
        def forward(self, x):
            weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
            out = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                if not (ids == (e + 1) % NUM_EXPERTS).any():
                    continue
                token, slot = torch.where(ids == e)
                out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
            return out

    assert "rows of expert 0, after the question whether there are others" in refusal(Neighbour())


def test_refuses_a_list_of_experts_with_two_rows_or_more():
    class Crowded(Hit):
        def forward(self, x):
            weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
            out = torch.zeros_like(x)
            mask = F.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0)
            for e in torch.greater(mask.sum((-1, -2)), 1).nonzero():
                slot, token = torch.where(mask[e].squeeze(0))
                out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
            return out

    assert "torch.export cannot trace Crowded" in refusal(Crowded())


def test_refuses_a_list_of_which_one_was_hit():
    class First(Hit):
        def forward(self, x):
            ids = self.router(x).argmax(-1)
            return self.experts[F.one_hot(ids, NUM_EXPERTS).sum(0).bool().nonzero()[0]](x)

    assert "First" in refusal(First())


def test_an_expert_of_another_kind_is_named():
    class Uneven(Asking):
        def __init__(self):
            super().__init__()
            self.experts[2] = torch.nn.Identity()

    assert "steps that differ" in refusal(Uneven())


def test_an_error_names_the_statement_and_what_was_asked_of_the_experts_that_were_hit():
    class Sorted(Hit):
        def forward(self, x):
            ids = self.router(x).topk(2, dim=-1).indices
            mask = F.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
            return sum(self.experts[e](x) for e in hit.argsort(0))

    message = refusal(Sorted())
    assert "'.argsort' of the experts that were hit: which these are depends on the routing" in message
    assert "test_export_modules.py" in message
    assert "for e in hit.argsort(0)" in message


def test_the_experts_that_were_hit_are_counted_and_read_by_their_number():
    class Numbered(Hit):
        def forward(self, x):
            weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
            mask, out = F.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0), torch.zeros_like(x)
            hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()[:, 0]
            for place in range(hit.numel()):
                e = hit[place]
                slot, token = torch.where(mask[e])
                out.index_add_(0, token, self.experts[e](x[token]) * weights[token, slot, None])
            return out

    model = Numbered()
    assert error(exported(model), model) < 1e-6


def test_a_layer_that_asks_nothing_may_stand_beside_one_that_does():
    class Silent(Asking):
        def empty(self, token, mask):
            return False

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Silent(), Asking()

        def forward(self, x):
            return self.second(x + self.first(x))

    model = Both()
    program = exported(model)
    assert len(moe_fx.explain(program).layers) == 2
    assert error(program, model) < 1e-6
