"""Stochastic rounding: its random words, its probabilities, and merges that keep small updates.

Seeds are fixed, so a test passes always or never. `SIGMAS` says how often it would fail with others: 6e-7 of a normal
variable's values lie beyond 5 standard deviations.
"""

from __future__ import annotations

import pytest
import torch
from helpers import bf16, exact_merge, f16, f32, f64, make_problem, norm_bound
from survival import survivals
from torch.library import opcheck

from dora_kernels import merge_dora, rounding
from dora_kernels.engine import ops

SIGMAS = 5.0
SEEDS = (0, 1, (1 << 40) + 3, (1 << 63) - 1)
axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])
targets = pytest.mark.parametrize("dtype", [bf16, f16], ids=["bf16", "f16"])
sources = pytest.mark.parametrize("source", [f32, f64], ids=["f32", "f64"])
LAYOUTS = {
    "rows": lambda t: t,
    "columns": lambda t: t.t().contiguous().t(),
    "gaps": lambda t: t.repeat_interleave(2, 1)[:, ::2],
}
CPU = torch.device("cpu")


def merged(problem, lane, seed=0):
    return merge_dora(
        problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, scaling=problem.scaling,
        magnitude_axis=problem.magnitude_axis, backend=lane.backend, rounding="stochastic", seed=seed,
    )  # fmt: skip


def grid(dtype):
    """Every finite number of a 16-bit dtype in order, zero once, and infinity's place as the next step."""
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).to(f64)
    return numbers[numbers.isfinite()].unique()


def neighbours(x, dtype):
    """The numbers of `dtype` at or below x and above it, for float64 x in its range."""
    numbers = grid(dtype)
    above = torch.searchsorted(numbers, x.contiguous(), right=True)
    return numbers[above - 1], numbers[above.clamp(max=numbers.numel() - 1)]


def values(dtype, source, count=20_000):
    """Of every magnitude, subnormal numbers of `dtype` and below included, in `source`."""
    exponents = torch.randint(-160 if dtype == bf16 else -40, 127 if dtype == bf16 else 15, (count,))
    return torch.ldexp(torch.randn(count, dtype=f64), exponents).to(source)


# The words.


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers(counter, key, expected):
    """Random123's, from its file of known answers."""
    found = rounding.philox(*(torch.tensor([word]) for word in counter), key[0] | key[1] << 32)
    assert tuple(int(word) for word in found) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_words_by_index(seed):
    """Any stretch of them, also beyond 2**32 and not from a multiple of four, is the same words."""
    for start in (0, (1 << 32) - 5, (1 << 34) - 3, 1 << 41):
        whole = rounding.words(seed, start, 40, CPU)
        assert whole.min() >= 0 and whole.max() < 1 << 32 and whole.unique().numel() == 40
        for first in (1, 2, 3, 4, 21):
            assert torch.equal(rounding.words(seed, start + first, 7, CPU), whole[first : first + 7])
        counter = torch.tensor([start // 4 & 0xFFFFFFFF]), torch.tensor([start // 4 >> 32])
        zero = torch.zeros(1, dtype=torch.int64)
        block = torch.cat(rounding.philox(*counter, zero, zero, seed))
        assert torch.equal(whole[: 4 - start % 4], block[start % 4 :])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kernels_draw_the_same_words_and_round_alike(lane, seed):
    if lane.backend != "triton":
        pytest.skip("about the kernels")
    from rounding_kernel import drawn, round_tile

    for start in (0, (1 << 32) - 100, (1 << 41) + 1):
        indices = torch.arange(start, start + 256, device=lane.device)
        assert torch.equal(drawn(seed, indices), rounding.words(seed, start, 256, indices.device))
    for dtype in (bf16, f16):
        beyond = 1 + torch.finfo(dtype).eps / 8  # a quarter of a step, which is never taken
        edge = torch.finfo(dtype).max * torch.tensor([1.0, 1.001, 1.002, 1.0021, 2.0**0.01, *[beyond] * 64])
        odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3e38, 1e-45, -1e-40, 2.0**-24, 2.0**-14, 2.0**-133])
        x = torch.cat([values(dtype, f32, 4096), edge.float(), -edge.float(), odd])
        x = torch.cat([x, x.new_full((-x.numel() % 256,), torch.nan)]).to(lane.device)
        words = rounding.words(seed, 0, x.numel(), x.device)
        got, wanted = round_tile(x, words, dtype), rounding.round_by_words(x, dtype, words)
        number = ~x.isnan()
        assert torch.equal(got.view(torch.int16)[number], wanted.view(torch.int16)[number])
        assert bool(got[~number].isnan().all())


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_words_are_uniform(shift):
    """Chi-square of each byte over 256 values, as a normal variable (Wilson and Hilferty)."""
    count, free = 1 << 20, 255
    found = torch.bincount(rounding.words(3, 0, count, CPU) >> shift & 0xFF, minlength=256).to(f64)
    square = float(((found - count / 256).square() / (count / 256)).sum())
    normal = ((square / free) ** (1 / 3) - (1 - 2 / (9 * free))) / (2 / (9 * free)) ** 0.5
    assert abs(normal) < SIGMAS


def test_other_seeds_draw_other_words():
    drawn = [rounding.words(seed, 0, 1000, CPU) for seed in SEEDS]
    assert torch.stack(drawn).unique().numel() > 3990
    assert len({rounding.seed_for(seed, name) for seed in SEEDS for name in ("a", "b", "layers.1")}) == 12
    assert all(0 <= rounding.seed_for(seed, "a") < 1 << 63 for seed in range(100))
    assert rounding.seed_for(0, "a") == rounding.seed_for(0, "a")


# One value.


@targets
@sources
def test_the_threshold_is_the_fraction(dtype, source):
    """Away from zero for exactly the words below 2**32 times the fraction: exact, and alike for both signs."""
    x = values(dtype, source)
    low, high = neighbours(x.to(f64).abs(), dtype)
    fraction = (x.to(f64).abs() - low) / (high - low)
    threshold = (fraction * 2.0**32).ceil().to(torch.int64)  # the first word that rounds towards zero
    for words, wanted in ((threshold, low), ((threshold - 1).clamp(min=0), torch.where(threshold > 0, high, low))):
        got = rounding.round_by_words(x, dtype, words)
        assert got.dtype == dtype and torch.equal(got.to(f64), wanted.copysign(x.to(f64)))
        assert torch.equal(rounding.round_by_words(-x, dtype, words), -got)
    if source == f32 and dtype == bf16:
        assert torch.equal(threshold.to(f64), fraction * 2.0**32), "some probability is no multiple of 2**-32"


@targets
@sources
def test_what_the_dtype_has_is_kept(dtype, source):
    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    for word in (0, (1 << 32) - 1):
        got = rounding.round_by_words(numbers.to(source), dtype, torch.full((1 << 16,), word))
        nan = numbers.isnan()
        assert torch.equal(got.view(torch.int16)[~nan], numbers.view(torch.int16)[~nan])
        assert bool(got[nan].isnan().all())


@targets
@sources
def test_beyond_the_largest_number_it_is_rounding_to_nearest(dtype, source):
    largest = torch.finfo(dtype).max
    half = (largest - float(grid(dtype)[-2])) / 2
    beyond = [largest, largest + half / 2, largest + half * 0.999, largest + half, largest * 1.003]
    x = torch.tensor(beyond, dtype=source)
    assert x.isfinite().all()
    for word in (0, (1 << 32) - 1):
        for signed in (x, -x):
            got = rounding.round_by_words(signed, dtype, torch.full((5,), word))
            assert torch.equal(got, signed.to(dtype)) and got.isinf().tolist() == [False] * 3 + [True] * 2


@targets
@pytest.mark.parametrize("seeded", [int, torch.Generator().manual_seed], ids=["words", "generator"])
def test_the_mean_is_the_value(dtype, seeded):
    """Of as many results as words were drawn: in all, and for each value, subnormal ones included."""
    count = 1 << 12
    x = values(dtype, f32, 200).abs()  # of both signs, a preference for the larger size would cancel
    low, high = neighbours(x.to(f64), dtype)
    fraction = (x.to(f64) - low) / (high - low)
    ups = torch.stack([
        (rounding.stochastic(x[i].expand(1, count), dtype, seeded(i)) == high[i].to(dtype)).to(f64).sum()
        for i in range(200)
    ])  # fmt: skip
    off = ups - count * fraction
    deviation = (count * fraction * (1 - fraction)).sqrt()
    assert abs(float(off.sum())) < SIGMAS * float(deviation.square().sum().sqrt())
    enough = deviation > 3  # where a binomial count is close to normal
    assert enough.sum() > 100 and bool((off.abs() < (SIGMAS + 1) * deviation)[enough].all())


@targets
@sources
def test_a_generator_takes_one_of_the_two_neighbours(dtype, source, monkeypatch):
    monkeypatch.setattr(rounding, "_CHUNK", 7000)
    x = values(dtype, source)
    draw = torch.Generator().manual_seed
    for signed in (x, -x):
        got = rounding.stochastic(signed, dtype, draw(3))
        low, high = neighbours(signed.to(f64), dtype)
        known = low == signed
        assert torch.equal(got.to(f64)[known], low[known]) and bool(((got == low) | (got == high)).all())
        assert torch.equal(got, rounding.stochastic(signed, dtype, draw(3)))
        assert not torch.equal(got, rounding.stochastic(signed, dtype, draw(4)))
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, torch.finfo(dtype).max], dtype=source)
    for part in (odd, odd[1:], odd[3:]):
        assert rounding.stochastic(part, dtype, draw(0)).to(source).view(-1).tolist()[1:] == part.tolist()[1:]
    assert bool(rounding.stochastic(odd[3:], dtype, draw(0)).signbit()[0])


# Merges.


@axes
@targets
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("magnitude", [True, False], ids=["dora", "lora"])
def test_a_merge_takes_one_of_the_two_neighbours(lane, dtype, magnitude_axis, layout, magnitude):
    problem = make_problem(
        (1,), 70, 90, 5, (f32, dtype, f32), magnitude_axis=magnitude_axis, magnitude=magnitude, device=lane.device
    )
    problem = problem.replace(weight=layout(problem.weight))
    exact = exact_merge(problem)
    got = merged(problem, lane, seed=7)
    low, high = (each.to(lane.device) for each in neighbours(exact.cpu(), dtype))
    # The error of the norm and of float32 sums may put the value on the other side of a number of the grid.
    slack = norm_bound(problem.weight, problem.lora_A, problem.lora_B) * exact.abs().max()
    assert bool(((got >= low - slack) & (got <= high + slack)).all())
    assert torch.equal(got, merged(problem, lane, seed=7))
    other = merged(problem, lane, seed=8)
    # Two independent draws differ with probability 2 f (1 - f), a third on average.
    fraction = (exact - low) / (high - low)
    chance = 2 * fraction * (1 - fraction)
    expected, deviation = chance.sum(), (chance * (1 - chance)).sum().sqrt()
    assert abs(float((got != other).sum() - expected)) < SIGMAS * float(deviation) + 1

    # Unbiased, in units of each element's own deviation.
    error = (got.to(f64) - exact) / ((high - low) * (fraction * (1 - fraction)).sqrt())
    usual = (fraction > 0.01) & (fraction < 0.99)
    assert abs(float(error[usual].mean())) < SIGMAS / float(usual.sum()) ** 0.5


def exact_problem(dtype, magnitude_axis, device):
    """One whose float32 arithmetic is exact in any order, and whose merged weight has three bits more than `dtype`."""
    bits = 8 if dtype == bf16 else 11

    def whole(*shape, below):
        return torch.randint(-below + 1, below, shape).to(f32)

    problem = make_problem((1,), 45, 51, 3, (f32, dtype, f32), magnitude_axis=magnitude_axis, magnitude=False)
    return problem.replace(
        weight=whole(51, 45, below=1 << bits).to(dtype), lora_A=whole(3, 45, below=4), lora_B=whole(51, 3, below=4),
        scaling=2.0**-3,
    ).map(lambda t: t.to(device))  # fmt: skip


@axes
@targets
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_same_seed_gives_the_same_bits_everywhere(lane, dtype, magnitude_axis, layout, monkeypatch):
    """Whatever the backend, the axis, the strides and the blocks: where the arithmetic is exact, so is the result."""
    problem = exact_problem(dtype, magnitude_axis, lane.device)
    exact = exact_merge(problem)
    assert bool((exact.to(dtype) != exact).float().mean() > 0.1), "nothing to round"
    for seed in SEEDS:
        words = rounding.words(seed, 0, exact.numel(), exact.device).view(exact.shape)
        wanted = rounding.round_by_words(exact, dtype, words)
        other = problem.replace(weight=layout(problem.weight))
        assert torch.equal(merged(other, lane, seed), wanted)
        with monkeypatch.context() as patch:
            patch.setattr("dora_kernels.core.products.BLOCK_ELEMENTS", 200)
            patch.setattr(rounding, "_CHUNK", 70)
            assert torch.equal(merged(other, lane, seed), wanted)


@axes
@targets
def test_an_update_of_zero_changes_nothing(lane, dtype, magnitude_axis):
    """Bit for bit where g is exactly 1: of rows and columns with four numbers of one size the norm is exact."""
    size = torch.randn(64).to(dtype).abs().view(16, 4)[:, :1].expand(16, 4).reshape(64)
    weight = torch.zeros(64, 64, dtype=dtype, device=lane.device)
    for row in range(64):
        first = row // 4 * 4
        weight[row, first : first + 4] = size[row] * torch.tensor([1, -1, -1, 1])
    factors = torch.randn(3, 64, device=lane.device), torch.zeros(64, 3, device=lane.device)
    for magnitude in (None, 2 * size.to(lane.device, f32)):
        for seed in SEEDS:
            got = merge_dora(
                weight, *factors, magnitude, magnitude_axis=magnitude_axis, backend=lane.backend,
                rounding="stochastic", seed=seed,
            )  # fmt: skip
            assert torch.equal(got.view(torch.int16), weight.view(torch.int16))


@axes
@pytest.mark.parametrize("dtype", [f32, f64])
def test_a_wide_weight_is_rounded_to_nearest(lane, dtype, magnitude_axis):
    if dtype == f64 and lane.backend == "triton":
        pytest.skip("the kernels have no float64")
    problem = make_problem((1,), 30, 26, 3, (f32, dtype, dtype), magnitude_axis=magnitude_axis, device=lane.device)
    tensors = problem.weight, problem.lora_A, problem.lora_B, problem.magnitude
    options = {"magnitude_axis": magnitude_axis, "scaling": problem.scaling, "backend": lane.backend}
    assert torch.equal(merged(problem, lane, seed=3), merge_dora(*tensors, **options))


@axes
def test_tracing(lane, magnitude_axis):
    problem = make_problem((1,), 37, 41, 4, (f32, bf16, f32), magnitude_axis=magnitude_axis, device=lane.device)
    torch._dynamo.reset()
    run = torch.compile(merged, backend="aot_eager", fullgraph=True)
    for seed in (5, 1 << 40):
        assert torch.equal(run(problem, lane, seed), merged(problem, lane, seed))
    args = problem.weight, problem.lora_A, problem.lora_B, problem.magnitude, 0.5, magnitude_axis, lane.backend
    opcheck(ops.merge_op, (*args, 1 << 40))


def test_small_updates_survive():
    """docs/merging.md: nearest loses what stays within half a step, stochastic rounding keeps it at any size."""
    for row in survivals(192, 1024, 64):
        assert abs(row.seen["stochastic"] - 1) < SIGMAS * row.deviation
        assert 1 - row.seen["nearest"] >= row.lost
        if row.size < 1e-3:
            assert row.lost > SIGMAS * row.deviation, "there is nothing to tell apart"
