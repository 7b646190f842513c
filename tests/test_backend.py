"""torch.compile(model, backend=...): the same passes on the graph that Dynamo hands over."""

import pytest
import torch
from models import relative_error
from toys import Gathered, Grouped

import moe_fx


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def x(tokens, dtype=torch.float32):
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(2)).to(dtype)


def test_backend_object_rewrites_and_reports():
    model, backend = Gathered().eval(), moe_fx.backend(moe_fx.Config(experts="gather", require="all"))
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for tokens in (6, 9):
            torch.testing.assert_close(compiled(x(tokens)), model(x(tokens)), rtol=1e-5, atol=1e-6)
    (layer,) = backend.reports[0].layers
    assert layer.lowering == "gather"


def test_backend_is_found_by_name():
    assert "moe_fx" in torch._dynamo.list_backends()
    model = Gathered().eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="moe_fx", fullgraph=True)
        torch.testing.assert_close(compiled(x(6)), model(x(6)), rtol=1e-5, atol=1e-6)


class Limited(Gathered):
    """A float attribute is a symbol under dynamic=True, and so an operand of the body."""

    def __init__(self):
        super().__init__(gated=False, activation=lambda h: h.clamp(-self.limit, self.limit))
        self.limit = 0.1


@pytest.mark.parametrize("lowering", ["grouped_mm", "linear", "gather"])
def test_symbolic_numbers_in_the_body(lowering):
    model, backend = Limited().eval(), moe_fx.backend(moe_fx.Config(experts=lowering, require="all"))
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for limit in (0.1, 0.3):
            model.limit = limit
            torch.testing.assert_close(compiled(x(6)), model(x(6)), rtol=1e-5, atol=1e-6)


def test_backend_quantizes():
    model, backend = Gathered().eval(), moe_fx.backend(moe_fx.Config(quantize={"*up": moe_fx.Int8WeightOnly()}))
    with torch.no_grad():
        actual = torch.compile(model, backend=backend)(x(6))
        model.up.data = moe_fx.Int8WeightOnly().dequantize(*moe_fx.Int8WeightOnly().quantize(model.up.data))
        torch.testing.assert_close(actual, model(x(6)), rtol=1e-5, atol=1e-6)
    assert backend.reports[0].layers[0].format == "up: int8_weight_only, down: none"


def test_quantizing_with_gradients_enabled_is_an_error():
    compiled = torch.compile(Gathered(), backend=moe_fx.backend(moe_fx.Config(quantize=moe_fx.Int8WeightOnly())))
    with pytest.raises(Exception, match="quantized experts cannot be trained"):
        compiled(x(6))


def test_unquantized_experts_can_be_trained():
    model = Gathered()
    compiled = torch.compile(model, backend=moe_fx.backend(moe_fx.Config(experts="grouped_mm", require="all")))
    compiled(x(6)).square().sum().backward()
    actual = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(x(6)).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_frozen_experts():
    model = Gathered(num_experts=16, hidden=64, inner=64, dtype=torch.bfloat16)
    model.up.requires_grad_(False)
    model.down.requires_grad_(False)
    tokens = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    grads = []
    for run in (model, torch.compile(model, backend=moe_fx.backend(moe_fx.Config(require="all")))):
        tokens.grad = model.router.grad = None
        run(tokens).float().square().sum().backward()
        grads.append((tokens.grad.float(), model.router.grad.float()))
    for expected, actual in zip(*grads, strict=True):
        assert (actual - expected).norm() < 0.02 * expected.norm()


def test_bfloat16_groups():
    model, backend = Grouped().eval(), moe_fx.backend(moe_fx.Config(require="all"))
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, dynamic=True)
        for tokens in (6, 9):
            expected = model(x(tokens, torch.bfloat16)).float()
            actual = compiled(x(tokens, torch.bfloat16)).float()
            assert (actual - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_configuration_of_another_type_is_an_error():
    with pytest.raises(moe_fx.ConfigError, match=r"takes a moe_fx\.Config, not dict"):
        moe_fx.backend({"experts": "gather"})


def test_weights_are_quantized_once_for_all_shapes_and_anew_when_they_change(monkeypatch):
    calls = []
    original = moe_fx.Int8WeightOnly.quantize
    monkeypatch.setattr(
        moe_fx.Int8WeightOnly, "quantize", lambda form, weight: (calls.append(weight.shape), original(form, weight))[1]
    )
    torch.compiler.reset()
    model = Gathered().eval()
    compiled = torch.compile(
        model, backend=moe_fx.backend(moe_fx.Config(quantize=moe_fx.Int8WeightOnly())), dynamic=False
    )
    with torch.no_grad():
        for count in (5, 6):
            x = torch.randn(count, 8)
            assert relative_error(compiled(x), model(x)) < 0.05
        assert len(calls) == 2  # up and down
        model.up.mul_(2)
        x = torch.randn(7, 8)
        assert relative_error(compiled(x), model(x)) < 0.05
    assert len(calls) == 3


@pytest.mark.parametrize("quantize", [None, moe_fx.Int8WeightOnly()], ids=["none", "int8"])
def test_all_weights_are_inputs_that_stay_where_they_are(quantize):
    """CUDA graphs copy every other input at every call."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    moving = {}

    def compiled_by(name, compiler):
        def inner(graph_module, example_inputs, **options):
            fixed = set(options["static_input_idxs"])
            moving[name] = [tuple(x.shape) for i, x in enumerate(example_inputs) if i not in fixed]
            return compile_fx_inner(graph_module, example_inputs, **options)

        return lambda graph_module, example_inputs: compiler(graph_module, example_inputs, inner_compile=inner)

    model, own = Gathered().eval(), moe_fx.backend(moe_fx.Config(quantize=quantize, require=1))
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        for name, compiler in (("inductor", compile_fx), ("moe_fx", own)):
            torch.compiler.reset()
            torch.compile(model, backend=compiled_by(name, compiler), dynamic=False)(x(6))
    assert moving["moe_fx"] == moving["inductor"] == [(6, 8)]
