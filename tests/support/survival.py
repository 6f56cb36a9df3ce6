"""How much of an update survives merging: docs/merging.md's table, which `python -m bench.rounding` prints.

A bfloat16 weight lies on bfloat16's grid, and rounding ``g (W + s B A)`` to nearest drops every change of less than
half a step. Seen is the projection of the output's change on the true change: 1 where all of it arrives. The tokens
share the directions that A reads, as tokens do that an adapter was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_kernels import dora_linear, dora_weight_norm, merge_dora

SHARED = 0.2
"""Of the tokens' size, in the directions of A."""
SIZES = (7e-5, 7e-4, 7e-3, 7e-2)
WAYS = ("nearest", "stochastic", "unmerged", "bf16 layer")
"""Merged in either way; the base product rounded to bfloat16 and the rest added as it is; and `dora_linear`, whose
output is rounded once more."""


@dataclass(frozen=True)
class Survival:
    """Of an update of that size, ``|change of y| / |y|``; what is seen of it and y's relative error, by way."""

    size: float
    seen: dict[str, float]
    error: dict[str, float]
    deviation: float
    """The standard deviation of what is seen with stochastic rounding, from the probabilities."""
    lost: float
    """At least so much is unseen with rounding to nearest: what elements hold that stay within half a step."""


def survivals(
    out_features: int = 1024, in_features: int = 4096, tokens: int = 128, sizes: Sequence[float] = SIZES, seed: int = 0
) -> Iterator[Survival]:
    """A row for each size; all products beside the layer's are in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = 8
    weight = (normal(out_features, in_features) / in_features**0.5).to(torch.bfloat16)
    lora_A = (normal(rank, in_features) / in_features**0.5).float()
    direction = normal(out_features, rank)
    shared = normal(tokens, rank) @ lora_A.double() * (in_features / rank) ** 0.5
    x = (normal(tokens, in_features) + SHARED * shared).bfloat16()
    wide, base = x.double(), x.double() @ weight.double().T
    for size in sizes:
        change = wide @ lora_A.double().T @ direction.T
        lora_B = (direction * (size * base.norm() / change.norm())).float()
        magnitude = dora_weight_norm(weight.double(), lora_A, lora_B)  # of V: g is 1, and the update B A alone
        update = lora_B.double() @ lora_A.double()
        factors = lora_A, lora_B, magnitude.float()
        outputs = {way: wide @ merge_dora(weight, *factors, rounding=way, seed=seed).double().T for way in WAYS[:2]}
        outputs["unmerged"] = base.bfloat16().double() + wide @ update.T
        outputs["bf16 layer"] = dora_linear(x, weight, *factors).double()
        yield _survival(size, weight.double(), update, wide, base, outputs)


def _survival(
    size: float, weight: Tensor, update: Tensor, x: Tensor, base: Tensor, outputs: dict[str, Tensor]
) -> Survival:
    change = x @ update.T
    square = change.square().sum()
    # What is seen is linear in the merged weight: this much for each element's rounding error.
    share = change.T @ x / square
    low, step = bfloat16_step(weight + update)
    fraction = (weight + update - low) / step
    variance = (fraction * (1 - fraction) * step.square() * share.square()).sum()
    # An element that moves goes at most twice as far as it should.
    moves = update.abs() >= 0.499 * step
    seen_at_most = (2 * update * share).abs()[moves].sum()
    return Survival(
        size,
        {way: float(((y - base) * change).sum() / square) for way, y in outputs.items()},
        {way: float((y - base - change).norm() / (base + change).norm()) for way, y in outputs.items()},
        float(variance.sqrt()),
        float(1 - seen_at_most),
    )


def bfloat16_step(values: Tensor) -> tuple[Tensor, Tensor]:
    """The multiple of the step at or below each float64 value of normal size, and that step."""
    _, exponent = torch.frexp(values)
    step = torch.ldexp(torch.ones_like(values), exponent - 8)
    return (values / step).floor() * step, step
