"""How many rows there are where every expert's are joined: as many as ids."""

import pytest
import torch
import torch.nn.functional as F
from moe_fx.passes.normalize import normalize
from moe_fx.passes.raising.lengths import joined_lengths
from torch.export import Dim

import moe_fx
from moe_fx.pipeline import Work
from moe_fx.program import ExportedWork, assuming
from moe_fx.shapes import known_equal

#: before, torch.export does not trace slices by elements of a tensor
pytestmark = pytest.mark.skipif(torch.__version__ < "2.13", reason="torch.export of 2.13 or later")


def counted(ids):
    return torch.bincount(ids.flatten(), minlength=3)


class Joined(torch.nn.Module):
    """The rows of all experts, joined after an op on each; ``parts`` says which rows an expert's are."""

    def __init__(self, parts, counts=counted):
        super().__init__()
        self.router, self.parts, self.counts = torch.nn.Linear(4, 3), parts, counts

    def forward(self, x):
        ids = self.router(x).topk(2, dim=-1).indices
        rows = x[ids.flatten().argsort() // 2]
        return torch.cat([part.sin() for part in self.parts(rows, self.counts(ids))]).cos()


def one_after_another(rows, counts):
    ends = F.pad(counts.cumsum(0), (1, 0))
    return [rows[ends[e] : ends[e + 1]] for e in range(3)]


def lengths(model):
    x = torch.randn(5, 4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.AUTO},))
    work = Work(ExportedWork(program), moe_fx.Config())
    normalize(work)
    return work, list(joined_lengths(work.program.graph))


def added(ids):
    return F.one_hot(ids.flatten(), 3).sum(0)


@pytest.mark.parametrize(
    "model", [Joined(one_after_another), Joined(lambda rows, counts: rows.split(counts.tolist()), added)]
)
def test_rows_of_all_experts_are_as_many_as_ids(model):
    work, found = lengths(model)
    ((total, number),) = found
    (joined,) = work.program.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default)
    assert known_equal(total, joined.meta["val"].shape[0])
    with assuming(found):
        assert known_equal(joined.meta["val"].shape[0], number)


def test_no_more_is_asserted_of_a_program_than_before():
    _, found = lengths(Joined(one_after_another))
    assert not known_equal(*found[0])
    environment = found[0][0].node.shape_env
    before = {symbol: list(told) for symbol, told in environment.deferred_runtime_asserts.items()}
    with assuming(found):
        assert environment.deferred_runtime_asserts != before
    assert environment.deferred_runtime_asserts == before


@pytest.mark.parametrize(
    "model",
    [
        Joined(lambda rows, counts: one_after_another(rows, counts)[:2]),
        Joined(lambda rows, counts: [*one_after_another(rows, counts), rows[counts[0] :]]),
        Joined(lambda rows, counts: one_after_another(rows, counts)[::-1]),
        Joined(one_after_another, lambda ids: torch.bincount(ids.flatten(), minlength=3) // 2),
        Joined(one_after_another, lambda ids: torch.zeros_like(ids[0, 0]).expand(3)),
        Joined(one_after_another, lambda ids: torch.bincount(ids.flatten() % 2, minlength=3)),
    ],
    ids=["an expert missing", "more rows", "another order", "half of them", "no counts", "other ids"],
)
def test_nothing_is_said_of_other_rows(model):
    assert lengths(model)[1] == []
