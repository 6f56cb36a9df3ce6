"""`eps`, which is added to the norm: against the formula written out, on every backend, in layers and in merging."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from helpers import NAMES, bf16, check, f32, f64, leaves_of, make_problem, oracle, ours, reference_linear, solve
from torch.utils._python_dispatch import TorchDispatchMode

from dora_kernels import DoRAConv2d, DoRAEmbedding, DoRALinear, dora_linear, dora_weight_norm, merge_dora
from dora_kernels.core.scale import safe_divisor

axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])
detachments = pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])

# Of the norms' size, so that nothing about it can go unseen.
EPS = 0.4


def formula(problem, eps, needs=NAMES):
    """The output and the gradients of ``m / (norm + eps) * V``, by autograd through V."""
    leaves = leaves_of(problem, needs)
    x, weight, lora_A, lora_B, magnitude, bias = leaves.values()
    adapted = weight + problem.scaling * lora_B @ lora_A
    norm = torch.linalg.vector_norm(adapted, dim=1 if problem.magnitude_axis == "out" else 0)
    g = magnitude / ((norm.detach() if problem.detach_norm else norm) + eps)
    y = x @ (adapted * (g.unsqueeze(1) if problem.magnitude_axis == "out" else g)).t() + bias
    wanted = {name: leaves[name] for name in needs}
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), problem.dy)))}


def with_zero(problem):
    """With a row and a column of V that are 0: of zeros, and of what cancels bit for bit."""
    weight, lora_A, lora_B = problem.weight.clone(), problem.lora_A.clone(), problem.lora_B.clone()
    weight[2], lora_B[2] = 0.0, 0.0
    weight[:, 5], lora_A[:, 5] = 0.0, 0.0
    weight[4], lora_A[:, 6:], lora_B[4] = 0.0, 0.0, 0.0
    return problem.replace(weight=weight, lora_A=lora_A, lora_B=lora_B)


@axes
@detachments
@pytest.mark.parametrize("eps", [EPS, 1e-8])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("function", [dora_linear, reference_linear], ids=["ours", "oracle"])
def test_formula(magnitude_axis, detach_norm, eps, zero, function):
    options = {"magnitude_axis": magnitude_axis, "detach_norm": detach_norm}
    problem = make_problem((3, 5), 21, 17, dtypes=(f64, f64, f64), **options)
    problem = with_zero(problem) if zero else problem
    results = solve(function, problem.replace(eps=eps))
    torch.testing.assert_close(results, formula(problem, eps), rtol=1e-11, atol=1e-12 / eps**0.5)
    assert all(t.isfinite().all() for t in results.values())


@axes
@detachments
@pytest.mark.parametrize("dtypes", [(f32,) * 3, (bf16, bf16, f32), (bf16,) * 3], ids=["f32", "mixed", "bf16"])
def test_backends(lane, dtypes, magnitude_axis, detach_norm):
    options = {"magnitude_axis": magnitude_axis, "detach_norm": detach_norm, "device": lane.device}
    problem = make_problem((7,), 51, 45, 3, dtypes, **options).replace(eps=EPS)
    check(ours(problem, lane.backend), problem)
    y = dora_linear(**problem.tensors, **problem.options, backend=lane.backend)
    check({"y": y}, problem, ())  # the way without a graph, which divides in another place


@axes
def test_zero_rows_stay_finite(lane, magnitude_axis):
    """A norm that is 0, and one of the rounding's size: eps is all of the divisor then."""
    problem = with_zero(make_problem(magnitude_axis=magnitude_axis, detach_norm=False, device=lane.device))
    weight = problem.weight.clone()
    weight[2], weight[:, 5] = 1e-12, 1e-12
    for one in (problem, problem.replace(weight=weight)):
        results = ours(one.replace(eps=1e-8), lane.backend)
        assert all(t.isfinite().all() for t in results.values())
    results = ours(problem.replace(eps=EPS), lane.backend)
    check(results, problem.replace(eps=EPS))


@pytest.mark.parametrize("needs", [("lora_A", "lora_B", "magnitude"), ("lora_B",), ("weight",), ("x",)], ids="-".join)
@axes
def test_subsets_of_gradients(magnitude_axis, needs):
    problem = make_problem(magnitude_axis=magnitude_axis, detach_norm=False, dtypes=(f64, f64, f64))
    torch.testing.assert_close(ours(problem.replace(eps=EPS), "torch", needs), formula(problem, EPS, needs))


@axes
def test_a_norm_handed_in(magnitude_axis):
    problem = make_problem(magnitude_axis=magnitude_axis, detach_norm=False, dtypes=(f64, f64, f64)).replace(eps=EPS)
    norm = dora_weight_norm(
        problem.weight, problem.lora_A, problem.lora_B, scaling=problem.scaling, magnitude_axis=magnitude_axis
    )
    torch.testing.assert_close(ours(problem, "torch", weight_norm=norm), ours(problem, "torch"))
    torch.testing.assert_close(oracle(problem, weight_norm=norm), oracle(problem))


@axes
def test_mixed_dtypes_of_x_and_weights(magnitude_axis):
    """Where eps is added in x's wider dtype, what is left of it in the norm is no gradient's scale."""
    problem = with_zero(make_problem(magnitude_axis=magnitude_axis, detach_norm=False, dtypes=(f64, f32, f32)))
    check(ours(problem.replace(eps=EPS), "torch"), problem.replace(eps=EPS))


@axes
@detachments
def test_second_derivatives(magnitude_axis, detach_norm):
    problem = make_problem(
        (3,), 6, 5, 2, (f64, f64, f64), magnitude_axis=magnitude_axis, detach_norm=detach_norm
    ).replace(eps=EPS)
    seconds = []
    for function in (dora_linear, reference_linear):
        leaves = leaves_of(problem)
        y = function(**leaves, **problem.options)
        first = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), list(leaves.values()))
        seconds.append([*first, *second])
    torch.testing.assert_close(*seconds)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def operations(layer, x):
    """Of a call with a kept norm."""
    layer(x)
    with Operations() as seen:
        layer(x)
    return seen.names


LAYERS = {
    "linear": (lambda **o: DoRALinear(21, 17, rank=3, **o), lambda: torch.randn(5, 21)),
    "embedding": (lambda **o: DoRAEmbedding(21, 17, rank=3, **o), lambda: torch.randint(0, 21, (5,))),
    "conv": (lambda **o: DoRAConv2d(4, 6, 3, rank=3, **o), lambda: torch.randn(2, 4, 5, 5)),
    "groups": (lambda **o: DoRAConv2d(4, 6, 3, rank=2, groups=2, **o), lambda: torch.randn(2, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
def test_no_operation_more_while_the_norm_is_kept(kind, grad):
    """The sum is kept beside it, and is never another eps's or an older norm's."""
    make, draw = LAYERS[kind]
    x, layer = draw(), make(eps=EPS)
    without = make()
    with torch.no_grad():
        for factor in (*layer.factors, *without.factors):
            factor.normal_()
    with torch.set_grad_enabled(grad):
        assert operations(layer, x) == operations(without, x)
    for change in (lambda: layer.factors[1].data.add_(0.5), lambda: setattr(layer, "eps", 0.7)):
        before = layer(x)
        change()
        with torch.set_grad_enabled(grad):
            y = layer(x)
        assert not torch.allclose(y, before)
        torch.testing.assert_close(y, copy.deepcopy(layer)(x))


def test_what_a_norm_can_be():
    norm = torch.tensor([0.0, 1.5, torch.nan, 3e38], requires_grad=True)
    torch.testing.assert_close(safe_divisor(norm, EPS), norm + EPS, equal_nan=True)
    without = torch.tensor([torch.inf, 1.5, torch.nan, 3e38])
    torch.testing.assert_close(safe_divisor(norm).detach(), without, equal_nan=True)


@axes
@detachments
@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "dropout"])
def test_layer(magnitude_axis, detach_norm, dropout):
    """Equal to its base at the start, and the formula afterwards; with dropout as the function of what dropout left."""
    torch.manual_seed(0)
    options = {"magnitude_axis": magnitude_axis, "detach_norm": detach_norm}
    layer = DoRALinear(21, 17, rank=3, alpha=2, eps=EPS, dropout=dropout, dtype=f64, **options)
    x = torch.randn(5, 21, dtype=f64)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert "eps=0.4" in repr(layer)
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    problem = make_problem((5,), 21, 17, dtypes=(f64, f64, f64), **options).replace(
        x=x, weight=layer.base_layer.weight, lora_A=layer.lora_A.weight, lora_B=layer.lora_B.weight,
        magnitude=layer.magnitude, bias=layer.base_layer.bias, scaling=layer.scaling,
    )  # fmt: skip
    adapter = ("lora_A", "lora_B", "magnitude")
    for training in (True, False):
        layer.train(training)
        if training and dropout:
            layer.dropout.forward = lambda x: x  # drops nothing, by the way of one that does
        y = layer(x)
        grads = torch.autograd.grad(y, [*layer.factors, layer.magnitude], problem.dy)
        torch.testing.assert_close({"y": y.detach(), **dict(zip(adapter, grads))}, formula(problem, EPS, adapter))
    layer.merge()
    torch.testing.assert_close(layer(x), y)


@axes
@pytest.mark.parametrize("backend", ["auto", "lane"])
def test_merge(lane, magnitude_axis, backend):
    problem = make_problem(magnitude_axis=magnitude_axis, device=lane.device)
    weight, lora_A, lora_B, magnitude = (t.to(f64) for t in list(problem.tensors.values())[1:5])
    adapted = weight + problem.scaling * lora_B @ lora_A
    dim = 1 if magnitude_axis == "out" else 0
    g = magnitude / (torch.linalg.vector_norm(adapted, dim=dim) + EPS)
    merged = merge_dora(
        problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, eps=EPS, scaling=problem.scaling,
        magnitude_axis=magnitude_axis, backend=lane.backend if backend == "lane" else backend,
    )  # fmt: skip
    # Norms to 1e-6 (`norm_bound`), twice, and a few roundings of float32.
    torch.testing.assert_close(merged.to(f64), adapted * g.unsqueeze(dim), rtol=3e-6, atol=3e-6)


def test_any_real_number():
    problem = make_problem((2,), 4, 4, 2)
    tensors = problem.weight, problem.lora_A, problem.lora_B, problem.magnitude
    assert torch.equal(merge_dora(*tensors, eps=Fraction(1, 4)), merge_dora(*tensors, eps=0.25))


def test_compiled_in_one_graph(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    problem = make_problem(detach_norm=False, dtypes=(f64, f64, f64))

    def layer(**leaves):
        return dora_linear(**leaves, **problem.replace(eps=EPS).options, backend="torch")

    leaves = leaves_of(problem)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), problem.dy)
    torch.testing.assert_close({"y": y.detach(), **dict(zip(leaves, grads))}, formula(problem, EPS))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "eps, error, message",
    [
        (-1e-8, ValueError, "eps: expected a finite number of at least 0, got -1e-08"),
        (float("nan"), ValueError, "eps: expected a finite number of at least 0, got nan"),
        ("1e-8", TypeError, "eps: expected a number, got str"),
        (True, TypeError, "eps: expected a number, got bool"),
    ],
)
def test_bad_eps(eps, error, message):
    problem = make_problem((2,), 4, 4, 2)
    for call in (
        lambda: dora_linear(**problem.tensors, eps=eps),
        lambda: merge_dora(problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, eps=eps),
        lambda: DoRALinear(4, 4, rank=2, eps=eps),
    ):
        with pytest.raises(error, match=message):
            call()
