"""What the report tells a user to write instead: a layer is missed for a reason, and found once it is so written."""

import pytest
import torch
import torch.nn.functional as F
from toys import export

import moe_fx

E, K, H = 4, 2, 8


class Experts(torch.nn.Module):
    """``layer`` of the token rows, the scores, and what every expert makes of every token ``[T, E, H]``."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.router = layer, torch.nn.Linear(H, E)
        self.experts = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(H, 16), torch.nn.ReLU(), torch.nn.Linear(16, H)) for _ in range(E)
        )

    def forward(self, x):
        return self.layer(self.experts, x, self.router(x).softmax(-1))


def explained(layer):
    report = moe_fx.explain(export(Experts(layer)))
    assert not report.layers
    return " ".join(str(miss) for miss in report.misses)


def assert_found(layer):
    model = Experts(layer).eval()
    after = moe_fx.transform(export(model), moe_fx.Config(require=1))
    for tokens in (6, 11):
        x = torch.randn(tokens, H)
        with torch.no_grad():
            torch.testing.assert_close(after.module()(x), model(x))


def masked_by_slot(combine):
    def layer(experts, x, scores):
        weights, ids = scores.topk(K, dim=-1)
        results = torch.stack([expert(x) for expert in experts], 1)
        return combine(results, F.one_hot(ids, E).to(x.dtype), weights, ids)

    return layer


def weighed_and_summed(results, mask, weights, ids):
    return (results[:, None] * mask[..., None] * weights[..., None, None]).sum(2).sum(1)


def summed_at_once(results, mask, weights, ids):
    return (results[:, None] * mask[..., None] * weights[..., None, None]).sum((1, 2))


def selected(results, mask, weights, ids):
    return (torch.where(mask[..., None] > 0, results[:, None], 0.0) * weights[..., None, None]).sum((1, 2))


def chosen_by_einsum(results, mask, weights, ids):
    return (torch.einsum("tke,teh->tkh", mask, results) * weights[..., None]).sum(1)


def gathered(results, mask, weights, ids):
    return (results.gather(1, ids[..., None].expand(-1, -1, H)) * weights[..., None]).sum(1)


@pytest.mark.parametrize("combine", [weighed_and_summed, summed_at_once, selected])
def test_results_masked_slot_by_slot_are_missed_with_a_remedy(combine):
    told = explained(masked_by_slot(combine))
    assert "masked slot by slot; choose first: torch.einsum('tke,teh->tkh', mask, results), or results.gather" in told


@pytest.mark.parametrize("combine", [chosen_by_einsum, gathered])
def test_results_chosen_before_they_are_weighed_are_found(combine):
    assert_found(masked_by_slot(combine))


def two_choices(scores):
    """The best expert, and the best of the others."""
    first = scores.argmax(-1)
    second = scores.masked_fill(F.one_hot(first, E).bool(), -torch.inf).argmax(-1)
    return [(ids, scores.gather(1, ids[:, None])[:, 0]) for ids in (first, second)]


def added(experts, x, slots):
    out = torch.zeros_like(x)
    for ids, weights in slots:
        for e, expert in enumerate(experts):
            out = out + (weights * (ids == e))[:, None] * expert(x)
    return out


def stacked(slots):
    ids, weights = (torch.stack(parts, -1) for parts in zip(*slots, strict=True))
    return [(ids[:, k], weights[:, k]) for k in range(K)]


def test_choices_that_stand_alone_are_missed_with_a_remedy():
    told = explained(lambda experts, x, scores: added(experts, x, two_choices(scores)))
    assert "as the ids of each slot stand alone: stack them, torch.stack([first, second], -1)" in told


def test_choices_that_are_stacked_are_found():
    assert_found(lambda experts, x, scores: added(experts, x, stacked(two_choices(scores))))
