"""`dora_linear` and each of its gradients against the float64 oracle: numbers, dtypes, layouts, special values."""

from __future__ import annotations

import pytest
import torch
from helpers import NAMES, bf16, check, error, f16, f32, f64, leaves_of, make_problem, oracle, ours, same_bits
from hypothesis import given
from hypothesis import strategies as st

from dora_kernels import dora_linear, dora_weight_norm
from dora_kernels.engine import dispatch
from dora_kernels.engine.dispatch import UnsupportedError

# (x, base layer, adapter). The third is PEFT's default: float32 adapters on a bfloat16 base.
DTYPES = [
    (f32, f32, f32),
    (bf16, bf16, bf16),
    (bf16, bf16, f32),
    (f32, bf16, f32),
    (bf16, f32, f32),
    (f32, f32, bf16),
    (f16, f16, f16),
    (f16, f16, f32),
    (f64, f64, f64),
    (f64, f32, f32),
    (f32, f64, f32),
]  # fmt: skip

# Leading shape, in_features, out_features, rank, bias: no multiple of a tile anywhere, each rank once.
SIZES = [
    ((37,), 51, 45, 1, True),
    ((5, 3), 33, 70, 3, False),
    ((1,), 17, 130, 16, True),
    ((19,), 130, 19, 33, False),
    ((2, 2, 5), 40, 40, 64, True),
    ((67,), 70, 33, 130, True),
]

axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])
detachments = pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])


def name_of(dtypes):
    short = {f32: "f32", f64: "f64", bf16: "bf16", f16: "f16"}
    return "-".join(short[dtype] for dtype in dtypes)


@axes
@detachments
@pytest.mark.parametrize("dtypes", DTYPES, ids=name_of)
def test_against_the_oracle(lane, dtypes, magnitude_axis, detach_norm):
    # The interpreter is slow: a share of the sizes there, each with another axis and kind of gradient.
    sizes = SIZES[2 * (magnitude_axis == "in") + (not detach_norm) :: 4] if lane.interpreted else SIZES
    for lead, in_features, out_features, rank, bias in sizes:
        problem = make_problem(
            lead, in_features, out_features, rank, dtypes,
            magnitude_axis=magnitude_axis, detach_norm=detach_norm, bias=bias, device=lane.device,
        )  # fmt: skip
        if lane.backend == "triton" and f64 in dtypes:
            with pytest.raises(UnsupportedError, match="float64"):
                ours(problem, lane.backend)
        else:
            check(ours(problem, lane.backend), problem)


@pytest.mark.parametrize("full_grid", [1, 10])
@axes
def test_kernels_that_loop_over_many_tiles(lane, full_grid, magnitude_axis, monkeypatch):
    """Problems as small as these fill no GPU, so each program would have a single tile: say that few fill it."""
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    monkeypatch.setattr("dora_kernels.kernels.config._FULL_GRID", full_grid)
    problem = make_problem((140,), 330, 150, 20, magnitude_axis=magnitude_axis, device=lane.device)
    check(ours(problem, lane.backend), problem)


@pytest.mark.parametrize("dtypes", DTYPES[:4], ids=name_of)
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_magnitude_it_is_lora(lane, dtypes, bias):
    problem = make_problem((9,), 35, 50, 5, dtypes, magnitude=False, bias=bias, device=lane.device)
    check(ours(problem, lane.backend), problem)
    x, weight, scaling = problem.x.to(f64), problem.weight.to(f64), problem.scaling
    lora = x @ (weight + scaling * problem.lora_B.to(f64) @ problem.lora_A.to(f64)).t()
    expected = lora + problem.bias.to(f64) if bias else lora
    assert error(oracle(problem)["y"], expected) < 1e-14


def problems():
    return st.fixed_dictionaries(
        {
            "lead": st.lists(st.integers(0, 5), max_size=3).map(tuple),
            "in_features": st.integers(1, 40),
            "out_features": st.integers(1, 40),
            "rank": st.integers(1, 20),
            "dtypes": st.sampled_from(DTYPES[:8]),
            "magnitude_axis": st.sampled_from(["out", "in"]),
            "detach_norm": st.booleans(),
            "bias": st.booleans(),
            "magnitude": st.sampled_from([True, True, True, False]),
            "scaling": st.sampled_from([0.0, 1.0, -0.5, 2, 16.0]),
            "seed": st.integers(0, 3),
        }
    )


@pytest.mark.slow
@given(arguments=problems(), needs=st.sets(st.sampled_from(NAMES)))
def test_any_problem(lane, arguments, needs):
    problem = make_problem(**arguments, device=lane.device)
    needs = {name for name in needs if problem.tensors[name] is not None}
    check(ours(problem, lane.backend, needs), problem, needs)


@axes
@pytest.mark.parametrize("lead", [(), (1,), (4, 3), (2, 3, 2), (0,), (3, 0), (0, 2, 2)], ids=str)
def test_leading_dimensions(lane, lead, magnitude_axis):
    problem = make_problem(lead, 21, 18, 4, magnitude_axis=magnitude_axis, device=lane.device)
    results = ours(problem, lane.backend)
    assert results["y"].shape == (*lead, 18)
    check(results, problem)
    if 0 in lead:
        for name in NAMES:
            assert torch.equal(results[name], torch.zeros_like(problem.tensors[name])), f"{name} is not zeros"


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def strided(t):
    """Every second element of every dimension of something larger."""
    wide = t.new_full([2 * size for size in t.shape], torch.nan)
    view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def sliced(t):
    """The middle columns of something wider: rows further apart than they are long."""
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 6), torch.nan)
    wide[..., 3:-3] = t
    return wide[..., 3:-3]


def expanded(t):
    return t[:1].expand_as(t)


LAYOUTS = [("x", layout) for layout in (transposed, strided, sliced, expanded)]
LAYOUTS += [("dy", layout) for layout in (transposed, strided, sliced, expanded)]
LAYOUTS += [(name, layout) for name in ("weight", "lora_A", "lora_B") for layout in (transposed, strided, sliced)]
LAYOUTS += [("magnitude", strided), ("bias", strided), ("magnitude", expanded), ("bias", expanded)]


@axes
@detachments
@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=[f"{name}-{layout.__name__}" for name, layout in LAYOUTS])
@pytest.mark.parametrize("lead", [(14,), (3, 5)], ids=str)
def test_strides(lane, lead, name, layout, magnitude_axis, detach_norm):
    if lane.interpreted and len(lead) == 2 and name not in ("x", "dy"):
        pytest.skip("the leading shape changes nothing for a parameter: once is enough in the slow interpreter")
    problem = make_problem(
        lead, 21, 34, 4, magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    tensor = layout(getattr(problem, name))
    assert not tensor.is_contiguous()
    problem = problem.replace(**{name: tensor})
    leaves = leaves_of(problem)
    y = dora_linear(**leaves, **problem.options, backend=lane.backend)
    y.backward(problem.dy)
    check({"y": y.detach(), **{one: t.grad for one, t in leaves.items()}}, problem)
    for parameter in ("weight", "lora_A", "lora_B", "magnitude", "bias"):
        # A parameter of gaps or overlaps has a dense gradient, in the order that torch.empty_like gives it.
        expected = torch.empty_like(problem.tensors[parameter]).stride()
        assert leaves[parameter].grad.stride() == expected, f"the gradient of {parameter} has other strides"


@pytest.mark.parametrize(
    "consume",
    [
        lambda y: y.sum(),
        lambda y: (y.transpose(0, 1) * torch.arange(1.0, 1 + y.shape[0], device=y.device)).sum(),
        lambda y: y[::2, 1::3].square().sum(),
        lambda y: y.mean(0).norm(),
        lambda y: y.unsqueeze(0).expand(3, -1, -1).sum(),
    ],
    ids=["sum", "transposed", "sliced", "mean", "expanded"],
)
@axes
def test_upstream_gradients_as_autograd_makes_them(lane, consume, magnitude_axis):
    problem = make_problem((12,), 21, 34, 4, magnitude_axis=magnitude_axis, device=lane.device)
    leaves = leaves_of(problem)
    y = dora_linear(**leaves, **problem.options, backend=lane.backend)
    grads = torch.autograd.grad(consume(y), list(leaves.values()))
    alone = y.detach().requires_grad_()
    (dy,) = torch.autograd.grad(consume(alone), alone)
    check({"y": y.detach(), **dict(zip(leaves, grads, strict=True))}, problem.replace(dy=dy))


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=name_of)
@axes
@detachments
def test_zero_rows_and_columns(lane, dtypes, magnitude_axis, detach_norm):
    problem = make_problem(
        (11,), 30, 26, 4, dtypes, magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    for t in (problem.weight, problem.lora_B):
        t[3] = 0
        t[25] = 0
    for t in (problem.weight, problem.lora_A):
        t[:, 0] = 0
        t[:, 17] = 0
    results = ours(problem, lane.backend)
    assert not any(result.isnan().any() for result in results.values())
    bias = problem.bias.to(results["y"].dtype)
    assert torch.equal(results["y"][:, [3, 25]], bias[[3, 25]].expand(11, 2))
    if magnitude_axis == "out":
        assert not results["magnitude"][[3, 25]].any() and not results["lora_B"][[3, 25]].any()
    else:
        assert not results["magnitude"][[0, 17]].any() and not results["lora_A"][:, [0, 17]].any()
        assert not results["x"][:, [0, 17]].any()
    check(results, problem)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1]], ids=name_of)
@axes
@detachments
def test_nan_stays_where_it_belongs(lane, dtypes, magnitude_axis, detach_norm):
    clean = make_problem(
        (21,), 30, 35, 4, dtypes, magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    x, dy = clean.x.clone(), clean.dy.clone()
    x[5, 2] = torch.nan
    dy[9, 4] = torch.nan
    others = [t for t in range(21) if t not in (5, 9)]
    for dirty in (clean.replace(x=x), clean.replace(dy=dy)):
        results, wanted = ours(dirty, lane.backend), oracle(dirty)
        for name, result in results.items():
            assert torch.equal(result.isnan(), wanted[name].isnan()), f"{name} has NaN elsewhere than the oracle"
        untouched = ours(clean, lane.backend)
        assert torch.equal(results["y"][others], untouched["y"][others])
        assert torch.equal(results["x"][others], untouched["x"][others])


@axes
def test_large_norms_do_not_overflow_the_full_gradient(lane, magnitude_axis):
    # With n = 1e13 the textbook form, dm * m / n³, divides by 1e39.
    problem = make_problem((9,), 24, 20, 3, magnitude_axis=magnitude_axis, detach_norm=False, device=lane.device)
    big = {name: getattr(problem, name) * 1e13 for name in ("weight", "lora_B", "magnitude")}
    problem = problem.replace(**big)
    check(ours(problem, lane.backend), problem)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=name_of)
@axes
@detachments
def test_a_norm_handed_in(lane, dtypes, magnitude_axis, detach_norm):
    problem = make_problem(
        (8,), 30, 26, 4, dtypes, magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    norm = dora_weight_norm(
        problem.weight, problem.lora_A, problem.lora_B,
        scaling=problem.scaling, magnitude_axis=magnitude_axis, backend=lane.backend,
    )  # fmt: skip
    assert same_bits(ours(problem, lane.backend, weight_norm=norm), ours(problem, lane.backend))
    # Its value is what is used: twice the norm is half the output.
    halved = ours(problem.replace(bias=None), lane.backend, weight_norm=2 * norm)["y"]
    assert error(2 * halved, ours(problem.replace(bias=None), lane.backend)["y"]) < 2 * torch.finfo(dtypes[0]).eps


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=name_of)
@axes
def test_two_runs_give_the_same_bits(lane, dtypes, magnitude_axis):
    problem = make_problem((130,), 70, 45, 9, dtypes, magnitude_axis=magnitude_axis, device=lane.device)
    first = ours(problem, lane.backend)
    assert same_bits(first, ours(problem, lane.backend))


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("layout", [torch.clone, sliced])
def test_sums_over_tokens_are_not_rounded_on_the_way(lane, dtype, layout):
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    # Rows enough for more than one block, elements enough for none to be small.
    grad, other = torch.randn(2, 700, 100, generator=torch.Generator().manual_seed(0)).to(lane.device, dtype)
    g = torch.rand(100, generator=torch.Generator().manual_seed(1)).to(lane.device) + 0.5
    scaled, dot, total = dispatch.kernels().scale_reduce(layout(grad), other, g, True, True)
    assert torch.equal(scaled, (grad.float() * g).to(dtype))
    for sums, terms in ((dot, grad.double() * other.double()), (total, grad.double())):
        assert sums.dtype == f32
        assert ((sums - terms.sum(0)).abs() <= 1e-6 * terms.abs().sum(0)).all()


@axes
@detachments
def test_parameter_gradients_leave_float32_unrounded(lane, magnitude_axis, detach_norm):
    problem = make_problem(
        (40,), 48, 64, 8, (bf16, bf16, f32), magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    results = ours(problem, lane.backend)
    for name in ("lora_A", "lora_B", "magnitude"):
        on_the_grid = (results[name].to(bf16).to(f32) == results[name]).float().mean().item()
        assert on_the_grid < 0.1, f"{on_the_grid:.0%} of the gradient of {name} are bfloat16 numbers"


@pytest.mark.parametrize("dtype", [bf16, f16])
@axes
@detachments
def test_autocast(lane, dtype, magnitude_axis, detach_norm):
    problem = make_problem(
        (4, 9), 50, 34, 6, magnitude_axis=magnitude_axis, detach_norm=detach_norm, device=lane.device
    )
    with torch.autocast(lane.device, dtype=dtype):
        inside = ours(problem, lane.backend)
    check(inside, problem, dtype=dtype)
    leaves = leaves_of(problem)
    with torch.autocast(lane.device, dtype=dtype):
        y = dora_linear(**leaves, **problem.options, backend=lane.backend)
    outside = torch.autograd.grad(y, list(leaves.values()), problem.dy.to(dtype))
    assert same_bits(inside, {"y": y.detach(), **dict(zip(leaves, outside, strict=True))})
    # Those of the factors are products of 16-bit matrices here as in PEFT: test_low_rank_precision.
    assert not torch.equal(inside["magnitude"].to(dtype).to(f32), inside["magnitude"]), "dm was rounded"


@axes
def test_the_norm_under_autocast_is_the_norm_without(lane, magnitude_axis):
    problem = make_problem((6,), 50, 34, 6, magnitude_axis=magnitude_axis, device=lane.device)
    norm = dora_weight_norm(
        problem.weight, problem.lora_A, problem.lora_B,
        scaling=problem.scaling, magnitude_axis=magnitude_axis, backend=lane.backend,
    )  # fmt: skip
    with torch.autocast(lane.device, dtype=bf16):
        assert same_bits(ours(problem, lane.backend), ours(problem, lane.backend, weight_norm=norm))


def test_autocast_leaves_a_named_dtype_alone_when_disabled(lane):
    problem = make_problem(device=lane.device)
    with torch.autocast(lane.device, dtype=bf16), torch.autocast(lane.device, enabled=False):
        assert same_bits(ours(problem, lane.backend), ours(problem, lane.backend))
        assert ours(problem, lane.backend)["y"].dtype == f32
