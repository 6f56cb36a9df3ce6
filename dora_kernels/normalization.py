"""16-bit activations scaled and summed on the CPU as a batch normalization: docs/design.md, "The primitives"."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_kernels.reference import accumulation_dtype, cast

# 16-bit activations up to this size meet float32 in one operation, which makes float32 copies of all that it reads and
# writes: 8x2048 elements times g 8 us on two cores, 14 us as a normalization; 512x2048 elements 2137 us and 104 us.
_MIXED_ELEMENTS = 1 << 16


def normalizes(x: Tensor) -> bool:
    """Whether x is scaled and summed as an evaluated batch normalization of mean 0 and variance 1.

    On the CPU it is PyTorch's one pass over 16-bit elements that takes float32 factors and keeps float32 sums: 512x2048
    elements scaled in 0.10 ms on two cores, in float32 blocks 0.16; scaled and reduced 0.28 and 0.53. Of float32
    elements it is the slower way.
    """
    return x.dtype != accumulation_dtype(x) and x.device.type == "cpu" and x.numel() > 0


def affine(x: Tensor, g: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """``g * x + bias`` in x's dtype, rounded once; into `out`, which may be x.

    Where g is infinite, a large 16-bit x gives NaN and a small one infinity.
    """
    if normalizes(x) and x.numel() > _MIXED_ELEMENTS:
        out = torch.empty_like(x) if out is None else out
        mean, variance, unused = _standard(x)
        bias = None if bias is None else cast(bias, torch.float32)
        torch.native_batch_norm(x, g, bias, mean, variance, False, 0.0, 0.0, out=(out, unused, unused))
        return out
    y = torch.mul(x, g, out=out) if bias is None else torch.addcmul(bias, x, g, out=out)
    return cast(y, x.dtype)


def sums_over_tokens(grad: Tensor, other: Tensor | None, want_sum: bool) -> tuple[Tensor | None, Tensor | None]:
    """``(Σ_t grad * other, Σ_t grad)``: what a normalization's weight and bias have for gradients."""
    mean, variance, unused = _standard(grad)
    wanted = [False, other is not None, want_sum]
    grad = grad.contiguous()  # the sums over another layout are 16-bit ones
    other_or_grad = grad if other is None else other.contiguous()
    _, products, sums = torch.ops.aten.native_batch_norm_backward.default(
        grad, other_or_grad, None, mean, variance, unused, unused, False, 0.0, wanted
    )
    return products if other is not None else None, sums if want_sum else None


def _standard(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean 0 and variance 1 of every feature, and an empty tensor for what only training normalizations have."""
    mean = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    return mean, torch.ones_like(mean), mean[:0]
