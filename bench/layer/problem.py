"""The layer that is timed, its float64 oracle, and the error that is allowed.

A result's error is ``|result - oracle| / |oracle|``; the limit is four times that of the same layer in plain PyTorch
operations and the same dtypes. PEFT's norm is rounded to the adapter's dtype, which the factor leaves room for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels import reference

ALLOWED = 4.0
FLOOR = 1e-6
"""Errors below this pass anywhere: plain PyTorch can be exact by luck."""


DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
"""Of the weight and the activations, and of the adapter."""


@dataclass(frozen=True)
class Case:
    """One row of the layer table."""

    hidden: int
    rank: int
    tokens: int
    dtypes: str
    device: torch.device

    @property
    def base(self) -> torch.dtype:
        """Of the weight and the activations."""
        return DTYPES[self.dtypes][0]

    @property
    def adapters(self) -> torch.dtype:
        """Of A, B and the magnitude."""
        return DTYPES[self.dtypes][1]

    @property
    def autocast(self) -> bool:
        """float32 adapters on a bfloat16 layer are PEFT's default, and run under autocast."""
        return self.base != self.adapters

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.hidden}x{self.hidden}, rank {self.rank}, {self.tokens} tokens, {self.dtypes}"


@dataclass(frozen=True)
class Problem:
    """Tensors of a layer in training: B far from zero, magnitudes moved away from the norm."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    dy: Tensor
    scaling: float

    @property
    def nbytes(self) -> int:
        """Of what one forward pass reads and writes."""
        return sum(t.nbytes for t in (self.x, self.weight, self.lora_A, self.lora_B, self.dy))


def make_problem(case: Case, seed: int) -> Problem:
    """Fresh random tensors."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=case.device)).to(dtype)

    size = case.hidden
    weight = normal(size, size, dtype=case.base, scale=size**-0.5)
    lora_A = normal(case.rank, size, dtype=case.adapters, scale=size**-0.5)
    lora_B = normal(size, case.rank, dtype=case.adapters, scale=case.rank**-0.5)
    scaling = 0.5
    norm = reference.weight_norm(weight, lora_A, lora_B, scaling, "out")
    moved = norm * (0.75 + 0.5 * torch.rand(size, generator=generator, device=case.device))
    x, dy = (normal(case.tokens, size, dtype=case.base) for _ in range(2))
    return Problem(x, weight, lora_A, lora_B, moved.to(case.adapters), dy, scaling)


def eager_dora(problem: Problem, x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """DoRA in plain PyTorch operations in x's dtype, the norm in float32."""
    norm = reference.weight_norm(problem.weight, a.detach(), b.detach(), problem.scaling, "out")
    return eager_lora(problem, x, a, b) * (m / norm).to(x.dtype)


def eager_lora(problem: Problem, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """LoRA in plain PyTorch operations in x's dtype."""
    low = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, problem.weight) + problem.scaling * low


def solve(function: Callable[..., Tensor], problem: Problem, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The output "y" of `function` of the named tensors, and the gradient of each."""
    leaves = [getattr(problem, name).detach().requires_grad_() for name in names]
    y = function(*leaves)
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, problem.dy.to(y.dtype))))}


NAMES = {"frozen": ("x",), "lora": ("x", "lora_A", "lora_B"), "dora": ("x", "lora_A", "lora_B", "magnitude")}


def oracle(problem: Problem, kind: str) -> dict[str, Tensor]:
    """Output and gradients in float64 of a layer of a kind: "frozen", "lora" or "dora"."""
    f64 = torch.float64
    names = ("x", "weight", "lora_A", "lora_B", "magnitude", "dy")
    exact = replace(problem, **{name: getattr(problem, name).to(f64) for name in names})

    def dense(x: Tensor, *adapter: Tensor) -> Tensor:
        if kind == "frozen":
            return F.linear(x, exact.weight)
        a, b, m = (*adapter, None)[:3]
        return reference.dora_linear(x, exact.weight, a, b, m, None, exact.scaling, "out", True, None, f64)

    return solve(dense, exact, NAMES[kind])


def plain(problem: Problem, kind: str) -> dict[str, Tensor]:
    """The same in plain PyTorch operations in the problem's own dtypes."""
    if kind == "frozen":
        return solve(lambda x: F.linear(x, problem.weight), problem, NAMES[kind])
    function = eager_dora if kind == "dora" else eager_lora
    return solve(lambda *leaves: function(problem, *leaves), problem, NAMES[kind])


def error(result: Tensor, wanted: Tensor) -> float:
    """Relative; NaN where the result has one."""
    return float((result.double() - wanted.double()).norm() / wanted.double().norm())


def errors(results: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """The error of each result by name."""
    return {name: error(results[name], wanted[name]) for name in wanted}


def limits(results: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """What is allowed, given plain PyTorch's `results`."""
    return {name: max(FLOOR, ALLOWED * off) for name, off in errors(results, wanted).items()}


def beyond(found: dict[str, float], allowed: dict[str, float]) -> list[str]:
    """Which errors exceed their limits; NaN always does."""
    wrong = [name for name in found if not found[name] <= allowed[name]]
    return [f"{name} off by {found[name]:.1e}, allowed {allowed[name]:.1e}" for name in wrong]
