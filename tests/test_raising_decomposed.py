"""What core ATen writes in another order, or in other ops, is found as what the model wrote is."""

import pytest
import torch
from torch.export import Dim

import moe_fx


def layers(model, x, dynamic=True):
    """How many layers are raised, decomposed and not; whatever was, the numbers are the model's."""
    model = model.eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("T")},) if dynamic else None)
    found = []
    for each in (program, program.run_decompositions()):
        after = moe_fx.transform(each)
        found.append(len(moe_fx.report(after).layers))
        for tokens in (1, 2, 9) if dynamic else (len(x),):
            rows = torch.randn(tokens, *x.shape[1:], generator=torch.Generator().manual_seed(tokens))
            with torch.no_grad():
                torch.testing.assert_close(after.module()(rows), model(rows))
    return tuple(found)


class TopOne(torch.nn.Module):
    """One expert per token, whose bias is written before its product."""

    def __init__(self, other=lambda ids: ids):
        super().__init__()
        self.router, self.other = torch.nn.Linear(8, 4), other
        self.up, self.up_bias = torch.nn.Parameter(torch.randn(4, 8, 16)), torch.nn.Parameter(torch.randn(4, 16))
        self.down, self.down_bias = torch.nn.Parameter(torch.randn(4, 16, 8)), torch.nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).max(-1)
        h = self.up_bias[ids].unsqueeze(1) + torch.bmm(x.unsqueeze(1), self.up[ids])
        y = self.down_bias[self.other(ids)].unsqueeze(1) + torch.bmm(h.relu(), self.down[ids])
        return y.squeeze(1) * weights.unsqueeze(-1)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_bias_before_its_product_is_the_experts_own(dynamic):
    assert layers(TopOne(), torch.randn(6, 8), dynamic) == (1, 1)


def test_refuses_a_bias_before_its_product_that_other_ids_choose():
    assert layers(TopOne(lambda ids: 3 - ids), torch.randn(6, 8)) == (0, 0)
