"""A layer's norm, computed now: what the magnitude is divided by, and what that was computed from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dora_kernels.core.precision import full_precision, no_autocast
from dora_kernels.core.problem import Form, Weights
from dora_kernels.core.scale import safe_divisor
from dora_kernels.engine import collectives, ops, writes
from dora_kernels.engine.fingerprints import Held


class Norm:
    """The divisor of a layer's magnitude, and a record of what it was computed from.

    It keeps those tensors alive, so that no other tensor can get their addresses.
    """

    __slots__ = (
        "b_is_zero", "backwards", "contiguous_b", "divisor", "held", "key", "steps", "tensors", "training", "version",
    )  # fmt: skip

    def __init__(self, divisor: Tensor, b_is_zero: bool = False) -> None:
        self.divisor = divisor
        """`core.scale.safe_divisor` of the norm. A snapshot if a backward may read it; otherwise to be used at once."""
        self.contiguous_b: Tensor | None = None
        """A copy of B, see `NormCache.contiguous_b`."""
        self.b_is_zero = b_is_zero
        """True if B is known to be 0. Then ``m / n`` is 1 wherever m equals the norm to float32's rounding."""

    def remember(self, weights: Weights, key: tuple[Any, ...], training: bool, held: Held | None) -> None:
        """Record what the norm was computed from."""
        self.tensors, self.key, self.training, self.held = tuple(t.detach() for t in weights[:3]), key, training, held
        self.version = weights.weight._version
        self.steps, self.backwards = writes.steps, writes.backwards

    def is_fresh(self, weights: Weights, training: bool, unnoticed_backward: bool) -> bool:
        """True if these tensors, whose key is unchanged, are known to hold what the norm was computed from."""
        weight, lora_A, lora_B, _, _ = weights
        if self.held is not None and not self.held.is_held_by(lora_A, lora_B):
            return False
        if not (training and self.training) or self.steps != writes.steps:
            return False
        owned = writes.owned(weight, lora_A, lora_B)
        return owned or (owned is None and self.backwards == writes.backwards and not unnoticed_backward)


def compute_norm(
    weights: Weights,
    form: Form,
    backend: str,
    weight_square: Tensor | None = None,
    compute: Callable[[], Tensor] | None = None,
    read_b: bool = True,
) -> Norm:
    """Compute a norm now.

    Args:
        compute: as in `NormCache.norm`.
        read_b: True allows reading B to see whether it is 0.
    """
    weight, lora_A, lora_B, magnitude, _ = weights
    with torch.no_grad():
        if compute is not None:
            with no_autocast(weight.device), full_precision(weight.device):
                return Norm(safe_divisor(compute(), form.eps))
        norm = ops.weight_norm(weight, lora_A, lora_B, form.scaling, form.magnitude_axis, backend, weight_square)
        snaps = read_b and not form.eps and magnitude is not None and not torch.compiler.is_compiling()
        b_is_zero = snaps and _is_zero(lora_B)
        a_is_zero = b_is_zero or (snaps and _is_zero(lora_A))  # embeddings start with A at 0
        if form.group is not None:
            norm, (a_is_zero, b_is_zero) = collectives.whole_norm(form.group, norm, a_is_zero, b_is_zero)
        if a_is_zero and magnitude is not None:
            return Norm(safe_divisor(_snapped(norm, magnitude)), b_is_zero)
        return Norm(safe_divisor(norm, form.eps))


def _is_zero(factor: Tensor) -> bool:
    if factor.is_meta or factor.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    first = factor[:1, :1]  # decides for almost every factor without reading the rest
    return not (bool(first.any()) or bool(factor.any()))


def _snapped(norm: Tensor, magnitude: Tensor) -> Tensor:
    """The norm of W where ``B A`` is 0, replaced by the magnitude wherever the two are equal to float32's rounding.

    PEFT's first magnitude is such a norm. So g is exactly 1, and a fresh adapter changes nothing. Sums of thousands of
    squares in another order, down the columns of GPT-2's weights above all, differ by up to 16 float32 steps.
    """
    m = magnitude.detach().to(norm.dtype)
    close = (m - norm).abs() <= 16.0 * torch.finfo(norm.dtype).eps * norm
    return torch.where(close, m, norm)
