"""Matrix products of the fused path, rounded at most once from float32 (float64) sums, on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_kernels.core.products import block_rows, blocks, mm_wide, scratch
from dora_kernels.engine.dispatch import kernels


def mm(left: Tensor, right: Tensor, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """``scaling * left @ right`` in `dtype`, rounded at most once.

    Operands of different dtypes are not rounded; `dtype` is then the wider one. On a GPU the BLAS may add up the parts
    of a 16-bit product's sum in 16 bits, so `kernels.product` computes products with 16-bit operands there.
    """
    if left.dtype.itemsize > right.dtype.itemsize:
        return mm(right.t(), left.t(), dtype, scaling).t()
    if left.device.type == "cuda" and left.dtype.itemsize == 2 and right.dtype != torch.float64:
        product: Tensor = kernels().product(left, right, dtype, scaling)
        return product
    if left.dtype == right.dtype == dtype and scaling != 1.0:
        return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)
    if left.dtype != right.dtype:
        product = mm_wide(left, right)
    elif left.dtype.itemsize < dtype.itemsize:
        product = _widened(left, right, dtype)
    else:
        product = torch.mm(left, right)
    product = product if scaling == 1.0 else product.mul_(scaling)
    return product if product.dtype == dtype else product.to(dtype)


def _widened(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of operands that are upcast, block by block."""
    tokens, rows, columns = right.shape[0], left.shape[0], right.shape[1]
    result = torch.zeros(rows, columns, dtype=dtype, device=left.device)
    step = block_rows(tokens, rows + columns)
    wide_left, wide_right = scratch(step, rows + columns, dtype, left.device).split((rows, columns), dim=1)
    for left_part, right_part in blocks(step, left.t(), right):
        size = left_part.shape[0]
        result.addmm_(wide_left[:size].copy_(left_part).t(), wide_right[:size].copy_(right_part))
    return result
