"""PEFT's DoRA as a function of plain tensors, the baseline of `dora-kernels parity`. PEFT need not be installed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def peft_formula(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    detach_norm: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """PEFT's DoRA layer, operation by operation and dtype by dtype, without dropout.

    PEFT's norm is always detached and has no eps. PEFT has no axis "in". There this is the same formula with g on the
    other side of the product, so that ``(g - 1) * x`` needs a second base product.
    """
    result = F.linear(x, weight, bias)
    dtype = result.dtype
    x = x.to(lora_A.dtype)
    g = magnitude / peft_norm(weight, lora_A, lora_B, scaling, magnitude_axis)
    if magnitude_axis == "out":
        base = result if bias is None else result - bias
        low = F.linear(F.linear(x, lora_A), lora_B)
        return (result + ((g - 1) * base + g * low * scaling)).to(dtype)
    base = F.linear((g - 1) * x, weight.to(x.dtype))
    low = F.linear(F.linear(g * x, lora_A), lora_B)
    return (result + (base + low * scaling)).to(dtype)


def peft_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude_axis: str) -> Tensor:
    """PEFT's norm: computed from a dense sum in the adapter's dtype, and returned in that dtype."""
    with torch.no_grad():
        direction = weight.to(lora_A.dtype) + scaling * (lora_B @ lora_A)
        return torch.linalg.norm(direction, dim=1 if magnitude_axis == "out" else 0).to(direction.dtype)
