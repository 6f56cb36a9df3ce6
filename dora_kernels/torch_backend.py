"""The `torch` backend: the primitives of DoRA in plain PyTorch operations. Runs on every device; the CPU's path.

The Triton kernels in `dora_kernels.kernels` offer the same primitives under the same names: `weight_norm`,
`compose`, `scale_reduce`. Nothing here forms an ``[out_features, in_features]`` temporary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dora_kernels.reference import accumulation_dtype, full_precision

# One block of W in float32 is about 2 MB: it stays in a core's share of the cache between the two uses of it.
_BLOCK_ELEMENTS = 1 << 19

_GRAM_FEATURES = 1024

# Rows whose squared norm is below this fraction of the squared terms it is summed from have lost digits to
# cancellation in the factored form and are recomputed directly; a quarter costs at most two bits.
_CANCELLATION = 0.25


def weight_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, weight_square: Tensor | None = None
) -> Tensor:
    """Row norms of ``W + s B A`` in float32 (float64 for float64 input), shape ``[out_features]``.

    Column norms are the row norms of the transposed problem ``(W.T, B.T, A.T)``.

    On the CPU the factored form is used, from matrices of rank r only:
    ``n² = |w|² + 2s Σ_k B (U + s/2 · B G)`` with ``U = W Aᵀ`` and ``G = A Aᵀ``;
    `weight_square` is ``|w|²`` per row where the caller keeps it. Rows that suffer from cancellation are recomputed.
    On other devices that recomputation would need the host to wait, so W is read in row blocks and the direct
    form is taken.
    """
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    a, b = lora_A.to(dtype), lora_B.to(dtype)
    if weight.device.type != "cpu":
        with full_precision(weight.device):
            return _direct_norm(weight, a, b, scaling)
    if weight_square is None:
        weight_square = row_square(weight, dtype)
    gram = _gram(a)
    u = mm_wide(weight, a.t()).addmm_(b, gram, alpha=0.5 * scaling)
    square = torch.add(weight_square, u.mul_(b).sum(1), alpha=2.0 * scaling)
    # `terms` bounds the size of the summands whatever cancels among them: duplicate rows of A included.
    terms = torch.addmv(weight_square, b.square(), gram.diagonal(), alpha=scaling * scaling)
    kept = square >= terms.mul_(_CANCELLATION)
    if not bool(kept.all()):
        lost = kept.logical_not_().nonzero().squeeze(1)
        for part in _blocks(lost.shape[0], weight.shape[1]):
            rows = lost[part]
            square[rows] = _direct_norm(weight[rows], a, b[rows], scaling).square_()
    return square.sqrt_()


def _gram(a: Tensor) -> Tensor:
    """``a aᵀ``, in parts: over a long row the BLAS's float32 sums of squares drift, by 8e-6 at 20 000 features."""
    a = a.contiguous()  # of a transposed one the BLAS adds up one long sum again, whatever the parts
    part = a[:, :_GRAM_FEATURES]
    gram = torch.mm(part, part.t())
    for start in range(_GRAM_FEATURES, a.shape[1], _GRAM_FEATURES):
        part = a[:, start : start + _GRAM_FEATURES]
        gram.addmm_(part, part.t())
    return gram


def _direct_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    norm = torch.empty(weight.shape[0], dtype=a.dtype, device=weight.device)
    for rows in _blocks(weight.shape[0], weight.shape[1]):
        direction = torch.addmm(weight[rows].to(a.dtype), b[rows], a, alpha=scaling)
        torch.linalg.vector_norm(direction, dim=1, out=norm[rows])
    return norm


def row_square(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared norm of every row of `weight`, ``[out_features]`` in `dtype`. Constant for a frozen weight."""
    if _row_major(weight):
        parts = [weight[rows].to(dtype).square().sum(1) for rows in _blocks(*weight.shape)]
        return torch.cat(parts)
    total = torch.zeros(weight.shape[0], dtype=dtype, device=weight.device)
    for columns in _blocks(weight.shape[1], weight.shape[0]):
        total += weight[:, columns].to(dtype).square().sum(1)
    return total


def mm_wide(weight: Tensor, other: Tensor) -> Tensor:
    """``weight @ other`` in other's dtype, upcasting `weight` block by block: no copy of it is ever whole."""
    if weight.dtype == other.dtype:
        return weight @ other
    if _row_major(weight):
        out = other.new_empty(weight.shape[0], other.shape[1])
        for rows in _blocks(*weight.shape):
            torch.mm(weight[rows].to(other.dtype), other, out=out[rows])
        return out
    out = other.new_zeros(weight.shape[0], other.shape[1])
    for columns in _blocks(weight.shape[1], weight.shape[0]):
        out.addmm_(weight[:, columns].to(other.dtype), other[columns])
    return out


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
) -> Tensor:
    """``g * (W + s B A)`` with g per row or per column, computed in float32 and rounded once to weight's dtype."""
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    a, b = lora_A.to(dtype), lora_B.to(dtype)
    merged = torch.empty_like(weight)
    with torch.autocast(weight.device.type, enabled=False), full_precision(weight.device):
        for rows in _blocks(*weight.shape):
            direction = torch.addmm(weight[rows].to(dtype), b[rows], a, alpha=scaling)
            if row_scale is not None:
                direction *= row_scale[rows].unsqueeze(1)
            if column_scale is not None:
                direction *= column_scale
            merged[rows] = direction
    return merged


def compose(
    base: Tensor, h: Tensor, lora_B: Tensor, g: Tensor | None, bias: Tensor | None, scaling: float, keep_base: bool
) -> Tensor:
    """``y = g * (base + s h Bᵀ) + bias``, shape ``[tokens, out_features]``, in base's dtype.

    `base` is left untouched if `keep_base` (never for plain LoRA, g None), and otherwise overwritten and returned.
    """
    dtype = base.dtype
    if not keep_base:
        base.addmm_(h, lora_B.to(dtype).t(), alpha=scaling)
        if g is not None:
            base.mul_(g)
        return base if bias is None else base.add_(bias)
    assert g is not None  # plain LoRA keeps nothing
    y = torch.empty_like(base)
    scaled_B = scaled_rows(lora_B, g, dtype).t()
    for rows in _blocks(*base.shape):
        part = y[rows]
        if bias is None:
            torch.mul(base[rows], g, out=part)
        else:
            torch.addcmul(bias, base[rows], g, out=part)
        part.addmm_(h[rows], scaled_B, alpha=scaling)
    return y


def scale_reduce(
    grad: Tensor, other: Tensor | None, g: Tensor | None, want_scaled: bool, want_sum: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One pass over ``grad [tokens, features]``: ``(g * grad, Σ_t grad * other, Σ_t grad)``.

    The scaled gradient is in grad's dtype, the two sums over tokens are ``[features]`` in float32 (float64 for
    float64); each is None where it is not wanted (`other` is None: no dot).
    """
    accumulate = accumulation_dtype(grad)
    scaled = torch.empty_like(grad) if want_scaled else None
    dot = total = None
    for rows in _blocks(*grad.shape):
        part = grad[rows].to(accumulate)
        if other is not None:
            dot = _added(dot, (part * other[rows]).sum(0))
        if want_sum:
            total = _added(total, part.sum(0))
        if scaled is not None and g is not None:
            torch.mul(part, g, out=scaled[rows])
    return scaled, dot, total


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def scaled_rows(matrix: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows * matrix``, a factor per row, rounded once to `dtype`."""
    rows = rows.unsqueeze(1)
    if matrix.dtype == dtype == rows.dtype:
        return matrix * rows
    return torch.mul(matrix, rows, out=torch.empty(matrix.shape, dtype=dtype, device=matrix.device))


def mm_accumulate(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in `dtype`, rounded at most once from its float32 accumulation.

    A bfloat16 product rounds its output, so a float32 result of bfloat16 operands needs either the BLAS's mixed
    output (CUDA) or operands that are upcast first.
    """
    if left.dtype == dtype:
        return left @ right
    if torch.finfo(dtype).bits < torch.finfo(left.dtype).bits:
        return (left @ right).to(dtype)
    if left.device.type == "cuda" and dtype == torch.float32 and _MM_OUT_DTYPE:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.to(dtype) @ right.to(dtype)


_MM_OUT_DTYPE = "dtype" in torch.ops.aten.mm.overloads()


def _row_major(weight: Tensor) -> bool:
    return weight.stride(0) >= weight.stride(1)


def _blocks(length: int, width: int) -> Iterator[slice]:
    """Slices of `length` whose product with `width` is about a block; at least one, also of nothing."""
    step = max(16, _BLOCK_ELEMENTS // max(width, 1))
    for start in range(0, max(length, 1), step):
        yield slice(start, start + step)
