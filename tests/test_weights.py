"""The weights of a program: filled later, saved and loaded, given up while they are quantized."""

import copy

import pytest
import torch
from models import exported, logits
from styles.one_of_them import Parameters
from test_format_product import FORMATS
from toys import Gathered, Grouped, export

import moe_fx
from moe_fx.weights import stacked_name

INT8 = moe_fx.Int8WeightOnly()


def rows(count=6):
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(count))


def run(program):
    with torch.no_grad():
        return program.module()(rows())


def valueless(device):
    if device == "meta":
        model = Gathered().to("meta").eval()
        return torch.export.export(model, (torch.empty(6, 8, device="meta"),))
    with torch._subclasses.FakeTensorMode(), torch.device("cpu"):
        return torch.export.export(Gathered().eval(), (torch.empty(6, 8),))


@pytest.mark.parametrize("form", [None, INT8, moe_fx.Float8Dynamic(), moe_fx.Int4WeightOnly(8, False)], ids=repr)
@pytest.mark.parametrize("lowering", ["grouped_mm", "linear", "gather"])
@pytest.mark.parametrize("device", ["fake", "meta"])
def test_a_program_without_weights_is_filled_from_a_quantized_state_dict(device, lowering, form, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    config = moe_fx.Config(experts=lowering, quantize=form, require="all")
    original = moe_fx.transform(export(Gathered()), config)
    safetensors.save_file(
        {name: tensor.detach() for name, tensor in original.state_dict.items()}, tmp_path / "weights.safetensors"
    )
    empty = moe_fx.transform(valueless(device), config)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict.items()} == {
        n: (t.shape, t.dtype) for n, t in original.state_dict.items()
    }
    filled = moe_fx.fill(empty, safetensors.load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(run(filled), run(original))
    assert moe_fx.report(filled) == moe_fx.report(empty)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("up_scale"), "up_scale has no values, and none are given"),
        (lambda tensors: tensors.update(side=torch.zeros(1)), "the program has no weight 'side'; its weights are "),
        (lambda tensors: tensors.update(up_scale=torch.zeros(3)), r"up_scale is torch.float32 \(4, 32\), the given"),
    ],
)
def test_only_what_fits_is_filled_in(change, message):
    tensors = dict(moe_fx.transform(export(Gathered()), moe_fx.Config(quantize=INT8)).state_dict)
    change(tensors)
    with pytest.raises(moe_fx.ProgramError, match=message):
        moe_fx.fill(moe_fx.transform(valueless("fake"), moe_fx.Config(quantize=INT8)), tensors)


def test_a_technique_needs_values():
    def halve(linear):
        linear.weight.data.mul_(0.5)

    with pytest.raises(moe_fx.ProgramError, match=r"up has no values .* so halve cannot quantize it"):
        moe_fx.transform(valueless("fake"), moe_fx.Config(quantize=halve))


@pytest.mark.parametrize("storage", ["stacked", "per_expert"])
@pytest.mark.parametrize("form", FORMATS, ids=repr)
def test_names_lead_from_the_original_parameters_to_the_new_and_back(form, storage):
    original = export(Gathered(hidden=32, inner=48), hidden=32)
    config = moe_fx.Config(experts="linear", quantize=form, storage=storage)
    program = moe_fx.transform(original, config)
    names = moe_fx.report(program).names
    assert set(names) == {"up", "down"}
    back = {new: old for old, each in names.items() for new in each}
    assert len(back) == sum(map(len, names.values()))
    assert set(program.state_dict) == {"router", *back}
    for old, weight in original.state_dict.items():
        if old in names and storage == "per_expert":
            count = len(names[old]) // 4
            by_expert = [names[old][expert::4] for expert in range(4)]
            assert all(len(each) == count for each in by_expert)
            wide = torch.stack([form.dequantize(*(program.state_dict[n] for n in each)) for each in by_expert])
            assert (wide - weight).abs().max() < 0.1 * weight.abs().max()


def test_the_input_keeps_its_weights():
    original = export(Gathered())
    before = {name: tensor.clone() for name, tensor in original.state_dict.items()}
    moe_fx.transform(original, moe_fx.Config(quantize=INT8))
    assert all(torch.equal(original.state_dict[name], tensor) for name, tensor in before.items())


def test_consume_empties_what_was_quantized_and_nothing_else():
    model = Gathered()
    original = export(model)
    expected = run(moe_fx.transform(original, moe_fx.Config(quantize={"*up": INT8})))
    program = moe_fx.transform(original, moe_fx.Config(quantize={"*up": INT8}, consume=True))
    assert original.state_dict["up"].numel() == model.up.numel() == 0
    assert model.down.numel() > 0
    assert torch.equal(run(program), expected)


def test_consume_spares_what_the_program_still_reads():
    class Penalised(Gathered):
        def forward(self, x):
            return super().forward(x) + self.up.abs().mean()

    model = Penalised()
    original = export(model)
    expected = run(moe_fx.transform(original, moe_fx.Config(quantize=INT8)))
    program = moe_fx.transform(original, moe_fx.Config(quantize=INT8, consume=True))
    assert model.up.numel() > 0
    assert model.down.numel() == 0
    assert torch.equal(run(program), expected)


def test_nothing_is_consumed_when_a_later_weight_cannot_be_quantized():
    model = Gathered()
    with torch.no_grad():
        model.down[1, 2, 3] = float("nan")
    original = export(model)
    with pytest.raises(moe_fx.ProgramError, match="down holds NaN or infinite values"):
        moe_fx.transform(original, moe_fx.Config(quantize=INT8, consume=True))
    assert model.up.numel() > 0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinite_weights_are_not_quantized(value):
    model = Grouped(hidden=16)
    with torch.no_grad():
        model.down[1, 2, 3] = value
    with pytest.raises(moe_fx.ProgramError, match="down holds NaN or infinite values"):
        moe_fx.transform(export(model, hidden=16), moe_fx.Config(quantize=INT8))


def test_a_consumed_model_is_the_quantized_one():
    pytest.importorskip("transformers", reason="the models come from transformers")
    import copy

    program = copy.deepcopy(exported("mixtral", "grouped_mm"))
    expected = moe_fx.transform(program, moe_fx.Config(quantize=INT8, linears=INT8))
    consumed = moe_fx.transform(program, moe_fx.Config(quantize=INT8, linears=INT8, consume=True))
    assert torch.equal(logits(consumed.module(), (2, 5)), logits(expected.module(), (2, 5)))
    taken = moe_fx.report(consumed).names
    assert all((program.state_dict[name].numel() == 0) == (name in taken) for name in program.state_dict)


@pytest.mark.parametrize(
    ("names", "taken", "expected"),
    [
        (["experts.0.up.weight", "experts.1.up.weight"], [], "experts.up.weight"),
        (["up.0", "up.1"], [], "up"),
        (["p.up_0", "p.up_1", "p.up_10"], ["p.down_0", "p.down_1"], "p.up"),
        (["up0", "up1"], [], "up"),
        (["0", "1"], [], "0_stacked"),
        (["a.0.up", "b.1.up"], [], "a.0.up_stacked"),
        # w.1 and w.3 are the other half: a tensor w cannot be a module, too
        (["w.0", "w.2"], ["w.1", "w.3"], "w.0_stacked"),
        (["up.0", "up.1"], ["up"], "up.0_stacked"),
        (["up.0", "up.1"], ["up", "up.0_stacked"], "up.0_stacked_2"),
    ],
)
def test_a_stack_has_a_name_of_its_own(names, taken, expected):
    assert stacked_name(names, [*names, *taken]) == expected


class Fading(Gathered):
    """The experts' weights are a buffer that every call halves."""

    def __init__(self):
        super().__init__()
        up = self.up.detach().clone()
        del self.up
        self.register_buffer("up", up)

    def forward(self, x):
        y = super().forward(x)
        self.up.mul_(0.5)
        return y


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("storage", ["stacked", "per_expert"])
def test_weights_that_the_program_writes_are_read_where_it_writes_them(storage, decomposed):
    model, x = Fading().eval(), torch.randn(6, 8)
    program = torch.export.export(copy.deepcopy(model), (x,))
    if decomposed:
        program = program.run_decompositions()
    after = moe_fx.transform(program, moe_fx.Config(experts="linear", storage=storage)).module()
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(after(x), model(x))


def test_refuses_to_quantize_weights_that_the_program_writes():
    program = torch.export.export(Fading().eval(), (torch.randn(6, 8),)).run_decompositions()
    with pytest.raises(moe_fx.ProgramError, match=r"computed or written by the program, from up .*'up': None"):
        moe_fx.transform(program, moe_fx.Config(quantize=moe_fx.Int8WeightOnly()))


class Cast(torch.nn.Module):
    """Every expert in turn on every token; its part of ``up`` is cast where it is read."""

    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(8, 4)
        self.up, self.down = torch.nn.Parameter(torch.randn(4, 16, 8)), torch.nn.Parameter(torch.randn(4, 8, 16))

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        table = torch.zeros(x.shape[0], 4).scatter(1, ids, weights)
        out = torch.zeros_like(x)
        for e in range(4):
            h = torch.nn.functional.linear(x.bfloat16(), self.up[e].bfloat16()).relu()
            out = out + table[:, e, None] * torch.nn.functional.linear(h.float(), self.down[e])
        return out


@pytest.mark.parametrize("within", ["", "block."])
def test_refuses_to_quantize_what_is_computed_of_each_expert_and_names_its_weight(within):
    model = (torch.nn.Sequential() if within else Cast()).eval()
    if within:
        model.add_module("block", Cast().eval())
    program = torch.export.export(model, (rows(),))
    with pytest.raises(moe_fx.ProgramError) as refused:
        moe_fx.transform(program, moe_fx.Config(quantize=INT8))
    assert f"is computed or written by the program, from {within}up " in str(refused.value)
    assert f"leave it out: Config(quantize={{..., '{within}up': None}})" in str(refused.value)
    assert "''" not in str(refused.value)
    after = moe_fx.transform(program, moe_fx.Config(quantize={"*": INT8, f"{within}up": None}, require="all"))
    (layer,) = moe_fx.report(after).layers
    assert set(layer.formats) == {f"{within}down"}
    expected = model(rows())
    assert (after.module()(rows()) - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("lowering", ["grouped_mm", "linear", "gather"])
def test_refuses_to_quantize_a_weight_that_is_multiplied_in_two_ways(lowering):
    """Square, so that nothing but the numbers would tell."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.up = torch.nn.Linear(8, 4), torch.nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
            h = torch.einsum("th,tknh->tkn", x, self.up[ids]).relu()
            return (torch.einsum("tkn,tknh->tkh", h, self.up[ids]) * weights[..., None]).sum(1)

    model = Tied().eval()
    program = torch.export.export(model, (rows(),))
    with pytest.raises(moe_fx.ProgramError, match="up is multiplied as it is by one linear and transposed by another"):
        moe_fx.transform(program, moe_fx.Config(experts=lowering, quantize=INT8))
    after = moe_fx.transform(program, moe_fx.Config(experts=lowering, quantize={"up": None}, require="all"))
    torch.testing.assert_close(after.module()(rows()), model(rows()))


class ExpertsLast(Gathered):
    """Weights [H, I, E] and [I, H, E] that all experts read at once."""

    def __init__(self):
        super().__init__(gated=False)
        self.up = torch.nn.Parameter(self.up.detach().permute(2, 1, 0).contiguous())
        self.down = torch.nn.Parameter(self.down.detach().permute(2, 1, 0).contiguous())

    def forward(self, x):
        ids, weights = self.route(x)
        table = torch.zeros(x.shape[0], self.E, dtype=x.dtype).scatter(1, ids, weights)
        h = torch.einsum("th,hie->tei", x, self.up).relu()
        return torch.einsum("te,tei,ihe->th", table, h, self.down)


@pytest.mark.parametrize("quantize", [None, INT8])
def test_weights_whose_experts_stand_last_can_be_read_by_linears(quantize):
    program, x = export(ExpertsLast()), torch.randn(6, 8)
    after = moe_fx.transform(program, moe_fx.Config(quantize=quantize, storage="per_expert", require=1))
    expected = program.module()(x)
    error = (after.module()(x) - expected).abs().max() / expected.abs().max()
    assert error < (1e-5 if quantize is None else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_whose_experts_stand_last_are_stored_as_matrices(dtype):
    program, x = export(ExpertsLast().to(dtype)), torch.randn(6, 8, dtype=dtype)
    after = moe_fx.transform(program, moe_fx.Config(experts="grouped_mm", require=1))
    stored = {name: (tensor.shape, tensor.is_contiguous()) for name, tensor in after.state_dict.items()}
    assert stored["up_experts_first"] == ((4, 8, 16), True)
    assert stored["down_experts_first"] == ((4, 16, 8), True)
    assert not {"up", "down"} & stored.keys()
    expected = program.module()(x)
    assert (after.module()(x) - expected).abs().max() <= (
        1e-5 if dtype is torch.float32 else 2e-2
    ) * expected.abs().max()


def test_what_quantized_weights_were_views_of_is_given_up():
    after = moe_fx.transform(export(ExpertsLast()), moe_fx.Config(quantize=INT8, require=1))
    assert {name for name in after.state_dict if not name.startswith("router")} == {
        "up_qdata", "up_scale", "down_qdata", "down_scale"
    }  # fmt: skip


@torch.no_grad()
def test_compiled_weights_whose_experts_stand_last_stay_the_models_own():
    model, given = ExpertsLast().bfloat16().eval(), rows().bfloat16()
    backend = moe_fx.backend(moe_fx.Config(experts="grouped_mm"))
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        expected = model(given)
        assert (compiled(given) - expected).abs().max() <= 2e-2 * expected.abs().max()
        model.up.mul_(2)
    assert [len(report.layers) for report in backend.reports] == [1]


class AlsoRead(Parameters):
    """One expert's matrix is multiplied with every token, beside the layer."""

    def forward(self, x):
        return super().forward(x) + torch.nn.functional.linear(x, self.up[1])


@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "core-aten"])
@pytest.mark.parametrize(
    ("model", "names"),
    [(Parameters, ["up"]), (AlsoRead, ["up.1", "up_stacked"])],
    ids=["all", "all-but-one"],
)
def test_of_what_is_stacked_only_parts_that_are_read_elsewhere_are_kept(model, names, decomposed):
    model, x = model().eval(), torch.randn(6, 16)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        program = program.run_decompositions() if decomposed else program
        after = moe_fx.transform(program, moe_fx.Config(require=1))
        assert sorted(after.state_dict) == ["down", "router.linear.weight", *names]
        assert (after.module()(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()
