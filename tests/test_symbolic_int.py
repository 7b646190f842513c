"""int() of numbers that depend on the data, under moe_fx.export: kept as symbols where nobody can tell."""

import importlib.util
import sys

import pytest
import torch
from torch.export import Dim

import moe_fx

SOURCE = """
import torch
import torch.nn.functional as F


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(8, 4, bias=False)
        self.up, self.down = (torch.nn.Parameter(torch.randn(4, 8, 8) * 0.3) for _ in range(2))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, -1)
        flat = ids.view(-1)
        rank = (F.one_hot(flat, 4).cumsum(0) - 1).gather(1, flat[:, None])[:, 0]
        capacity = {capacity}
        bins = x.new_zeros(4, capacity, 8)
        bins[flat, rank] = x.repeat_interleave(2, 0)
        rows = torch.bmm(torch.bmm(bins, self.up).relu(), self.down)[flat, rank]
        return {factor} * (rows.view(-1, 2, 8) * weights[..., None]).sum(1)


def is_whole(number: int) -> bool:
    return isinstance(number, int)
"""
LARGEST = "int(torch.bincount(flat, minlength=4).max())"


@pytest.fixture
def model(tmp_path, monkeypatch):
    def build(capacity=LARGEST, factor="1"):
        file = tmp_path / "written.py"
        file.write_text(SOURCE.format(capacity=capacity, factor=factor))
        spec = importlib.util.spec_from_file_location("written", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "written", module)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        return module.Model().eval()

    return build


def export(model):
    return moe_fx.export(model, (torch.randn(6, 8),), dynamic_shapes=({0: Dim.AUTO},))


@pytest.mark.parametrize("capacity", [LARGEST, "int(rank.max()) + 1", "int(rank.max().item()) + 1"])
@torch.no_grad()
def test_a_capacity_that_int_asks_for_stays_what_it_is_for_other_routing(model, capacity):
    model = model(capacity)
    after = moe_fx.transform(export(model), moe_fx.Config(require="all"))
    for tokens in (6, 1, 40):
        x = torch.randn(tokens, 8)
        torch.testing.assert_close(after.module()(x), model(x))
    assert "int" not in vars(sys.modules["written"])


@torch.no_grad()
def test_a_symbol_is_an_int_to_isinstance(model):
    model = model(factor="2 if is_whole(capacity) else 3")
    x = torch.randn(6, 8)
    torch.testing.assert_close(export(model).module()(x), model(x))


@torch.no_grad()
def test_where_types_are_looked_at_nothing_stands_for_int(model):
    with pytest.raises(moe_fx.ExportError, match="Could not extract specialized integer"):
        export(model(factor="2 if type(capacity) is int else 3"))


@torch.no_grad()
def test_the_text_of_a_symbol_is_an_error(model):
    with pytest.raises(moe_fx.ExportError, match="the text of a number that depends on the data"):
        export(model(factor="len(str(capacity))"))
    with pytest.raises(moe_fx.ExportError, match="the text of a number that depends on the data"):
        export(model(factor="len(f'{capacity}')"))
