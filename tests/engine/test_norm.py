"""`dora_weight_norm` against float64, to the bounds of `helpers.norm_bound`, and what it allocates."""

from __future__ import annotations

import pytest
import torch
from helpers import FACTORED, LANES, Lane, bf16, f16, f32, f64, make_problem, norm_bound, norm_lane, ours
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dora_kernels import dora_weight_norm, testing

# (base, lora_A, lora_B)
DTYPES = [
    (f32, f32, f32),
    (bf16, bf16, bf16),
    (f16, f16, f16),
    (bf16, f32, f32),
    (f16, f32, f32),
    (f32, bf16, bf16),
    (bf16, bf16, f32),
    (f32, f16, f16),
]


@pytest.fixture(scope="module", params=[*LANES, *FACTORED])
def lane(request):
    with norm_lane(request.param) as lane:
        yield lane


axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])


def name_of(dtypes):
    short = {f32: "f32", f64: "f64", bf16: "bf16", f16: "f16"}
    return "-".join(short[dtype] for dtype in dtypes)


def factors(lane, out_features, in_features, rank, dtypes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (out_features, in_features), (rank, in_features), (out_features, rank)
    scales = in_features**-0.5, in_features**-0.5, rank**-0.5
    return tuple(
        (torch.randn(shape, generator=generator) * scale).to(lane.device, dtype)
        for shape, scale, dtype in zip(shapes, scales, dtypes, strict=True)
    )


def worst(norm, exact):
    """The largest relative error of a row; rows that are exactly zero must come out so."""
    assert norm.shape == exact.shape
    zero = exact == 0
    assert not norm[zero].any()
    return ((norm.to(f64) - exact)[~zero] / exact[~zero]).abs().max().item() if (~zero).any() else 0.0


def exact_norm(tensors, scaling, magnitude_axis):
    return testing.weight_norm(*(t.to(f64) for t in tensors), scaling, magnitude_axis)


def terms_norm(tensors, scaling, magnitude_axis):
    """Of the absolute values of everything that is summed."""
    return exact_norm([t.abs() for t in tensors], abs(scaling), magnitude_axis)


def check_norm(lane, tensors, scaling=0.7, magnitude_axis="out", bound=None):
    norm = dora_weight_norm(*tensors, scaling=scaling, magnitude_axis=magnitude_axis, backend=lane.backend)
    assert norm.dtype == (f64 if any(t.dtype == f64 for t in tensors) else f32)
    assert norm.is_contiguous() and not norm.requires_grad
    off = worst(norm, exact_norm(tensors, scaling, magnitude_axis))
    bound = norm_bound(*tensors) if bound is None else bound
    assert off <= bound, f"a norm is off by {off:.2e}, allowed {bound:.0e}"


@axes
@pytest.mark.parametrize("dtypes", DTYPES, ids=name_of)
def test_dtypes_and_ranks(lane, dtypes, magnitude_axis):
    sizes = [(45, 51, 1), (130, 33, 3), (17, 200, 16), (70, 70, 33), (33, 130, 64), (19, 67, 130), (40, 90, 384)]
    if lane.interpreted:
        sizes = [(45, 51, 1), (17, 140, 33), (19, 67, 130)]
    for out_features, in_features, rank in sizes:
        check_norm(lane, factors(lane, out_features, in_features, rank, dtypes), magnitude_axis=magnitude_axis)


@axes
def test_float64(magnitude_axis):
    lane = Lane("torch", "cpu")
    for dtypes in [(f64, f64, f64), (f64, f32, f32), (bf16, f64, f32)]:
        check_norm(lane, factors(lane, 40, 60, 5, dtypes), magnitude_axis=magnitude_axis)


@axes
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=name_of)
def test_a_long_row(lane, dtypes, magnitude_axis):
    """Sums of many squares, the adapter's above all: accumulated one after another in float32 they would drift."""
    length = 2048 if lane.interpreted else 20_000
    shape = (9, length) if magnitude_axis == "out" else (length, 9)
    check_norm(lane, factors(lane, *shape, 4, dtypes), scaling=8.0, magnitude_axis=magnitude_axis)


@axes
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=name_of)
def test_ten_orders_of_magnitude(lane, dtypes, magnitude_axis):
    weight, lora_A, lora_B = factors(lane, 60, 50, 5, dtypes)
    spread = torch.logspace(-5, 5, 60, device=lane.device)
    check_norm(lane, ((weight * spread[:, None]).to(dtypes[0]), lora_A, lora_B), magnitude_axis=magnitude_axis)
    check_norm(lane, ((weight * spread[:50]).to(dtypes[0]), lora_A, lora_B), magnitude_axis=magnitude_axis)


@axes
def test_float16_squares_overflow(lane, magnitude_axis):
    weight, lora_A, lora_B = factors(lane, 40, 50, 5, (f16, f16, f16))
    tensors = ((weight * 50_000).clamp(-60_000, 60_000), lora_A * 3_000, lora_B * 100)
    assert all(t.isfinite().all() for t in tensors) and tensors[0].square().isinf().any()
    check_norm(lane, tensors, magnitude_axis=magnitude_axis)


@axes
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=name_of)
@pytest.mark.parametrize("left", [0.3, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("rows", ["all", "some"])
def test_near_cancellation(lane, left, rows, dtypes, magnitude_axis):
    """W almost undone by the adapter: off by no more than one rounding to float32 of each term of ``W + s B A``.

    The factored form alone is 100 times worse; within the bound where little cancels.
    """
    rest, lora_A, lora_B = factors(lane, 60, 80, 6, dtypes)
    weight = rest * left - (0.7 * lora_B.to(f32) @ lora_A.to(f32)).to(rest.dtype)
    if rows == "some":
        weight[::3] = rest[::3]
        weight[:, ::3] = rest[:, ::3]
    tensors = weight, lora_A, lora_B
    rounding = 2**-24 * (terms_norm(tensors, 0.7, magnitude_axis) / exact_norm(tensors, 0.7, magnitude_axis)).max()
    check_norm(lane, tensors, magnitude_axis=magnitude_axis, bound=max(norm_bound(*tensors), rounding.item()))


@axes
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[3]], ids=name_of)
def test_duplicate_rows_of_a(lane, dtypes, magnitude_axis):
    """Rank directions that undo one another: large terms, a small sum."""
    weight, lora_A, lora_B = factors(lane, 50, 60, 8, dtypes)
    lora_A[4:] = lora_A[:4]
    lora_B[:, 4:] = -lora_B[:, :4]
    tensors = weight, lora_A * 30, lora_B * 30
    exact = exact_norm(tensors, 0.7, magnitude_axis)
    direct = worst(testing.weight_norm(*tensors, 0.7, magnitude_axis), exact)
    check_norm(lane, tensors, magnitude_axis=magnitude_axis, bound=max(norm_bound(*tensors), 2 * direct))


@axes
def test_zeros(lane, magnitude_axis):
    weight, lora_A, lora_B = factors(lane, 30, 40, 3, (f32, f32, f32))
    weight[4] = lora_B[4] = 0
    weight[:, 7] = lora_A[:, 7] = 0
    check_norm(lane, (weight, lora_A, lora_B), magnitude_axis=magnitude_axis)
    check_norm(lane, (weight, lora_A, torch.zeros_like(lora_B)), magnitude_axis=magnitude_axis)
    check_norm(lane, (torch.zeros_like(weight), lora_A, lora_B), magnitude_axis=magnitude_axis)
    check_norm(lane, (weight, lora_A, lora_B), scaling=0, magnitude_axis=magnitude_axis)


@axes
def test_nan_stays_in_its_row(lane, magnitude_axis):
    weight, lora_A, lora_B = factors(lane, 30, 40, 3, (f32, f32, f32))
    weight[5, 6] = torch.nan
    weight[9, 11] = torch.inf
    norm = dora_weight_norm(weight, lora_A, lora_B, magnitude_axis=magnitude_axis, backend=lane.backend)
    at_nan, at_inf = (5, 9) if magnitude_axis == "out" else (6, 11)
    assert norm.isnan().nonzero().flatten().tolist() == [at_nan]
    assert norm.isinf().nonzero().flatten().tolist() == [at_inf]


@axes
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=name_of)
def test_strides(lane, dtypes, magnitude_axis):
    tensors = factors(lane, 44, 52, 6, dtypes)
    plain = dora_weight_norm(*tensors, magnitude_axis=magnitude_axis, backend=lane.backend)
    transposed = tuple(t.t().contiguous().t() for t in tensors)
    wide = tuple(torch.full((2 * t.shape[0], t.shape[1] + 3), torch.nan).to(t) for t in tensors)
    sliced = tuple(w[::2, : t.shape[1]].copy_(t) for w, t in zip(wide, tensors, strict=True))
    for other in (transposed, sliced):
        check_norm(lane, other, magnitude_axis=magnitude_axis)
        norm = dora_weight_norm(*other, magnitude_axis=magnitude_axis, backend=lane.backend)
        assert worst(norm, plain.to(f64)) <= 2 * norm_bound(*tensors)


@axes
def test_the_two_axes_are_one_another_transposed(lane, magnitude_axis):
    weight, lora_A, lora_B = factors(lane, 44, 52, 6, (f32, f32, f32))
    other = "in" if magnitude_axis == "out" else "out"
    one = dora_weight_norm(weight, lora_A, lora_B, magnitude_axis=magnitude_axis, backend=lane.backend)
    two = dora_weight_norm(weight.t(), lora_B.t(), lora_A.t(), magnitude_axis=other, backend=lane.backend)
    assert torch.equal(one, two)


@axes
def test_two_runs_give_the_same_bits(lane, magnitude_axis):
    tensors = factors(lane, 70, 150, 6, (bf16, f32, f32))
    one, two = (dora_weight_norm(*tensors, magnitude_axis=magnitude_axis, backend=lane.backend) for _ in range(2))
    assert torch.equal(one, two)


@axes
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=name_of)
def test_autocast_does_not_round_the_factors(lane, dtypes, magnitude_axis):
    tensors = factors(lane, 44, 52, 6, dtypes)
    norm = dora_weight_norm(*tensors, magnitude_axis=magnitude_axis, backend=lane.backend)
    with torch.autocast(lane.device, dtype=bf16):
        assert torch.equal(dora_weight_norm(*tensors, magnitude_axis=magnitude_axis, backend=lane.backend), norm)


@pytest.mark.slow
@given(
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70)),
    dtypes=st.sampled_from(DTYPES),
    scaling=st.sampled_from([0.0, 1.0, -2.0, 0.01]),
    magnitude_axis=st.sampled_from(["out", "in"]),
    seed=st.integers(0, 5),
)
def test_any_norm(lane, sizes, dtypes, scaling, magnitude_axis, seed):
    tensors = factors(lane, *sizes, dtypes, seed)
    exact = exact_norm(tensors, scaling, magnitude_axis)
    # A row of few elements may cancel by chance; what was summed is then the measure.
    terms = terms_norm(tensors, scaling, magnitude_axis)
    norm = dora_weight_norm(*tensors, scaling=scaling, magnitude_axis=magnitude_axis, backend=lane.backend)
    assert ((norm.to(f64) - exact).abs() <= norm_bound(*tensors) * terms).all()


class Largest(TorchDispatchMode):
    """The most elements of a tensor with storage of its own that is made while the mode is on."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, t.numel())
        return result


@axes
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3]], ids=name_of)
@pytest.mark.parametrize("case", ["plain", "transposed", "cancelling"])
def test_no_temporary_of_the_weights_size(dtypes, magnitude_axis, case):
    weight, lora_A, lora_B = factors(Lane("torch", "cpu"), 2048, 2048, 16, dtypes)
    if case == "transposed":
        weight = weight.t()
    if case == "cancelling":
        weight = (weight / 100 - lora_B.float() @ lora_A.float()).to(dtypes[0])
    with Largest() as largest:
        dora_weight_norm(weight, lora_A, lora_B, magnitude_axis=magnitude_axis, backend="torch")
    assert largest.elements <= 2048 * 2048 / 4


@axes
@pytest.mark.parametrize("detach_norm", [True, False], ids=["detached", "full"])
@pytest.mark.parametrize("dtypes", [(bf16, bf16, bf16), (bf16, bf16, f32), (f32, f32, f32)], ids=name_of)
def test_no_temporary_of_the_weights_size_in_training(dtypes, magnitude_axis, detach_norm):
    problem = make_problem((8,), 2048, 2048, 16, dtypes, magnitude_axis=magnitude_axis, detach_norm=detach_norm)
    with Largest() as largest:
        ours(problem, "torch", {"x", "lora_A", "lora_B", "magnitude", "bias"})
    assert largest.elements <= 2048 * 2048 / 4


def test_the_measure_of_temporaries_sees_one():
    weight, lora_A, lora_B = torch.randn(64, 48), torch.randn(2, 48), torch.randn(64, 2)
    with Largest() as largest:
        testing.weight_norm(weight, lora_A, lora_B, 1.0, "out")
    assert largest.elements == 64 * 48


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch 2.9 has the setting to be undone")
@axes
def test_reduced_precision_is_not_for_the_norm(magnitude_axis):
    """On a CPU with bfloat16 products the user's setting would round W, A and B."""
    seen = []

    class Settings(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.name():
                seen.append(torch.backends.mkldnn.matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    tensors = factors(Lane("torch", "cpu"), 30, 40, 4, (f32, f32, f32))
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with Settings():
            dora_weight_norm(*tensors, magnitude_axis=magnitude_axis, backend="torch")
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert seen and set(seen) == {"ieee"}
