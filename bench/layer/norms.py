"""The norm's table: shapes, ranks and dtypes, ours in every form, and PEFT's.

A row's bytes and FLOPs are the fewest: W, A and B once, the norm once, two operations for each element of W and rank.
`ours` is what a layer calls when its norm has to be refreshed, |W|² at hand where the factored form wants it; `direct`
and `factored` are its two forms, whichever it takes; `unchanged` is what a call costs that asks the device and hears
that nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.layer.kernels import KernelRow, modules
from bench.layer.problem import DTYPES, error
from bench.timing import cache_bytes, copies_beyond
from dora_kernels import reference, torch_backend
from dora_kernels.content import sample

LIMIT = 1e-5
"""The norm is computed in float32 accuracy from the factors as stored."""
ROUNDED_LIMIT = 2e-2
"""PEFT computes it in the adapter's dtype."""
SCALING = 0.5


@dataclass(frozen=True)
class NormCase:
    out_features: int
    in_features: int
    rank: int
    dtypes: str
    device: torch.device

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.out_features}x{self.in_features}, rank {self.rank}, {self.dtypes}"

    @property
    def least(self) -> tuple[int, int]:
        """Bytes and FLOPs."""
        base, adapter = (torch.finfo(dtype).bits // 8 for dtype in DTYPES[self.dtypes])
        elements = self.out_features * self.in_features
        factors = self.rank * (self.out_features + self.in_features)
        return base * elements + adapter * factors + 4 * self.out_features, 2 * elements * self.rank


Factors = tuple[Tensor, Tensor, Tensor]


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


def norm_row(case: NormCase, backend: str) -> KernelRow:
    """Every provider on copies of the factors that exceed the cache."""
    least_bytes, least_flops = case.least
    row = KernelRow("weight_norm", case.rank, None, case.dtypes, least_bytes, least_flops)
    row.shape = f"{case.out_features}x{case.in_features}"
    copies = [_factors(case, seed) for seed in range(copies_beyond(cache_bytes(case.device), least_bytes))]
    wanted = reference.weight_norm(*(t.double() for t in copies[0]), SCALING, "out")

    def add(name: str, call: Callable[..., Tensor], limit: float = LIMIT, *beside: list[Any]) -> None:
        calls = [lambda given=given: call(*given) for given in zip(copies, *beside)]
        row.add(name, calls, error(calls[0](), wanted), limit)

    squares = [torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_() for weight, _, _ in copies]
    for name, module in modules(backend):
        add(name, lambda t, square, module=module: module.weight_norm(*t, SCALING, square), LIMIT, squares)
    for name, form in _forms(backend, case).items():
        add(name, lambda t, square, form=form: form(*t, SCALING, square), LIMIT, squares)
    if backend == "triton":
        add("unchanged", _ask, LIMIT, _kept(copies))
    try:
        peft = [_peft_modules(factors) for factors in copies]
    except ImportError as reason:
        row.absent["peft"] = str(reason)
        return row
    add("peft", _peft_norm, ROUNDED_LIMIT, peft)
    return row


def _forms(backend: str, case: NormCase) -> dict[str, Callable[..., Tensor]]:
    """Both forms by name, whichever the backend takes, of the factors, the scaling and |W|²."""
    if backend == "torch":

        def direct(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor) -> Tensor:
            return torch_backend.direct_norm(weight, a.float(), b.float(), scaling)

        def factored(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor) -> Tensor:
            return torch_backend.factored_norm(weight, a.float(), b.float(), scaling, square)

        return {"direct": direct, "factored": factored}
    from dora_kernels.kernels import norm

    found = {"direct": lambda *given: norm.direct_norm(*given[:4]), "factored": norm.factored_norm}
    return found if DTYPES[case.dtypes][0] == torch.bfloat16 else {"direct": found["direct"]}


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


def _peft_modules(factors: Factors) -> tuple[Any, nn.Linear, nn.Linear]:
    from peft.tuners.lora.dora import DoraLinearLayer

    linears = []
    for factor in factors[1:]:
        module = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta")
        module.weight = nn.Parameter(factor, requires_grad=False)
        linears.append(module)
    return DoraLinearLayer(fan_in_fan_out=False), linears[0], linears[1]


def _peft_norm(factors: Factors, modules: tuple[Any, nn.Linear, nn.Linear]) -> Tensor:
    """What PEFT's DoRA layer does in every forward pass to have its norm; x is in the adapter's dtype there."""
    dora, lora_A, lora_B = modules
    dtype = lora_A.weight.dtype
    with torch.no_grad():
        eye = torch.eye(lora_A.weight.shape[1], device=lora_A.weight.device, dtype=dtype)
        product = lora_B(lora_A(eye)).T
        norm: Tensor = dora.get_weight_norm(factors[0].to(dtype), product, SCALING)
        return norm
