"""Weighted sums of DoRA adapters as one DoRA adapter.

The sum ``W + Σ w_i (g_i V_i - W)`` of the merged weights is ``c ⊙ (W + Σ (w_i s_i g_i / c) ⊙ B_i A_i)``, a factor per
row ``c = 1 + Σ w_i (g_i - 1)``: a DoRA adapter again, of the sum of the ranks, whose magnitude is c times its own norm.
Of a smaller rank it is the best one in the Frobenius norm of ``B A``. Plain LoRA has g = 1.

(PEFT adds A and B up and leaves the magnitude at the norm of W.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_kernels.peft.layer import DoraVariant
from dora_kernels.peft.state import dora_adapters, strength
from dora_kernels.reference import no_autocast

COMBINATIONS = ("cat", "svd", "linear")
"""PEFT's names: of the summed rank, of a rank of one's own, of the adapters' common rank."""

# A row whose factors cancel has no direction left to scale; it keeps this share of W.
_LEAST = 1e-6


def factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """The parameters A and B, None where the layer has no such adapter."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return None


@torch.no_grad()
def combine(layer: Any, name: str, adapters: Sequence[str], weights: Sequence[float], result: str) -> float:
    """Write the weighted sum into the adapter `result`, of scaling 1; the relative error of ``B A`` its rank leaves.

    Each adapter at its strength (`set_dora_strength`).

    Raises:
        ValueError: a tensor cannot be read, an adapter has a bias, which no DoRA adapter has, or the layer is a grouped
            convolution, whose update is no product.
    """
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        raise ValueError(f"{name}: adapters of a grouped convolution cannot be added up")
    biased = [one for one in adapters if layer.lora_bias.get(one)]
    if biased:
        raise ValueError(f"{name}: adapter {biased[0]!r} has a bias (lora_bias), which a DoRA adapter cannot take over")
    a, b = factors(layer, result) or (None, None)
    assert a is not None and b is not None
    with no_autocast(b.device):
        c, left, right = _sum(layer, name, list(zip(adapters, weights, strict=True)), b)
        left, right, error = _of_rank(left, right, a.shape[0])
    a.copy_(right.view(a.shape))
    b.copy_(left.view(b.shape))
    if result in dora_adapters(layer):
        variant = layer.lora_variant[result]
        weights_of = variant.read(layer, result) if isinstance(variant, DoraVariant) else None
        if weights_of is None:
            raise ValueError(f"{name}: the weights of adapter {result!r} cannot be read")
        norm = variant.divisor(layer, result, weights_of)("torch")
        magnitude: Tensor = layer.lora_magnitude_vector[result].weight
        magnitude.copy_((c * norm.masked_fill(torch.isinf(norm), 0.0)).view(magnitude.shape))
    return error


def _sum(
    layer: Any, name: str, weights: Sequence[tuple[str, float]], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """c, and the factors of the summed rank."""
    parts = [(one, weight * strength(layer, one), found) for one, weight in weights
             if (found := factors(layer, one)) is not None]  # fmt: skip
    scales = {one: _scale(layer, name, one) for one, _, _ in parts}
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    c = 1.0 + sum(weight * (scales[one] - 1.0) for one, weight, _ in parts)
    c = torch.as_tensor(c, dtype=dtype, device=like.device).expand(like.shape[0]).clone()
    c = torch.where(c.abs() < _LEAST, torch.full_like(c, _LEAST), c)
    left = torch.cat([
        (weight * layer.scaling[one] * scales[one] / c).expand(like.shape[0])[:, None] * found[1].flatten(1).to(dtype)
        for one, weight, found in parts
    ], 1)  # fmt: skip
    return c, left, torch.cat([found[0].flatten(1).to(dtype) for _, _, found in parts])


def _scale(layer: Any, name: str, adapter: str) -> Tensor | float:
    """g of each row; 1 for plain LoRA."""
    if adapter not in dora_adapters(layer):
        return 1.0
    variant = layer.lora_variant.get(adapter)
    weights = variant.read(layer, adapter) if isinstance(variant, DoraVariant) else None
    if variant is None or weights is None:
        raise ValueError(f"{name}: the weights of adapter {adapter!r} cannot be read")
    norm: Tensor = variant.divisor(layer, adapter, weights)("torch")
    return weights.magnitude / norm


def _of_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """``left @ right`` as factors of that rank, filled up with zeros or cut by its singular values."""
    missing = rank - right.shape[0]
    if missing >= 0:
        return torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing)), 0.0
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.t())
    u, s, v = torch.linalg.svd(r_left @ r_right.t())
    root = s[:rank].sqrt()
    error = float(s[rank:].norm() / s.norm()) if bool(s.any()) else 0.0
    return (q_left @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ q_right.t()), error
