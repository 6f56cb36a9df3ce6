"""A DoRA layer as the linear problem that everything here is written for: its tensors, and its fixed options."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """The tensors of a layer; views where it stores another shape (GPT-2's `Conv1D`, convolutions, embeddings)."""

    weight: Tensor
    """``[N, K]``, N output and K input features."""
    lora_A: Tensor
    """``[r, K]``"""
    lora_B: Tensor
    """``[N, r]``"""
    magnitude: Any = None
    """A tensor ``[N]``, or ``[K]`` with ``magnitude_axis="in"``; None is plain LoRA."""
    bias: Tensor | None = None
    """``[N]``"""


class Form(NamedTuple):
    """The fixed options of a layer: which of the published forms of DoRA it computes (docs/variants.md)."""

    scaling: float = 1.0
    """Factor of the low-rank product."""
    magnitude_axis: str = "out"
    """"out", a norm per output feature, or "in", per input feature."""
    detach_norm: bool = True
    """No gradient through the norm."""
    eps: float = 0.0
    """Added to the norm."""


def row_problem(weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude_axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """The problem whose *row* norms are wanted: along "in" the transposed one."""
    return (weight, lora_A, lora_B) if magnitude_axis == "out" else (weight.t(), lora_B.t(), lora_A.t())
