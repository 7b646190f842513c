"""Pieces that a user declares for an op of their own."""

import pytest
import torch
from moe_fx.passes.raising import registry
from moe_fx.passes.raising.pieces import TOKEN_MAJOR, Dispatch
from toys import Gathered, export

import moe_fx
from moe_fx.pattern import Var, call


@torch.library.custom_op("moe_fx_tests::spread", mutates_args=())
def spread(tokens: torch.Tensor, top_k: int) -> torch.Tensor:
    """Each row ``top_k`` times."""
    return tokens.repeat_interleave(top_k, 0)


@spread.register_fake
def _(tokens, top_k):
    return tokens.new_empty(tokens.shape[0] * top_k, *tokens.shape[1:])


class Spread(Gathered):
    def experts(self, x, ids, weights):
        flat = ids.reshape(-1)
        h = self.activation(self.apply(spread(x, self.K), self.up, flat))
        y = self.apply(h, self.down, flat) * weights.reshape(-1, 1)
        return y.view(-1, self.K, y.shape[-1]).sum(1)


PIECE = Dispatch(TOKEN_MAJOR, call("moe_fx_tests::spread", args=(Var("tokens"), Var("top_k"))))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "REGISTERED", [])
    return registry.REGISTERED


def test_a_registered_piece_is_used(registered):
    model = Spread().eval()
    before = moe_fx.explain(export(model))
    assert before.layers == ()
    assert "moe_fx_tests::spread" in before.misses[0].found
    moe_fx.register(PIECE)
    program = moe_fx.transform(export(model), moe_fx.Config(require="all"))
    x = torch.randn(7, 8)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_registered_piece_that_is_wrong_does_no_harm(registered):
    # The piece claims that the op yields the rows of other tokens than it does: the sizes fit, the numbers do not.
    moe_fx.register(Dispatch(TOKEN_MAJOR, call("moe_fx_tests::turned", args=(Var("tokens"), Var("top_k")))))

    class Turned(Spread):
        def experts(self, x, ids, weights):
            flat = ids.reshape(-1)
            h = self.activation(self.apply(turned(x, self.K), self.up, flat))
            y = self.apply(h, self.down, flat) * weights.reshape(-1, 1)
            return y.view(-1, self.K, y.shape[-1]).sum(1)

    report = moe_fx.explain(export(Turned().eval()))
    assert report.layers == ()
    assert report.misses[0].wanted == "the same numbers from the layer and its experts node"


@torch.library.custom_op("moe_fx_tests::turned", mutates_args=())
def turned(tokens: torch.Tensor, top_k: int) -> torch.Tensor:
    """Each row ``top_k`` times, the last first."""
    return tokens.flip(0).repeat_interleave(top_k, 0)


@turned.register_fake
def _(tokens, top_k):
    return tokens.new_empty(tokens.shape[0] * top_k, *tokens.shape[1:])


def test_what_is_no_piece_is_refused(registered):
    with pytest.raises(moe_fx.ConfigError, match="register takes pieces"):
        moe_fx.register("spread")
