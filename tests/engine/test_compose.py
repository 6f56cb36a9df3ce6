"""A DoRA layer from another module's base product: `run_compose` and its gradients against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    NAMES,
    bf16,
    check,
    distance,
    divisor_of,
    f16,
    f32,
    f64,
    gradients,
    leaves_of,
    make_problem,
    oracle,
    same_bits,
    saved_by,
    solve,
)

from dora_kernels.core.problem import Weights
from dora_kernels.engine import dispatch
from dora_kernels.engine.dispatch import UnsupportedError
from dora_kernels.engine.layer import run_compose

DTYPES = [(f32, f32, f32), (bf16, bf16, bf16), (bf16, bf16, f32), (f16, f16, f32), (f64, f64, f64)]


def composed(x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm, backend="auto", eps=0.0):
    """`dora_linear` whose base product is PyTorch's own, with the history that autograd gives it."""
    result = F.linear(x, weight, bias)
    h = F.linear(x, lora_A.to(x.dtype))

    weights = Weights(weight, lora_A, lora_B, magnitude, bias)
    return run_compose(result, h, weights, scaling, lambda: divisor_of(*weights[:3], scaling, backend), backend)


@pytest.mark.parametrize("dtypes", DTYPES, ids=["f32", "bf16", "bf16-f32", "f16-f32", "f64"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_against_the_oracle(lane, dtypes, bias):
    if lane.backend == "triton" and f64 in dtypes:
        pytest.skip("the kernels have no float64")
    for lead, rank in (((37,), 3), ((2, 3, 5), 33)):
        problem = make_problem(lead, 51, 45, rank, dtypes, bias=bias, device=lane.device)
        if bias:  # which the base result holds, rounded with it
            problem = problem.replace(bias=problem.bias / 30)
        needs = [name for name in NAMES if bias or name != "bias"]
        check(solve(composed, problem, needs, backend=lane.backend), problem, needs)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=["f32", "bf16"])
def test_a_large_bias_as_exact_as_peft(lane, dtype):
    """PEFT subtracts the bias from the rounded base result too."""

    def peft(x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm, eps):
        result = F.linear(x, weight, bias)
        norm = (weight.double() + scaling * lora_B.double() @ lora_A.double()).norm(dim=1).float().detach()
        g = magnitude / norm
        return (result + (g - 1) * (result - bias) + g * scaling * F.linear(F.linear(x, lora_A), lora_B)).to(x.dtype)

    problem = make_problem((64,), 51, 45, 3, (dtype, dtype, dtype), device=lane.device)
    problem = problem.replace(bias=20 * problem.bias)
    wanted = oracle(problem)
    ours, theirs = solve(composed, problem, backend=lane.backend), solve(peft, problem)
    for name in wanted:
        assert distance(ours[name], wanted[name]) <= 2 * distance(theirs[name], wanted[name]), name


@pytest.mark.parametrize("dtype", [bf16, f16], ids=["bf16", "f16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_float32_factors_are_added_before_rounding(lane, dtype, bias):
    """In the kernels: y is the nearest to the sum of the 16-bit base product and the rest."""
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    generator = torch.Generator(lane.device).manual_seed(0)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, device=lane.device)

    tokens, features, rank = 37, 300, 5
    base, h = normal(tokens, features).to(dtype), normal(tokens, rank).to(dtype)
    b, g, offset = normal(features, rank), 0.5 + normal(features).abs(), normal(features).to(dtype) if bias else None

    def exact(b):
        y = g.double() * (base.double() + 0.7 * h.double() @ b.double().t())
        return y if offset is None else y + offset.double()

    wanted = exact(b)
    nearest = exact(b.to(dtype)).to(dtype)  # B is rounded for the tensor cores, as autocast does
    for keep in (True, False):
        given = base.clone()
        y = dispatch.kernels().compose(given, h, b, g, offset, 0.7, keep)
        # The nearest, but for what float32 leaves open between two.
        assert distance(y, wanted) <= 1.02 * distance(nearest, wanted)
        if keep:
            assert torch.equal(given, base)


@pytest.mark.parametrize("absent", NAMES)
def test_only_the_gradients_asked_for(lane, absent):
    problem = make_problem(device=lane.device)
    problem = problem.replace(bias=problem.bias / 30)
    needs = [name for name in NAMES if name != absent]
    check(solve(composed, problem, needs, backend=lane.backend), problem, needs)


def test_a_bias_of_a_wider_dtype():
    """The output has the base result's dtype, whatever the bias is kept in."""

    def run(x, weight, lora_A, lora_B, magnitude, bias, scaling, backend, **_):
        result = F.linear(x, weight, bias.to(x.dtype))
        weights = Weights(weight, lora_A, lora_B, magnitude, bias)
        divisor = divisor_of(*weights[:3], scaling)
        return run_compose(result, F.linear(x, lora_A), weights, scaling, lambda: divisor, backend)

    problem = make_problem()
    problem = problem.replace(bias=problem.bias.double())
    solved = solve(run, problem, backend="torch")
    assert solved["y"].dtype == f32
    check(solved, problem)


def test_the_base_result_stays_as_it_is(lane):
    problem = make_problem(device=lane.device)
    for leaves in (leaves_of(problem), leaves_of(problem, ())):
        result = F.linear(leaves["x"], leaves["weight"], leaves["bias"])
        before = result.detach().clone()
        run_compose(
            result, F.linear(leaves["x"], leaves["lora_A"]), Weights(*list(leaves.values())[1:]), problem.scaling,
            lambda: torch.ones(45, device=lane.device), lane.backend,
        )  # fmt: skip
        assert torch.equal(result, before)


def test_a_consumer_that_overwrites_the_output(lane):
    problem = make_problem(device=lane.device)

    def overwritten(**tensors):
        return composed(**tensors).mul_(2)

    doubled = solve(overwritten, problem, backend=lane.backend)
    plain = solve(composed, problem.replace(dy=2 * problem.dy), backend=lane.backend)
    doubled.pop("y"), plain.pop("y")
    assert same_bits(doubled, plain)


def test_what_is_saved(lane):
    """The base result, or the sum in its place, h, g and the norm."""
    problem = make_problem((66,), device=lane.device)
    leaves = leaves_of(problem)
    result, h = (torch.randn(66, width, device=lane.device, requires_grad=True) for width in (45, 3))
    norm = torch.ones(45, device=lane.device)
    weights = Weights(*list(leaves.values())[1:])
    _, saved = saved_by(lambda: run_compose(result, h, weights, 0.7, lambda: norm, lane.backend))
    own = {t.untyped_storage().data_ptr() for t in leaves.values()}
    storages = {t.untyped_storage().data_ptr(): tuple(t.shape) for t in saved}
    assert sorted(shape for at, shape in storages.items() if at not in own) == [(45,), (45,), (66, 3), (66, 45)]


@pytest.mark.parametrize("rows", [0, 1])
def test_few_tokens_and_a_dead_row(lane, rows):
    problem = make_problem((rows,), device=lane.device)
    dead = torch.arange(45, device=lane.device) == 7
    problem = problem.replace(
        weight=problem.weight.masked_fill(dead[:, None], 0.0), lora_B=problem.lora_B.masked_fill(dead[:, None], 0.0)
    )
    results = solve(composed, problem, backend=lane.backend)
    assert all(t.isfinite().all() for t in results.values())
    assert torch.equal(results["y"][:, dead], problem.bias[dead].expand(rows, 1))
    if rows:
        check(results, problem)


def test_second_derivatives(lane, monkeypatch):
    """The kernels asked for by name have none; where they ran by themselves, as for a large embedding on a GPU, the
    formula's, and an error rather than half of one where the base result has a gradient.
    """
    problem = make_problem(device=lane.device, dtypes=(f32, f32, f32))
    leaves = leaves_of(problem, ("lora_A", "lora_B", "magnitude"))

    def second(function, **extra):
        tensors = {n: t.detach().requires_grad_(t.requires_grad) for n, t in leaves.items()}
        first = gradients(function(**tensors, **problem.options, **extra), tensors, problem.dy, create_graph=True)
        total = sum(grad.square().sum() for grad in first.values())
        return torch.autograd.grad(total, [tensors[n] for n in first])

    def dense(x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm, eps):
        norm = (weight + scaling * lora_B @ lora_A).norm(dim=1).detach()
        return F.linear(x, (magnitude / norm)[:, None] * (weight + scaling * lora_B @ lora_A), bias)

    def agree():
        for one, other in zip(second(composed), second(dense), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())

    agree()
    if lane.backend == "triton":
        named = "backend='triton' has no second derivative.*create_graph=True"
        with pytest.raises(UnsupportedError, match=named):
            second(composed, backend=lane.backend)
        monkeypatch.setattr("dora_kernels.engine.layer.resolve", lambda *_: "triton")
        agree()
        leaves["x"] = leaves["x"].requires_grad_()
        with pytest.raises(UnsupportedError, match="another module computes"):
            second(composed)
    else:
        leaves["x"] = leaves["x"].requires_grad_()
        agree()


def test_compiled(lane):
    if lane.backend == "triton":
        pytest.skip("the compiler takes the plain operations")
    problem = make_problem(device=lane.device)
    check(solve(torch.compile(composed, backend="aot_eager", fullgraph=True), problem, backend="auto"), problem)


def test_autocast(lane):
    """The output keeps the base result's dtype (peft issue 1692), the adapter's gradients theirs."""
    problem = make_problem(dtypes=(f32, f32, f32), device=lane.device).map(lambda t: t.to(bf16).to(f32))

    def under_autocast(**tensors):
        with torch.autocast(lane.device, bf16):
            return composed(**tensors)

    check(solve(under_autocast, problem, [n for n in NAMES if n != "bias"], backend=lane.backend),
          problem, [n for n in NAMES if n != "bias"], bf16)  # fmt: skip
