"""Matrix products with float32 (float64) sums, one block of rows at a time: no temporary is as large as W."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one block: 4 MB in float32. With blocks of half or a quarter of this size the direct norm took up to 1.2
# times as long (weights of 576x576 to 4096x4096, ranks 16 to 384, two cores).
BLOCK_ELEMENTS = 1 << 20


class _Kept(threading.local):
    """A thread's float32 block on the CPU, kept between calls.

    A new block has to fault its pages in whenever the allocator has returned them: the norm of 2048x2048 float32
    elements at rank 16 takes 2.3 ms with the kept block, 2.9 ms without.
    """

    block: Tensor | None = None


_kept = _Kept()


def scaled_rows(matrix: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows * matrix`` with one factor per row, rounded once to `dtype`."""
    rows = rows.unsqueeze(1)
    if matrix.dtype == dtype == rows.dtype:
        return matrix * rows
    return torch.mul(matrix, rows, out=torch.empty(matrix.shape, dtype=dtype, device=matrix.device))


def mm_wide(weight: Tensor, other: Tensor) -> Tensor:
    """``weight @ other`` in other's dtype. `weight` is upcast block by block, so no full copy of it is made."""
    if weight.dtype == other.dtype:
        return weight @ other
    if row_major(weight):
        out = other.new_empty(weight.shape[0], other.shape[1])
        # `other` is not copied: with a copied Aᵀ of four columns the BLAS adds up one long sum, with twice the error
        # and in five times the time.
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


def mm_groups(rows: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Each group's rows times its matrix: ``[S, K]`` and ``[E, K, N]`` to ``[S, N]``.

    Group e has the rows ``ends[e - 1]`` to ``ends[e]``. Rows after the last end are left out, and their results
    uninitialized.
    """
    if _grouped(rows):
        return _grouped_mm(rows, stack, ends)
    result = rows.new_empty(rows.shape[0], stack.shape[2])
    for e, part in _groups(ends):
        torch.mm(rows[part], stack[e], out=result[part])
    return result


def _grouped(rows: Tensor) -> bool:
    """True if PyTorch's grouped product runs: it reads `ends` on the device."""
    return rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")


def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    result: Tensor = F.grouped_mm(left, right, offs=ends.to(torch.int32))
    return result


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            yield e, slice(start, end)
        start = end


def row_major(weight: Tensor) -> bool:
    return weight.stride(0) >= weight.stride(1)


def blocks(step: int, first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yield the tensors in blocks of `step` of the rows they share; at least one block."""
    if first.shape[0] <= step:
        return iter(((first, *others),))
    starts = range(0, first.shape[0], step)
    return (tuple(None if t is None else t[start : start + step] for t in (first, *others)) for start in starts)


def block_rows(rows: int, width: int) -> int:
    """How many rows of this width make a block; at least 1."""
    return max(1, min(rows, max(16, BLOCK_ELEMENTS // max(width, 1))))


def scratch(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory for a block, valid until the next call."""
    size = rows * width
    if size > BLOCK_ELEMENTS or dtype != torch.float32 or device.type != "cpu" or _recorded():
        return torch.empty(rows, width, dtype=dtype, device=device)
    if _kept.block is None:
        with torch.inference_mode(False):
            _kept.block = torch.empty(BLOCK_ELEMENTS, dtype=dtype, device=device)
    return _kept.block[:size].view(rows, width)


def _recorded() -> bool:
    """True if a tensor made elsewhere would be recorded in a graph, or a tensor made here would be a fake one."""
    return torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0
