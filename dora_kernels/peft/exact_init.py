"""Initialise magnitudes to the exact norm, so that a fresh adapter changes nothing, whatever the base's dtype.

PEFT computes the first magnitude from a norm in the base layer's dtype. With a bfloat16 base and float32 adapters the
fresh model is up to 3.5e-3 away from the base model.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_kernels.core.problem import Weights
from dora_kernels.peft.layer import DoraVariant
from dora_kernels.peft.shards import part, split_of
from dora_kernels.peft.state import dora_adapters, switch

logger = logging.getLogger("dora_kernels")


class Rewritten(NamedTuple):
    """A magnitude that was rewritten."""

    name: str
    magnitude: weakref.ref[Tensor]
    before: Tensor
    after: Tensor


@torch.no_grad()
def rewrite_magnitudes(model: nn.Module) -> list[Rewritten]:
    """Set every fresh magnitude of the patched layers to the norm of its base weight. Returns the rewritten ones.

    A magnitude is fresh if B (A in an embedding) is 0, and if it equals PEFT's own initialisation bit for bit. Adapters
    whose tensors cannot be read now are left unchanged, with a warning in the log.
    """
    done, unread = [], []
    for name, layer in model.named_modules():
        if switch(layer) is None or getattr(layer, "merged_adapters", None):
            continue
        for adapter in dora_adapters(layer):
            variant = getattr(layer, "lora_variant", {}).get(adapter)
            if getattr(variant, "starts_exact", False):
                continue
            weights = variant.read(layer, adapter) if isinstance(variant, DoraVariant) else None
            if weights is None:
                unread.append(f"{name} ({adapter})")
                continue
            exact = None if split_of(layer) is None else _norm(layer, adapter, variant, weights)  # by all processes
            if (weights.lora_A.any() and weights.lora_B.any()) or not _fresh(layer, adapter, exact):
                continue
            magnitude: Tensor = layer.lora_magnitude_vector[adapter].weight
            own = part(magnitude)
            before, exact = own.clone(), _norm(layer, adapter, variant, weights) if exact is None else exact
            own.copy_(exact.view(own.shape))
            if not torch.equal(before, own):
                after = own.clone()
                done.append(Rewritten(f"{name} ({adapter})", weakref.ref(magnitude), before, after))
    if unread:
        logger.warning(
            "exact_init left %d magnitudes unchanged, because their weights cannot be read now (sharded, offloaded, "
            "on meta): patch before the model is wrapped; the first: %s", len(unread), unread[0],
        )  # fmt: skip
    return done


@torch.no_grad()
def undo(rewritten: list[Rewritten]) -> None:
    """Restore the magnitudes that nobody has changed since they were rewritten."""
    for _, reference, before, after in rewritten:
        magnitude = part(reference())
        if magnitude is not None and magnitude.shape == after.shape and torch.equal(magnitude.cpu(), after.cpu()):
            magnitude.copy_(before)


def _norm(layer: Any, adapter: str, variant: Any, weights: Weights) -> Tensor:
    divisor: Tensor = variant.divisor(layer, adapter, weights)
    return divisor.masked_fill(torch.isinf(divisor), 0.0)


def _fresh(layer: Any, adapter: str, exact: Tensor | None) -> bool:
    """True if the magnitude is PEFT's own initialisation.

    PEFT initialises before it casts adapters to float32, so A and B may have been in the base's dtype.

    Args:
        exact: the norm of a split layer, whose initialisation is this package's.
    """
    module = layer.lora_magnitude_vector[adapter]
    base = layer.get_base_layer()
    if adapter in getattr(layer, "lora_embedding_A", ()):
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    weight = getattr(base, "weight", None)
    for dtype in {a.dtype, getattr(weight, "dtype", a.dtype)}:
        if exact is not None:
            own = part(module.weight)
            if torch.equal(exact.to(dtype).to(own.dtype), own):
                return True
        elif dtype.is_floating_point:
            stock = type(module)(fan_in_fan_out=module.fan_in_fan_out)
            stock.update_layer(base_layer=base, lora_A=a.to(dtype), lora_B=b.to(dtype), scaling=layer.scaling[adapter])
            if torch.equal(stock.weight.to(module.weight), module.weight):
                return True
    return False
