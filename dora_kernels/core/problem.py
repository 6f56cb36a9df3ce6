"""A DoRA layer as a linear problem, the form that everything here works on: its tensors and its fixed options."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """The tensors of a layer. Views if it stores another shape (GPT-2's `Conv1D`, convolutions, embeddings).

    Those of a stack of experts have one more dimension, E, in front.
    """

    weight: Tensor
    """``[N, K]``, with N output and K input features."""
    lora_A: Tensor
    """``[r, K]``."""
    lora_B: Tensor
    """``[N, r]``."""
    magnitude: Any = None
    """A tensor ``[N]``, or ``[K]`` with ``magnitude_axis="in"``; None for plain LoRA."""
    bias: Tensor | None = None
    """``[N]``."""


class Form(NamedTuple):
    """The fixed options of a layer: which published variant of DoRA it computes (docs/variants.md)."""

    scaling: float = 1.0
    """Factor of the low-rank product."""
    magnitude_axis: str = "out"
    """"out": one norm per output feature; "in": one per input feature."""
    detach_norm: bool = True
    """True: no gradient flows through the norm."""
    eps: float = 0.0
    """Added to the norm."""
    group: Any = None
    """The process group over which the columns of W and A are split; the norm is that of the whole rows."""


def row_problem(weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude_axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(W, A, B)`` of the problem whose *row* norms are wanted: along "in", the transposed one."""
    return (weight, lora_A, lora_B) if magnitude_axis == "out" else (weight.t(), lora_B.t(), lora_A.t())
