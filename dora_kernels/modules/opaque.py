"""The norm of a layer whose weight is not a plain tensor: from dequantised blocks, or from the layer's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.core.precision import accumulation_dtype, no_autocast
from dora_kernels.engine.blocked import CANCELLATION
from dora_kernels.functional import dora_weight_norm
from dora_kernels.modules import dequantize

Constants = tuple[Tensor, Tensor]
"""|W|² of each row, and the bias, of a layer that shows its weight only through its forward."""


def input_dtype(base: nn.Module, a: Tensor) -> torch.dtype:
    """The input dtype for a layer of unknown format: that of a floating-point tensor that it holds, else a's."""
    floating = (t.dtype for t in (*base.parameters(), *base.buffers()) if t.dtype in (torch.bfloat16, torch.float16))
    return next(floating, a.dtype)


@torch.no_grad()
def constants_of(base: Any, like: Tensor, columns: int) -> Constants:
    """The constants, from the layer's outputs for zeros and for the rows of an identity matrix.

    Args:
        like: a tensor with the adapter's dtype and the layer's device.
        columns: the layer's in_features.
    """
    with torch.inference_mode(False), no_autocast(like.device):
        like = like.detach().to(input_dtype(base, like))
        bias = base.forward(like.new_zeros(1, columns))[0].detach()
        return _forward_square(base, like, columns, None, None, 0.0), bias


def opaque_norm(base: Any, a: Tensor, b: Tensor, scaling: float, constants: Callable[[], Constants]) -> Tensor:
    """Row norms ``[N]`` of ``W + s B A``.

    Args:
        a: ``[r, K]``.
        b: ``[N, r]``.
        constants: gives `constants_of` the layer; called only if its format is unknown.
    """
    blocks = dequantize.row_blocks(base)
    if blocks is not None:
        norm = torch.empty(b.shape[0], dtype=accumulation_dtype(a), device=a.device)
        for rows, block in blocks():
            norm[rows] = dora_weight_norm(block, a, b[rows], scaling=scaling)
        return norm
    square, bias = constants()
    low = a.to(square.dtype), b.to(square.dtype)
    gram = low[0] @ low[0].t()
    like = a.to(input_dtype(base, a))
    u = (base.forward(like) - bias).t().to(square.dtype)
    found = square + 2.0 * scaling * ((u + 0.5 * scaling * (low[1] @ gram)) * low[1]).sum(1)
    terms = square + scaling * scaling * (low[1].square() @ gram.diagonal())
    lost = found < CANCELLATION * terms
    if not (a.is_cuda and torch.cuda.is_current_stream_capturing()) and bool(lost.any()):
        found = torch.where(lost, _forward_square(base, like, a.shape[1], a, b, scaling), found)
    return found.clamp_min_(0.0).sqrt_()


def _forward_square(
    base: Any, like: Tensor, columns: int, a: Tensor | None, b: Tensor | None, scaling: float
) -> Tensor:
    """Squared row norms of ``W + s B A``, one block of columns at a time."""
    total: Any = 0.0
    for part, block in dequantize.through_forward(base, like, columns)():
        wide = block.to(accumulation_dtype(block))
        if a is not None and b is not None:
            wide = torch.addmm(wide, a[:, part].t().to(wide.dtype), b.t().to(wide.dtype), alpha=scaling)
        total = total + wide.square().sum(0)
    result: Tensor = total
    return result
