"""``y = g * z`` that keeps y instead of z: its gradients, what it keeps, consumers that write, rows of 0."""

from __future__ import annotations

import pytest
import torch
from helpers import f32, f64, saved_by
from torch.utils.checkpoint import checkpoint

from dora_kernels import dora_linear
from dora_kernels.engine import rescale
from dora_kernels.testing import NAMES, check, make_problem

TOKENS, IN, OUT = 260, 24, 136
"""Large enough to be rescaled in place, and of two blocks with `small_blocks`."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(rescale, "_BLOCK_ELEMENTS", 100 * OUT)


@pytest.fixture
def used(monkeypatch):
    """Counts the calls that keep y."""
    calls, function = [], rescale._Rescale.forward
    monkeypatch.setattr(
        rescale._Rescale, "forward", staticmethod(lambda ctx, z, g: (calls.append(1), function(ctx, z, g))[1])
    )
    return calls


def layer_problem(**options):
    return make_problem((2, TOKENS // 2), IN, OUT, 4, bias=False, **options)


def leaves_of(problem):
    return {n: None if t is None else t.detach().clone().requires_grad_() for n, t in problem.tensors.items()}


def results(problem, consume=lambda y: y, run=lambda layer, leaves: layer(*leaves)):
    leaves = leaves_of(problem)
    y = run(lambda *tensors: consume(dora_linear(*tensors, **problem.options)), leaves.values())
    y.backward(problem.dy)
    return {"y": y.detach(), **{name: t.grad for name, t in leaves.items() if t is not None}}


@pytest.mark.parametrize("detach_norm", [True, False])
def test_gradients(used, detach_norm):
    problem = layer_problem(detach_norm=detach_norm)
    check(results(problem), problem)
    assert used


def test_beside_the_kept_product(monkeypatch):
    """The magnitude's gradient is as exact as from the product itself."""
    problem = layer_problem()
    exact = results(problem.map(lambda t: t.double()))["magnitude"]
    kept = results(problem)["magnitude"].double()
    monkeypatch.setattr(rescale, "_LEAST_ELEMENTS", 1 << 40)
    today = results(problem)["magnitude"].double()
    assert (kept - exact).norm() <= 1.25 * (today - exact).norm()


CONSUMERS = [
    (lambda y: y.mul_(3), lambda y: y * 3),
    (torch.sigmoid_, torch.sigmoid),
    (lambda y: y.transpose(0, 1).add_(1).transpose(0, 1), lambda y: y + 1),
]
RUNS = {
    "plain": lambda layer, leaves: layer(*leaves),
    "reentrant": lambda layer, leaves: checkpoint(layer, *leaves, use_reentrant=True),
    "non-reentrant": lambda layer, leaves: checkpoint(layer, *leaves, use_reentrant=False),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("overwriting", range(len(CONSUMERS)))
def test_consumers_that_write(used, overwriting, run):
    problem = layer_problem()
    one, other = (results(problem, consume, RUNS[run]) for consume in CONSUMERS[overwriting])
    assert used and all(torch.equal(one[name], other[name]) for name in one)


def test_memory_is_the_consumers(used):
    """One activation between the layer and a consumer that keeps its input."""
    problem = layer_problem()
    y, saved = saved_by(lambda: torch.nn.functional.silu(dora_linear(**leaves_of(problem), **problem.options)))
    assert used
    places = [torch._C._data_address(t) for t in saved if t.numel() == y.numel()]
    assert len(places) == 2 and len(set(places)) == 1


@pytest.mark.parametrize("small", [0.0, 1e-30, -1e-30], ids=str)
def test_rows_that_lose_digits(used, small):
    """The product is kept then."""
    problem = layer_problem()
    problem.magnitude[3] = small
    check(results(problem), problem)
    assert not used


def test_negative_magnitudes(used):
    problem = layer_problem()
    problem.magnitude[3:7] *= -1
    check(results(problem), problem)
    assert used


@pytest.mark.parametrize("gone", ["lazy_clone", "bias", "bf16"])
def test_where_it_is_not_used(used, monkeypatch, gone):
    if gone == "lazy_clone":  # a torch without it
        monkeypatch.setattr(rescale, "lazy_clone", None)
    options = {"bias": {"bias": True}, "bf16": {"dtypes": (torch.bfloat16,) * 3}}.get(gone, {"bias": False})
    problem = make_problem((TOKENS,), IN, OUT, 4, **options)
    check(results(problem), problem)
    assert not used


def test_second_derivatives():
    problem = layer_problem(dtypes=(f64,) * 3)

    def second(scale):
        z0, g = problem.dy.view(-1, OUT).clone().requires_grad_(), problem.magnitude.clone().requires_grad_()
        first = torch.autograd.grad(scale(z0 * 2, g).pow(3).sum(), (z0, g), create_graph=True)
        return torch.autograd.grad(sum(each.square().sum() for each in first), (z0, g))

    for mine, theirs in zip(second(rescale.rescale), second(lambda z, g: z * g)):
        torch.testing.assert_close(mine, theirs)


def test_without_gradients():
    """Nothing is kept, and the bits are the same."""
    problem = layer_problem()
    with torch.no_grad():
        y, saved = saved_by(lambda: dora_linear(**problem.tensors, **problem.options))
    assert not saved and torch.equal(y, results(problem)["y"])
    assert y.dtype == f32 and set(NAMES) >= {"x", "magnitude"}
