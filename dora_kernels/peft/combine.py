"""Combine a PEFT layer's DoRA adapters into one DoRA adapter, by a weighted sum (`dora_kernels.core.weighted_sum`).

PEFT's own code adds up A and B and leaves the magnitude at the norm of W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_kernels.core import weighted_sum
from dora_kernels.core.precision import accumulation_dtype, no_autocast
from dora_kernels.core.scale import magnitude_scale
from dora_kernels.peft import experts
from dora_kernels.peft.layer import DoraVariant
from dora_kernels.peft.state import dora_adapters, strength

COMBINATIONS = ("cat", "svd", "linear")
"""PEFT's names.

The rank is the sum of the ranks ("cat"), chosen by the caller ("svd"), or the common one ("linear").
"""


def factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """Return the parameters A and B, or None if the layer has no such adapter."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return None


@torch.no_grad()
def combine(layer: Any, name: str, adapters: Sequence[str], weights: Sequence[float], result: str) -> float:
    """Write the weighted sum into the adapter `result`, with scaling 1; return the share of the update that is lost.

    Each adapter counts at its strength (`set_dora_strength`).

    Raises:
        ValueError: a tensor cannot be read; an adapter has a bias, which a DoRA adapter cannot have; or the layer is a
            grouped convolution, whose update is not a product.
    """
    if isinstance(layer, experts.STOCK):
        return experts.combine(layer, adapters, weights, result)
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise ValueError(f"{name}: adapters of a grouped convolution cannot be added up")
    biased = [one for one in adapters if layer.lora_bias.get(one)]
    if biased:
        raise ValueError(f"{name}: adapter {biased[0]!r} has a bias (lora_bias), which a DoRA adapter cannot take over")
    a, b = factors(layer, result) or (None, None)
    assert a is not None and b is not None
    with no_autocast(b.device):
        dtype = accumulation_dtype(b)
        parts = _parts(layer, name, adapters, weights, dtype)
        b.zero_()  # makes the norm that of W
        full = weighted_sum.weighted_sum(parts, lambda: _norm(layer, name, result), dtype, b.shape[0])
        total, lost = weighted_sum.of_rank(full, a.shape[0])
    missing = a.shape[0] - total.right.shape[0]
    a.copy_(torch.nn.functional.pad(total.right, (0, 0, 0, missing)).view(a.shape))
    b.copy_(torch.nn.functional.pad(weighted_sum.divided(total), (0, missing)).view(b.shape))
    if result in dora_adapters(layer):
        magnitude: Tensor = layer.lora_magnitude_vector[result].weight
        magnitude.copy_((total.factor * _norm(layer, name, result)).view(magnitude.shape))
    return lost / weighted_sum.size(full) if lost else 0.0


def _parts(
    layer: Any, name: str, adapters: Sequence[str], weights: Sequence[float], dtype: torch.dtype
) -> list[weighted_sum.Part]:
    parts = []
    for one, weight in zip(adapters, weights, strict=True):
        found = factors(layer, one)
        if found is None:
            continue
        scale = None
        if one in dora_adapters(layer):
            norm = _norm(layer, name, one)
            scale = magnitude_scale(layer.lora_magnitude_vector[one].weight.view(-1), norm)
        weight *= strength(layer, one)
        a, b = (factor.to(dtype).flatten(1) for factor in found)
        parts.append(weighted_sum.Part(weight, weight * layer.scaling[one] * b, a, scale))
    return parts


def _norm(layer: Any, name: str, adapter: str) -> Tensor:
    variant = layer.lora_variant.get(adapter)
    weights = variant.read(layer, adapter) if isinstance(variant, DoraVariant) else None
    if weights is None:
        raise ValueError(f"{name}: the weights of adapter {adapter!r} cannot be read")
    assert isinstance(variant, DoraVariant)
    divisor: Tensor = variant.divisor(layer, adapter, weights)
    return divisor.masked_fill(torch.isinf(divisor), 0.0)
