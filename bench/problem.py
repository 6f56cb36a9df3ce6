"""The layer that is timed, its float64 oracle, and the error that is allowed.

A result's error is ``|result - oracle| / |oracle|``; the limit is four times that of the same layer in plain PyTorch
operations and the same dtypes, and for the worst row of a result sixteen times that of its worst row. PEFT's norm is
rounded to the adapter's dtype, which the factors leave room for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.providers import ROW
from dora_kernels.core import reference

ALLOWED = 4.0
ALLOWED_ROW = 16.0
"""Of a single row, in which fewer roundings make up for each other; one that is wrong is off by about 1."""
FLOOR = 1e-6
"""Errors below this pass anywhere: plain PyTorch can be exact by luck."""
PROBE = 0.02


DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "bf16/fp32": (torch.bfloat16, torch.float32),
}
"""Of the weight and the activations, and of the adapter."""


@dataclass(frozen=True)
class LayerShape:
    """A layer and its input."""

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
    def widths(self) -> tuple[int, int]:
        """Bytes of an element of each."""
        return self.base.itemsize, self.adapters.itemsize

    @property
    def autocast(self) -> bool:
        """float32 adapters on a bfloat16 layer are PEFT's default; "+" runs them under autocast, "/" without."""
        return "+" in self.dtypes

    @property
    def label(self) -> str:
        """For people."""
        words = "1 token" if self.tokens == 1 else f"{self.tokens} tokens"
        return f"{self.hidden}x{self.hidden}, rank {self.rank}, {words}, {self.dtypes}"

    @property
    def facts(self) -> dict[str, Any]:
        """What a row of figures states."""
        return {
            "shape": [self.hidden, self.hidden], "rank": self.rank, "tokens": self.tokens, "dtypes": self.dtypes,
        }  # fmt: skip


class OfShape:
    """What a case with one of these shapes says of itself."""

    shape: LayerShape

    @property
    def label(self) -> str:
        """For people."""
        return self.shape.label

    @property
    def dtypes(self) -> str:
        """Of the layer and the adapter."""
        return self.shape.dtypes

    @property
    def facts(self) -> dict[str, Any]:
        """What every row states."""
        return self.shape.facts


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
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Of what one forward pass reads and writes."""
        return sum(t.nbytes for t in (self.x, self.weight, self.lora_A, self.lora_B, self.dy))


def make_problem(shape: LayerShape, seed: int) -> Problem:
    """Fresh random tensors."""
    generator = torch.Generator(shape.device).manual_seed(seed)

    def normal(*sizes: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, generator=generator, device=shape.device)).to(dtype)

    size = shape.hidden
    weight = normal(size, size, dtype=shape.base, scale=size**-0.5)
    lora_A = normal(shape.rank, size, dtype=shape.adapters, scale=size**-0.5)
    lora_B = normal(size, shape.rank, dtype=shape.adapters, scale=shape.rank**-0.5)
    scaling = 0.5
    norm = reference.weight_norm(weight, lora_A, lora_B, scaling, "out")
    moved = norm * (0.75 + 0.5 * torch.rand(size, generator=generator, device=shape.device))
    x, dy = (normal(shape.tokens, size, dtype=shape.base) for _ in range(2))
    return Problem(x, weight, lora_A, lora_B, moved.to(shape.adapters), dy, scaling)


def eager_dora(problem: Problem, detached: bool, x: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """DoRA in plain PyTorch operations in x's dtype, the norm in float32."""
    factors = (a.detach(), b.detach()) if detached else (a, b)
    norm = reference.weight_norm(problem.weight, *factors, problem.scaling, "out")
    y = _eager(problem, x, a, b) * (m / norm).to(x.dtype)
    return y if problem.bias is None else y + problem.bias


def eager_lora(problem: Problem, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """LoRA in plain PyTorch operations in x's dtype."""
    y = _eager(problem, x, a, b)
    return y if problem.bias is None else y + problem.bias


def _eager(problem: Problem, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    low = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, problem.weight) + problem.scaling * low


def solve(function: Callable[..., Tensor], problem: Problem, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The output "y" of `function` of the named tensors, and the gradient of each."""
    leaves = [getattr(problem, name).detach().requires_grad_() for name in names]
    y = function(*leaves)
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, leaves, problem.dy.to(y.dtype))))}


NAMES = {
    "frozen": ("x",),
    "lora": ("x", "lora_A", "lora_B"),
    "dora": ("x", "lora_A", "lora_B", "magnitude"),
    "dora_attached": ("x", "lora_A", "lora_B", "magnitude"),
}
"""Kinds of layers, and whose gradients each has. "dora_attached" differentiates the norm too."""


def oracle(problem: Problem, kind: str) -> dict[str, Tensor]:
    """Output and gradients of a kind of layer in float64."""
    f64 = torch.float64
    names = ("x", "weight", "lora_A", "lora_B", "magnitude", "dy", "bias")
    tensors = {name: getattr(problem, name) for name in names}
    exact = replace(problem, **{name: t if t is None else t.to(f64) for name, t in tensors.items()})

    def dense(x: Tensor, *adapter: Tensor) -> Tensor:
        if kind == "frozen":
            return F.linear(x, exact.weight, exact.bias)
        a, b, m = (*adapter, None)[:3]
        return reference.dora_linear(
            x, exact.weight, a, b, m, exact.bias, exact.scaling, "out", kind != "dora_attached", None, f64
        )

    return solve(dense, exact, NAMES[kind])


def plain(problem: Problem, kind: str) -> dict[str, Tensor]:
    """The same in plain PyTorch operations in the problem's own dtypes."""
    if kind == "frozen":
        return solve(lambda x: F.linear(x, problem.weight, problem.bias), problem, NAMES[kind])
    if kind == "lora":
        return solve(lambda *leaves: eager_lora(problem, *leaves), problem, NAMES[kind])
    return solve(lambda *leaves: eager_dora(problem, kind == "dora", *leaves), problem, NAMES[kind])


def adapter_gradients(model: nn.Module) -> dict[str, list[Tensor]]:
    """Of a PEFT model's adapters, by kind; NaN where there is none."""
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = next(kind for kind in ("lora_A", "lora_B", "magnitude") if kind in name)
            gradient = torch.full_like(parameter, torch.nan) if parameter.grad is None else parameter.grad
            kinds.setdefault(kind, []).append(gradient)
    return kinds


def take_adapters(model: nn.Module, trained: nn.Module) -> None:
    """Give a PEFT model the adapters of another one."""
    values = dict(trained.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name])


@contextlib.contextmanager
def long_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """For the step before a last check: AdamW moves every element by about `PROBE`, which shows in 16 bits too."""
    group = optimizer.param_groups[0]
    before, group["lr"] = group["lr"], PROBE
    try:
        yield
    finally:
        group["lr"] = before


Results = dict[str, Any]
"""Tensors by name, or several under one name."""


def error(result: Tensor, wanted: Tensor) -> float:
    """Relative; NaN where the result has one."""
    return float((result.double() - wanted.double()).norm() / wanted.double().norm())


def row_error(result: Tensor, wanted: Tensor) -> float:
    """That of the worst row, or element of a vector, over the rows' root mean square: a fault in one place shows."""
    shape = (-1, wanted.shape[-1] if wanted.dim() > 1 else 1)
    off, rows = (t.double().reshape(shape) for t in (result.double() - wanted.double(), wanted))
    return float(off.norm(dim=1).max() / rows.norm() * rows.shape[0] ** 0.5)


def errors(results: Results, wanted: Results) -> dict[str, float]:
    """The error of each result by name, and that of its worst row; of several under one name, the largest."""
    found = {}
    for name, right in wanted.items():
        ones, others = (t if isinstance(t, list) else [t] for t in (results[name], right))
        pairs = [(one.view_as(other), other) for one, other in zip(ones, others, strict=True)]
        for suffix, measure in (("", error), (ROW, row_error)):
            found[name + suffix] = max((measure(*pair) for pair in pairs), key=lambda off: (math.isnan(off), off))
    return found


def limits(results: Results, wanted: Results) -> dict[str, float]:
    """What is allowed, given plain PyTorch's `results`; nothing where these are not finite."""
    found = errors(results, wanted)
    allowed = {name: ALLOWED_ROW if name.endswith(ROW) else ALLOWED for name in found}
    return {name: max(FLOOR, allowed[name] * off) for name, off in found.items() if math.isfinite(off)}


def beyond(found: dict[str, float], allowed: dict[str, float]) -> list[str]:
    """Which errors exceed their limits; NaN exceeds any."""
    wrong = [name for name in found if name in allowed and not found[name] <= allowed[name]]
    return [f"{name} off by {found[name]:.1e}, allowed {allowed[name]:.1e}" for name in wrong]
