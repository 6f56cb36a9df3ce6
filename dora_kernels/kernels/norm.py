"""Weight norm: ``n_i = sqrt(Σ_k (W[i, k] + s Σ_r B[i, r] A[r, k])²)``, in one read of W unless digits are lost.

Shapes: W ``[N, K]``, A ``[R, K]``, B ``[N, R]``, any strides; n ``[N]`` float32. Column norms are the row norms of
``(W.T, B.T, A.T)``. Stacks (experts) have one more dimension in front, in W, A, B and n; one launch serves them all.

A program forms tiles of ``W + s B A`` for BLOCK_N rows in registers, with the product on the matrix units, squares them
and sums in float32. Nothing as large as W is written. If a product in pieces cancels most of the sum, the program
sweeps over its tiles once more with all pieces. K is split among programs if N alone gives too few. Each writes the
norm of its part, and a second kernel combines those: no atomics, the same bits every run.

Bytes: N·K of W, plus A once per block of rows and B once per split, or once per tile if the rank exceeds BLOCK_R
(both from the L2 cache), plus 8·N·splits. Above a certain rank the factored form is used instead (factored.py).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.combine import combine
from dora_kernels.kernels.config import (
    CANCELLATION,
    blocks,
    full_grid,
    kept_norm_config,
    most_fingerprints,
    norm_config,
    norm_products,
    splits,
)
from dora_kernels.kernels.dot import cast, dot
from dora_kernels.kernels.factored import factored_rows, is_factored
from dora_kernels.kernels.launch import INTERPRETED, PLANS, Plan, launch
from dora_kernels.kernels.rounding import draw, round_by_words


@triton.jit
def sweep(
    w_ptr, a_ptr, b_ptr, merged_ptr,
    offs_n, mask_n, row_scale,
    start, stop, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_mn, stride_mk,
    scaling,
    PRODUCTS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, HOLD_B: tl.constexpr,
    seed=None, index=0, index_n=0, index_k=0,
):  # fmt: skip
    """Form ``V = W + s B A`` tile by tile, over columns ``[start, stop)`` of BLOCK_N rows.

    Returns ``Σ_k V²`` and the terms of each row. The terms, ``Σ_k (W² + s² Σ_r B² A²)``, are the size of what V is
    summed from. They are computed only if three products make up the product. If `merged_ptr` is given, ``row_scale *
    V`` is written there, rounded stochastically if there is a seed, with the element's index ``index + n * index_n + k
    * index_k``. HOLD_B: the rank fits in BLOCK_R, and B's rows are held across the loop.
    """
    # 16-bit factors of the same dtype are multiplied as they are, all others as float32 in pieces.
    wide = tl.float32 if PRODUCTS > 1 else a_ptr.dtype.element_ty
    offs_r = tl.arange(0, BLOCK_R)
    b_rows = b_ptr + offs_n[:, None] * stride_bn
    if HOLD_B:
        offs = offs_r.to(tl.int64)
        b = tl.load(b_rows + offs[None, :] * stride_br, mask=mask_n[:, None] & (offs_r < R)[None, :], other=0.0)
        b = b.to(wide)
    total = tl.zeros((BLOCK_N,), tl.float32)
    terms = tl.zeros((BLOCK_N,), tl.float32)
    low = tl.zeros((BLOCK_N,), tl.float32)
    # Triton pipelines only what a product reads, unless it is told to; W is the stream from memory.
    STAGES: tl.constexpr = 3 if PRODUCTS == 1 else None
    for k in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        mask_w = mask_n[:, None] & mask_k[None, :]
        w = tl.load(w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk, mask=mask_w, other=0.0)
        a_columns = a_ptr + offs_k[None, :] * stride_ak
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if HOLD_B:
            a = tl.load(
                a_columns + offs[:, None] * stride_ar, mask=(offs_r < R)[:, None] & mask_k[None, :], other=0.0
            ).to(wide)
            acc = dot(b, a, acc, PRODUCTS, INTERPRETED, True)
            if PRODUCTS == 3:
                low += _low_rank_terms(b, a)
        else:
            for r in range(0, R, BLOCK_R):
                mask_r = r + offs_r < R
                offs = (r + offs_r).to(tl.int64)
                a = tl.load(
                    a_columns + offs[:, None] * stride_ar, mask=mask_r[:, None] & mask_k[None, :], other=0.0
                ).to(wide)
                b = tl.load(b_rows + offs[None, :] * stride_br, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
                b = b.to(wide)
                acc = dot(b, a, acc, PRODUCTS, INTERPRETED, True)
                if PRODUCTS == 3:
                    low += _low_rank_terms(b, a)
        w = w.to(tl.float32)
        v = w + scaling * acc
        total += tl.sum(v * v, 1)
        if PRODUCTS == 3:
            terms += tl.sum(w * w, 1)
        if merged_ptr is not None:
            merged = row_scale[:, None] * v
            if seed is not None:
                words = draw(seed, index + offs_n[:, None] * index_n + offs_k[None, :] * index_k)
                merged = round_by_words(merged, words, merged_ptr.dtype.element_ty)
            merged = cast(merged, merged_ptr.dtype.element_ty, INTERPRETED)
            tl.store(merged_ptr + offs_n[:, None] * stride_mn + offs_k[None, :] * stride_mk, merged, mask=mask_w)
    return total, terms + scaling * scaling * low


@triton.jit
def _low_rank_terms(b, a):
    """``Σ_k Σ_r B² A²`` of a tile."""
    return tl.sum(b * b * tl.sum(a * a, 1)[None, :], 1)


@triton.jit(do_not_specialize=["shares"])
def weight_norm_kernel(
    w_ptr, a_ptr, b_ptr, norm_ptr, changed_ptr,
    N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_wg, stride_ag, stride_bg, span,
    shares, scaling,
    GROUPS: tl.constexpr, SPLIT: tl.constexpr, REPAIR: tl.constexpr, SHARES: tl.constexpr, CANCELLATION: tl.constexpr,
    PRODUCTS: tl.constexpr, INTERPRETED: tl.constexpr, HOLD_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Norm of columns ``[split * span, (split + 1) * span)`` for BLOCK_N rows of one of GROUPS weights.

    A program exits without writing if `changed_ptr` is given and none of its `shares` flags is set (kept.py; 0 is then
    written as infinity, ready to divide by), or with REPAIR if none of its norms is negative (factored.py). With
    `changed_ptr` it computes one part after the other and combines them as `combine_kernel` does, so that a kept norm
    has the same bits as one computed for a step.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    norm_ptr += split.to(tl.int64) * N * GROUPS
    if GROUPS > 1:
        group = (block // tl.cdiv(N, BLOCK_N)).to(tl.int64)
        block = block % tl.cdiv(N, BLOCK_N)
        w_ptr += group * stride_wg
        a_ptr += group * stride_ag
        b_ptr += group * stride_bg
        norm_ptr += group * N
    offs_n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    norm_ptrs = norm_ptr + offs_n
    start = split * span
    stop = tl.minimum(start + span, K)
    if changed_ptr is not None:
        flags = tl.arange(0, SHARES)
        changed = tl.load(changed_ptr + flags, mask=flags < shares, other=0)
        any_changed = tl.max(changed, 0) > 0
        N = tl.where(any_changed, N, 0)
        stop = tl.where(any_changed, K if SPLIT else stop, 0)
    mask_n = offs_n < N
    if REPAIR:
        mask_n &= tl.load(norm_ptrs, mask=mask_n, other=0.0) < 0.0
    if REPAIR:
        stop = tl.where(tl.max(mask_n.to(tl.int32), 0) > 0, stop, start)
    if changed_ptr is None or not SPLIT:
        norm = _part_norm(
            w_ptr, a_ptr, b_ptr, offs_n, mask_n, start, stop, K, R,
            stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
            scaling, CANCELLATION, PRODUCTS, INTERPRETED, HOLD_B, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    else:
        square = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, stop, span):
            part = _part_norm(
                w_ptr, a_ptr, b_ptr, offs_n, mask_n, start, tl.minimum(start + span, K), K, R,
                stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
                scaling, CANCELLATION, PRODUCTS, INTERPRETED, HOLD_B, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            square += part * part
        norm = tl.sqrt(square)
    if changed_ptr is not None:
        norm = tl.where(norm == 0.0, float("inf"), norm)
    tl.store(norm_ptrs, norm, mask=mask_n)


@triton.jit
def _part_norm(
    w_ptr, a_ptr, b_ptr, offs_n, mask_n, start, stop, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    scaling,
    CANCELLATION: tl.constexpr, PRODUCTS: tl.constexpr, INTERPRETED: tl.constexpr, HOLD_B: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The norms of columns ``[start, stop)``."""
    total, terms = sweep(
        w_ptr, a_ptr, b_ptr, None,
        offs_n, mask_n, None,
        start, stop, K, R,
        stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, 0, 0,
        scaling,
        PRODUCTS, INTERPRETED, BLOCK_N, BLOCK_K, BLOCK_R, HOLD_B,
    )  # fmt: skip
    if PRODUCTS == 3:
        # If most of the terms cancel, the products' errors matter: compute again with all pieces.
        lost = mask_n & (total < CANCELLATION * terms)
        stop = tl.where(tl.max(lost.to(tl.int32), 0) > 0, stop, start)
        exact, _ = sweep(
            w_ptr, a_ptr, b_ptr, None,
            offs_n, lost, None,
            start, stop, K, R,
            stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, 0, 0,
            scaling,
            6, INTERPRETED, BLOCK_N, BLOCK_K, BLOCK_R, HOLD_B,
        )  # fmt: skip
        total = tl.where(lost, exact, total)
    return tl.sqrt(total)


def weight_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, weight_square: Tensor | None = None
) -> Tensor:
    """Row norms of ``W + s B A``, float32 ``[N]``, or ``[G, N]`` of stacks, whose norms are always computed directly.

    `weight_square` is ``|W|²`` per row, which the factored form needs.
    """
    if is_factored(weight, lora_A, lora_B):
        return factored_norm(weight, lora_A, lora_B, scaling, weight_square)
    return direct_norm(weight, lora_A, lora_B, scaling)


def direct_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The norm in one read of W."""
    plan, grid = _plan(*_described(weight, lora_A, lora_B), full_grid())
    norm = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    count = grid[1]
    parts = norm if count == 1 else torch.empty((count, *norm.shape), dtype=torch.float32, device=weight.device)
    launch(weight_norm_kernel, plan, grid, (weight, lora_A, lora_B, parts, None), (0, float(scaling)))
    return norm if count == 1 else combine(parts, norm, norm=True)


def factored_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, weight_square: Tensor | None = None
) -> Tensor:
    """The norm from matrices of rank r; rows that lost digits are computed directly."""
    if weight_square is None:
        weight_square = row_square(weight)
    norm = factored_rows(weight, lora_A, lora_B, scaling, weight_square)
    repair_norm(norm, weight, lora_A, lora_B, scaling)
    return norm


def repair_norm(norm: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """Compute the negative norms, in place. The host does not need to know which."""
    plan, grid = _plan(*_described(weight, lora_A, lora_B), repair=True)
    launch(weight_norm_kernel, plan, grid, (weight, lora_A, lora_B, norm, None), (0, float(scaling)))


def renew_divisor(
    divisor: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, changed: Tensor
) -> None:
    """Recompute the norm, infinity in place of 0, into `divisor` if one of the flags `changed` is set.

    It is one launch: a program computes the parts of K one after another. It rarely has anything to do.
    """
    shares = changed.numel()
    plan, grid = _plan(*_described(weight, lora_A, lora_B), full_grid(), most_fingerprints())
    launch(weight_norm_kernel, plan, grid[:1], (weight, lora_A, lora_B, divisor, changed), (shares, float(scaling)))


def row_square(weight: Tensor) -> Tensor:
    """Squared norm of every row, float32 ``[N]``."""
    nothing = torch.empty(0, dtype=weight.dtype, device=weight.device)
    return direct_norm(weight, nothing.view(0, weight.shape[1]), nothing.view(weight.shape[0], 0), 0.0).square_()


def _described(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[Any, ...]:
    """The arguments that `_plan` gets for these tensors."""
    return (
        math.prod(weight.shape[:-2]), *weight.shape[-2:], lora_A.shape[-2], weight.dtype, lora_A.dtype, lora_B.dtype,
        strides(weight, lora_A, lora_B),
    )  # fmt: skip


def strides(*stacks: Tensor) -> tuple[int, ...]:
    """The strides of rows and columns of each, and then those of the stacks, 0 for a matrix."""
    inner = [stride for one in stacks for stride in one.stride()[-2:]]
    return (*inner, *(one.stride()[0] if one.dim() == 3 else 0 for one in stacks))


@functools.lru_cache(PLANS)
def _plan(
    groups: int,
    N: int,
    K: int,
    R: int,
    weight: torch.dtype,
    lora_A: torch.dtype,
    lora_B: torch.dtype,
    lie: tuple[int, ...],
    programs: int = 1,
    shares: int = 0,
    repair: bool = False,
) -> tuple[Plan, tuple[int, int]]:
    """A plan and its grid. One program handles BLOCK_N rows and a span of columns, a multiple of BLOCK_K.

    K is split if N alone gives fewer than `programs`. `shares`: the most flags that a program reads.
    """
    products = norm_products(weight, lora_A, lora_B, K, exact=repair)
    config = norm_config(R, products)
    if shares:
        config = kept_norm_config(config, R, products)
    rows, steps = groups * blocks(N, config.BLOCK_N), blocks(K, config.BLOCK_K)
    span = blocks(steps, splits(rows, steps, programs)) * config.BLOCK_K
    flags = groups, blocks(K, span) > 1, repair, shares, CANCELLATION, products, INTERPRETED, config.BLOCK_R >= R
    return Plan((N, K, R, *lie, span), flags, config), (rows, blocks(K, span))
