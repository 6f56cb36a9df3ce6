"""The norm and the merged weight in plain PyTorch operations, one block of W at a time, for ``backend="torch"``.

`dora_kernels.kernels` has the same two functions, under the same names, as Triton kernels. No temporary holds more
than a 4 MB block of the weight. On the CPU each thread keeps one such block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, cast, full_precision
from dora_kernels.core.products import block_rows, blocks, mm_wide, row_major, scratch
from dora_kernels.core.scale import magnitude_scale
from dora_kernels.engine import choices
from dora_kernels.rounding import stochastic

_GRAM_FEATURES = 1024

# If a row's squared norm is below this fraction of the terms it is summed from, the factored form has lost digits to
# cancellation, and the row is computed directly. A quarter costs at most two bits.
CANCELLATION = 0.25

# Weights with fewer elements, or with fewer features per rank, use the direct norm. Time of the factored form over
# that of the direct one, on two cores: 1.1 to 1.3 for 576x576 to 1536x576 in a model's training, rank 16; at 2048x2048
# 0.7 to 1.0 for rank 16, 1.0 to 1.1 for 64, 1.3 to 1.5 for 384; at 4096x4096 0.5 to 0.9, 0.9 to 1.0 and 1.1 to 1.2
# (bench/results).
_FACTORED_ELEMENTS = 1 << 21
_FACTORED_FEATURES = 64


def weight_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, weight_square: Tensor | None = None
) -> Tensor:
    """Row norms of ``W + s B A`` in float32 (float64 for float64 input), shape ``[out_features]``.

    Column norms are the row norms of the transposed problem ``(W.T, B.T, A.T)``.

    For a large weight on the CPU and a low rank, the norm is computed in factored form, from matrices of rank r only:
    ``n² = |w|² + 2s Σ_k B (U + s/2 · B G)`` with ``U = W Aᵀ`` and ``G = A Aᵀ``. Rows that suffer from cancellation are
    computed directly, from blocks of ``W + s B A``. On other devices every row is computed directly, because finding
    the cancelled rows would make the host wait.

    Args:
        weight: ``[N, K]``, or a stack of experts ``[E, N, K]`` with factors ``[E, r, K]`` and ``[E, N, r]``.
        weight_square: ``|w|²`` per row (`row_square`), which is constant for a frozen weight; computed if None.
    """
    if weight.dim() == 3:
        squares = [None] * len(weight) if weight_square is None else weight_square
        stacks = zip(weight, lora_A, lora_B.contiguous(), squares, strict=True)
        return torch.stack([weight_norm(w, a, b, scaling, square) for w, a, b, square in stacks])
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    a, b = cast(lora_A, dtype), cast(lora_B, dtype)
    with full_precision(weight.device):
        if not is_factored(weight, lora_A, lora_B):
            return direct_norm(weight, a, b, scaling)
        if weight_square is None:
            weight_square = row_square(weight, dtype)
        return factored_norm(weight, a, b, scaling, weight_square)


def is_factored(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """True if `weight_norm` uses the factored form, which needs `row_square`."""
    (rows, features), rank = weight.shape[-2:], lora_A.shape[-2]
    if weight.device.type == "cpu" and weight.dim() == 2 and not torch.compiler.is_compiling():
        form = choices.measured(weight.device, weight.dtype, rows, features, rank).get("norm")
        if form is not None:
            return bool(form == "factored")
    wide = features >= _FACTORED_FEATURES * rank
    return wide and rows * features >= _FACTORED_ELEMENTS and weight.device.type == "cpu"


def factored_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float, weight_square: Tensor) -> Tensor:
    gram = _gram(a)
    u = mm_wide(weight, a.t()).addmm_(b, gram, alpha=0.5 * scaling)
    square = torch.add(weight_square, u.mul_(b).sum(1), alpha=2.0 * scaling)
    # The size of the summed terms, whatever cancels among them, even if A has duplicate rows.
    terms = CANCELLATION * scaling * scaling
    kept = square >= torch.addmv(weight_square, b.square(), gram.diagonal(), beta=CANCELLATION, alpha=terms)
    if bool(kept.all()):
        return square.sqrt_()
    norm = square.sqrt_()
    for rows in kept.logical_not_().nonzero().squeeze(1).split(block_rows(*weight.shape)):
        norm[rows] = direct_norm(weight[rows], a, b[rows], scaling)
    return norm


def _gram(a: Tensor) -> Tensor:
    """``a aᵀ``, summed in parts: over a long row the BLAS's float32 sums drift, by 8e-6 at 20 000 features."""
    a = a.contiguous()  # for a transposed matrix the BLAS would again add up one long sum, even of the parts
    gram = torch.mm(a[:, :_GRAM_FEATURES], a[:, :_GRAM_FEATURES].t())
    for start in range(_GRAM_FEATURES, a.shape[1], _GRAM_FEATURES):
        part = a[:, start : start + _GRAM_FEATURES]
        gram.addmm_(part, part.t())
    return gram


def direct_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Row norms of ``W + s B A``, which is formed one block at a time, in the order in which W lies in memory."""
    along_rows = row_major(weight)
    rows, left, right = (weight, b, a) if along_rows else (weight.t(), a.t(), b.t())
    length, width = rows.shape
    # Down columns PyTorch adds one after another in float32, which drifts: 3e-6 over 20 000, half of it in two blocks.
    step = block_rows(length if along_rows else (length + 1) // 2, width)
    buffer = scratch(step, width, a.dtype, weight.device)
    norms = []
    for start in range(0, length, step):
        part = slice(start, start + step)
        block = buffer[: min(step, length - start)].copy_(rows[part])
        block.addmm_(left[part], right, alpha=scaling)
        norms.append(torch.linalg.vector_norm(block, dim=1 if along_rows else 0))
    if len(norms) == 1:
        return norms[0]
    return torch.cat(norms) if along_rows else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def row_square(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared norm of every row of `weight`, in `dtype`."""
    if weight.dim() == 3:
        return torch.stack([row_square(w, dtype) for w in weight])
    nothing = weight.new_empty(0, dtype=dtype)
    rank_0 = nothing.view(0, weight.shape[1]), nothing.view(weight.shape[0], 0)
    return direct_norm(weight, *rank_0, 0.0).square_()


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    seed: int | torch.Generator | None = None,
    transposed: bool = False,
    norm: Tensor | None = None,
) -> Tensor:
    """``g * (W + s B A)`` with ``g = magnitude / norm`` per row, 0 where the norm is 0; without a magnitude g is 1.

    Computed in float32 (float64 for float64 input) and rounded once to weight's dtype: to nearest, or stochastically if
    a seed is given.

    Args:
        seed: as `rounding.stochastic`.
        transposed: True if this is the transposed problem (``magnitude_axis="in"``). Its columns are then the rows of
            the original weight; stochastic rounding numbers the elements along those.
        norm: the norm of the rows, if it is known.
    """
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    a, b = cast(lora_A, dtype), cast(lora_B, dtype)
    g = None
    if magnitude is not None:
        norm = weight_norm(weight, lora_A, lora_B, scaling) if norm is None else norm
        g = magnitude_scale(magnitude, norm).unsqueeze(1)
    merged = torch.empty_like(weight)
    start = 0
    with full_precision(weight.device):
        if not transposed if isinstance(seed, int) else row_major(weight):
            for target, rows, left, scale in blocks(block_rows(*merged.shape), merged, weight, b, g):
                _merge_block(target, rows, left, a, scale, scaling, seed, start)
                start += target.numel()
        else:
            scale = None if g is None else g.t()
            for target, columns, left in blocks(block_rows(*merged.t().shape), merged.t(), weight.t(), a.t()):
                _merge_block(target, columns, left, b.t(), scale, scaling, seed, start)
                start += target.numel()
    return merged


def _merge_block(
    target: Tensor,
    w: Tensor,
    left: Tensor,
    right: Tensor,
    scale: Tensor | None,
    scaling: float,
    seed: int | torch.Generator | None,
    start: int,
) -> None:
    if w.dtype == target.dtype == left.dtype:
        direction = torch.addmm(w, left, right, alpha=scaling, out=target)
        if scale is not None:
            direction.mul_(scale)
        return
    direction = w.to(left.dtype).addmm_(left, right, alpha=scaling)
    merged = direction if scale is None else direction.mul_(scale)
    target.copy_(merged if seed is None else stochastic(merged, target.dtype, seed, start))
