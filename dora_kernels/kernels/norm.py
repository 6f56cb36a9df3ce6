"""Weight norm: ``n_i = sqrt(Σ_k (W[i, k] + s Σ_r B[i, r] A[r, k])²)`` in one read of W.

Shapes: W ``[N, K]``, A ``[R, K]``, B ``[N, R]``, any strides; n ``[N]`` float32. Column norms are the row norms of
``(W.T, B.T, A.T)``.

A program forms tiles of ``W + s B A`` for BLOCK_N rows in registers, the product on the matrix units, squares them and
sums in float32: nothing cancels, and nothing of W's size is written. K is split among programs where N alone gives too
few; each writes the norm of its part, and a second pass takes the norm of those: no atomics, the same bits every run.

Bytes: N·K of W, plus B once per split and A once per block of rows (from the L2 cache), plus 4·N·splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import norm_config, products, splits
from dora_kernels.kernels.dot import dot
from dora_kernels.kernels.launch import INTERPRETED, on_device


@triton.jit
def weight_norm_kernel(
    w_ptr, a_ptr, b_ptr, norm_ptr,
    N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    scaling, span,
    HOLD_B: tl.constexpr, PRODUCTS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Norm of columns ``[split * span, (split + 1) * span)`` for BLOCK_N rows. HOLD_B: the rank fits in BLOCK_R."""
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    split = tl.program_id(1)
    b_rows = b_ptr + offs_n[:, None] * stride_bn
    # 16-bit factors of one dtype are multiplied as they are, everything else as float32 in pieces.
    wide = tl.float32 if PRODUCTS > 1 else a_ptr.dtype.element_ty
    if HOLD_B:
        b = tl.load(b_rows + offs_r[None, :] * stride_br, mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0)
        b = b.to(wide)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(split * span, tl.minimum((split + 1) * span, K), BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        mask_w = mask_n[:, None] & mask_k[None, :]
        w = tl.load(w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk, mask=mask_w, other=0.0)
        a_columns = a_ptr + offs_k[None, :] * stride_ak
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if HOLD_B:
            a = tl.load(
                a_columns + offs_r[:, None] * stride_ar, mask=(offs_r < R)[:, None] & mask_k[None, :], other=0.0
            )
            acc = dot(b, a.to(wide), acc, PRODUCTS, INTERPRETED)
        else:
            for r in range(0, R, BLOCK_R):
                mask_r = r + offs_r < R
                offs = (r + offs_r).to(tl.int64)
                a = tl.load(
                    a_columns + offs[:, None] * stride_ar, mask=mask_r[:, None] & mask_k[None, :], other=0.0
                )
                b = tl.load(b_rows + offs[None, :] * stride_br, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
                acc = dot(b.to(wide), a.to(wide), acc, PRODUCTS, INTERPRETED)
        v = w.to(tl.float32) + scaling * acc
        total += tl.sum(v * v, 1)
    tl.store(norm_ptr + split.to(tl.int64) * N + offs_n, tl.sqrt(total), mask=mask_n)


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Row norms of ``W + s B A``, float32 ``[N]``."""
    (N, K), R = weight.shape, lora_A.shape[0]
    wide = lora_A.dtype == torch.float32 or lora_A.dtype != lora_B.dtype
    count = products(wide, weight.dtype == torch.float32)
    config = norm_config(R, count)
    steps = triton.cdiv(K, config.BLOCK_K)
    blocks = triton.cdiv(N, config.BLOCK_N)
    span = triton.cdiv(steps, splits(blocks, steps)) * config.BLOCK_K
    parts = triton.cdiv(K, span)
    norm = torch.empty(parts, N, dtype=torch.float32, device=weight.device)
    with on_device(weight):
        weight_norm_kernel[(blocks, parts)](
            weight, lora_A, lora_B, norm,
            N, K, R,
            *weight.stride(), *lora_A.stride(), *lora_B.stride(),
            scaling, span,
            HOLD_B=R <= config.BLOCK_R, PRODUCTS=count, INTERPRETED=INTERPRETED, **config._asdict(),
        )  # fmt: skip
    return norm[0] if parts == 1 else torch.linalg.vector_norm(norm, dim=0)
