"""`merge_dora` against float64: the values, one rounding, and agreement with the unmerged layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import LANES, bf16, error, exact_merge, f16, f32, f64, make_problem, norm_bound, oracle, true_norm, usable

from dora_kernels import merge_dora

DTYPES = [(f32, f32), (bf16, bf16), (f16, f16), (bf16, f32), (f32, bf16), (f64, f64), (f64, f32)]
axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])


@pytest.fixture(scope="module", params=LANES)
def lane(request):
    return usable(request.param)


def name_of(dtypes):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def merged(problem, lane):
    return merge_dora(
        problem.weight, problem.lora_A, problem.lora_B, problem.magnitude,
        scaling=problem.scaling, magnitude_axis=problem.magnitude_axis, backend=lane.backend,
    )  # fmt: skip


@axes
@pytest.mark.parametrize("magnitude", [True, False], ids=["dora", "lora"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=name_of)
def test_values(lane, dtypes, magnitude_axis, magnitude):
    base, adapter = dtypes
    if f64 in dtypes and lane.backend == "triton":
        pytest.skip("the kernels have no float64")
    rows = 150 if lane.interpreted else 1100
    for out_features, in_features, rank in [(40, 70, 5), (rows, 213, 9), (1, 1, 1), (20, 30, 140)]:
        problem = make_problem(
            (1,), in_features, out_features, rank, (f32, base, adapter),
            magnitude_axis=magnitude_axis, magnitude=magnitude,
        )  # fmt: skip
        got, wanted = merged(problem, lane), exact_merge(problem)
        assert got.dtype == base and got.stride() == problem.weight.stride() and not got.requires_grad
        # Half a step of the base dtype for the one rounding, beside the norm's error and the float32 arithmetic.
        rounding = torch.finfo(base).eps / 2 if base in (bf16, f16) else 0.0
        bound = rounding + norm_bound(problem.weight, problem.lora_A, problem.lora_B)
        assert error(got, wanted) <= bound


@axes
@pytest.mark.parametrize("base", [bf16, f16])
def test_one_rounding(lane, base, magnitude_axis):
    """Float32 arithmetic puts one number in about 2**14 on the other side of a tie; a second rounding, one in four."""
    problem = make_problem((1,), 200, 300, 6, (f32, base, f32), magnitude_axis=magnitude_axis, device=lane.device)
    nearest = exact_merge(problem).to(base)
    assert (merged(problem, lane) != nearest).float().mean() < 1e-2
    twice = (exact_merge(problem.replace(magnitude=None)).to(base) * 1.3).to(base)
    once = (exact_merge(problem.replace(magnitude=None)) * 1.3).to(base)
    assert (twice != once).float().mean() > 0.1, "the measure does not see a second rounding"


@axes
def test_the_merged_layer_is_the_unmerged_one(lane, magnitude_axis):
    problem = make_problem((20,), 60, 50, 4, magnitude_axis=magnitude_axis, device=lane.device)
    y = F.linear(problem.x.to(f64), merged(problem, lane).to(f64), problem.bias.to(f64))
    assert error(y, oracle(problem)["y"]) < 2 * norm_bound(problem.weight, problem.lora_A, problem.lora_B)


@axes
def test_a_fresh_adapter_changes_nothing(lane, magnitude_axis):
    problem = make_problem((1,), 60, 50, 4, (f32, bf16, f32), magnitude_axis=magnitude_axis, device=lane.device)
    problem = problem.replace(lora_B=torch.zeros_like(problem.lora_B))
    problem = problem.replace(magnitude=true_norm(problem).to(f32))
    assert torch.equal(merged(problem, lane), problem.weight)


@axes
def test_zero_rows_merge_to_zero(lane, magnitude_axis):
    problem = make_problem((1,), 30, 26, 3, magnitude_axis=magnitude_axis, device=lane.device)
    problem.weight[5] = problem.lora_B[5] = 0
    problem.weight[:, 8] = problem.lora_A[:, 8] = 0
    got = merged(problem, lane)
    assert got.isfinite().all() and not got[5].any() and not got[:, 8].any()


@axes
@pytest.mark.parametrize("layout", [lambda t: t.t().contiguous().t(), lambda t: t.repeat(2, 2)[::2, : t.shape[1]]])
def test_strides(lane, magnitude_axis, layout):
    problem = make_problem((1,), 30, 26, 3, magnitude_axis=magnitude_axis, device=lane.device)
    other = problem.replace(weight=layout(problem.weight))
    assert not other.weight.is_contiguous()
    before = other.weight.clone()
    assert error(merged(other, lane), exact_merge(other)) <= norm_bound(other.weight, other.lora_A, other.lora_B)
    assert torch.equal(other.weight, before)


@axes
def test_autocast_does_not_round_it(lane, magnitude_axis):
    problem = make_problem((1,), 30, 26, 3, magnitude_axis=magnitude_axis, device=lane.device)
    with torch.autocast(lane.device, dtype=bf16):
        inside = merged(problem, lane)
    assert torch.equal(inside, merged(problem, lane))


def test_merging_needs_no_graph(lane):
    problem = make_problem(device=lane.device).map(lambda t: t.requires_grad_())
    assert not merged(problem, lane).requires_grad
