"""A choice of experts of which no layer came is told of, however the experts are written."""

import pytest
import torch
import torch.nn.functional as F
from models import build, token_ids

import moe_fx

H, E, K, WIDE = 8, 4, 2, 6


def normal(*shape):
    return torch.nn.Parameter(torch.randn(*shape) * 0.3)


class Written(torch.nn.Module):
    """Four experts, two for each token; ``results`` computes their sum from the token and its table of weights."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(H, E, bias=False)
        self.up, self.down = normal(E, H, WIDE), normal(E, WIDE, H)

    def table(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K, dim=-1)
        return torch.zeros(x.shape[0], E).scatter(1, ids, weights)

    def forward(self, x):
        return self.results(x, self.table(x))


class TwoAtATime(Written):
    def results(self, x, table):
        out = torch.zeros_like(x)
        parts = zip(table.t().unsqueeze(-1).split(2), self.up.split(2), self.down.split(2), strict=True)
        for weights, up, down in parts:
            out = out + ((F.relu(x @ up) * weights) @ down).sum(0)
        return out


class BlockDiagonal(Written):
    def results(self, x, table):
        wide = ((table != 0).unsqueeze(-1) * x.unsqueeze(1)).flatten(1)
        hidden = F.relu(wide @ torch.block_diag(*self.up)).view(-1, E, WIDE) * table.unsqueeze(-1)
        return hidden.flatten(1) @ self.down.flatten(0, 1)


class GroupedConvolution(Written):
    def results(self, x, table):
        up, down = (each.transpose(1, 2).reshape(-1, each.shape[1], 1) for each in (self.up, self.down))
        hidden = F.conv1d(x.repeat(1, E).unsqueeze(-1), up, groups=E)
        done = F.conv1d(F.relu(hidden), down, groups=E).view(-1, E, H)
        return sum((done * table.unsqueeze(-1)).unbind(1))


UNKNOWN = [TwoAtATime, BlockDiagonal, GroupedConvolution]


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("decomposed", [False, True])
@torch.no_grad()
def test_a_choice_is_told_of_where_no_rule_knows_the_experts(kind, decomposed):
    program = torch.export.export(kind(), (torch.randn(5, H),))
    program = program.run_decompositions() if decomposed else program
    result = moe_fx.explain(program)
    assert result.layers == ()
    assert result.misses


class NoChoice(Written):
    """All experts for every token."""

    def table(self, x):
        return self.router(x).softmax(-1)

    def results(self, x, table):
        return torch.einsum("te,teh->th", table, torch.einsum("th,ehi,eio->teo", x, self.up, self.down))


class BestTokens(torch.nn.Module):
    """Mixture of depths: some of the tokens go through a layer, others do not."""

    def __init__(self):
        super().__init__()
        self.score, self.layer = torch.nn.Linear(H, 1), torch.nn.Linear(H, H)

    def forward(self, x):
        weights, token = self.score(x).squeeze(-1).topk(2)
        return x.index_add(0, token, self.layer(x[token]) * weights[:, None])


@pytest.mark.parametrize("kind", [NoChoice, BestTokens], ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_nothing_is_told_where_no_experts_are_chosen(kind):
    assert moe_fx.explain(torch.export.export(kind(), (torch.randn(5, H),))).misses == ()


@pytest.mark.parametrize("length", [4, 5, 8, 9])
def test_attention_of_a_fixed_length_chooses_no_experts(length):
    """gpt-oss takes its largest logit from the others: along as many as there are keys."""
    pytest.importorskip("transformers", reason="the models come from transformers")
    with torch.no_grad():
        kwargs = dict(input_ids=token_ids((2, length)))
        program = torch.export.export(build("gpt_oss", "grouped_mm"), (), kwargs, strict=False)
    moe_fx.transform(program, moe_fx.Config(experts="gather", require="all", validate=False))
