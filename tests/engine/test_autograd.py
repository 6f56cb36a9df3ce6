"""`dora_linear` in autograd: who gets a gradient, what is saved, consumers, checkpoints, higher derivatives."""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import pytest
import torch
from helpers import (
    NAMES,
    bf16,
    check,
    f32,
    f64,
    gradients,
    leaves_of,
    make_problem,
    ours,
    reference_linear,
    same_bits,
    saved_by,
)
from torch.utils.checkpoint import checkpoint

from dora_kernels import DoRALinear, dora_linear
from dora_kernels.engine import fused
from dora_kernels.engine.dispatch import UnsupportedError

axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])
detachments = pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])


@axes
@detachments
def test_every_subset_of_gradients(lane, magnitude_axis, detach_norm, monkeypatch):
    """Nobody unasked gets a gradient, none is computed in vain, and the others are right without it."""
    computed = []
    real = fused.backward

    def spy(*args):
        computed.append(real(*args))
        return computed[-1]

    monkeypatch.setattr(fused, "backward", spy)
    problem = make_problem(
        (6,), 20, 18, 3, magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    for size in (0, 1, 5, 6) if lane.interpreted else range(7):
        for needs in itertools.combinations(NAMES, size):
            leaves = leaves_of(problem, needs)
            y = dora_linear(**leaves, **problem.options, backend=lane.backend)
            assert y.requires_grad == bool(needs)
            if needs:
                y.backward(problem.dy)
            if needs and lane.backend == "triton":  # PyTorch's own autograd decides for the formula
                unasked = {n for n, grad in computed.pop()._asdict().items() if grad is not None} - set(needs)
                assert not unasked, f"computed for nobody: {unasked}"
            assert {name for name in NAMES if leaves[name].grad is not None} == set(needs)
            if size != 3:
                check({"y": y.detach(), **{name: leaves[name].grad for name in needs}}, problem, needs)


@pytest.mark.parametrize(
    ("magnitude_axis", "detach_norm", "needs", "kept"),
    [
        ("out", True, NAMES, True),
        ("out", True, {"magnitude"}, True),
        ("out", True, set(NAMES) - {"magnitude"}, False),  # a frozen magnitude
        ("out", False, {"x", "bias"}, False),
        ("out", False, {"lora_A"}, True),  # dm is a factor of the gradient through the norm
        ("in", True, NAMES, False),  # dm comes from x and dx
        ("in", False, NAMES, False),
    ],
)
def test_the_base_product_is_kept_only_where_it_is_read(lane, magnitude_axis, detach_norm, needs, kept):
    problem = make_problem(
        (11,), 23, 37, 4, magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    leaves = leaves_of(problem, needs)
    y, saved = saved_by(lambda: dora_linear(**leaves, **problem.options, backend=lane.backend))
    outputs = [t for t in saved if t.shape == y.shape]
    assert len(outputs) == kept
    assert all(t.untyped_storage().data_ptr() != y.untyped_storage().data_ptr() for t in outputs)
    if lane.backend == "triton":  # the formula keeps the scaled x along "in"
        assert not any(t.shape == problem.x.shape and t.data_ptr() != problem.x.data_ptr() for t in saved)


def test_nothing_is_saved_without_grad(lane):
    problem = make_problem(device=lane.device)
    _, saved = saved_by(lambda: ours(problem, lane.backend, ()))
    assert not saved
    with torch.no_grad():
        y = dora_linear(**leaves_of(problem), **problem.options, backend=lane.backend)
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(dora_linear(**problem.tensors, **problem.options, backend=lane.backend), y)


# In place, and the same out of place.
CONSUMERS = [
    (lambda y: y.mul_(3), lambda y: y * 3),
    (lambda y: y.add_(1).mul_(y.detach().clone()), lambda y: (y + 1) * (y.detach() + 1)),
    (torch.relu_, torch.relu),
    (torch.sigmoid_, torch.sigmoid),
    (lambda y: y.masked_fill_(y < 0, 0), lambda y: y.masked_fill(y < 0, 0)),
]


@pytest.mark.parametrize("overwriting", range(len(CONSUMERS)), ids=["mul", "add", "relu", "sigmoid", "masked_fill"])
@pytest.mark.parametrize("recompute", ["plain", "reentrant", "non-reentrant"])
@axes
def test_consumers_that_overwrite_the_output(lane, overwriting, recompute, magnitude_axis):
    if lane.interpreted and recompute != "plain" and overwriting > 0:
        pytest.skip("once is enough in the slow interpreter")
    problem = make_problem((9,), 21, 34, 4, magnitude_axis=magnitude_axis, device=lane.device)
    results = []
    for consume in CONSUMERS[overwriting]:
        leaves = leaves_of(problem)

        def layer(*tensors, consume=consume):
            return consume(dora_linear(*tensors, **problem.options, backend=lane.backend))

        if recompute == "plain":
            y = layer(*leaves.values())
        else:
            y = checkpoint(layer, *leaves.values(), use_reentrant=recompute == "reentrant")
        # The checkpoint that re-enters autograd wants .backward().
        y.backward(problem.dy)
        results.append({"y": y.detach(), **{name: t.grad for name, t in leaves.items()}})
    assert same_bits(*results)


@pytest.mark.parametrize("use_reentrant", [True, False])
@axes
@detachments
def test_checkpointing(lane, use_reentrant, magnitude_axis, detach_norm):
    problem = make_problem(
        (2, 7), 21, 34, 4, (bf16, bf16, f32), magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    leaves = leaves_of(problem)

    def layer(*tensors):
        return dora_linear(*tensors, **problem.options, backend=lane.backend)

    y = checkpoint(layer, *leaves.values(), use_reentrant=use_reentrant)
    y.backward(problem.dy)
    results = {"y": y.detach(), **{name: t.grad for name, t in leaves.items()}}
    wanted = ours(problem, lane.backend)
    check(results, problem)
    if use_reentrant:
        # Its first forward runs under no_grad, where no base product is kept and the output is rounded elsewhere.
        del results["y"], wanted["y"]
    assert same_bits(results, wanted)


@axes
@detachments
def test_a_graph_may_be_walked_twice(lane, magnitude_axis, detach_norm):
    problem = make_problem(
        (9,), 21, 34, 4, magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    leaves = leaves_of(problem)
    y = dora_linear(**leaves, **problem.options, backend=lane.backend)
    before = y.detach().clone()
    dy = problem.dy.clone()
    first = gradients(y, leaves, dy, retain_graph=True)
    second = gradients(y, leaves, dy, retain_graph=True)
    assert same_bits(first, second)
    assert torch.equal(y, before) and torch.equal(dy, problem.dy)
    assert all(torch.equal(leaves[name], t) for name, t in problem.tensors.items())
    check({"y": before, **second}, problem)


def test_a_tensor_used_twice_gets_both_gradients(lane):
    problem = make_problem((6,), 20, 20, 3, device=lane.device)
    leaves = leaves_of(problem)
    parameters = {name: t for name, t in leaves.items() if name != "x"}

    def layer(x):
        return dora_linear(x, **parameters, **problem.options, backend=lane.backend)

    middle = layer(leaves["x"])
    y = layer(middle)
    total = gradients(y, leaves, problem.dy, retain_graph=True)
    (d_middle,) = torch.autograd.grad(y, middle, problem.dy)
    one = ours(problem.replace(dy=d_middle), lane.backend)
    two = ours(problem.replace(x=middle.detach()), lane.backend)
    for name in parameters:
        torch.testing.assert_close(total[name], one[name] + two[name])


# Higher derivatives are the formula's; the kernels asked for by name say that they have none.


def small(**changes):
    return make_problem((3,), 5, 4, 2, (f64, f64, f64), **changes)


@axes
@detachments
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(magnitude_axis, detach_norm, bias):
    """Finite differences see the norm move: with a detached one, it is the layer with its norm given that agrees."""
    problem = small(magnitude_axis=magnitude_axis, detach_norm=detach_norm, bias=bias)
    norm = None
    if detach_norm:
        norm = problem.magnitude * 1.3

    def layer(*tensors):
        return dora_linear(*tensors, **problem.options, weight_norm=norm, backend="torch")

    assert torch.autograd.gradcheck(layer, tuple(leaves_of(problem).values()))


@axes
@detachments
def test_gradgradcheck(magnitude_axis, detach_norm):
    problem = small(magnitude_axis=magnitude_axis, detach_norm=detach_norm)
    norm = problem.magnitude * 1.3 if detach_norm else None

    def layer(*tensors):
        return dora_linear(*tensors, **problem.options, weight_norm=norm)

    assert torch.autograd.gradgradcheck(layer, tuple(leaves_of(problem).values()))


@axes
@detachments
def test_second_derivatives_are_the_oracles(magnitude_axis, detach_norm):
    problem = small(magnitude_axis=magnitude_axis, detach_norm=detach_norm)
    penalties = []
    for function in (dora_linear, reference_linear):
        leaves = leaves_of(problem)
        y = function(**leaves, **problem.options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # of ours
            first = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        penalties.append(torch.autograd.grad(penalty, list(leaves.values())))
    for got, wanted in zip(*penalties, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_kernels_have_no_second_derivative(lane):
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    problem = make_problem(device=lane.device)
    leaves = leaves_of(problem)
    y = dora_linear(**leaves, **problem.options, backend=lane.backend)
    with pytest.raises(UnsupportedError, match=f"backend='{lane.backend}' has no second derivative.*create_graph=True"):
        torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)


def functional_calls(function, **options):
    problem = small(**options)

    def loss(x, lora_A):
        tensors = {**problem.tensors, "x": x, "lora_A": lora_A}
        return function(**tensors, **problem.options).square().sum()

    x, lora_A = problem.x, problem.lora_A
    return {
        "grad": lambda: torch.func.grad(loss, argnums=1)(x, lora_A),
        "vmap": lambda: torch.func.vmap(loss, in_dims=(0, None))(x, lora_A),
        "per-sample": lambda: torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None))(x, lora_A),
        "jvp": lambda: torch.func.jvp(loss, (x, lora_A), (x, lora_A))[1],
        "jacrev": lambda: torch.func.jacrev(loss, argnums=(0, 1))(x, lora_A),
        "hessian": lambda: torch.func.hessian(loss, argnums=1)(x, lora_A),
    }


@axes
@detachments
@pytest.mark.parametrize("transform", ["grad", "vmap", "per-sample", "jvp", "jacrev", "hessian"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_function_transforms(transform, backend, magnitude_axis, detach_norm):
    options = {"magnitude_axis": magnitude_axis, "detach_norm": detach_norm}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = functional_calls(partial(dora_linear, backend=backend), **options)[transform]()
    torch.testing.assert_close(got, functional_calls(reference_linear, **options)[transform]())


def test_the_kernels_have_no_function_transforms(lane):
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    with pytest.raises(UnsupportedError, match="backend='triton'.*torch.func"):
        problem = make_problem(device=lane.device)
        torch.func.vmap(lambda x: dora_linear(**{**problem.tensors, "x": x}, backend="triton"))(problem.x)


@axes
@detachments
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name, magnitude_axis, detach_norm):
    problem = small(magnitude_axis=magnitude_axis, detach_norm=detach_norm)
    tangents = []
    for function in (dora_linear, reference_linear):
        with torch.autograd.forward_ad.dual_level():
            tensor = problem.tensors[name]
            dual = torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor))
            y = function(**{**problem.tensors, name: dual}, **problem.options)
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)


class Wrapped(torch.Tensor):
    """A subclass that a hand-written backward cannot know."""


@axes
@detachments
@pytest.mark.parametrize("name", NAMES)
def test_tensor_subclasses(name, magnitude_axis, detach_norm):
    for dtypes in ((f32, f32, f32), (bf16, bf16, f32)):
        problem = make_problem(dtypes=dtypes, magnitude_axis=magnitude_axis, detach_norm=detach_norm)
        leaves = leaves_of(problem)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            y = dora_linear(**{**leaves, name: leaves[name].as_subclass(Wrapped)}, **problem.options)
        assert type(y) is Wrapped
        plain = y.as_subclass(torch.Tensor)
        check({"y": plain.detach(), **gradients(plain, leaves, problem.dy)}, problem)


def test_the_kernels_take_no_tensor_subclasses(lane):
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    problem = make_problem(device=lane.device)
    x = problem.x.as_subclass(Wrapped)
    with pytest.raises(UnsupportedError, match="backend='triton'.*tensors of type Wrapped"):
        dora_linear(**{**problem.tensors, "x": x}, **problem.options, backend="triton")


def test_parameters_are_plain_tensors(lane):
    problem = make_problem(device=lane.device)
    parameters = {name: torch.nn.Parameter(t.clone()) for name, t in problem.tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        y = dora_linear(**parameters, **problem.options, backend=lane.backend)
    assert torch.equal(y, ours(problem, lane.backend)["y"])


@pytest.mark.parametrize("recording", [False, True])
def test_a_traced_layer_trains(recording):
    """Traced without a graph or with one: the trace is of plain operations, which have gradients."""
    torch.manual_seed(0)
    layer = DoRALinear(24, 17, rank=3, alpha=6)
    torch.nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 24)
    with torch.set_grad_enabled(recording):
        traced = torch.jit.trace(layer, (x,), check_trace=False)
    x = torch.randn(7, 24, requires_grad=True)
    wanted, solved = (torch.autograd.grad(f(x).square().sum(), [x, layer.lora_B.weight]) for f in (layer, traced))
    torch.testing.assert_close(solved, wanted)
