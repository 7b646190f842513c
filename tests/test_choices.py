"""The router's topk beside fused layers: written as one op, wherever that op can be, and nowhere else."""

import pytest
import torch
from toys import Gathered, export

import moe_fx
from moe_fx.kernels.top_k import top_k


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    """What is written for a GPU is written for the CPU too, where its ops are their references."""
    for module in ("table", "choices"):
        monkeypatch.setattr(f"moe_fx.passes.lowering.{module}.unavailable", lambda device: None)


def choices(model, experts="fused"):
    """How often the op is called, and how often topk still is; the program must compute what the model does."""
    program = moe_fx.transform(export(model), moe_fx.Config(experts=experts, require=1))
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(7)).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=2**-6, atol=2**-8)
    targets = [node.target for node in program.graph.nodes]
    return targets.count(torch.ops.moe_fx.top_k.default), targets.count(torch.ops.aten.topk.default)


class Routed(Gathered):
    def __init__(self, choose, num_experts=8, **options):
        super().__init__(num_experts=num_experts, dtype=torch.bfloat16, **options)
        self.choose = choose

    def route(self, x):
        scores = torch.nn.functional.linear(x, self.router).float().sigmoid()
        ids = self.choose(scores)
        return ids, scores.gather(1, ids).to(x.dtype)


def within_groups(scores):
    best = scores.view(-1, 4, 2).sum(-1).topk(2, dim=-1).indices
    mask = torch.zeros_like(scores[:, :4]).scatter(1, best, 1.0)
    return scores.masked_fill(mask.repeat_interleave(2, 1) == 0, 0.0).topk(2, dim=-1).indices


def test_a_router_chooses_by_one_op():
    assert choices(Gathered(num_experts=8, dtype=torch.bfloat16)) == (1, 0)


def test_a_choice_of_groups_before_that_of_experts_is_another_one():
    assert choices(Routed(within_groups)) == (2, 0)


@pytest.mark.parametrize(
    ("choose", "options"),
    [
        (lambda scores: scores.topk(2, dim=-1, largest=False).indices, {}),
        (lambda scores: scores.mT.topk(2, dim=0).indices.mT, {}),
        (lambda scores: scores.double().topk(2, dim=-1).indices, {}),
        (lambda scores: scores.topk(2, dim=-1).indices, {"num_experts": 1025}),
        (lambda scores: scores.topk(33, dim=-1).indices, {"num_experts": 40, "top_k": 33}),
    ],
    ids=["smallest", "another dimension", "float64", "too many scores", "too many chosen"],
)
def test_what_the_op_cannot_choose_stays(choose, options):
    assert choices(Routed(choose, **options)) == (0, 1)


def test_other_lowerings_keep_topk():
    assert choices(Gathered(num_experts=8, dtype=torch.bfloat16), experts="grouped_mm") == (0, 1)


def test_what_lies_behind_the_routers_product_is_not_the_routers():
    class Sparse(Gathered):
        def forward(self, x):
            kept = x.topk(4, dim=-1)
            x = torch.zeros_like(x).scatter(1, kept.indices, kept.values)
            return super().forward(x)

    assert choices(Sparse(num_experts=8, dtype=torch.bfloat16)) == (1, 1)


def test_on_a_cpu_the_op_is_topk():
    scores = torch.randn(3, 5, 60)
    for actual, expected in zip(top_k(scores, 4), scores.topk(4, dim=-1), strict=True):
        assert torch.equal(actual, expected)
    torch.library.opcheck(torch.ops.moe_fx.top_k.default, (scores, 4), test_utils=("test_schema", "test_faketensor"))
