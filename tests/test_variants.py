"""The published forms of DoRA that docs/variants.md lists, each written from its formula, and ours in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import FACTORED, f64, norm_lane
from torch import Tensor, nn

from dora_kernels import DoRALinear, dora_linear

IN, OUT, RANK, ALPHA, EPS = 13, 9, 3, 5.0, 1e-8

# float64's accuracy: some thousand eps, relative to the norm of what is compared. The sums here have at most some
# hundred terms, and an option that is off by the least of the forms' differences, an eps of 1e-8, is off by 1e-8.
TOLERANCE = 1e-12


def article(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
    """(a) A [in, r], B [r, out], m [1, in], scaled by alpha itself."""
    V = W + ALPHA * (A @ B).T
    return x @ (m * (V / V.norm(dim=0, keepdim=True))).T + bias


def article_source(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
    """(a), as its source has it: A [out, r], B [r, in], m [1, in], unscaled."""
    V = W + A @ B
    return x @ (m * (V / V.norm(dim=0, keepdim=True))).T + bias


def peft(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
    """(b) A [r, in], B [out, r], m [out], scaled by alpha / r; the norm is a constant of the backward."""
    scaling = ALPHA / RANK
    g = m / (W + scaling * B @ A).norm(dim=1).detach()
    base = x @ W.T + bias
    return base + (g - 1) * (base - bias) + g * (scaling * (x @ A.T @ B.T))


def mlp(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
    """(c) A [r, in], B [out, r], m [out, 1], scaled by alpha / r, eps added to the norm."""
    V = W + ALPHA / RANK * (B @ A)
    return x @ (m * (V / (V.norm(dim=1, keepdim=True) + EPS))).T + bias


def column_norm(x: Tensor, W: Tensor, bias: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
    """(d) A [in, r], B [r, out], m [1, in], scaled by alpha itself, the norm at least 1e-8."""
    V = W + ALPHA * (A @ B).T
    return x @ (m * (V / V.norm(dim=0, keepdim=True).clamp(min=EPS))).T + bias


class Form(NamedTuple):
    """A published form: what it computes, the shapes of its A, B and m, and ours for them."""

    computes: Callable[..., Tensor]
    shapes: Callable[[int, int], tuple[tuple[int, ...], ...]]
    ours: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    scaling: float
    options: dict[str, object]


def transposed(A: Tensor, B: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return A.T, B.T, m.squeeze(0)


INPUTS: dict[str, object] = {"magnitude_axis": "in", "detach_norm": False}


def tutorial(inputs: int, outputs: int) -> tuple[tuple[int, ...], ...]:
    return (inputs, RANK), (RANK, outputs), (1, inputs)


FORMS = {
    "article": Form(article, tutorial, transposed, ALPHA, INPUTS),
    "article's source": Form(
        article_source, lambda i, o: ((o, RANK), (RANK, i), (1, i)), lambda A, B, m: (B, A, m.squeeze(0)), 1.0, INPUTS
    ),
    "peft": Form(peft, lambda i, o: ((RANK, i), (o, RANK), (o,)), lambda A, B, m: (A, B, m), ALPHA / RANK, {}),
    "mlp": Form(
        mlp, lambda i, o: ((RANK, i), (o, RANK), (o, 1)), lambda A, B, m: (A, B, m.squeeze(1)), ALPHA / RANK,
        {"detach_norm": False, "eps": EPS},
    ),
    "column norm": Form(column_norm, tutorial, transposed, ALPHA, INPUTS),
}  # fmt: skip
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
# With a square weight either axis runs.
shapes = pytest.mark.parametrize("sizes", [(IN, OUT), (IN, IN)], ids=["wide", "square"])
# Triton refuses float64. The last one takes the norm from products of the factors, as for large weights.
backends = pytest.mark.parametrize("backend", ["auto", "torch", "factored"])


@pytest.fixture
def chosen(backend):
    """The backend's name, "factored" being torch with its thresholds down."""
    if backend != "factored":
        yield backend
        return
    with norm_lane(FACTORED[0].values[0]) as lane:
        yield lane.backend


def problem(form: Form, sizes: tuple[int, int] = (IN, OUT), *, start: bool = False) -> dict[str, Tensor]:
    """A layer as it is in training, in the form's shapes, or at its start, where B, or what stands for it, is zero."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=f64)

    inputs, outputs = sizes
    A, B, m = (normal(*shape) for shape in form.shapes(inputs, outputs))
    W = normal(outputs, inputs)
    if start:
        up = form.ours(A, B, m)[1]
        up.zero_()
        m = W.norm(dim=0 if form.options.get("magnitude_axis") == "in" else 1).reshape(m.shape)
    return {"x": normal(4, 5, inputs), "W": W, "bias": normal(outputs), "A": A, "B": B, "m": m}


def solve(function: Callable[..., Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of each value."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    y = function(**leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=f64)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy)))}


def assert_close(ours: dict[str, Tensor], published: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == published.keys()
    for name, wanted in published.items():
        off = (ours[name] - wanted).norm() / wanted.norm()
        assert off <= tolerance, f"{name} is off by {off:.1e}"


def layer_of(form: Form, values: dict[str, Tensor], backend: str = "auto") -> DoRALinear:
    """The form's layer, all of its parameters trainable, as a published one's are until somebody freezes W."""
    layer = DoRALinear(IN, OUT, rank=RANK, alpha=form.scaling * RANK, dtype=f64, backend=backend, **form.options)
    mine = parameters(layer)
    A, B, m = form.ours(values["A"], values["B"], values["m"])
    with torch.no_grad():
        for name, value in {"W": values["W"], "bias": values["bias"], "A": A, "B": B, "m": m}.items():
            mine[name].copy_(value)
    return layer.requires_grad_(True)


def parameters(layer: DoRALinear) -> dict[str, nn.Parameter]:
    base = layer.base_layer
    return {
        "W": base.weight, "bias": base.bias, "A": layer.lora_A.weight, "B": layer.lora_B.weight, "m": layer.magnitude
    }  # fmt: skip


@forms
@backends
@shapes
def test_the_function_is_the_published_one(form, chosen, sizes):
    def ours(x, W, bias, A, B, m):
        A, B, m = form.ours(A, B, m)
        return dora_linear(x, W, A, B, m, bias, scaling=form.scaling, backend=chosen, **form.options)

    values = problem(form, sizes)
    assert_close(solve(ours, values), solve(form.computes, values))


@forms
@backends
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_the_published_one(form, chosen, training):
    values = problem(form)
    layer = layer_of(form, values, chosen).train(training)
    wanted = solve(form.computes, values)
    wanted["A"], wanted["B"], wanted["m"] = form.ours(wanted["A"], wanted["B"], wanted["m"])
    for _ in range(2):  # the second time with the norm kept
        layer.zero_grad()
        x = values["x"].clone().requires_grad_()
        y = layer(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=f64))
        assert_close({"y": y, "x": x.grad, **{n: p.grad for n, p in parameters(layer).items()}}, wanted)


@forms
def test_training_from_the_start_is_the_published_one(form):
    """Ten steps from where a layer equals its base layer: A, B and m end where the published ones do."""
    values = problem(form, start=True)
    layer = layer_of(form, values)
    layer.base_layer.requires_grad_(False)
    theirs = {name: values[name].clone().requires_grad_() for name in ("A", "B", "m")}
    x, W, bias = (values[name] for name in ("x", "W", "bias"))
    wanted = torch.randn(*x.shape[:-1], OUT, generator=torch.Generator().manual_seed(2), dtype=f64)
    start = x @ W.T + bias
    # eps moves the start by as much
    torch.testing.assert_close(layer(x), start, rtol=0, atol=10 * EPS if "eps" in form.options else 1e-13)

    pairs = [
        (lambda: form.computes(x, W, bias, **theirs), list(theirs.values())),
        (lambda: layer(x), [p for p in layer.parameters() if p.requires_grad]),
    ]
    for call, trained in pairs:
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            (call() - wanted).square().mean().backward()
            optimizer.step()
    ends = dict(zip("ABm", form.ours(*(theirs[name].detach() for name in "ABm"))))
    assert (layer(x) - start).abs().max() > 1e-2
    assert_close({name: parameters(layer)[name].detach() for name in "ABm"}, ends, tolerance=1e-10)


def test_peft_itself():
    """(b) is what PEFT computes, and with the patch too."""
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    import dora_kernels

    form = FORMS["peft"]
    values = problem(form)
    model = get_peft_model(
        nn.Sequential(nn.Linear(IN, OUT)).double(),
        LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["0"]),
    )
    layer = model.base_model.model[0]
    layer.requires_grad_(True)
    mine = {
        "W": layer.base_layer.weight, "bias": layer.base_layer.bias, "A": layer.lora_A["default"].weight,
        "B": layer.lora_B["default"].weight, "m": layer.lora_magnitude_vector["default"].weight,
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(values[name])
    wanted = solve(form.computes, values)
    for patched in (False, True):
        if patched:
            assert dora_kernels.patch_peft(model).patched
        model.zero_grad()
        x = values["x"].clone().requires_grad_()
        y = model(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=f64))
        assert_close({"y": y, "x": x.grad, **{name: p.grad for name, p in mine.items()}}, wanted)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_detaching_changes_gradients_and_not_outputs(axis):
    form = FORMS["article" if axis == "in" else "mlp"]
    values = problem(form)
    full = layer_of(form, values)
    detached = copy.deepcopy(full)
    detached.detach_norm = True
    y, same = full(values["x"]), detached(values["x"])
    assert torch.equal(same, y)
    y.square().sum().backward()
    same.square().sum().backward()
    changed = {n: (p.grad - full.get_parameter(n).grad).norm() / p.grad.norm() for n, p in detached.named_parameters()}
    assert {n for n, size in changed.items() if size > 1e-2} == {
        "base_layer.weight", "lora_A.weight", "lora_B.weight"
    }  # fmt: skip
    assert max(changed["lora_magnitude_vector"], changed["base_layer.bias"]) < TOLERANCE


def with_zeros(form: Form, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The third output's weights zero, or the third input's, adapter included."""
    W, (A, B, _) = values["W"], form.ours(values["A"], values["B"], values["m"])
    if form.options.get("magnitude_axis") == "in":
        W[:, 2] = A[:, 2] = 0
    else:
        W[2] = B[2] = 0
    return values


@backends
def test_a_zero_row_with_eps_is_the_published_one(chosen):
    """The row is zero whatever g is; the gradients of its weights are m / eps, large and the same."""
    form = FORMS["mlp"]

    def ours(x, W, bias, A, B, m):
        return dora_linear(x, W, A, B, m.squeeze(1), bias, scaling=form.scaling, backend=chosen, **form.options)

    values = with_zeros(form, problem(form))
    wanted = solve(form.computes, values)
    assert wanted["W"][2].abs().min() > 1e5
    assert_close(solve(ours, values), wanted)


@backends
def test_a_zero_column_without_eps(chosen):
    """The column is zero as in the clamped form, all gradients too where m is zero, as at the start. Where m is not,
    the clamped form has gradients of m / 1e-8 there, ours zeros. The article's form is NaN."""
    form = FORMS["column norm"]

    def ours(x, W, bias, A, B, m):
        return dora_linear(x, W, A.T, B.T, m.squeeze(0), bias, scaling=ALPHA, backend=chosen, **form.options)

    values = with_zeros(form, problem(form))
    results, wanted = solve(ours, values), solve(column_norm, values)
    assert_close({"y": results["y"]}, {"y": wanted["y"]})
    assert wanted["A"][2].abs().max() > 1e5
    assert all(grad.isfinite().all() for grad in results.values()) and not results["A"][2].any()
    assert article(**values).isnan().all()
    values["m"][0, 2] = 0
    assert_close(solve(ours, values), solve(column_norm, values))
