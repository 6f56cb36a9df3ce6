"""Products of matrices in the dtype of their sums, a block of rows at a time: no temporary has W's size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Elements of one block: 4 MB in float32. Blocks of half and a quarter of it took the direct norm of 576x576 to
# 4096x4096 weights, ranks 16 to 384, on two cores up to 1.2 times as long.
BLOCK_ELEMENTS = 1 << 20


class _Kept(threading.local):
    """A thread's block of float32 on the CPU.

    A new one at every call costs its pages whenever the allocator has given them back: the norm of 2048x2048 float32
    elements at rank 16 takes 2.3 ms or 2.9 ms.
    """

    block: Tensor | None = None


_kept = _Kept()


def scaled_rows(matrix: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows * matrix``, a factor per row, rounded once to `dtype`."""
    rows = rows.unsqueeze(1)
    if matrix.dtype == dtype == rows.dtype:
        return matrix * rows
    return torch.mul(matrix, rows, out=torch.empty(matrix.shape, dtype=dtype, device=matrix.device))


def mm_accumulate(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in `dtype`, rounded at most once from its float32 accumulation.

    A bfloat16 product rounds its output, so a float32 result of bfloat16 operands needs either the BLAS's mixed
    output (CUDA) or operands that are upcast, block by block. Where one operand is narrower, `dtype` is the other's.
    """
    if left.dtype != right.dtype:
        return mm_mixed(left, right) if right.dtype == dtype else mm_mixed(right.t(), left.t()).t()
    if left.dtype == dtype:
        return torch.mm(left, right)
    if torch.finfo(dtype).bits < torch.finfo(left.dtype).bits:
        return (left @ right).to(dtype)
    if left.device.type == "cuda" and dtype == torch.float32 and _MM_OUT_DTYPE:
        return torch.mm(left, right, out_dtype=torch.float32)
    tokens, rows, columns = right.shape[0], left.shape[0], right.shape[1]
    result = torch.zeros(rows, columns, dtype=dtype, device=left.device)
    step = block_rows(tokens, rows + columns)
    wide_left, wide_right = scratch(step, rows + columns, dtype, left.device).split((rows, columns), dim=1)
    for left_part, right_part in blocks(step, left.t(), right):
        size = left_part.shape[0]
        result.addmm_(wide_left[:size].copy_(left_part).t(), wide_right[:size].copy_(right_part))
    return result


_MM_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


def mm_mixed(narrow: Tensor, wide: Tensor) -> Tensor:
    """``narrow @ wide`` in wide's dtype, to which nothing is rounded and of `narrow` no copy is ever whole.

    A large bfloat16 matrix on CUDA goes to the tensor cores with bfloat16 pieces of `wide`; a block of it costs fewer
    launches upcast. float16 has not the exponents for pieces.
    """
    pieces = narrow.device.type == "cuda" and _MM_OUT_DTYPE and narrow.numel() > BLOCK_ELEMENTS
    if pieces and narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32:
        return _mm_pieces(narrow, wide)
    return mm_wide(narrow, wide)


def _mm_pieces(narrow: Tensor, wide: Tensor) -> Tensor:
    """Of a bfloat16 and a float32 matrix, with three bfloat16 pieces side by side, which hold all of a float32."""
    rows, columns = wide.shape
    pieces = narrow.new_empty(rows, 3, columns)
    rest = wide
    for i in range(3):
        pieces[:, i] = rest
        rest = rest - pieces[:, i]
    product = torch.mm(narrow, pieces.view(rows, 3 * columns), out_dtype=wide.dtype)
    return product.view(-1, 3, columns).sum(1)


def mm_wide(weight: Tensor, other: Tensor) -> Tensor:
    """``weight @ other`` in other's dtype, upcasting `weight` block by block: no copy of it is ever whole."""
    if weight.dtype == other.dtype:
        return weight @ other
    if row_major(weight):
        out = other.new_empty(weight.shape[0], other.shape[1])
        # `other` as it lies: with a copied Aᵀ of four columns the BLAS adds up one long sum, with twice the error and
        # in five times the time.
        step = block_rows(*weight.shape)
        buffer = scratch(step, weight.shape[1], other.dtype, other.device)
        for rows, target in blocks(step, weight, out):
            torch.mm(buffer[: rows.shape[0]].copy_(rows), other, out=target)
        return out
    out = other.new_zeros(weight.shape[0], other.shape[1])
    step = block_rows(*weight.t().shape)
    buffer = scratch(step, weight.shape[0], other.dtype, other.device)
    for columns, rows in blocks(step, weight.t(), other):
        out.addmm_(buffer[: rows.shape[0]].copy_(columns).t(), rows)
    return out


def row_major(weight: Tensor) -> bool:
    return weight.stride(0) >= weight.stride(1)


def blocks(step: int, first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors in blocks of so many of the rows they share; at least one block."""
    if first.shape[0] <= step:
        return iter(((first, *others),))
    starts = range(0, first.shape[0], step)
    return (tuple(None if t is None else t[start : start + step] for t in (first, *others)) for start in starts)


def block_rows(rows: int, width: int) -> int:
    """How many of these rows make a block, at least one."""
    return max(1, min(rows, max(16, BLOCK_ELEMENTS // max(width, 1))))


def scratch(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Unwritten memory for a block, to be used before the next is asked for."""
    size = rows * width
    if size > BLOCK_ELEMENTS or dtype != torch.float32 or device.type != "cpu" or _recorded():
        return torch.empty(rows, width, dtype=dtype, device=device)
    if _kept.block is None:
        with torch.inference_mode(False):
            _kept.block = torch.empty(BLOCK_ELEMENTS, dtype=dtype, device=device)
    return _kept.block[:size].view(rows, width)


def _recorded() -> bool:
    """Whether a tensor made elsewhere would end up in a graph, or one made here is a fake one."""
    return torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
