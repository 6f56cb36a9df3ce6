"""`dora_kernels.testing`: its oracle is right, and its budgets tell right results from wrong ones."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import f32, f64

from dora_kernels import testing

WAYS = [
    {"magnitude_axis": axis, "detach_norm": detach, "magnitude": magnitude}
    for axis in ("out", "in") for detach in (True, False) for magnitude in (True, False)
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_oracle_is_the_formula_written_out(way):
    problem = testing.make_problem(**way)
    leaves = testing.leaves_of(testing.widened(problem))
    direction = leaves["weight"] + problem.scaling * leaves["lora_B"] @ leaves["lora_A"]
    x, adapted = leaves["x"], direction
    if way["magnitude"]:
        dim = 1 if way["magnitude_axis"] == "out" else 0
        norm = direction.norm(dim=dim, keepdim=True)
        adapted = leaves["magnitude"].unsqueeze(dim) * direction / (norm.detach() if way["detach_norm"] else norm)
        torch.testing.assert_close(testing.true_norm(problem), norm.detach().squeeze(dim))
    y = x @ adapted.T + leaves["bias"]
    wanted = {"y": y.detach(), **testing.gradients(y, leaves, problem.dy.to(f64))}
    found = testing.oracle(problem)
    assert found.keys() == wanted.keys() and (way["magnitude"] == ("magnitude" in found))
    for name, result in found.items():
        assert result.dtype == f64
        torch.testing.assert_close(result, wanted[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(testing.exact_merge(problem), adapted.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtypes", testing.DTYPES)
def test_plain_operations_pass_and_a_fault_does_not(dtypes, way):
    problem = testing.make_problem(dtypes=testing.all_of(dtypes), **way)
    results = testing.solve(testing.eager, problem)
    testing.check(results, problem)
    allowed, wanted = testing.budgets(problem), testing.oracle(problem)
    for name in results:
        off = 1 + 4 * allowed[name] / wanted[name].norm().item()
        with pytest.raises(AssertionError, match=f"^{name} of norm .* is off by"):
            testing.check({**results, name: (wanted[name] * off).to(results[name].dtype)}, problem)
    with pytest.raises(AssertionError, match="y of norm .* is off by nan"):
        testing.check({**results, "y": results["y"] * torch.nan}, problem)
    with pytest.raises(AssertionError, match=r"y is torch\.float64"):
        testing.check({**results, "y": results["y"].double()}, problem)
    with pytest.raises(AssertionError, match="expected"):
        testing.check({"y": results["y"]}, problem)


def test_a_baseline_that_is_not_finite_grants_nothing():
    problem = testing.make_problem()
    plain = testing.solve(testing.eager, problem)
    bad = {name: result * torch.nan for name, result in plain.items()}
    fair = testing.budgets(problem, baseline=plain)
    assert all(0 < granted <= fair[name] for name, granted in testing.budgets(problem, baseline=bad).items())


def test_problems_are_those_of_their_seed_and_dtypes():
    one, same, other = (testing.make_problem(seed=seed) for seed in (1, 1, 2))
    assert testing.same_bits(one.tensors, same.tensors) and not torch.equal(one.x, other.x)
    problem = testing.make_problem((2, 3), 5, 4, 2, testing.all_of("bf16+fp32"), bias=False)
    assert (problem.x.shape, problem.weight.shape, problem.dy.shape) == ((2, 3, 5), (4, 5), (2, 3, 4))
    assert problem.weight.dtype == torch.bfloat16 and problem.lora_A.dtype == f32 and problem.bias is None
    with pytest.raises(ValueError, match="name: expected one of fp32, .*; got 'int8'"):
        testing.all_of("int8")


def test_a_wrong_result_is_beyond_its_limits():
    problem = testing.make_problem()
    wanted = testing.oracle(problem)
    allowed = testing.limits(testing.solve(testing.eager, problem), wanted)
    assert not testing.beyond(testing.errors(testing.solve(testing.eager, problem), wanted), allowed)
    off = {name: value * (1 + 1e-4) for name, value in wanted.items()}
    assert len(testing.beyond(testing.errors(off, wanted), allowed)) == 2 * len(wanted), "each, and its worst row"
    assert testing.beyond({"y": math.nan}, {"y": 1.0}) and not testing.beyond({"y": 1.0}, {})
    assert not testing.limits({"y": torch.tensor([math.inf])}, {"y": torch.ones(1)}), "no baseline, no limit"
    attached = testing.oracle(problem.replace(detach_norm=False))
    assert testing.beyond(testing.errors(attached, wanted), allowed), "the norm's gradient is told from none"


def test_one_wrong_row_of_many_is_beyond_its_limit():
    wanted = {"y": torch.randn(4096, 8, dtype=f64)}
    allowed = testing.limits({"y": wanted["y"] * (1 + 1e-2)}, wanted)
    tail = wanted["y"].clone()
    tail[-1] = 0.0
    (wrong,) = testing.beyond(testing.errors({"y": tail}, wanted), allowed)
    assert wrong.startswith("y, worst row off by")
    layers_of_a_model = {"lora_A": [torch.ones(3), torch.ones(2, 2)]}
    off = {"lora_A": [torch.ones(3), torch.tensor([[1.0, 1.0], [2.0, 1.0]])]}
    assert testing.errors(off, layers_of_a_model) == {
        "lora_A": pytest.approx(0.5), "lora_A, worst row": pytest.approx(0.5**0.5)
    }  # fmt: skip
    off["lora_A"][0] = torch.full((3,), math.nan)
    assert math.isnan(testing.errors(off, layers_of_a_model)["lora_A"])
