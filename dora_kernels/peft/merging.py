"""The arithmetic of merging a DoRA adapter and undoing it, and what is kept so that it can be undone to the bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype
from dora_kernels.core.problem import Form, Weights
from dora_kernels.core.scale import magnitude_scale
from dora_kernels.engine import ops
from dora_kernels.engine.dispatch import norm_backend
from dora_kernels.engine.fingerprints import digest
from dora_kernels.engine.layer import norm_now
from dora_kernels.peft.shards import agreed, part


def merged_rows(
    rows: Tensor, unmerged: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Any, scaling: float, k: float,
    group: Any = None,
) -> tuple[Tensor, Any]:
    """``g * (rows + s B A)`` at strength k, in float32, with g of the unmerged weight; and the norm, if any.

    Args:
        group: over which the rows are split, if they are.
    """
    factors = lora_A.detach(), lora_B.detach()
    wide = rows.to(accumulation_dtype(rows, *factors))
    merged, norm = ops.merge(wide, *factors, None, scaling, "out", norm_backend("auto", wide)), None
    if magnitude is not None:
        norm = norm_now(Weights(unmerged, *factors), Form(scaling, group=group), "auto")
        merged.mul_(magnitude_scale(magnitude.detach(), norm).unsqueeze(1))
    return merged if k == 1.0 else torch.lerp(wide, merged, k), norm


def unmerged_rows(
    rows: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Any, norm: Tensor | None, scaling: float, k: float
) -> Tensor:
    """The inverse of `merged_rows`, in float32."""
    factor: Any = 1.0
    wide, factors = rows.to(accumulation_dtype(rows, lora_A)), (lora_A.detach(), -k * lora_B.detach())
    if magnitude is not None and norm is not None:
        g = (k * magnitude_scale(magnitude.detach(), norm)).unsqueeze(1)
        factor = 1.0 - k + g
        factors = factors[0], lora_B.detach() * (-g / factor)
    wide = wide / factor
    return ops.merge(wide, *factors, None, scaling, "out", norm_backend("auto", wide))


@torch.no_grad()
def add_plain(layer: Any, adapter: str, sign: float, check: bool = False) -> None:
    """Add `sign` times a plain LoRA adapter to the base of a layer that is split over processes, each to its own part.

    Raises:
        ValueError: `check` is true and a value would not be finite, in any of the processes. Nothing is written then.
    """
    base, scaling = layer.get_base_layer(), sign * layer.scaling[adapter]
    if adapter in layer.lora_A:
        lora_A, lora_B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        lora_bias = part(layer.lora_B[adapter].bias)
        rows = part(base.weight)
    else:
        lora_A, lora_B, lora_bias = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], None
        rows = part(base.weight).t()
    if lora_bias is not None and base.bias is None:
        raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
    merged, _ = merged_rows(rows, rows, part(lora_A), part(lora_B), None, scaling, 1.0)
    results = [(rows, merged)]
    if lora_bias is not None:
        bias = part(base.bias)
        results.append((bias, bias + scaling * lora_bias))
    if check and not agreed(base, all(bool(result.isfinite().all()) for _, result in results)):
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
    for own, result in results:
        own.data.copy_(result)


class Unmerged:
    """A copy of a base layer's weight and bias on the CPU, and a record of what merging made of them."""

    def __init__(self, base: Any) -> None:
        self.weight = part(base.weight).detach().to("cpu", copy=True)
        self._bias = UnmergedBias(base)
        self._merged: Tensor | None = None

    def merged(self, base: Any) -> None:
        """Record what merging made of the layer."""
        self._merged = digest(part(base.weight)).cpu()
        self._bias.merged(base)

    def is_of(self, base: Any) -> bool:
        """True if the layer's weight is still what merging made of it."""
        weight = part(base.weight)
        if self._merged is None or weight.dtype != self.weight.dtype or weight.shape != self.weight.shape:
            return agreed(base, False)
        return agreed(base, torch.equal(self._merged, digest(weight).cpu()))

    def put_back(self, base: Any) -> None:
        """Write the copies into the layer."""
        part(base.weight).data.copy_(self.weight)
        self._bias.put_back(base)


class UnmergedBias:
    """A copy of a base layer's bias. Merging changes it if an adapter has a bias of its own."""

    def __init__(self, base: Any) -> None:
        self._before = self._merged = _bias(base)

    def merged(self, base: Any) -> None:
        """Record what merging made of the bias."""
        self._merged = _bias(base)

    def put_back(self, base: Any) -> None:
        """Restore the bias. If somebody has changed it since merging, keep that change."""
        now = _bias(base)
        if now is not None and self._before is not None and self._merged is not None:
            changed = not torch.equal(now, self._merged)
            part(base.bias).data.copy_(now - (self._merged - self._before) if changed else self._before)


def _bias(base: Any) -> Tensor | None:
    """A copy on the CPU."""
    bias = part(getattr(base, "bias", None))
    return None if bias is None else bias.detach().to("cpu", copy=True)
