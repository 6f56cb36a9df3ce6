"""The norm: ours in both forms and on every backend, and what each library does in its layer to have it.

A row's bytes and FLOPs are the fewest: W, A and B once, the norm once, two operations for each element of W and rank.
`ours` is the norm itself, |W|² at hand where the factored form wants it; what a layer notes beside it, to know later
whether A, B and W are the same, is in the steps of the suite layer. `direct` and `factored` are its two forms, whatever
the thresholds between them say.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.problem import dtypes_of
from bench.providers import Case, Missing, Subject, library
from bench.timing import cache_bytes, copies_beyond
from dora_kernels.engine.dispatch import norm_backend, triton_problem
from dora_kernels.engine.ops import norm_module
from dora_kernels.testing import error, weight_norm

if TYPE_CHECKING:
    from bench.run import Run

LIMIT = 1e-5
"""The norm is computed in float32 accuracy from the factors as stored."""
ROUNDINGS = 2.0
"""Of the adapter's dtype, in which the others compute it."""
SCALING = 0.5
SHAPES = ((4096, 4096), (8192, 8192), (8192, 28672))
"""On a GPU where `--hidden` says nothing."""
THRESHOLDS = {
    "torch": ("dora_kernels.engine.blocked._FACTORED_ELEMENTS", "dora_kernels.engine.blocked._FACTORED_FEATURES"),
    "triton": ("dora_kernels.kernels.factored.DIRECT_RANK",),
}
"""Below these the direct form is taken; at 0 the factored one always is."""
Factors = tuple[Tensor, Tensor, Tensor]


def cases(run: Run, suite: str) -> Iterator[NormCase]:
    """Every combination of dtypes, shape and rank."""
    given, cuda = run.given, run.device.type == "cuda"
    shapes = [(size, size) for size in given.hidden or ()] or (SHAPES if cuda else ((2048, 2048),))
    for dtypes, shape, rank in itertools.product(given.dtypes, shapes, given.ranks or ([16, 384] if cuda else [16])):
        yield NormCase(*shape, rank, dtypes, run.device)


@dataclass
class NormCase(Case):
    """One W and its factors."""

    out_features: int
    in_features: int
    rank: int
    dtypes: str
    device: torch.device
    suite: str = "norm"
    providers: Sequence[str] = (
        "peft_dora", "peft_dora_compiled", "torchtune", "dense", "ours", "ours_triton", "ours_torch", "ours_direct",
        "ours_factored",
    )  # fmt: skip

    @property
    def label(self) -> str:  # type: ignore[override]
        """For people."""
        return f"{self.out_features}x{self.in_features}, rank {self.rank}, {self.dtypes}"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        return {
            "shape": [self.out_features, self.in_features], "rank": self.rank, "tokens": None, "dtypes": self.dtypes,
        }  # fmt: skip

    @property
    def least(self) -> tuple[int, int]:
        """Bytes and FLOPs."""
        base, adapter = (dtype.itemsize for dtype in dtypes_of(self.dtypes))
        elements = self.out_features * self.in_features
        factors = self.rank * (self.out_features + self.in_features)
        return base * elements + adapter * factors + 4 * self.out_features, 2 * elements * self.rank

    @functools.cached_property
    def copies(self) -> list[Factors]:
        """W, A and B, so often that none is found in the cache."""
        count = copies_beyond(cache_bytes(self.device), self.least[0])
        return [self._factors(seed) for seed in range(count)]

    @functools.cached_property
    def squares(self) -> list[Tensor]:
        """|W|² of each copy, which a layer keeps."""
        return [torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_() for weight, _, _ in self.copies]

    @functools.cached_property
    def wanted(self) -> Tensor:
        """The first copy's norm in float64."""
        return weight_norm(*(t.double() for t in self.copies[0]), SCALING, "out")

    def subject(self, provider: str) -> Subject:
        """The provider's norm of every copy."""
        if provider.startswith("ours"):
            call, beside = _ours(self, provider), self.squares
        else:
            call, beside = _THEIRS[provider](), [_linears(factors) for factors in self.copies]
        calls = [functools.partial(call, *given) for given in zip(self.copies, beside)]
        rounded = ROUNDINGS * torch.finfo(dtypes_of(self.dtypes)[1]).eps
        limit = LIMIT if provider.startswith("ours") else max(LIMIT, rounded)
        errors = {"norm": error(calls[0]().view_as(self.wanted), self.wanted)}
        parts = frozenset({"refresh"})
        return Subject(provider, {"refresh": calls}, errors, {"norm": limit}, {"refresh": self.least}, parts)

    def _factors(self, seed: int) -> Factors:
        generator = torch.Generator(self.device).manual_seed(seed)
        base, adapter = dtypes_of(self.dtypes)

        def normal(rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
            return (scale * torch.randn(rows, columns, generator=generator, device=self.device)).to(dtype)

        width = self.in_features**-0.5
        return (
            normal(self.out_features, self.in_features, width, base),
            normal(self.rank, self.in_features, width, adapter),
            normal(self.out_features, self.rank, self.rank**-0.5, adapter),
        )


def _ours(case: NormCase, provider: str) -> Callable[[Factors, Tensor], Tensor]:
    """The norm of the factors, given |W|²."""
    name = provider.removeprefix("ours_")
    form = name if name in ("direct", "factored") else ""
    backend = norm_backend("auto", case.copies[0][0]) if form or name == "ours" else name
    if backend == "triton" and (reason := triton_problem(case.device)):
        raise Missing(reason)
    if form == "factored" and backend == "triton" and dtypes_of(case.dtypes)[0] != torch.bfloat16:
        raise Missing("the kernels have the factored form for bfloat16 weights only")
    module = norm_module(backend)

    def norm(factors: Factors, square: Tensor) -> Tensor:
        found: Tensor = module.weight_norm(*factors, SCALING, square)
        return found

    if not form:
        return norm
    limit = 0 if form == "factored" else 1 << 62

    def forced(factors: Factors, square: Tensor) -> Tensor:
        for threshold in patches:
            threshold.start()
        try:
            return norm(factors, square)
        finally:
            for threshold in patches:
                threshold.stop()

    patches = [mock.patch(name, limit) for name in THRESHOLDS[backend]]
    return forced


def _linears(factors: Factors) -> list[nn.Linear]:
    """A and B as the libraries hold them."""
    linears = []
    for factor in factors[1:]:
        module = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta")
        module.weight = nn.Parameter(factor, requires_grad=False)
        linears.append(module)
    return linears


def _dense_norm(of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Factors, list[nn.Linear]], Tensor]:
    """What a library's layer does in every forward pass: `of` W and B·A, in the adapter's dtype; x is in it there."""

    @torch.no_grad()
    def norm(factors: Factors, linears: list[nn.Linear]) -> Tensor:
        lora_A, lora_B = linears
        dtype = lora_A.weight.dtype
        eye = torch.eye(lora_A.weight.shape[1], device=lora_A.weight.device, dtype=dtype)
        return of(factors[0].to(dtype), lora_B(lora_A(eye)).T)

    return norm


def _peft() -> Callable[..., Tensor]:
    with library():
        from peft.tuners.lora.dora import DoraLinearLayer
    dora = DoraLinearLayer(fan_in_fan_out=False)
    return _dense_norm(lambda weight, product: dora.get_weight_norm(weight, product, SCALING))


def _torchtune() -> Callable[..., Tensor]:
    with library():
        from torchtune.modules.peft import DoRALinear
    layer = DoRALinear(8, 8, 1, SCALING)  # its method asks for the scaling alone
    return _dense_norm(layer._get_weight_norm)


_THEIRS: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "peft_dora": _peft,
    "peft_dora_compiled": lambda: torch.compile(_peft()),
    "torchtune": _torchtune,
    "dense": lambda: lambda factors, _: (factors[0] + SCALING * (factors[2] @ factors[1])).norm(dim=1),
}
