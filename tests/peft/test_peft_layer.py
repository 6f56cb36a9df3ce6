"""One patched PEFT layer: unusual inputs, special values, compilation, function transforms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_models import (
    batch,
    check,
    check_parity,
    counted,
    lora_layers,
    one_thread,  # noqa: F401
    solve,
    toy_input,
    toy_twins,
    twins,
)

with_dropout = pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
both_layouts = pytest.mark.parametrize("kind", ["llama", "gpt2"])  # of the base weight: nn.Linear, Conv1D


def layers(kind="llama", **options):
    """A stock layer, and the same patched."""
    return tuple(lora_layers(model)[0] for model in twins(kind, **options))


def solve_layer(layer, x):
    """The output, and the gradient of x and of every parameter that has one."""
    layer.zero_grad()
    torch.manual_seed(0)
    x = x.to(layer.weight.dtype).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    assert len(grads) == 3
    return {"y": y.detach(), "x": x.grad, **grads}


@both_layouts
@with_dropout
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens(kind, shape, dropout):
    for layer in layers(kind, lora_dropout=dropout):
        results = solve_layer(layer, torch.randn(*shape, layer.in_features))
        assert results["y"].shape == (*shape, layer.out_features)
        assert results["x"].shape == (*shape, layer.in_features)
        assert all((grad == 0).all() for name, grad in results.items() if "lora_" in name)


@both_layouts
def test_one_token_without_leading_dimensions(kind):
    """Stock PEFT gives [1, out_features] here."""
    stock, ours = layers(kind)
    results = solve_layer(ours, torch.ones(32))
    assert results["y"].shape == (ours.out_features,)
    check(lambda layer: {n: t.reshape(-1) for n, t in solve_layer(layer, torch.ones(32)).items()}, stock, ours)


@with_dropout
@pytest.mark.parametrize(
    "kind, layout",
    # Conv1D takes a view of its input, so stock refuses the transposed one.
    [
        ("llama", "transposed"),
        ("llama", "expanded"),
        ("llama", "every other"),
        ("gpt2", "expanded"),
        ("gpt2", "every other"),
    ],
)
def test_layouts_of_the_input(kind, layout, dropout):
    x = {
        "transposed": torch.randn(32, 5, 4).transpose(0, 2),
        "expanded": torch.randn(32).expand(4, 5, 32),
        "every other": torch.randn(4, 5, 64)[..., ::2],
    }[layout]
    check(lambda layer: solve_layer(layer, x.detach()), *layers(kind, lora_dropout=dropout))


def test_float64_under_autocast_stays_float64(monkeypatch):
    x = torch.randn(5, 32, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (layer.double()(x) for layer in layers())
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs)


def test_a_tensor_subclass(monkeypatch):
    """PEFT's operations take it, as they do unpatched."""

    class Tagged(Tensor):
        pass

    stock, ours = layers()
    x = torch.randn(4, 32)
    with counted(monkeypatch) as counts:
        y = ours(x.as_subclass(Tagged))
    assert type(y) is Tagged and counts["layer"] == 0
    torch.testing.assert_close(y.as_subclass(Tensor), stock(x))


@with_dropout
def test_scaling_as_a_tensor(dropout, monkeypatch):
    """As `prepare_model_for_compiled_hotswap` makes it: left to PEFT."""
    stock, ours = layers(lora_dropout=dropout)
    for layer in (stock, ours):
        layer.scaling["default"] = torch.tensor(1.3)
    with counted(monkeypatch) as counts:
        check(lambda layer: solve_layer(layer, torch.ones(3, 32)), stock, ours)
    assert counts == {"layer": 0, "norm": 0}


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "trace"])
@with_dropout
def test_function_transforms(transform, dropout):
    """PEFT's plain operations run under them."""
    x = torch.randn(4, 32)
    results = []
    for layer in layers(lora_dropout=dropout):
        layer.eval()
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def call(parameters, x, layer=layer):
            return torch.func.functional_call(layer, parameters, (x,)).square().sum()

        if transform == "grad":
            results.append(torch.func.grad(call)(parameters, x)["lora_A.default.weight"])
        elif transform == "vmap":
            results.append(torch.func.vmap(call, in_dims=(None, 0))(parameters, x))
        elif transform == "jvp":
            results.append(torch.func.jvp(lambda x, call=call, p=parameters: call(p, x), (x,), (x,))[1])
        else:
            with torch.no_grad():
                results.append(torch.jit.trace(layer, (x,))(x + 1))
    torch.testing.assert_close(results[1], results[0])


def test_zero_rows_are_not_nan():
    """Stock PEFT divides by zero: peft issue 2049."""
    _, ours = twins()
    layer = lora_layers(ours)[0]
    with torch.no_grad():
        layer.base_layer.weight[5] = 0
        layer.lora_B["default"].weight[5] = 0
        layer.lora_magnitude_vector["default"].weight[5] = 0
    assert all(t.isfinite().all() for t in solve(ours, batch()).values())


@pytest.fixture
def clean_compiler(monkeypatch):
    """No graph of another test; and the compiler's own scratch memory needs no poison."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    yield
    torch._dynamo.reset()


def test_a_model_compiled_in_one_graph(clean_compiler):
    stock, ours = twins()
    stock.config.use_cache = ours.config.use_cache = False
    ours.compile(fullgraph=True, backend="aot_eager")
    check_parity(stock, ours, batch())


@both_layouts
@with_dropout
def test_a_layer_compiled_in_one_graph(kind, dropout, clean_compiler):
    """Through whatever changes between calls."""
    stock, ours = layers(kind, lora_dropout=dropout)
    ours.compile(fullgraph=True, backend="aot_eager")

    def agree(*shape):
        x = torch.randn(*shape, 32)
        check(lambda layer: solve_layer(layer, x.detach()), stock, ours)

    agree(4, 3)
    agree(5, 2)
    for layer in (stock, ours):
        layer.set_scale("default", 0.3)
    agree(4, 3)
    for layer in (stock, ours):
        layer.lora_B["default"].weight.data.mul_(1.2)
        layer.eval()
    agree(4, 3)


class Louder(torch.nn.Linear):
    """A linear layer whose forward is its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def give_a_bias(layer):
    layer.lora_B["default"].bias = torch.nn.Parameter(torch.ones(layer.out_features))


def exchange(name):
    def change(layer):
        module = getattr(layer, name)
        (module if name == "base_layer" else module["default"]).__class__ = Louder

    return change


def shorten(layer):
    for factors, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
        weight = factors["default"].weight
        weight.data = weight.data.narrow(dim, 0, 2)


CHANGES = {"bias": give_a_bias, "A": exchange("lora_A"), "B": exchange("lora_B"), "base": exchange("base_layer")}


@pytest.mark.parametrize("change", [*CHANGES.values(), shorten], ids=[*CHANGES, "rank"])
@pytest.mark.parametrize("trains", [True, False])
def test_what_was_checked_once_may_change(change, trains):
    """Modules and tensors that are exchanged or edited in place after the first call."""
    stock, ours, _ = toy_twins()
    for model in (stock, ours):
        model.train(trains)
        model(toy_input())
        for layer in lora_layers(model):
            change(layer)
    assert torch.allclose(ours(toy_input()), stock(toy_input()), rtol=1e-5, atol=1e-6)
