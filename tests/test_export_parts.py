"""moe_fx.export: rows cut into parts by counts, where the model asks each expert whether it has any."""

import pytest
import torch
from test_raising_parts import Parts
from torch.export import Dim

import moe_fx


class Infer(Parts):
    """As DeepSeek V2: a part for each expert that has rows."""

    def numbers(self, counts):
        return counts.tolist()

    def results(self, rows, counts):
        outputs, start = [], 0
        for e, count in enumerate(self.numbers(counts)):
            end = start + count
            if count == 0:
                self.otherwise(e)
                continue
            outputs.append(self.part(rows[start:end], e))
            start = end
        return self.joined(outputs)

    def part(self, rows, e):
        return self.expert(rows, e)

    def otherwise(self, e):
        pass

    def joined(self, outputs):
        return torch.cat(outputs)


class ByScatter(Infer):
    def counted(self, ids, x):
        return ids.new_zeros((ids.shape[0], self.E)).scatter_(1, ids, 1).sum(0)


class Tensors(Infer):
    """The counts stay tensors."""

    def numbers(self, counts):
        return counts


class Bins(Infer):
    def counted(self, ids, x):
        return torch.bincount(ids.flatten(), minlength=self.E)


def exported(model):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return moe_fx.export(model.eval(), (x,), dynamic_shapes=({0: Dim.AUTO},))


@pytest.mark.parametrize("kind", [Infer, ByScatter, Tensors, Bins])
@torch.no_grad()
def test_parts_of_experts_that_have_rows_are_exported(kind):
    model = kind()
    program = exported(model)
    (layer,) = moe_fx.explain(program, moe_fx.Config(require="all")).layers
    assert (layer.num_experts, layer.top_k) == (4, 2)
    for tokens in (1, 1, 6, 9):  # a single token leaves experts without rows
        x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(tokens))
        assert (program.module()(x) - model(x)).abs().max() <= 1e-6 * model(x).abs().max()


class JoinedAsTheyAre(Infer):
    """The rows of an expert that has none are joined as they are."""

    def results(self, rows, counts):
        parts = rows.split(self.numbers(counts))
        return torch.cat([self.expert(part, e) if part.shape[0] > 0 else part for e, part in enumerate(parts)])


class EndsOneByOne(Infer):
    """Where an expert's rows end, and where they begin, are elements of a tensor."""

    def results(self, rows, counts):
        outputs, ends = [], counts.cumsum(0)
        for e, end in enumerate(ends):
            start = ends[e - 1] if e else 0
            if start == end:
                continue
            outputs.append(self.expert(rows[start:end], e))
        return torch.cat(outputs)


class CountsRead(Infer):
    """As many counts as the last expert that has rows is told by; how far they spread is read as well."""

    def counted(self, ids, x):
        self.spread = torch.bincount(ids.flatten())
        return self.spread

    def forward(self, x):
        return super().forward(x) * (1 + self.spread.float().square().sum())


@pytest.mark.parametrize("kind", [JoinedAsTheyAre, EndsOneByOne, CountsRead])
@torch.no_grad()
def test_parts_of_experts_are_exported_however_they_are_asked_for(kind):
    model = kind()
    program = exported(model)
    (layer,) = moe_fx.explain(program, moe_fx.Config(require="all")).layers
    assert (layer.num_experts, layer.top_k) == (4, 2)
    for seed, tokens in enumerate((1, 1, 2, 6, 9)):
        x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(seed))
        assert (program.module()(x) - model(x)).abs().max() <= 1e-6 * model(x).abs().max()


class CountsIdle(Infer):
    """What is added in the end depends on how many experts were left out."""

    def results(self, rows, counts):
        self.idle = 0
        return super().results(rows, counts)

    def otherwise(self, e):
        self.idle += 1

    def joined(self, outputs):
        return super().joined(outputs) * (1 + self.idle)


class AfterAnIdleOne(Infer):
    """An expert does something else if the one before it was idle."""

    def results(self, rows, counts):
        self.idle = -1
        return super().results(rows, counts)

    def otherwise(self, e):
        self.idle = e

    def part(self, rows, e):
        return self.expert(rows, e) * (2 if self.idle == e - 1 >= 0 else 1)


class AsksForAnother(Infer):
    """Whether an expert is left out depends on how many rows the next one has."""

    def results(self, rows, counts):
        numbers, outputs, start = counts.tolist(), [], 0
        for e in range(self.E):
            if numbers[(e + 1) % self.E] == 0:
                continue
            outputs.append(self.expert(rows[start : start + numbers[e]], e))
            start = start + numbers[e]
        return torch.cat(outputs)


REFUSALS = {
    CountsIdle: "if it has none, does something else than leave it out",
    AfterAnIdleOne: "if it has none, does something else than leave it out",
    AsksForAnother: "other rows than those of expert 1, which was asked for",
}


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.__name__)
def test_refuses_what_does_not_just_leave_idle_experts_out(kind):
    with pytest.raises(moe_fx.ExportError, match=REFUSALS[kind]):
        exported(kind())


class MadeInts(Infer):
    def numbers(self, counts):
        return [int(count) for count in counts.tolist()]


def test_a_number_of_rows_made_an_int_is_told_of():
    with pytest.raises(moe_fx.ExportError, match=r"int\(\) of how many rows an expert has: what tolist\(\) answers"):
        exported(MadeInts())
