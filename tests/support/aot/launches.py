"""The calls of the primitives that ship, and the launches that they make, taken from the launchers themselves.

A launcher runs on tensors of the "meta" device with its kernels replaced by recorders, so that a `Launch` holds what a
real call would pass: the grid, the tile sizes chosen for that shape and dtype, flags derived from them, the strides.
`shipped` lists one launch per distinct configuration over ranks and token counts, for each dtype and layout that the
layer calls it with; tests/kernels/test_aot.py checks that no rank from 1 to 1024 launches anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from aot.recording import NAMES, Launch, Made, Operation, Operations, described, instead
from dora_kernels import testing
from dora_kernels.engine.fingerprints import sample

LARGEST_RANK = 1024
# Powers of two and their successors: what the configurations distinguish, they distinguish there.
TOKENS = sorted({n for i in range(15) for n in (2**i, 2**i + 1)})
RANKS = [n for n in TOKENS if n <= LARGEST_RANK]

_SIZE = 4096
_SEED = 1 << 40
"""Of 64 bits."""
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = tuple(testing.DTYPES.values())
"""Of the base layer and the adapter."""


@dataclass(frozen=True)
class Recorded:
    """What a call did: its launches, the PyTorch operations beside them, and its results."""

    launches: list[Launch]
    operations: list[Operation]
    results: dict[str, Tensor]


@dataclass(frozen=True)
class Call:
    """A call of a primitive: its tensors by the names of the kernels' arguments, None where absent, and the rest."""

    primitive: str
    dtypes: str
    case: str
    operands: dict[str, Tensor | None]
    others: tuple[Any, ...]
    results: tuple[str, ...]
    launcher: Callable[..., Any] | None = None
    """Where it is not the function of the primitive's name."""
    unchanged: bool = False
    """Whether the device finds that there is nothing to do."""
    wide: bool = False
    """Whether the device has 16-bit products with unrounded float32 sums, as NVIDIA's have: high ranks are factored."""

    def run(self, made: Callable[[Made], None] = lambda _: None) -> Recorded:
        """Call the launcher; `made` has each launch, which does not run by itself."""
        from dora_kernels import kernels

        launches: list[Launch] = []

        def launch(one: Made) -> None:
            launches.append(described(one, self.primitive, self.dtypes, self.case))
            with _disable_current_modes():
                made(one)

        launcher = self.launcher or getattr(kernels, self.primitive)
        product = sys.modules["dora_kernels.kernels.product"]
        wide = mock.patch.dict(product._wide, {torch.device("meta"): self.wide})
        with instead(launch), wide, Operations(self.operands) as operations:
            found = launcher(*self.operands.values(), *self.others)
        found = found if isinstance(found, tuple) else (found,)
        results = {name: one for name, one in zip(self.results, found, strict=True) if one is not None}
        return Recorded(launches, operations.made, results)

    @property
    def launches(self) -> list[Launch]:
        return self.run().launches

    @property
    def config(self) -> Hashable:
        """What the choice of configurations decided for this call."""
        return tuple((launch.kernel, launch.config) for launch in self.launches)


def _labels(dtypes: tuple[torch.dtype, torch.dtype]) -> str:
    return "+".join(dict.fromkeys(NAMES[dtype] for dtype in dtypes))


def _words(*said: str) -> str:
    return ", ".join(word for word in said if word)


def weight_norm(
    dtypes: tuple[torch.dtype, torch.dtype],
    rank: int,
    shape: tuple[int, int] = (_SIZE, _SIZE),
    conv1d: bool = False,
    axis: str = "out",
    square: bool = False,
    groups: int = 0,
    device: str = "meta",
    wide: bool = False,
) -> Call:
    """A norm of a weight of that shape; `square`: its squared norm per row is known; `groups`: of a stack."""
    operands = _factors(dtypes, rank, shape, conv1d, axis, device, groups)
    given = {"square": _zeros((operands["w"].shape[0],), _FP32, device)} if square else {}
    case = _words(_weight_case(rank, shape, conv1d, axis, groups), "|W|² given" if square else "")
    launcher = _norm_with_square if square else None
    operands |= given
    return Call("weight_norm", _labels(dtypes), case, operands, (0.5,), ("norm",), launcher, wide=wide)


def _norm_with_square(w: Tensor, a: Tensor, b: Tensor, square: Tensor, scaling: float) -> Tensor:
    from dora_kernels.kernels import weight_norm

    norm: Tensor = weight_norm(w, a, b, scaling, square)
    return norm


def kept_norm(
    dtypes: tuple[torch.dtype, torch.dtype],
    rank: int,
    shape: tuple[int, int] = (_SIZE, _SIZE),
    conv1d: bool = False,
    axis: str = "out",
    unchanged: bool = False,
    groups: int = 0,
    device: str = "meta",
) -> Call:
    """A norm kept on the device: its first call or, `unchanged`, one that finds all as it was."""
    from dora_kernels.kernels import KeptNorm

    operands = _factors(dtypes, rank, shape, conv1d, axis, device, groups)
    kept = KeptNorm(operands["w"].shape[:-1], 0.5, operands["w"].device)

    def launcher(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        divisor: Tensor = kept.divisor(w, sample(w), a, b)
        return divisor

    case = _words(_weight_case(rank, shape, conv1d, axis, groups), "unchanged" if unchanged else "changed")
    call = Call("kept_norm", _labels(dtypes), case, dict(operands), (), ("norm",), launcher, unchanged)
    if unchanged:
        call.run(Made.run if device == "cpu" else lambda _: None)
    return call


def merge(
    dtypes: tuple[torch.dtype, torch.dtype],
    rank: int,
    shape: tuple[int, int] = (_SIZE, _SIZE),
    conv1d: bool = False,
    axis: str = "out",
    magnitude: bool = True,
    seed: int | None = None,
    groups: int = 0,
    device: str = "meta",
) -> Call:
    """A merged weight, with or without a magnitude, rounded to nearest or with a seed stochastically."""
    operands = _factors(dtypes, rank, shape, conv1d, axis, device, groups)
    m = _zeros(operands["w"].shape[:-1], dtypes[1], device) if magnitude else None
    said = "" if magnitude else "no m", "" if seed is None else "stochastic"
    case = _words(_weight_case(rank, shape, conv1d, axis, groups), *said)
    return Call("merge", _labels(dtypes), case, {**operands, "m": m}, (0.5, seed, axis == "in"), ("merged",))


def _factors(
    dtypes: tuple[torch.dtype, torch.dtype],
    rank: int,
    shape: tuple[int, int],
    conv1d: bool,
    axis: str,
    device: str,
    groups: int,
) -> dict[str, Tensor]:
    """W, A and B; `conv1d`: W is stored transposed, as GPT-2 does; axis "in" is the transposed problem."""
    rows, columns = shape
    stack = (groups,) if groups else ()
    w = _zeros((*stack, columns, rows), dtypes[0], device).mT if conv1d else _zeros((*stack, *shape), dtypes[0], device)
    a, b = _zeros((*stack, rank, columns), dtypes[1], device), _factor_b((*stack, rows, rank), dtypes[1], device)
    return dict(zip("wab", (w, a, b) if axis == "out" else (w.mT, b.mT, a.mT)))


def _factor_b(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """As PEFT stores it: that of experts has the expert last."""
    if len(shape) == 2:
        return _zeros(shape, dtype, device)
    groups, rows, rank = shape
    return _zeros((rows, rank, groups), dtype, device).permute(2, 0, 1)


def _weight_case(rank: int, shape: tuple[int, int], conv1d: bool, axis: str, groups: int) -> str:
    sizes = " x ".join(map(str, (groups, *shape) if groups else shape))
    return _words(sizes, f"rank {rank}", "" if axis == "out" else f"axis {axis}", "Conv1D" if conv1d else "")


def compose(
    dtypes: tuple[torch.dtype, torch.dtype],
    tokens: int,
    rank: int,
    size: int = _SIZE,
    magnitude: bool = True,
    bias: bool = True,
    keep: bool = True,
    wide: bool = False,
    groups: int = 0,
    adapters: bool = False,
    device: str = "meta",
) -> Call:
    """A compose of `tokens` x `size` base results; `wide`: h is of the adapter's dtype.

    Groups have equally many tokens. They are experts or, with `adapters`, tokens of different adapters in any order.
    """
    stack = (groups,) if groups else ()
    b = (*stack, size, rank)
    operands = {
        "base": _zeros((tokens, size), dtypes[0], device),
        "h": _zeros((tokens, rank), dtypes[wide], device),
        "b": _zeros(b, dtypes[1], device) if adapters else _factor_b(b, dtypes[1], device),
        "g": _zeros((*stack, size), _FP32, device) if magnitude else None,
        "bias": _zeros((*stack, size), dtypes[0], device) if bias else None,
    }
    launcher = None
    if groups:
        operands["ends"] = _ends(tokens, groups, device)
        launcher = _compose_experts
    if adapters:
        operands["rows"] = torch.arange(tokens, device=device)
        operands["scalings"] = _zeros((groups,), _FP32, device)
        launcher = _compose_adapters
    absent = [f"no {name}" for name in ("g", "bias") if operands[name] is None]
    of = f"{groups} adapters" if adapters else f"{groups} experts" if groups else ""
    said = "wide h" if wide else "", "" if keep else "in place", of
    case = _words(f"{tokens} tokens x {size}", f"rank {rank}", *absent, *said)
    return Call("compose", _labels(dtypes), case, operands, (0.5, keep), ("y",), launcher)


def _compose_experts(
    base: Tensor, h: Tensor, b: Tensor, g: Tensor, bias: Tensor, ends: Tensor, scaling: float, keep: bool
) -> Tensor:
    from dora_kernels.kernels import compose

    y: Tensor = compose(base, h, b, g, bias, scaling, keep, ends=ends)
    return y


def _compose_adapters(
    base: Tensor,
    h: Tensor,
    b: Tensor,
    g: Tensor,
    bias: Tensor,
    ends: Tensor,
    rows: Tensor,
    scalings: Tensor,
    scaling: float,
    keep: bool,
) -> Tensor:
    from dora_kernels.kernels import compose

    y: Tensor = compose(base, h, b, g, bias, scalings, keep, ends=ends, rows=rows)
    return y


def _ends(tokens: int, groups: int, device: str) -> Tensor:
    """Where the tokens of groups of nearly the same size end."""
    ends = torch.arange(1, groups + 1, device=device) * tokens // groups
    return ends.to(torch.int32)


def product(
    dtypes: tuple[torch.dtype, torch.dtype],
    M: int,
    K: int,
    N: int,
    transposed: bool = False,
    out: torch.dtype | None = None,
    groups: int = 0,
    adapters: bool = False,
    device: str = "meta",
) -> Call:
    """A product with the factor of an adapter, ``x Aᵀ``, or `transposed` with a gradient, ``dYᵀ H``.

    Groups have equally many tokens. They are experts or, with `adapters`, tokens of different adapters in any order.
    """
    stack = (groups,) if groups else ()
    operands = {
        "left": _zeros((K, M), dtypes[0], device).t() if transposed else _zeros((M, K), dtypes[0], device),
        "right": _zeros((K, N), dtypes[1], device) if transposed else _zeros((*stack, N, K), dtypes[1], device).mT,
    }
    launcher = None
    if groups:
        operands["ends"] = _ends(M, groups, device)
        launcher = _product_experts
    if adapters:
        operands["rows"] = torch.arange(M, device=device)
        launcher = _product_adapters
    of = f"{groups} adapters" if adapters else f"{groups} experts" if groups else ""
    case = _words(f"{M} x {K} x {N}", "dYᵀ H" if transposed else "", of)
    wide = _FP32 if _FP32 in dtypes else dtypes[0]
    return Call("product", _labels(dtypes), case, operands, (out or wide,), ("out",), launcher)


def _product_experts(left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    from dora_kernels.kernels import product

    made: Tensor = product(left, right, dtype, ends=ends)
    return made


def _product_adapters(left: Tensor, right: Tensor, ends: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    from dora_kernels.kernels import product

    made: Tensor = product(left, right, dtype, ends=ends, rows=rows)
    return made


def one_pass(
    dtypes: tuple[torch.dtype, torch.dtype],
    tokens: int,
    rank: int,
    shape: tuple[int, int] = (_SIZE, _SIZE),
    conv1d: bool = False,
    keep: bool = False,
    bias: bool = True,
    device: str = "meta",
) -> Call:
    """The forward of few tokens."""
    operands: dict[str, Tensor | None] = {"x": _zeros((tokens, shape[1]), dtypes[0], device)}
    operands |= _factors(dtypes, rank, shape, conv1d, "out", device, 0)
    operands["g"] = _zeros((shape[0],), _FP32, device)
    operands["divisor"] = _zeros((shape[0],), _FP32, device)
    operands["bias"] = _zeros((shape[0],), dtypes[0], device) if bias else None
    said = "Conv1D" if conv1d else "", "base kept" if keep else ""
    case = _words(f"{tokens} tokens", f"{shape[0]} x {shape[1]}", f"rank {rank}", *said)
    return Call("one_pass", _labels(dtypes), case, operands, (0.5, keep), ("y", "h", "base"), _one_pass)


def _one_pass(*given: Any) -> tuple[Tensor | None, ...]:
    from dora_kernels.kernels import one_pass

    x, w, a, b, g, divisor, bias, scaling, keep = given
    made: tuple[Tensor | None, ...] = one_pass(x, w, a, b, g, bias, scaling, keep, divisor)
    return made


def scale_reduce(
    dtype: torch.dtype,
    tokens: int,
    size: int = _SIZE,
    scaled: bool = True,
    dot: bool = True,
    total: bool = True,
    groups: int = 0,
    rank: int = 0,
    h: torch.dtype | None = None,
    device: str = "meta",
) -> Call:
    """A pass over `tokens` x `size` gradients that makes any of its results; groups have equally many tokens.

    With a `rank` one of them is the product with h, in its dtype or the gradient's.
    """
    stack = (groups,) if groups else ()
    operands = {
        "grad": _zeros((tokens, size), dtype, device),
        "other": _zeros((tokens, size), dtype, device) if dot else None,
        "g": _zeros((*stack, size), _FP32, device) if scaled else None,
        "h": _zeros((tokens, rank), h or dtype, device) if rank else None,
        "ends": _ends(tokens, groups, device) if groups else None,
    }
    absent = [f"no {name}" for name, there in (("scaled", scaled), ("dot", dot), ("sum", total)) if not there]
    said = f"rank {rank}" if rank else "", f"{groups} experts" if groups else ""
    results = "scaled", "dot", "sum", "low"
    case, labels = _words(f"{tokens} tokens x {size}", *absent, *said), _labels((dtype, h or dtype))
    return Call("scale_reduce", labels, case, operands, (scaled, total), results, _scale_reduce)


def _scale_reduce(
    grad: Tensor, other: Tensor | None, g: Tensor | None, h: Tensor | None, ends: Tensor | None, *wanted: bool
) -> tuple[Tensor | None, ...]:
    """As the layer calls it: the sums are partial where there is a product."""
    from dora_kernels import kernels

    if h is None:
        return *kernels.scale_reduce(grad, other, g, *wanted, ends), None
    made: tuple[Tensor | None, ...] = kernels.scale_partials(grad, other, g, *wanted, ends, h)
    return made


def product_over_tokens(
    dtype: torch.dtype,
    tokens: int,
    size: int = _SIZE,
    rank: int = 16,
    groups: int = 64,
    h: torch.dtype | None = None,
    device: str = "meta",
) -> Call:
    """The gradient of A of experts with equally many tokens each."""
    operands = {
        "grad": _zeros((tokens, size), dtype, device),
        "h": _zeros((tokens, rank), h or dtype, device),
        "ends": _ends(tokens, groups, device),
    }
    case = _words(f"{tokens} tokens x {size}", f"rank {rank}", f"{groups} experts", "no partner")
    labels = _labels((dtype, h or dtype))
    return Call("scale_reduce", labels, case, operands, (h or dtype, True), ("low",), _product_over_tokens)


def _product_over_tokens(left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype, turned: bool) -> Tensor:
    from dora_kernels import kernels

    made: Tensor = kernels.product_over_tokens(left, right, ends, dtype, turned)
    return made


def factor_grads(
    dtypes: tuple[torch.dtype, torch.dtype],
    rank: int,
    size: int = _SIZE,
    strips: int = 32,
    wanted: bool = True,
    groups: int = 0,
    parts: int = 1,
    device: str = "meta",
) -> Call:
    """The gradients of B and of the magnitude from what was summed over tokens; `wanted`: B's too.

    Without strips there is no gradient of the magnitude.
    """
    stack = (groups,) if groups else ()
    operands: dict[str, Tensor | None] = {
        "p": _zeros((parts, *stack, size, rank), _FP32, device),
        "b": _factor_b((*stack, size, rank), dtypes[1], device),
        "dot": _zeros((*stack, strips, size), _FP32, device) if strips else None,
        "g": _zeros((*stack, size), _FP32, device),
        "divisor": _zeros((*stack, size), _FP32, device),
    }
    experts = f"{groups} experts" if groups else ""
    summed = f"{strips} strips", f"{parts} parts"
    case = _words(f"{size} features", f"rank {rank}", *summed, "" if wanted else "no dB", experts)
    dtype = (dtypes[1] if dtypes[0] is dtypes[1] else _FP32) if wanted else None
    return Call("factor_grads", _labels(dtypes), case, operands, (0.5, dtype), ("db", "dm"))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def shipped(every_dtype: bool = True) -> list[Launch]:
    """Every launch to compile, each distinct signature once; float16 follows bfloat16 unless `every_dtype`."""
    dtypes = [pair for pair in DTYPES if every_dtype or pair[0] is not _FP16]
    makers = _norms, _kept_norms, _merges, _composes, _products, _one_passes
    calls = [call for pair in dtypes for make in makers for call in make(pair)]
    calls += [call for base, adapter in dtypes if base is adapter for call in _scale_reduces(base)]
    calls += [factor_grads(pair, rank, *rest) for pair in dtypes for rank, *rest in _FACTOR_GRADS]
    return list({launch.signature: launch for call in calls for launch in call.launches}.values())


_FACTOR_GRADS = (
    (16, _SIZE, 16, True, 0, 16), (64, _SIZE, 16, True, 0, 16), (63, _SIZE - 1, 16, True, 0, 16), (384,),
    (383, _SIZE - 1), (1, _SIZE, 1, False), (16, _SIZE, 0, True, 0, 16), (64, _SIZE, 0), (16, _SIZE, 1, True, 64),
    (63, _SIZE - 1, 16, True, 64, 16),
)  # fmt: skip


def _classes(values: Iterable[int], make: Callable[[int], Call]) -> list[int]:
    """A value for every configuration that `make` meets; multiples of 16, and large ones, are preferred."""
    ordered = sorted(values, key=lambda value: (value % 16 == 0, value))
    return list({make(value).config: value for value in ordered}.values())


def _norms(dtypes: tuple[torch.dtype, torch.dtype]) -> Iterator[Call]:
    for rank in _classes(RANKS, partial(weight_norm, dtypes, wide=True)):
        yield weight_norm(dtypes, rank, wide=True)
        yield weight_norm(dtypes, rank, axis="in", wide=True)
        yield weight_norm(dtypes, max(1, rank - 1), (_SIZE - 1, _SIZE - 1), wide=True)
    ranks = _classes(RANKS, partial(weight_norm, dtypes))
    for rank in ranks:
        yield weight_norm(dtypes, rank)
        yield weight_norm(dtypes, rank, axis="in")
    yield weight_norm(dtypes, 8)
    if dtypes[0] is _FP16:
        return
    for rank in (64, max(ranks)):
        yield weight_norm(dtypes, rank, conv1d=True)
        yield weight_norm(dtypes, rank, conv1d=True, axis="in")
        # Odd sizes and ranks leave no load aligned.
        yield weight_norm(dtypes, rank - 1, (_SIZE - 1, _SIZE - 1))
    if dtypes[1] is _BF16:
        yield weight_norm(dtypes, 1)
    yield weight_norm(dtypes, 16, groups=64)


def _kept_norms(dtypes: tuple[torch.dtype, torch.dtype]) -> Iterator[Call]:
    for rank in _classes(RANKS, partial(kept_norm, dtypes)):
        yield kept_norm(dtypes, rank)
    yield kept_norm(dtypes, 383, (_SIZE - 1, _SIZE - 1), conv1d=True, axis="in")


def _merges(dtypes: tuple[torch.dtype, torch.dtype]) -> Iterator[Call]:
    for rank in _classes(RANKS, partial(merge, dtypes)):
        yield merge(dtypes, rank)
        yield merge(dtypes, rank, axis="in", magnitude=False)
        if dtypes[0] is not _FP32:
            yield merge(dtypes, rank, seed=_SEED)
    yield merge(dtypes, 383, (_SIZE - 1, _SIZE - 1), conv1d=True)
    if dtypes[0] is not _FP32:
        yield merge(dtypes, 383, (_SIZE - 1, _SIZE - 1), conv1d=True, axis="in", seed=_SEED)
    yield merge(dtypes, 16, groups=64)


def _composes(dtypes: tuple[torch.dtype, torch.dtype]) -> Iterator[Call]:
    for wide in {False, dtypes[0] is not dtypes[1]}:
        make = partial(compose, dtypes, wide=wide)
        for tokens in _classes(TOKENS, lambda count, make=make: make(count, 64)):
            for rank in _classes(RANKS, partial(make, tokens)):
                yield make(tokens, rank)
        yield make(8191, 383, size=_SIZE - 1)
        yield make(16384, 16, groups=64)
        for tokens in (32, 8192):
            yield make(tokens, 64, groups=32, adapters=True, keep=False)
    if dtypes == (_BF16, _BF16):
        yield compose(dtypes, 1, 16)
        for magnitude, bias in ((False, False), (True, False), (False, True)):
            yield compose(dtypes, 8192, LARGEST_RANK, magnitude=magnitude, bias=bias)


def _products(dtypes: tuple[torch.dtype, torch.dtype]) -> Iterator[Call]:
    for rows in (16, 32, 64):
        for columns in (16, 32, 64):
            yield product(dtypes, rows, _SIZE, columns)
    for tokens in (1, 8192):
        yield product(dtypes, tokens, _SIZE, 16)
    yield product(dtypes, 8191, _SIZE - 1, 383)
    yield product(dtypes, 32, _SIZE, 64, groups=32, adapters=True)
    yield product(dtypes, 16384, _SIZE, 16, groups=64)
    for tokens in (8192, 8191):
        yield product(dtypes, _SIZE, tokens, 16, transposed=True, out=_FP32)


def _one_passes(dtypes: tuple[torch.dtype, torch.dtype]) -> Iterator[Call]:
    if dtypes[0] is _FP32:
        return
    for tokens in (1, 32, 64):
        for rank in (16, 32, 64):
            yield one_pass(dtypes, tokens, rank)
    yield one_pass(dtypes, 16, 64, keep=True)
    yield one_pass(dtypes, 64, 64, (_SIZE // 4, _SIZE), keep=True)
    yield one_pass(dtypes, 5, 15, (_SIZE - 1, _SIZE - 1), keep=True, bias=False)
    yield one_pass(dtypes, 8, 16, conv1d=True)


def _scale_reduces(dtype: torch.dtype) -> Iterator[Call]:
    for tokens in _classes(TOKENS, partial(scale_reduce, dtype)):
        yield scale_reduce(dtype, tokens)
    yield scale_reduce(dtype, 8191, size=_SIZE - 1)
    yield scale_reduce(dtype, 16384, groups=64)
    for h in dict.fromkeys((dtype, _FP32)):
        for rank in (16, 32, 64):
            yield scale_reduce(dtype, 8192, total=False, rank=rank, h=h)
        yield scale_reduce(dtype, 8191, _SIZE - 1, rank=63, h=h)
        yield scale_reduce(dtype, 16384, rank=16, groups=64, total=False, h=h)
        yield product_over_tokens(dtype, 16384, h=h)
    if dtype is not _BF16:
        return
    for wanted in ((True, True, False), (True, False, False), (False, False, True)):
        yield scale_reduce(dtype, 8192, _SIZE, *wanted)
