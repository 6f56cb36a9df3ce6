"""The dense form of DoRA in plain PyTorch: the specification, and the oracle of every test.

``V = W + scaling * B @ A`` is formed whole, in float32 (float64 for float64 input), and autograd does the rest.
Every other backend has to agree with this one; nothing here is fast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of `tensors` is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, which takes a microsecond to do nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _direction(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + scaling * (lora_B.to(dtype) @ lora_A.to(dtype))


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude_axis: str) -> Tensor:
    """Norm of every row ("out") or column ("in") of ``W + scaling * B @ A``, differentiable."""
    with no_autocast(weight.device), full_precision(weight.device):
        direction = _direction(weight, lora_A, lora_B, scaling, accumulation_dtype(weight, lora_A, lora_B))
        return torch.linalg.vector_norm(direction, dim=1 if magnitude_axis == "out" else 0)


def magnitude_scale(magnitude: Tensor, norm: Tensor, eps: float = 0.0) -> Tensor:
    """``g = magnitude / (norm + eps)``; without eps 0 where the norm is 0.

    (Stock PEFT gives NaN there: peft issue 2049.)
    """
    if eps:
        return magnitude.to(norm.dtype) / (norm + eps)
    zero = norm == 0
    return torch.where(zero, torch.zeros_like(norm), magnitude.to(norm.dtype) / norm.masked_fill(zero, 1.0))


def merge(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor | None, scaling: float, magnitude_axis: str
) -> Tensor:
    """``g * (W + scaling * B @ A)`` as computed, to be rounded once to weight's dtype."""
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
    """``x @ (g * V).T + bias`` for x of any number of leading dimensions, rounded once to `compute_dtype`.

    A norm handed in stands for the true one: its value is used, and with ``detach_norm=False`` the gradient
    through the norm is the true norm's.
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


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep float32 products in float32, whatever the user's setting: TF32 on CUDA, bfloat16 on the CPU."""
    matmul: Any = torch.backends.cuda.matmul if device.type == "cuda" else None
    if device.type == "cpu" and not torch.compiler.is_compiling():
        matmul = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9
    name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = exact if matmul is None else getattr(matmul, name)
    if before == exact or (before == "none" and device.type == "cpu"):
        yield
        return
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on there; asking so of the meta device raises."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


class no_autocast:
    """Turn autocast off inside, at no cost where it is off already: every cast here is explicit."""

    __slots__ = ("_context",)

    def __init__(self, device: torch.device) -> None:
        self._context = torch.autocast(device.type, enabled=False) if autocast_enabled(device) else None

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*exc)
