"""Weighted sums of low-rank adapters of one weight: the mathematics, on tensors alone.

The sum ``W + Σ w_i (g_i V_i - W)`` of merged weights, with ``V_i = W + s_i B_i A_i`` and one factor g per row, equals
``c W + U`` with ``c = 1 + Σ w_i (g_i - 1)`` and ``U = Σ w_i s_i g_i B_i A_i``. That is again a DoRA adapter,
``c (W + U / c)``: its rank is the sum of the ranks, its magnitude c times the norm of ``W + U / c``. Plain LoRA has
g = 1. Truncating U to a lower rank by its singular values gives, for this c, the merged weight nearest to the sum in
the Frobenius norm.

Here the factor is per row; a magnitude per column is the transposed problem, ``(Wᵀ, Bᵀ, Aᵀ)``. One magnitude may cover
several consecutive rows (a convolution's input channel has one row for each element of its kernel).

A row with c = 0 has no direction left to scale. If its U is 0 too, the row is exactly 0. If not, W keeps a share that
disappears in rounding: `_LEAST`, relative to the row itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_kernels.core.precision import full_precision, no_autocast

# In units of the rounding of a row of the sum: eight, about what its other terms lose by themselves.
_LEAST = 8.0

# Elements of one block in which a weight is read: 4 MB in float32.
_BLOCK_ELEMENTS = 1 << 20


class Part(NamedTuple):
    """A term of the sum: ``w s B A = left @ right``, ``[n, r]`` and ``[r, k]``, left being on the scaled side."""

    weight: float
    left: Tensor
    right: Tensor
    scale: Tensor | None
    """g; None for 1."""


class Sum(NamedTuple):
    """``factor W + left @ right``, with one factor per magnitude. `replaced` counts factors that were (nearly) 0."""

    factor: Tensor
    left: Tensor
    right: Tensor
    replaced: int


def weighted_sum(parts: Sequence[Part], base_norm: Callable[[], Tensor], dtype: torch.dtype, length: int) -> Sum:
    """The sum, with the ranks added up, in `dtype`.

    Args:
        parts: at least one, all of one weight.
        base_norm: returns the norm of W along the magnitude; called only if some c is nearly 0.
        dtype: float32 or float64.
        length: the number of magnitudes.
    """
    device = parts[0].left.device
    scaled = [part for part in parts if part.scale is not None]
    # Not 1 + Σ w (g - 1): if the weights add up to 1, nothing cancels here.
    factor = torch.full((length,), 1.0 - math.fsum(part.weight for part in scaled), dtype=dtype, device=device)
    left = []
    for part in parts:
        rows = part.left.to(dtype)
        if part.scale is not None:
            scale = part.scale.to(dtype)
            factor += part.weight * scale
            rows = _scaled(rows, scale)
        left.append(rows)
    all_left, all_right = torch.cat(left, 1), torch.cat([part.right.to(dtype) for part in parts])
    factor, replaced = _without_zeros(factor, all_left, all_right, base_norm)
    return Sum(factor, all_left, all_right, replaced)


def _without_zeros(
    factor: Tensor, left: Tensor, right: Tensor, base_norm: Callable[[], Tensor]
) -> tuple[Tensor, int]:
    least = _LEAST * torch.finfo(factor.dtype).eps
    small = factor.abs() < least
    if not bool(small.any()):
        return factor, 0
    with no_autocast(left.device), full_precision(left.device):
        squares = (left @ (right @ right.t())) * left
    update = _by_magnitude(squares, factor.shape[0]).sum((1, 2)).clamp_(min=0.0).sqrt_()
    norm = base_norm().to(factor.dtype)
    wanted = torch.where(norm == 0, torch.ones_like(norm), least * update / norm.masked_fill(norm == 0, 1.0))
    replaced = small & (factor.abs() < wanted) & (update > 0)
    return torch.where(replaced, wanted.copysign(factor), factor), int(replaced.sum())


def divided(total: Sum) -> Tensor:
    """The left factor of the new adapter, ``left / c``; 0 where c is 0."""
    factor = total.factor
    inverse = torch.where(factor == 0, torch.zeros_like(factor), 1.0 / factor.masked_fill(factor == 0, 1.0))
    return _scaled(total.left, inverse)


def of_rank(total: Sum, rank: int) -> tuple[Sum, float]:
    """The sum with its update cut to at most `rank`, and the Frobenius norm of what the merged weight loses by that."""
    if total.right.shape[0] <= rank:
        return total, 0.0
    with no_autocast(total.left.device), full_precision(total.left.device):
        q_left, r_left = torch.linalg.qr(total.left)
        q_right, r_right = torch.linalg.qr(total.right.t())
        u, s, v = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
        root = s[:rank].sqrt()
        left, right = (q_left @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ q_right.t())
    return total._replace(left=left, right=right), float(s[rank:].norm())


def size(total: Sum) -> float:
    """Frobenius norm of the update ``left @ right``, from matrices of its rank."""
    with no_autocast(total.left.device), full_precision(total.left.device):
        triangle = torch.linalg.qr(total.right.t(), mode="r").R
        return float(torch.linalg.matrix_norm(total.left @ triangle.t()))


def change(total: Sum, weight: Tensor) -> float:
    """Frobenius norm of the sum's change to ``weight [n, k]``, ``(c - 1) W + U``, from blocks of rows."""
    rows = (total.factor - 1.0).repeat_interleave(weight.shape[0] // total.factor.shape[0])
    step = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    norms = []
    with no_autocast(weight.device), full_precision(weight.device):
        for start in range(0, weight.shape[0], step):
            part = slice(start, start + step)
            block = weight[part].to(rows.dtype) * rows[part, None]
            norms.append(torch.linalg.vector_norm(block.addmm_(total.left[part], total.right)))
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _by_magnitude(rows: Tensor, length: int) -> Tensor:
    return rows.reshape(length, -1, rows.shape[1])


def _scaled(rows: Tensor, scale: Tensor) -> Tensor:
    return (_by_magnitude(rows, scale.shape[0]) * scale[:, None, None]).reshape(rows.shape)
