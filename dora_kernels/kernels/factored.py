"""Weight norm at high rank, from matrices of rank r: ``n² = |w|² + 2s Σ_k B (U + s/2 · B G)``, U = W Aᵀ, G = A Aᵀ.

Shapes: U ``[N, pieces * R]`` and G ``[R, R]`` float32, from the vendor's BLAS. Its operand is A or, for float32
adapters of a bfloat16 weight, the two bfloat16 pieces of A. B ``[N, R]``; ``|w|²`` and n ``[N]`` float32.

The kernel multiplies B G chunk by chunk and sums up. If the sum is much smaller than its terms, it has lost digits:
such a row's norm is returned as -1, and `norm.repair_norm` computes it directly.

Bytes: U once, B twice for every chunk of the rank, G once per block of rows (from the L2 cache).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import CANCELLATION, DIRECT_RANK, blocks, factored_config
from dora_kernels.kernels.dot import dot, dot_by_pieces
from dora_kernels.kernels.launch import INTERPRETED, PLANS, Plan, launch
from dora_kernels.kernels.product import wide_products

# A bound, not a measurement: tensor cores may truncate at each step of 16 features, which loses half a unit of 2**-24
# on average. So 128 steps lose at most 4e-6 of G, and half of that in G's part of a norm.
_GRAM_FEATURES = 2048


FACTORED: dict[tuple[int, ...], bool] = {}
"""By N, K and R: whether the factored form was measured to be the faster one here. The engine fills it in."""


@triton.jit
def factored_norm_kernel(
    u_ptr, gram_ptr, b_ptr, square_ptr, norm_ptr,
    N, R, stride_un, stride_gr, stride_bn, stride_br,
    scaling,
    PIECES: tl.constexpr, CANCELLATION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Norms of BLOCK_N rows; -1 if the squared norm is below CANCELLATION times its terms, or NaN."""
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    b_rows = b_ptr + offs_n[:, None] * stride_bn
    cross = tl.zeros((BLOCK_N,), tl.float32)
    low = tl.zeros((BLOCK_N,), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + offs
        mask_r = offs_r < R
        mask = mask_n[:, None] & mask_r[None, :]
        u = tl.load(u_ptr + offs_n[:, None] * stride_un + offs_r[None, :], mask=mask, other=0.0)
        if PIECES == 2:
            u += tl.load(u_ptr + offs_n[:, None] * stride_un + (R + offs_r)[None, :], mask=mask, other=0.0)
        acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for q in range(0, R, BLOCK_R):
            offs_q = q + offs
            mask_q = offs_q < R
            mask_g = mask_q[:, None] & mask_r[None, :]
            left = tl.load(
                b_rows + offs_q.to(tl.int64)[None, :] * stride_br, mask=mask_n[:, None] & mask_q[None, :], other=0.0
            )
            gram = tl.load(gram_ptr + offs_q[:, None] * stride_gr + offs_r[None, :], mask=mask_g, other=0.0)
            if PIECES == 2:
                acc = dot(left, gram, acc, 3, INTERPRETED, True)
            else:
                acc = dot_by_pieces(left, gram, acc, INTERPRETED)
        b = tl.load(b_rows + offs_r.to(tl.int64)[None, :] * stride_br, mask=mask, other=0.0).to(tl.float32)
        diagonal = tl.load(gram_ptr + offs_r * (stride_gr + 1), mask=mask_r, other=0.0)
        cross += tl.sum(b * (u + 0.5 * scaling * acc), 1)
        low += tl.sum(b * b * diagonal[None, :], 1)
    weight_square = tl.load(square_ptr + offs_n, mask=mask_n, other=0.0)
    square = weight_square + 2.0 * scaling * cross
    sound = square >= CANCELLATION * (weight_square + scaling * scaling * low)
    tl.store(norm_ptr + offs_n, tl.where(sound, tl.sqrt(tl.maximum(square, 0.0)), -1.0), mask=mask_n)


def is_factored(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """True if the norm uses the factored form: at high rank, or where it was measured to be faster."""
    rank = lora_A.shape[-2]
    return FACTORED.get((*weight.shape, rank), rank > DIRECT_RANK) and can_be_factored(weight, lora_A, lora_B)


def can_be_factored(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """True for one bfloat16 weight, whose BLAS product is exact.

    float16 has too few exponent bits for the pieces of float32 adapters.
    """
    if weight.dim() > 2 or weight.dtype != torch.bfloat16:
        return False
    if lora_A.dtype != lora_B.dtype or lora_A.dtype not in (torch.bfloat16, torch.float32) or 1 not in weight.stride():
        return False  # the BLAS would copy a W with gaps
    return INTERPRETED or wide_products(weight.device)


def factored_rows(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, weight_square: Tensor) -> Tensor:
    """Row norms of ``W + s B A``, float32 ``[N]``; -1 for rows that have to be computed directly."""
    N, R = lora_B.shape
    pieces = 1 if lora_A.dtype == weight.dtype else 2
    operand = lora_A if pieces == 1 else _in_two_pieces(lora_A, weight.dtype)
    u = _product(weight, operand.t())
    gram = _gram(operand)
    if pieces == 2:
        gram = gram.view(2, R, 2, R).sum((0, 2))
    norm = torch.empty(N, dtype=torch.float32, device=weight.device)
    plan = _plan(N, R, pieces, u.stride(0), gram.stride(0), lora_B.stride())
    tensors = u, gram, lora_B, weight_square, norm
    launch(factored_norm_kernel, plan, (blocks(N, plan.config.BLOCK_N),), tensors, (float(scaling),))
    return norm


@functools.lru_cache(PLANS)
def _plan(N: int, R: int, pieces: int, row_u: int, row_gram: int, strides_b: tuple[int, ...]) -> Plan:
    return Plan((N, R, row_u, row_gram, *strides_b), (pieces, CANCELLATION, INTERPRETED), factored_config())


def _in_two_pieces(lora_A: Tensor, dtype: torch.dtype) -> Tensor:
    """``[2R, K]``: A rounded, and the remainder rounded. Together they represent A to about 2**-17."""
    high = lora_A.to(dtype)
    return torch.cat([high, (lora_A - high.to(lora_A.dtype)).to(dtype)])


def _gram(operand: Tensor) -> Tensor:
    """``operand operandᵀ``, in parts of `_GRAM_FEATURES`: the accumulator of a long sum of positive terms drifts."""
    K = operand.shape[1]
    whole = K // _GRAM_FEATURES * _GRAM_FEATURES
    parts, rest = operand.split((whole, K - whole), dim=1)
    gram = _product(rest, rest.t())
    if whole:
        parts = parts.unflatten(1, (-1, _GRAM_FEATURES)).transpose(0, 1)
        gram += _product(parts, parts.transpose(1, 2)).sum(0)
    return gram


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Product of 16-bit operands with unrounded float32 sums; computed in float64 if kernels are interpreted."""
    if left.device.type == "cuda":
        product = torch.mm if left.dim() == 2 else torch.bmm
        return product(left, right, out_dtype=torch.float32)
    return (left.double() @ right.double()).float()
