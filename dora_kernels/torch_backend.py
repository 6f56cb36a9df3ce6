"""The `torch` backend: the primitives of DoRA in plain PyTorch operations. Runs on every device; the CPU's path.

The Triton kernels in `dora_kernels.kernels` offer the same primitives under the same names: `weight_norm`,
`merge`, `compose`, `scale_reduce`. No temporary holds more of the weight than a block of 4 MB; on the CPU each thread
keeps one such block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dora_kernels.normalization import affine, normalizes, sums_over_tokens
from dora_kernels.reference import accumulation_dtype, cast, full_precision, magnitude_scale
from dora_kernels.rounding import stochastic

_GRAM_FEATURES = 1024

# Rows whose squared norm is below this fraction of the squared terms it is summed from have lost digits to
# cancellation in the factored form and are recomputed directly; a quarter costs at most two bits.
CANCELLATION = 0.25

# Weights of fewer elements, or of fewer features for each of the rank, take the direct norm. Two cores, times of the
# factored form over the direct one: 1.1 to 1.3 for 576x576 to 1536x576 in a model's training, rank 16; at 2048x2048 0.7
# to 1.0 for rank 16, 1.0 to 1.1 for 64, 1.3 to 1.5 for 384, and at 4096x4096 0.5 to 0.9, 0.9 to 1.0 and 1.1 to 1.2
# (bench/results).
_FACTORED_ELEMENTS = 1 << 21
_FACTORED_FEATURES = 64

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


def weight_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, weight_square: Tensor | None = None
) -> Tensor:
    """Row norms of ``W + s B A`` in float32 (float64 for float64 input), shape ``[out_features]``.

    Column norms are the row norms of the transposed problem ``(W.T, B.T, A.T)``.

    A large weight on the CPU takes the factored form at low rank, from matrices of rank r only:
    ``n² = |w|² + 2s Σ_k B (U + s/2 · B G)`` with ``U = W Aᵀ`` and ``G = A Aᵀ``; `weight_square` is ``|w|²`` per row
    (`row_square`), which is constant for a frozen weight. Rows that suffer from cancellation are computed directly:
    in blocks of ``W + s B A``, as all rows elsewhere: on other devices the host would have to wait.
    """
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    a, b = cast(lora_A, dtype), cast(lora_B, dtype)
    with full_precision(weight.device):
        if not is_factored(weight, lora_A, lora_B):
            return direct_norm(weight, a, b, scaling)
        if weight_square is None:
            weight_square = row_square(weight, dtype)
        return factored_norm(weight, a, b, scaling, weight_square)


def is_factored(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether `weight_norm` takes the factored form, and so has a use for `row_square`."""
    wide = weight.shape[1] >= _FACTORED_FEATURES * lora_A.shape[0]
    return wide and weight.numel() >= _FACTORED_ELEMENTS and weight.device.type == "cpu"


def factored_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float, weight_square: Tensor) -> Tensor:
    gram = _gram(a)
    u = mm_wide(weight, a.t()).addmm_(b, gram, alpha=0.5 * scaling)
    square = torch.add(weight_square, u.mul_(b).sum(1), alpha=2.0 * scaling)
    # The size of what was summed, whatever cancels among it, duplicate rows of A included.
    terms = CANCELLATION * scaling * scaling
    kept = square >= torch.addmv(weight_square, b.square(), gram.diagonal(), beta=CANCELLATION, alpha=terms)
    if bool(kept.all()):
        return square.sqrt_()
    norm = square.sqrt_()
    for rows in kept.logical_not_().nonzero().squeeze(1).split(_block_rows(*weight.shape)):
        norm[rows] = direct_norm(weight[rows], a, b[rows], scaling)
    return norm


def _gram(a: Tensor) -> Tensor:
    """``a aᵀ``, in parts: over a long row the BLAS's float32 sums of squares drift, by 8e-6 at 20 000 features."""
    a = a.contiguous()  # of a transposed one the BLAS adds up one long sum again, whatever the parts
    gram = torch.mm(a[:, :_GRAM_FEATURES], a[:, :_GRAM_FEATURES].t())
    for start in range(_GRAM_FEATURES, a.shape[1], _GRAM_FEATURES):
        part = a[:, start : start + _GRAM_FEATURES]
        gram.addmm_(part, part.t())
    return gram


def direct_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """A block of ``W + s B A`` at a time, along the rows of W as it lies in memory, at most half of it."""
    row_major = _row_major(weight)
    rows, left, right = (weight, b, a) if row_major else (weight.t(), a.t(), b.t())
    length, width = rows.shape
    step = _block_rows((length + 1) // 2, width)
    buffer = _scratch(step, width, a.dtype, weight.device)
    norms = []
    for start in range(0, length, step):
        part = slice(start, start + step)
        block = buffer[: min(step, length - start)].copy_(rows[part])
        block.addmm_(left[part], right, alpha=scaling)
        norms.append(torch.linalg.vector_norm(block, dim=1 if row_major else 0))
    return torch.cat(norms) if row_major else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def row_square(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared norm of every row of `weight`, in `dtype`."""
    nothing = weight.new_empty(0, dtype=dtype)
    rank_0 = nothing.view(0, weight.shape[1]), nothing.view(weight.shape[0], 0)
    return direct_norm(weight, *rank_0, 0.0).square_()


def mm_wide(weight: Tensor, other: Tensor) -> Tensor:
    """``weight @ other`` in other's dtype, upcasting `weight` block by block: no copy of it is ever whole."""
    if weight.dtype == other.dtype:
        return weight @ other
    if _row_major(weight):
        out = other.new_empty(weight.shape[0], other.shape[1])
        # `other` as it lies: with a copied Aᵀ of four columns the BLAS adds up one long sum, with twice the error and
        # in five times the time.
        step = _block_rows(*weight.shape)
        buffer = _scratch(step, weight.shape[1], other.dtype, other.device)
        for rows, target in _blocks(step, weight, out):
            torch.mm(buffer[: rows.shape[0]].copy_(rows), other, out=target)
        return out
    out = other.new_zeros(weight.shape[0], other.shape[1])
    step = _block_rows(*weight.t().shape)
    buffer = _scratch(step, weight.shape[0], other.dtype, other.device)
    for columns, rows in _blocks(step, weight.t(), other):
        out.addmm_(buffer[: rows.shape[0]].copy_(columns).t(), rows)
    return out


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    seed: int | None = None,
    transposed: bool = False,
) -> Tensor:
    """``g * (W + s B A)`` with ``g = magnitude / norm`` per row, 0 where the norm is 0; without a magnitude g is 1.

    Computed in float32 (float64 for float64 input) and rounded once to weight's dtype, with a seed stochastically.
    Along "in" the problem is the `transposed` one, whose columns are the rows of the weight that the elements' indices
    count along.
    """
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    a, b = cast(lora_A, dtype), cast(lora_B, dtype)
    g = None
    if magnitude is not None:
        g = magnitude_scale(magnitude, weight_norm(weight, lora_A, lora_B, scaling)).unsqueeze(1)
    merged = torch.empty_like(weight)
    start = 0
    with full_precision(weight.device):
        if _row_major(weight) if seed is None else not transposed:
            for target, rows, left, scale in _blocks(_block_rows(*merged.shape), merged, weight, b, g):
                _merge_block(target, rows, left, a, scale, scaling, seed, start)
                start += target.numel()
        else:
            scale = None if g is None else g.t()
            for target, columns, left in _blocks(_block_rows(*merged.t().shape), merged.t(), weight.t(), a.t()):
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
    seed: int | None,
    start: int,
) -> None:
    direction = torch.addmm(w.to(left.dtype), left, right, alpha=scaling)
    merged = direction if scale is None else direction.mul_(scale)
    target.copy_(merged if seed is None else stochastic(merged, target.dtype, seed, start))


def compose(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    g: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: bool,
    divisor: Tensor | None = None,
) -> Tensor:
    """``y = g * (base + s h Bᵀ) + bias``, shape ``[tokens, out_features]``, in base's dtype.

    Where a divisor is given, g is the magnitude, still to be divided by it.
    `base` is overwritten: with the sum in the bracket if `keep` and `keeps_sum` (never for plain LoRA, g None), with y
    itself if not `keep`.
    """
    if g is not None and divisor is not None:
        g = quotient(g, divisor, base)
    if h.dtype != base.dtype or (g is not None and not keeps_sum(base, h, lora_B)):
        return _compose_wide(base, h, lora_B, g, bias, scaling, torch.empty_like(base) if keep else base)
    total = base.addmm_(h, cast(lora_B, base.dtype).t(), alpha=scaling)
    if g is None:
        return total if bias is None else total.add_(bias)
    return affine(total, g, bias, None if keep else base)


def keeps_sum(base: Tensor, h: Tensor, lora_B: Tensor) -> bool:
    """Whether what `compose` keeps holds the low-rank product too, so that a dot with it is all of dm.

    Not of a 16-bit base product and a float32 h or, on the CPU, float32 factors, where that sum would be rounded once
    more than in PEFT's layer, which adds up in float32.
    """
    if h.dtype != base.dtype:
        return False
    return base.device.type != "cpu" or base.dtype in (accumulation_dtype(base), lora_B.dtype)


def _compose_wide(
    base: Tensor, h: Tensor, lora_B: Tensor, g: Tensor | None, bias: Tensor | None, scaling: float, out: Tensor
) -> Tensor:
    """`compose` in float32 blocks, rounded once; `out` may be `base`."""
    dtype = accumulation_dtype(base, h, lora_B)
    h, right = cast(h, dtype), cast(lora_B, dtype).t()
    step = _block_rows(*base.shape)
    buffer = _scratch(step, base.shape[1], dtype, base.device)
    with full_precision(base.device):
        for rows, left, target in _blocks(step, base, h, out):
            block = buffer[: rows.shape[0]].copy_(rows).addmm_(left, right, alpha=scaling)
            if g is None:
                target.copy_(block if bias is None else block.add_(bias))
            else:
                target.copy_(block.mul_(g) if bias is None else torch.addcmul(bias, block, g, out=block))
    return out


def scale_partials(
    grad: Tensor, other: Tensor | None, g: Any, want_scaled: bool, want_sum: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`scale_reduce`, its two sums as one strip: ``[1, features]``."""
    scaled, dot, total = scale_reduce(grad, other, g, want_scaled, want_sum)
    return scaled, None if dot is None else dot.unsqueeze(0), None if total is None else total.unsqueeze(0)


def factor_grads(
    p: Tensor, lora_B: Tensor, dot: Tensor, g: Tensor, divisor: Tensor, scaling: float, dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor]:
    """``(dB = s g * P, dm = (Σ_strips dot + s Σ_k B * P) / divisor)``; dB in `dtype`, None where that is."""
    dm = cast(torch.add(dot.sum(0), (p * lora_B).sum(1), alpha=scaling), dot.dtype).div_(divisor)
    return None if dtype is None else scaled_rows(p, g * scaling, dtype), dm


def scale_reduce(
    grad: Tensor, other: Tensor | None, g: Any, want_scaled: bool, want_sum: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One pass over ``grad [tokens, features]``: ``(g * grad, Σ_t grad * other, Σ_t grad)``.

    The scaled gradient is in grad's dtype, the two sums over tokens are ``[features]`` in float32 (float64 for
    float64); each is None where it is not wanted (`other` is None: no dot).
    """
    dtype = accumulation_dtype(grad)
    scaled = torch.empty_like(grad) if want_scaled else None
    dot = total = None
    for part, partner, target in _blocks(_block_rows(*grad.shape), grad, other, scaled):
        products = sums = None
        if normalizes(grad):
            if partner is not None or want_sum:
                products, sums = sums_over_tokens(part, partner, want_sum)
        else:
            wide = cast(part, dtype)
            if partner is not None:
                # The scaled gradient's memory holds the products before it holds that.
                products = torch.mul(wide, partner, out=target if wide is part else None).sum(0)
            if want_sum:
                sums = wide.sum(0)
        dot, total = _added(dot, products), _added(total, sums)
        if target is not None:
            affine(part, g, None, target)
    return scaled, dot, total


def quotient(magnitude: Tensor, divisor: Tensor, x: Tensor) -> Tensor:
    """``g = magnitude / divisor``, in the dtype sums over x are accumulated in."""
    dtype = accumulation_dtype(x)
    g = magnitude / (divisor if divisor.dtype == dtype else divisor.to(dtype))
    return g if g.dtype == dtype else g.to(dtype)


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total.add_(part)


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
    step = _block_rows(tokens, rows + columns)
    wide_left, wide_right = _scratch(step, rows + columns, dtype, left.device).split((rows, columns), dim=1)
    for left_part, right_part in _blocks(step, left.t(), right):
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


def _row_major(weight: Tensor) -> bool:
    return weight.stride(0) >= weight.stride(1)


def _blocks(step: int, first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The tensors in blocks of so many of the rows they share; at least one block."""
    if first.shape[0] <= step:
        return iter(((first, *others),))
    starts = range(0, first.shape[0], step)
    return (tuple(None if t is None else t[start : start + step] for t in (first, *others)) for start in starts)


def _block_rows(rows: int, width: int) -> int:
    """How many of these rows make a block, at least one."""
    return max(1, min(rows, max(16, BLOCK_ELEMENTS // max(width, 1))))


def _scratch(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
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
