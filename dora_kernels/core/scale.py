"""``g = m / n`` from a magnitude m and a norm n. A norm of 0 gives g = 0."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, cast


def safe_divisor(norm: Tensor, eps: float = 0.0) -> Tensor:
    """Return the divisor of the magnitude: ``norm + eps`` or, without eps, the norm with 0 replaced by infinity.

    Dividing by infinity gives g = 0. (PEFT itself gives NaN there: peft issue 2049.)
    """
    return norm + eps if eps else torch.threshold(norm, 0.0, torch.inf)  # keeps NaN


def norm_of(divisor: Tensor, eps: float) -> Tensor:
    """Return the norm from its `safe_divisor`.

    Values of 0, and those too small to tell from the rounding of eps, are returned as infinity.
    """
    return torch.threshold(divisor - eps, 2.0 * eps * torch.finfo(divisor.dtype).eps, torch.inf) if eps else divisor


def quotient(magnitude: Tensor, divisor: Tensor, x: Tensor) -> Tensor:
    """``g = magnitude / divisor``, in the dtype in which sums over x are accumulated."""
    dtype = accumulation_dtype(x)
    return cast(magnitude / cast(divisor, dtype), dtype)


def magnitude_scale(magnitude: Tensor, norm: Tensor, eps: float = 0.0) -> Tensor:
    """``g = magnitude / (norm + eps)``; without eps, 0 where the norm is 0."""
    return magnitude.to(norm.dtype) / safe_divisor(norm, eps)
