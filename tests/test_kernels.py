"""moe_fx::grouped_mm against its definition."""

import pytest
import torch

from moe_fx.kernels.grouped_mm import grouped_mm

OFFSETS = {
    "ragged": [3, 3, 8, 10], "all rows on one expert": [0, 10, 10, 10], "rows behind the last group": [1, 2, 3, 4],
    "no rows": [0, 0, 0, 0],
}  # fmt: skip


def definition(rows, matrices, offsets):
    out = torch.zeros(rows.shape[0], matrices.shape[2], dtype=rows.dtype)
    for row in range(rows.shape[0]):
        for expert in reversed(range(len(offsets))):
            if row < offsets[expert] and row >= (offsets[expert - 1] if expert else 0):
                out[row] = rows[row] @ matrices[expert].to(rows.dtype)
    return out


def operands(num_rows, dtype, weights=None):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, 5, generator=generator).to(dtype)
    matrices = torch.randn(4, 7, 5, generator=generator)
    return rows, (matrices * 20).to(weights).mT if weights else matrices.to(dtype).mT


@pytest.mark.parametrize("weights", [None, torch.int8])
@pytest.mark.parametrize("case", OFFSETS)
def test_each_row_meets_the_matrix_of_its_group(case, weights):
    offsets = torch.tensor(OFFSETS[case], dtype=torch.int32)
    rows, matrices = operands(0 if case == "no rows" else 10, torch.float64, weights)
    torch.testing.assert_close(grouped_mm(rows, matrices, offsets), definition(rows, matrices, offsets))


def test_gradients():
    rows, matrices = operands(10, torch.float64)
    offsets = torch.tensor(OFFSETS["ragged"], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda r, m: grouped_mm(r, m, offsets), (rows.requires_grad_(), matrices.contiguous().requires_grad_())
    )


def test_the_op_keeps_its_promises_to_the_compiler():
    rows, matrices = operands(10, torch.float32)
    torch.library.opcheck(grouped_mm, (rows, matrices, torch.tensor(OFFSETS["ragged"], dtype=torch.int32)))
