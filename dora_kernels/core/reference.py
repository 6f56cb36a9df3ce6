"""DoRA in its dense form, in plain PyTorch: the specification, and the reference of every test.

``V = W + scaling * B @ A`` is formed whole, in float32 (float64 for float64 input), and autograd does the rest.
All other implementations have to agree with this one, and none of them imports it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, full_precision, no_autocast
from dora_kernels.core.scale import magnitude_scale


def _direction(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + scaling * (lora_B.to(dtype) @ lora_A.to(dtype))


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude_axis: str) -> Tensor:
    """Norm of every row ("out") or column ("in") of ``W + scaling * B @ A``, differentiable."""
    with no_autocast(weight.device), full_precision(weight.device):
        direction = _direction(weight, lora_A, lora_B, scaling, accumulation_dtype(weight, lora_A, lora_B))
        return torch.linalg.vector_norm(direction, dim=1 if magnitude_axis == "out" else 0)


def merge(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float, magnitude_axis: str
) -> Tensor:
    """``g * (W + scaling * B @ A)`` in the dtype it is computed in; the caller rounds it once to weight's dtype."""
    with no_autocast(weight.device), full_precision(weight.device):
        adapted = _direction(weight, lora_A, lora_B, scaling, accumulation_dtype(weight, lora_A, lora_B))
        if magnitude is not None:
            dim = 1 if magnitude_axis == "out" else 0
            adapted = adapted * magnitude_scale(magnitude, torch.linalg.vector_norm(adapted, dim=dim)).unsqueeze(dim)
        return adapted


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    detach_norm: bool,
    weight_norm: Tensor | None,
    compute_dtype: torch.dtype,
    eps: float = 0.0,
) -> Tensor:
    """``x @ (g * V).T + bias`` for x with any number of leading dimensions, rounded once to `compute_dtype`.

    If `weight_norm` is given, its value replaces the computed norm; with ``detach_norm=False`` the gradient through the
    norm is still that of the computed norm.
    """
    dtype = accumulation_dtype(x, weight, lora_A, lora_B)
    with no_autocast(x.device), full_precision(x.device):
        adapted = _direction(weight, lora_A, lora_B, scaling, dtype)
        if magnitude is not None:
            dim = 1 if magnitude_axis == "out" else 0
            norm = torch.linalg.vector_norm(adapted, dim=dim)
            if detach_norm:
                norm = norm.detach()
            if weight_norm is not None:
                norm = norm + (weight_norm.to(dtype) - norm).detach()
            adapted = adapted * magnitude_scale(magnitude, norm, eps).unsqueeze(dim)
        y = x.to(compute_dtype).to(dtype) @ adapted.transpose(0, 1)
        if bias is not None:
            y = y + bias.to(dtype)
        return y.to(compute_dtype)


def compose(
    result: Tensor, h: Tensor, lora_B: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """``g * (result - bias + scaling * h @ B.T) + bias``, rounded once to result's dtype: `dora_linear` from parts."""
    dtype = accumulation_dtype(result, h)
    with no_autocast(result.device), full_precision(result.device):
        low = h.to(dtype) @ lora_B.to(dtype).transpose(0, 1)
        offset = result.new_zeros((), dtype=dtype) if bias is None else bias.to(dtype)
        g = magnitude_scale(magnitude, norm).to(dtype)
        return (g * (result.to(dtype) - offset + scaling * low) + offset).to(result.dtype)
