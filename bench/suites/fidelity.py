"""Errors of the output and every gradient against float64, ours beside PEFT's, in the same dtypes; nothing is timed.

The oracle starts from the numbers as they are stored: what rounding them to the dtype has cost already is nobody's
error. The aim is that ours is at most PEFT's in every cell; one that is more than `NOISE` above it fails the run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.layers import NEEDS, make_layer
from bench.problem import LayerShape, ShapeCase, make_problem
from bench.providers import Subject
from dora_kernels.testing import ROW, Problem, eager, errors, limits, oracle, solve, weight_norm

if TYPE_CHECKING:
    from bench.run import Run

RANKS = (1, 4, 16, 64, 256, 768)
HIDDEN, TOKENS = 768, 64
PROVIDERS = ("peft_dora", "ours", "ours_triton", "ours_torch")
NOISE = 1.1
"""In float32 ours and PEFT's differ in the order of sums alone. The rms error of the 768 elements of dm scatters by
1 / sqrt(2·768), the quotient of two by 3.7 %; this is not quite three times that."""
CONDITIONS = {
    "g near 1": "m within a thousandth of the norm, B small: the start of a training",
    "trained": "s·B·A as large as W, m moved by a quarter",
    "g far from 1": "m from a tenth to ten times the norm",
    "tiny weights": "W, A, B and m a thousand times smaller",
    "huge weights": "W and m a thousand times larger, a bias a thousand times larger",
    "large bias": "a bias a thousand times the output",
}


def cases(run: Run, suite: str) -> Iterator[FidelityCase]:
    """Every condition, dtype and rank."""
    for shape in run.shapes([HIDDEN], [TOKENS], RANKS):
        for condition in CONDITIONS:
            yield FidelityCase(shape, condition)


@dataclass
class FidelityCase(ShapeCase):
    """One cell of the table."""

    shape: LayerShape
    condition: str
    suite: str = "fidelity"
    providers: Sequence[str] = PROVIDERS

    timed = False

    @property
    def label(self) -> str:  # type: ignore[override]
        """For people."""
        return f"{self.condition}, {super().label}"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        return {**super().facts, "condition": self.condition}

    def subject(self, provider: str) -> Subject:
        """The provider's layer: PEFT's error is the limit of the others."""
        layer = make_layer(provider, self._problem, self.shape)
        found = errors(layer.results(), self._wanted)
        allowed = {}
        if provider != "peft_dora":
            # Where PEFT's own error is not finite, four times that of plain PyTorch operations.
            whole = {name: off for name, off in self._stock.items() if not name.endswith(ROW)}
            allowed = self._plain | {name: NOISE * off for name, off in whole.items() if math.isfinite(off)}
        return Subject(provider, {"results": []}, found, allowed)

    @functools.cached_property
    def _problem(self) -> Problem:
        return make(self.shape, self.condition)

    @functools.cached_property
    def _wanted(self) -> dict[str, Tensor]:
        return oracle(self._problem, NEEDS["dora"])

    @functools.cached_property
    def _plain(self) -> dict[str, float]:
        """What plain PyTorch operations allow."""
        return limits(solve(eager, self._problem, NEEDS["dora"]), self._wanted)

    @functools.cached_property
    def _stock(self) -> dict[str, float]:
        return errors(make_layer("peft_dora", self._problem, self.shape).results(), self._wanted)


def make(shape: LayerShape, condition: str) -> Problem:
    """A layer in a condition, in the shape's dtypes."""
    generator = torch.Generator(shape.device).manual_seed(1)
    p = make_problem(shape, 0)

    def moved(low: float, high: float, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        norm = weight_norm(weight, a, b, p.scaling, "out").double()
        exponent = torch.rand(norm.shape, generator=generator, device=shape.device, dtype=torch.float64)
        return (norm * low * (high / low) ** exponent).to(shape.adapters)

    weight, a, b, bias = p.weight, p.lora_A, p.lora_B, None
    span = 0.75, 1.25
    if condition == "g near 1":
        b, span = b * 1e-3, (0.999, 1.001)
    elif condition == "g far from 1":
        span = 0.1, 10.0
    elif condition == "tiny weights":
        weight, a, b = weight * 1e-3, a * 10**-1.5, b * 10**-1.5
    elif condition == "huge weights":
        weight, a, b = weight * 1e3, a * 10**1.5, b * 10**1.5
    size = {"large bias": 1e3, "huge weights": 1e3}.get(condition)
    if size:
        bias = (size * torch.randn(shape.hidden, generator=generator, device=shape.device)).to(shape.base)
    return p.replace(weight=weight, lora_A=a, lora_B=b, magnitude=moved(*span, weight, a, b), bias=bias)
