"""`DoRALinear` and `LoRALinear`: their formula with and without dropout, their start, their options, training."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import check, f32, f64, make_problem
from torch import nn

from dora_kernels import DoRALinear, LoRALinear, dora_weight_norm

bf16 = torch.bfloat16
axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])
detachments = pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])
kinds = pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])


def layer_of(problem, **options):
    """The problem as a layer, with the weights of the problem; all of them train."""
    out_features, in_features = problem.weight.shape
    rank = problem.lora_A.shape[0]
    kind = LoRALinear if problem.magnitude is None else DoRALinear
    if kind is DoRALinear:
        options |= {"magnitude_axis": problem.magnitude_axis, "detach_norm": problem.detach_norm}
    layer = kind(
        in_features, out_features, problem.bias is not None, rank=rank, alpha=problem.scaling * rank,
        device=problem.weight.device, dtype=problem.weight.dtype, adapter_dtype=problem.lora_A.dtype, **options,
    ).requires_grad_(True)  # fmt: skip
    assert layer.scaling == pytest.approx(problem.scaling)
    layer.scaling = problem.scaling
    with torch.no_grad():
        for parameter, value in zip(parameters(layer).values(), values(problem).values(), strict=True):
            parameter.copy_(value)
    return layer


def parameters(layer):
    named = {
        "weight": layer.base_layer.weight, "lora_A": layer.lora_A.weight, "lora_B": layer.lora_B.weight,
        "magnitude": getattr(layer, "magnitude", None), "bias": layer.base_layer.bias,
    }  # fmt: skip
    return {name: p for name, p in named.items() if p is not None}


def values(problem):
    return {name: t for name, t in problem.tensors.items() if t is not None and name != "x"}


def random_layer(kind=DoRALinear, in_features=9, out_features=7, **options):
    """An adapter that is far from its start."""
    layer = kind(in_features, out_features, **{"rank": 3, "alpha": 2, **options})
    with torch.no_grad():
        layer.lora_B.weight.normal_(std=0.5)
        if kind is DoRALinear:
            layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
    return layer


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small spend their time waking threads, on a busy machine above all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@axes
@detachments
@pytest.mark.parametrize("training, bias", [(True, True), (True, False), (False, True)])
def test_formula(lane, magnitude_axis, detach_norm, bias, training):
    problem = make_problem(
        (3, 5), magnitude_axis=magnitude_axis, detach_norm=detach_norm, bias=bias, device=lane.device
    )
    layer = layer_of(problem, backend=lane.backend, dropout=0.0 if training else 0.4).train(training)
    for _ in range(2):  # the second time with the kept norm
        x = problem.x.clone().requires_grad_()
        leaves = {"x": x, **parameters(layer)}
        y = layer(x)
        grads = torch.autograd.grad(y, list(leaves.values()), problem.dy)
        check({"y": y.detach(), **dict(zip(leaves, grads, strict=True))}, problem, leaves)


@axes
def test_one_norm_for_many_calls(magnitude_axis):
    layer = random_layer(magnitude_axis=magnitude_axis)
    for training in (True, False):
        layer.train(training)
        for _ in range(3):
            layer(torch.randn(2, 9)).sum().backward()
    assert (layer._norm_cache.computed, layer._norm_cache.reused) == (1, 5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_formula_of_plain_lora(lane, bias):
    problem = make_problem((3, 5), magnitude=False, bias=bias, device=lane.device)
    layer = layer_of(problem, backend=lane.backend)
    leaves = {"x": problem.x.clone().requires_grad_(), **parameters(layer)}
    y = layer(leaves["x"])
    grads = torch.autograd.grad(y, list(leaves.values()), problem.dy)
    check({"y": y.detach(), **dict(zip(leaves, grads, strict=True))}, problem, leaves)


def with_dropout(x, dropped, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm):
    """torchtune's form: dropout on the low-rank branch only."""
    y = None
    if magnitude is not None:
        norm = (weight + scaling * lora_B @ lora_A).norm(dim=1 if magnitude_axis == "out" else 0)
        g = magnitude / (norm.detach() if detach_norm else norm)
        if magnitude_axis == "in":
            x, dropped = x * g, dropped * g
    y = x @ weight.T + scaling * (dropped @ lora_A.T @ lora_B.T)
    if magnitude is not None and magnitude_axis == "out":
        y = y * g
    return y if bias is None else y + bias


@pytest.mark.parametrize("magnitude", [True, False], ids=["dora", "lora"])
@axes
@detachments
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_formula_with_dropout(magnitude, magnitude_axis, detach_norm, bias):
    """In float64, where both are exact; the dropout module is called once, on x."""
    options = {"magnitude_axis": magnitude_axis, "detach_norm": detach_norm}
    problem = make_problem((3, 5), dtypes=(f64, f64, f64), magnitude=magnitude, bias=bias, **options)
    layer = layer_of(problem, dropout=0.4)
    results = []
    for call in ("ours", "formula"):
        x = problem.x.clone().requires_grad_()
        torch.manual_seed(3)
        if call == "ours":
            y = layer(x)
        else:
            inputs = {name: parameters(layer).get(name) for name in ("weight", "lora_A", "lora_B", "magnitude", "bias")}
            y = with_dropout(x, F.dropout(x, 0.4), *inputs.values(), problem.scaling, **options)
        results.append([y, *torch.autograd.grad(y, [x, *parameters(layer).values()], problem.dy)])
    torch.testing.assert_close(*results)
    torch.manual_seed(4)
    assert not torch.allclose(layer(problem.x), results[0][0]), "the dropout does nothing"
    layer.eval()
    torch.testing.assert_close(layer(problem.x), layer_of(problem)(problem.x))


@kinds
def test_dropout_on_average_is_the_evaluation(kind):
    """Only the low-rank branch is random, and linear in it."""
    torch.manual_seed(0)
    layer = random_layer(kind, dropout=0.5)
    x = torch.randn(1, 9).expand(20000, 9)
    with torch.no_grad():
        drawn = layer.train()(x)
        wanted = layer.eval()(x[:1])
    scatter = drawn.std(0)
    assert (scatter > 0.05).all()
    assert ((drawn.mean(0) - wanted[0]).abs() < 5 * scatter / 20000**0.5).all()


@kinds
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear(kind, bias):
    linear = nn.Linear(9, 7, bias=bias).eval()
    layer = kind.from_linear(linear, rank=3, alpha=6, dropout=0.1)
    assert layer.base_layer is linear and not layer.training
    assert not linear.weight.requires_grad and layer.lora_A.weight.requires_grad
    assert (layer.in_features, layer.out_features, layer.rank, layer.scaling) == (9, 7, 3, 2.0)
    x = torch.randn(4, 9)
    torch.testing.assert_close(layer(x), linear(x))
    assert kind.from_linear(nn.Linear(2, 3).train(), rank=1).training


def test_scaling_by_alpha_and_rank():
    scalings = [
        DoRALinear(4, 4, rank=4, **options).scaling
        for options in ({}, {"alpha": 8}, {"alpha": 8, "use_rslora": True}, {"use_rslora": True})
    ]
    assert scalings == [1.0, 2.0, 4.0, 1.0]


@axes
@pytest.mark.parametrize("dtype", [f32, bf16, torch.float16, f64])
def test_a_new_layer_is_its_base_layer(magnitude_axis, dtype):
    """float32 adapters on a 16-bit base, and the norm unrounded: here stock PEFT is off by up to 3.5e-3."""
    torch.manual_seed(0)
    layer = DoRALinear(48, 40, False, rank=4, alpha=8, dtype=dtype, magnitude_axis=magnitude_axis)
    adapter = f64 if dtype == f64 else f32
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {adapter}
    x = torch.randn(64, 48).to(dtype)
    y, base = layer(x), layer.base_layer(x)
    assert y.dtype == dtype
    if magnitude_axis == "out" and dtype in (bf16, torch.float16):
        assert torch.equal(y, base)
    torch.testing.assert_close(y, base)
    torch.testing.assert_close(
        layer.magnitude.detach(), dora_weight_norm(*adapted(layer), magnitude_axis=magnitude_axis)
    )


def adapted(layer):
    return layer.base_layer.weight, layer.lora_A.weight, layer.lora_B.weight


def test_repr():
    layer = DoRALinear(4, 6, rank=2, alpha=3, use_rslora=True, dropout=0.25, magnitude_axis="in", backend="torch")
    assert repr(layer) == (
        "DoRALinear(\n  in_features=4, out_features=6, rank=2, scaling=2.12132, use_rslora=True, backend='torch', "
        "magnitude_axis='in', detach_norm=True\n  (base_layer): Linear(in_features=4, out_features=6, bias=True)\n"
        "  (dropout): Dropout(p=0.25, inplace=False)\n  (lora_A): Linear(in_features=4, out_features=2, bias=False)\n"
        "  (lora_B): Linear(in_features=2, out_features=6, bias=False)\n)"
    )
    assert repr(LoRALinear(4, 6, rank=2)).startswith(
        "LoRALinear(\n  in_features=4, out_features=6, rank=2, scaling=1\n"
    )


@kinds
def test_the_start_of_an_adapter_is_reproducible(kind):
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(kind(9, 7, rank=3).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


OPTIONS = [
    ({"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
    ({"rank": 2.0}, TypeError, "rank: expected an int, got float"),
    ({"rank": True}, TypeError, "rank: expected an int, got bool"),
    ({"rank": 2, "alpha": "8"}, TypeError, "alpha: expected a number, got str"),
    ({"rank": 2, "alpha": True}, TypeError, "alpha: expected a number, got bool"),
    ({"rank": 2, "dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
    ({"rank": 2, "dropout": -0.1}, ValueError, "dropout: expected a probability"),
    ({"rank": 2, "dropout": float("nan")}, ValueError, "dropout: expected a probability"),
    ({"rank": 2, "alpha": float("inf")}, ValueError, "alpha: expected a finite number, got inf"),
    ({"rank": 2, "backend": "cuda"}, ValueError, "backend: expected one of 'auto', .*, got 'cuda'"),
    ({"rank": 2, "magnitude_axis": "rows"}, ValueError, "magnitude_axis: expected 'out' or 'in', got 'rows'"),
    ({"rank": 2, "ranks": 3}, TypeError, "unexpected keyword argument 'ranks'"),
    ({"rank": 2, "adapter_dtype": torch.int8}, TypeError, "adapter_dtype: expected float32, .* got torch.int8"),
    ({"rank": 2, "adapter_dtype": "bf16"}, TypeError, "adapter_dtype: expected float32, .* got 'bf16'"),
]


@pytest.mark.parametrize("options, error, message", OPTIONS, ids=[str(options) for options, _, _ in OPTIONS])
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        DoRALinear(4, 4, **options)
    base = nn.Linear(4, 4)
    with pytest.raises(error, match=message):
        DoRALinear.from_linear(base, **options)
    assert base.weight.requires_grad


@pytest.mark.parametrize("linear", [None, nn.Conv1d(1, 1, 1), type("Quantised", (nn.Linear,), {})(2, 2)])
def test_from_something_else(linear):
    message = r"base: expected exactly a torch\.nn\.Linear, .* got (NoneType|Conv1d|Quantised)"
    with pytest.raises(TypeError, match=message):
        LoRALinear.from_linear(linear=linear, rank=2)


@kinds
def test_a_base_layer_in_the_constructor(kind):
    """A subclass is one of them, square as well; sizes are the base layer's own."""
    torch.manual_seed(0)
    sub = type("Sub", (nn.Linear,), {})
    for base in (sub(6, 6), nn.Linear(7, 9, bias=False)):
        layer = kind(4, 5, rank=2, base_layer=base)
        assert (layer.in_features, layer.out_features) == (base.in_features, base.out_features)
        x = torch.randn(3, base.in_features)
        torch.testing.assert_close(layer(x), base(x))
    for wrong in (nn.Conv1d(4, 5, 1), nn.Embedding(4, 5)):
        with pytest.raises(TypeError, match="base_layer: expected a torch.nn.Linear or GPT-2's Conv1D, got"):
            kind(4, 5, rank=2, base_layer=wrong)
        assert wrong.weight.requires_grad


@kinds
def test_a_parametrized_base_layer(kind):
    """Its class is another then."""
    layer = random_layer(kind, 6, 6)
    x = torch.randn(3, 6)
    before = layer(x)
    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Identity())
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_the_base_layers_is_not_set_here(name):
    layer = random_layer()
    for value in (nn.Parameter(torch.zeros(7)), torch.zeros(7), None):
        with pytest.raises(AttributeError, match=rf"set base_layer\.{name}"):
            setattr(layer, name, value)


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
def test_training(kind, dropout):
    """Towards a layer that an adapter of this rank can be; then merged."""
    torch.manual_seed(0)
    target = random_layer(kind, 12, 10, rank=2)
    layer = kind.from_linear(copy.deepcopy(target.base_layer), rank=4, dropout=dropout)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.03)
    frozen = layer.base_layer.weight.clone()
    losses = []
    for step in range(100):
        x = torch.randn(32, 12, generator=torch.Generator().manual_seed(step))
        loss = (layer(x) - target(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) < (0.3 if dropout else 0.05) * sum(losses[:10])
    assert torch.equal(layer.base_layer.weight, frozen)
    layer.eval()
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_x_of_a_wider_dtype_than_the_base(kind, dropout):
    """The compute dtype is x's."""
    layer = random_layer(kind, dropout=dropout, dtype=bf16)
    assert layer(torch.randn(5, 9)).dtype == f32


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_autocast(kind, dropout):
    layer = random_layer(kind, dropout=dropout)
    x = torch.randn(5, 9)
    with torch.autocast("cpu", bf16):
        y = layer(x)
        wanted = layer.base_layer(x).dtype
    assert y.dtype == wanted == bf16
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters() if p.grad is not None} == {f32}


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_compiled_in_one_graph(dropout, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    layer = random_layer(dropout=dropout)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 9)
    results = []
    for call in (layer, compiled):
        torch.manual_seed(0)
        layer.zero_grad()
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results)
    torch._dynamo.reset()


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = random_layer(dropout=0.1)
        layer(torch.randn(2, 9)).sum().backward()
        layer.eval().merge()
        layer.unmerge()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(3, 5), ValueError, r"x: expected \[..., 8\], got \[3, 5\]"),
        (torch.tensor(1.0), ValueError, r"x: expected \[..., 8\], got \[\]"),
        (torch.ones(3, 8, dtype=torch.long), TypeError, "x: expected float32, .* got torch.int64"),
        ([1.0] * 8, TypeError, "x: expected a torch.Tensor, got list"),
    ],
)
@kinds
def test_bad_x(kind, x, error, message, dropout):
    with warnings.catch_warnings(), pytest.raises(error, match=message):
        warnings.simplefilter("error")
        kind(8, 6, rank=2, dropout=dropout)(x)


@axes
def test_on_meta(magnitude_axis):
    """Shapes alone, as for counting and for loading weights later."""
    layer = DoRALinear(8, 6, rank=2, magnitude_axis=magnitude_axis, device="meta")
    x = torch.randn(3, 8, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape == (3, 6) and x.grad.shape == x.shape and layer.lora_A.weight.grad.is_meta
