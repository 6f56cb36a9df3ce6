"""The norm: ours in every form and on every backend, and what each library does in its layer to have it.

A row's bytes and FLOPs are the fewest: W, A and B once, the norm once, two operations for each element of W and rank.
`ours` is the norm itself, |W|² at hand where the factored form wants it; what a layer notes beside it, to know later
whether A, B and W are the same, is in the steps of the suite layer. `direct` and `factored` are its two forms;
`unchanged` is what a call costs that asks the device and hears that all is as it was.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bench.problem import DTYPES, error
from bench.providers import Missing, Subject, library
from bench.timing import cache_bytes, copies_beyond
from dora_kernels import linear, reference, torch_backend
from dora_kernels.engine.dispatch import resolve, triton_problem
from dora_kernels.engine.fingerprints import sample

if TYPE_CHECKING:
    from bench.run import Run

LIMIT = 1e-5
"""The norm is computed in float32 accuracy from the factors as stored."""
ROUNDINGS = 2.0
"""Of the adapter's dtype, in which the others compute it."""
SCALING = 0.5
SHAPES = ((4096, 4096), (8192, 8192), (8192, 28672))
"""On a GPU where `--hidden` says nothing."""
Factors = tuple[Tensor, Tensor, Tensor]


def stages(run: Run) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every combination of dtypes, shape and rank."""
    given, cuda = run.given, run.device.type == "cuda"
    shapes = [(size, size) for size in given.hidden or ()] or (SHAPES if cuda else ((2048, 2048),))
    for dtypes, shape, rank in itertools.product(given.dtypes, shapes, given.ranks or ([16, 384] if cuda else [16])):
        case = NormCase(*shape, rank, dtypes, run.device)
        yield f"norm: {case.label}", lambda case=case: run.measure(case)


@dataclass
class NormCase:
    """One W and its factors."""

    out_features: int
    in_features: int
    rank: int
    dtypes: str
    device: torch.device
    suite: str = "norm"
    providers: Sequence[str] = (
        "peft_dora", "peft_dora_compiled", "torchtune", "dense", "ours", "ours_triton", "ours_torch", "ours_reference",
        "ours_direct", "ours_factored", "ours_unchanged",
    )  # fmt: skip

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.out_features}x{self.in_features}, rank {self.rank}, {self.dtypes}"

    @property
    def facts(self) -> dict[str, Any]:
        """What every row states."""
        return {
            "shape": [self.out_features, self.in_features], "rank": self.rank, "tokens": None, "dtypes": self.dtypes,
        }  # fmt: skip

    @property
    def least(self) -> tuple[int, int]:
        """Bytes and FLOPs."""
        base, adapter = (dtype.itemsize for dtype in DTYPES[self.dtypes])
        elements = self.out_features * self.in_features
        factors = self.rank * (self.out_features + self.in_features)
        return base * elements + adapter * factors + 4 * self.out_features, 2 * elements * self.rank

    @functools.cached_property
    def copies(self) -> list[Factors]:
        """W, A and B, so often that none is found in the cache."""
        count = copies_beyond(cache_bytes(self.device), self.least[0])
        return [_factors(self, seed) for seed in range(count)]

    @functools.cached_property
    def squares(self) -> list[Tensor]:
        """|W|² of each copy, which a layer keeps."""
        return [torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_() for weight, _, _ in self.copies]

    @functools.cached_property
    def wanted(self) -> Tensor:
        """The first copy's norm in float64."""
        return reference.weight_norm(*(t.double() for t in self.copies[0]), SCALING, "out")

    def subject(self, provider: str) -> Subject:
        """The provider's norm of every copy."""
        prepared = _PREPARED[provider](self) if provider in _PREPARED else _ours(self, provider)
        call, *beside = prepared
        calls = [functools.partial(call, *given) for given in zip(self.copies, *beside)]
        rounded = ROUNDINGS * torch.finfo(DTYPES[self.dtypes][1]).eps
        limit = LIMIT if provider.startswith("ours") else max(LIMIT, rounded)
        least = {} if provider == "ours_unchanged" else {"refresh": self.least}
        errors = {"norm": error(calls[0]().view_as(self.wanted), self.wanted)}
        return Subject(provider, {"refresh": calls}, errors, {"norm": limit}, least, frozenset({"refresh"}))


def _factors(case: NormCase, seed: int) -> Factors:
    generator = torch.Generator(case.device).manual_seed(seed)
    base, adapter = DTYPES[case.dtypes]

    def normal(rows: int, columns: int, scale: float, dtype: torch.dtype) -> Tensor:
        return (scale * torch.randn(rows, columns, generator=generator, device=case.device)).to(dtype)

    width = case.in_features**-0.5
    return (
        normal(case.out_features, case.in_features, width, base),
        normal(case.rank, case.in_features, width, adapter),
        normal(case.out_features, case.rank, case.rank**-0.5, adapter),
    )


def _ours(case: NormCase, provider: str) -> tuple[Any, ...]:
    """A call of the factors and of what lies beside them, and that."""
    automatic = resolve("auto", case.copies[0])
    if provider == "ours_unchanged":
        if automatic != "triton":
            raise Missing("the device is asked on a GPU only")
        return _ask, _kept(case.copies)
    if provider in ("ours_direct", "ours_factored"):
        form = _forms(case, automatic)[provider.removeprefix("ours_")]
        return lambda t, square: form(*t, SCALING, square), case.squares
    backend = automatic if provider == "ours" else provider.removeprefix("ours_")
    if backend == "reference":
        return lambda t: reference.weight_norm(*t, SCALING, "out"), *()
    if backend == "triton" and (reason := triton_problem(case.device)):
        raise Missing(reason)
    module = linear.primitives(backend)
    return lambda t, square: module.weight_norm(*t, SCALING, square), case.squares


def _forms(case: NormCase, backend: str) -> dict[str, Callable[..., Tensor]]:
    """Both forms by name, whichever the backend takes, of the factors, the scaling and |W|²."""
    if backend == "torch":

        def direct(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor) -> Tensor:
            return torch_backend.direct_norm(weight, a.float(), b.float(), scaling)

        def factored(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor) -> Tensor:
            return torch_backend.factored_norm(weight, a.float(), b.float(), scaling, square)

        return {"direct": direct, "factored": factored}
    from dora_kernels.kernels import norm

    if DTYPES[case.dtypes][0] == torch.float32:

        def factored(*_: Any) -> Tensor:
            raise Missing("the kernels have the factored form for 16-bit weights only")

        return {"direct": lambda *given: norm.direct_norm(*given[:4]), "factored": factored}
    return {"direct": lambda *given: norm.direct_norm(*given[:4]), "factored": norm.factored_norm}


def _kept(copies: list[Factors]) -> list[Any]:
    """A norm kept on the device for each copy, computed."""
    from dora_kernels.kernels import KeptNorm

    found = [KeptNorm(weight.shape[0], SCALING, weight.device) for weight, _, _ in copies]
    for factors, kept in zip(copies, found):
        _ask(factors, kept)
    return found


def _ask(factors: Factors, kept: Any) -> Tensor:
    weight, a, b = factors
    norm: Tensor = kept.divisor(weight, sample(weight), a, b)
    return norm


def _linears(factors: Factors) -> list[nn.Linear]:
    """A and B as the libraries hold them."""
    linears = []
    for factor in factors[1:]:
        module = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta")
        module.weight = nn.Parameter(factor, requires_grad=False)
        linears.append(module)
    return linears


def _peft(case: NormCase, compiled: bool = False) -> tuple[Any, ...]:
    with library():
        from peft.tuners.lora.dora import DoraLinearLayer
    dora = DoraLinearLayer(fan_in_fan_out=False)

    @torch.no_grad()
    def norm(factors: Factors, linears: list[nn.Linear]) -> Tensor:
        """What PEFT's DoRA layer does in every forward pass; x is in the adapter's dtype there."""
        lora_A, lora_B = linears
        dtype = lora_A.weight.dtype
        eye = torch.eye(lora_A.weight.shape[1], device=lora_A.weight.device, dtype=dtype)
        found: Tensor = dora.get_weight_norm(factors[0].to(dtype), lora_B(lora_A(eye)).T, SCALING)
        return found

    return torch.compile(norm) if compiled else norm, [_linears(factors) for factors in case.copies]


def _torchtune(case: NormCase) -> tuple[Any, ...]:
    with library():
        from torchtune.modules.peft import DoRALinear
    layer = DoRALinear(8, 8, 1, SCALING)  # its method asks for the scaling alone

    @torch.no_grad()
    def norm(factors: Factors, linears: list[nn.Linear]) -> Tensor:
        """What torchtune's layer does in every forward pass."""
        lora_A, lora_B = linears
        dtype = lora_A.weight.dtype
        eye = torch.eye(lora_A.weight.shape[1], device=lora_A.weight.device, dtype=dtype)
        found: Tensor = layer._get_weight_norm(factors[0].to(dtype), lora_B(lora_A(eye)).T)
        return found

    return norm, [_linears(factors) for factors in case.copies]


def _dense(case: NormCase) -> tuple[Any, ...]:
    def norm(factors: Factors) -> Tensor:
        weight, a, b = factors
        return (weight + SCALING * (b @ a)).norm(dim=1)

    return (norm,)


_PREPARED: dict[str, Callable[[NormCase], tuple[Any, ...]]] = {
    "peft_dora": _peft,
    "peft_dora_compiled": functools.partial(_peft, compiled=True),
    "torchtune": _torchtune,
    "dense": _dense,
}
