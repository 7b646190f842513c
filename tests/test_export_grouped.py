"""moe_fx.export: grouped products in dtypes that run eagerly, and that torch.export does not trace."""

import pytest
import torch
from torch.export import Dim

import moe_fx


class Grouped(torch.nn.Module):
    """As torchtitan: rows sorted by expert, a grouped product for each projection."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(8, 4, bias=False)
        self.up, self.down = (torch.nn.Parameter(torch.randn(4, *shape) * 0.3) for shape in ((16, 8), (8, 16)))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        counts = torch.histc(ids.flatten().float(), bins=4, min=0, max=4)
        order, ends = ids.flatten().argsort(stable=True), counts.cumsum(0, dtype=torch.int32)
        hidden = torch._grouped_mm(x[order // 2], self.up.transpose(-2, -1), offs=ends).relu()
        rows = torch._grouped_mm(hidden, self.down.transpose(-2, -1), offs=ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, order // 2, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_grouped_products_are_exported_and_raised_in_any_dtype(dtype):
    model = Grouped().to(dtype)
    x = torch.randn(6, 8, dtype=dtype)
    program = moe_fx.export(model, (x,), dynamic_shapes=({0: Dim.AUTO},))
    after = moe_fx.transform(program, moe_fx.Config(require="all"))
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    for tokens in (6, 9):
        x = torch.randn(tokens, 8, dtype=dtype)
        expected = model(x)
        for module in (program.module(), after.module()):
            assert (module(x) - expected).abs().max() <= tolerance * expected.abs().max()
