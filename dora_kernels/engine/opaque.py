"""The norm of a layer that shows its weight only through its forward: packed, or quantised in an unknown format.

`forward` is the layer's product ``x Wᵀ`` without its bias, for ``x [tokens, in_features]``. The factored form needs one
forward of r tokens for each adapter, and ‖W‖², which takes in_features tokens once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype
from dora_kernels.core.products import BLOCK_ELEMENTS
from dora_kernels.engine.blocked import CANCELLATION

Forward = Callable[[Tensor], Tensor]


def columns(forward: Forward, like: Tensor, in_features: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of columns of W, ``W[:, part]`` transposed: the outputs for rows of an identity matrix.

    Args:
        like: a tensor with the input's dtype and device.
    """
    step = max(1, BLOCK_ELEMENTS // max(in_features, 1))
    for start in range(0, in_features, step):
        part = slice(start, min(start + step, in_features))
        identity = like.new_zeros(part.stop - part.start, in_features)
        identity[:, part].fill_diagonal_(1.0)
        yield part, forward(identity)


def square(
    forward: Forward, like: Tensor, in_features: int, a: Tensor | None = None, b: Tensor | None = None, s: float = 0.0
) -> Tensor:
    """Squared row norms of W, or of ``W + s B A``, one block of columns at a time, in float32."""
    total: Any = 0.0
    for part, block in columns(forward, like, in_features):
        wide = block.to(accumulation_dtype(block))
        if a is not None and b is not None:
            wide = torch.addmm(wide, a[:, part].t().to(wide.dtype), b.t().to(wide.dtype), alpha=s)
        total = total + wide.square().sum(0)
    result: Tensor = total
    return result


def norm(forward: Forward, like: Tensor, weight_square: Tensor, lora_A: Tensor, lora_B: Tensor, s: float) -> Tensor:
    """Row norms of ``W + s B A``. If a row suffers from cancellation, all are computed through the identity again.

    Args:
        like: A tensor with the dtype in which the layer takes A.
        weight_square: `square` of W.
    """
    a, b = lora_A.to(weight_square.dtype), lora_B.to(weight_square.dtype)
    gram = a @ a.t()
    u = forward(lora_A.to(like.dtype)).t().to(weight_square.dtype)
    found = weight_square + 2.0 * s * ((u + 0.5 * s * (b @ gram)) * b).sum(1)
    lost = found < CANCELLATION * (weight_square + s * s * (b.square() @ gram.diagonal()))
    if not (a.is_cuda and torch.cuda.is_current_stream_capturing()) and bool(lost.any()):
        found = torch.where(lost, square(forward, like, a.shape[1], lora_A, lora_B, s), found)
    return found.clamp_min_(0.0).sqrt_()
