"""Loops that agree where all experts have rows and where none has, and not in between, are refused."""

import pytest
import torch
import torch.nn.functional as F
from test_export_modules import NUM_EXPERTS, Model, refusal


class Between(Model):
    """What a loop remembers of the experts before, ``kind`` says."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        out, hits, last = torch.zeros_like(x), 0, -1
        pool = list(self.experts)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            if token.numel() == 0:
                if self.kind == "an idle expert changes the rows":
                    x = x * 1.1
                elif self.kind == "an idle expert after a hit one adds" and hits:
                    out = out + 1
                continue
            hits, last = hits + 1, e
            if self.kind == "the next of a pool":
                expert = pool.pop(0)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
            if self.kind == "left after two" and hits == 2:
                break
        if self.kind == "two were hit" and hits == 2:
            out = out * 2
        if self.kind == "the last was not the last" and last not in (-1, NUM_EXPERTS - 1):
            out = out * 2
        return out


KINDS = (
    "an idle expert changes the rows", "an idle expert after a hit one adds", "the next of a pool", "left after two",
    "two were hit", "the last was not the last",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_a_loop_that_remembers_experts_between(kind):
    text = refusal(Between(kind))
    assert "has rows" in text or "have rows" in text


@pytest.mark.parametrize("kind", ["two were hit", "the next of a pool"])
def test_refuses_a_loop_over_many_experts_that_remembers_them(kind, monkeypatch):
    monkeypatch.setattr("test_export_modules.NUM_EXPERTS", 20)
    text = refusal(Between(kind))
    assert "has rows" in text or "have rows" in text


class Listed(Model):
    """A list of the experts that were hit, numbered anew; ``kind`` says what the number is for."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, NUM_EXPERTS).permute(2, 1, 0)
        hit = torch.greater(mask.sum((-1, -2)), 0).nonzero()
        if self.kind == "the first three":
            hit = hit[:3]
        for place, e in enumerate(hit):
            slot, token = torch.where(mask[e].squeeze(0))
            expert = self.experts[place if self.kind == "the module" else e]
            scale = 2 if self.kind == "compared" and place != e else 1
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None] * scale)
        return out * 2 if self.kind == "how many" and len(hit) == 2 else out


@pytest.mark.parametrize("kind", ["the module", "compared", "how many", "the first three"])
def test_refuses_what_depends_on_the_place_of_an_expert_among_those_hit(kind):
    assert refusal(Listed(kind))
