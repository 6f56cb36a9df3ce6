"""The shape of a layer that is timed, its numbers, and what judges a model. The oracle is `dora_kernels.testing`'s."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.providers import Case
from dora_kernels import testing
from dora_kernels.testing import Problem

PROBE = 0.02
Judged = tuple[dict[str, Any], dict[str, float]]
"""The exact results, and the errors that are allowed."""


def dtypes_of(name: str) -> tuple[torch.dtype, torch.dtype]:
    """Of the weight and the activations, and of the adapter."""
    return testing.DTYPES[name.replace("/", "+")]


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
        return dtypes_of(self.dtypes)[0]

    @property
    def adapters(self) -> torch.dtype:
        """Of A, B and the magnitude."""
        return dtypes_of(self.dtypes)[1]

    @property
    def widths(self) -> tuple[int, int]:
        """Bytes of an element of each."""
        return self.base.itemsize, self.adapters.itemsize

    @property
    def autocast(self) -> bool:
        """True if the layer runs under autocast: float32 adapters on a 16-bit layer, as PEFT has them by default."""
        return "+" in self.dtypes


@dataclass
class ShapeCase(Case):
    """A comparison at one of these shapes."""

    shape: LayerShape

    @property
    def dtypes(self) -> str:  # type: ignore[override]
        """Of the layer and the adapter."""
        return self.shape.dtypes

    @property
    def label(self) -> str:  # type: ignore[override]
        """For people."""
        shape = self.shape
        words = "1 token" if shape.tokens == 1 else f"{shape.tokens} tokens"
        return f"{shape.hidden}x{shape.hidden}, rank {shape.rank}, {words}, {shape.dtypes}"

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """What every row states."""
        shape = self.shape
        return {
            "shape": [shape.hidden, shape.hidden], "rank": shape.rank, "tokens": shape.tokens, "dtypes": shape.dtypes,
        }  # fmt: skip


def make_problem(shape: LayerShape, seed: int) -> Problem:
    """Fresh random tensors of a layer in training, without a bias."""
    dtypes = shape.base, shape.base, shape.adapters
    return testing.make_problem(
        (shape.tokens,), shape.hidden, shape.hidden, shape.rank, dtypes, bias=False, scaling=0.5, device=shape.device,
        seed=seed,
    )  # fmt: skip


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
