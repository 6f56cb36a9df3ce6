"""One pass: the whole forward for few tokens, ``y = g * (x Wᵀ + s (x Aᵀ) Bᵀ) + bias``, in one read of W.

Shapes: x ``[M, K]`` of at most 64 rows, W ``[N, K]``, A ``[R, K]``, B ``[N, R]``, y and the base product ``x Wᵀ``
``[M, N]``, h = x Aᵀ ``[M, R]``, R at most 64; g and bias ``[N]``. x and W are of one 16-bit dtype, in which A and B are
used. g may be None, or passed as magnitude and divisor.

A program handles BLOCK_N rows of W and all tokens: the base product and h (each program by itself) are summed in
float32 over tiles of K. Then h, in x's dtype, is multiplied by B, and y is rounded once. If N alone gives too few
programs, K is split. The parts are written, and `finish_kernel` adds them in their order and does the rest.

Bytes: W once, y once; x and A once per BLOCK_N rows of W, from the L2 cache; 8·M·(N + R) per part if there are several.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import OnePassConfig, blocks, one_pass_config, one_pass_parts
from dora_kernels.kernels.dot import cast, dot
from dora_kernels.kernels.launch import INTERPRETED, PLANS, Plan, launch


@triton.jit(do_not_specialize=["M"])
def one_pass_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, g_ptr, divisor_ptr, bias_ptr, y_ptr, base_ptr, h_ptr,
    N, K, R, stride_xm, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, span,
    M, scaling,
    SPLIT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_N features of y or, with SPLIT, what a part of K adds to their sums: base and h in float32."""
    block, part = tl.program_id(0), tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    mask_h = (offs_m < tl.where(block == 0, M, 0))[:, None] & mask_r[None, :]  # the first program writes h
    base = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(part * span, tl.minimum((part + 1) * span, K), BLOCK_K):
        offs_k = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )
        w = tl.load(
            w_ptr + offs_n[:, None] * stride_wn + offs_k[None, :] * stride_wk,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + offs_r[:, None] * stride_ar + offs_k[None, :] * stride_ak,
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        )
        a = cast(a, x.dtype, INTERPRETED)
        base = dot(x, tl.trans(w), base, 1, INTERPRETED)
        h = dot(x, tl.trans(a), h, 1, INTERPRETED)
    if SPLIT:
        part = part.to(tl.int64)
        tl.store(
            base_ptr + (part * M + offs_m[:, None]) * N + offs_n[None, :], base, mask=mask_m[:, None] & mask_n[None, :]
        )
        tl.store(h_ptr + (part * M + offs_m[:, None]) * R + offs_r[None, :], h, mask=mask_h)
    else:
        _finish(
            base, h, b_ptr, g_ptr, divisor_ptr, bias_ptr, y_ptr, base_ptr, h_ptr,
            offs_m, offs_n, offs_r, mask_m, mask_n, mask_r, mask_h,
            N, R, stride_bn, stride_br, scaling, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "parts"])
def finish_kernel(
    base_parts_ptr, h_parts_ptr,
    b_ptr, g_ptr, divisor_ptr, bias_ptr, y_ptr, base_ptr, h_ptr,
    N, R, stride_bn, stride_br,
    M, parts, scaling,
    INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_N features of y from the parts' sums."""
    block = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    mask_h = (offs_m < tl.where(block == 0, M, 0))[:, None] & mask_r[None, :]  # the first program writes h
    base = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for _ in range(0, parts):
        base += tl.load(
            base_parts_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask_m[:, None] & mask_n[None, :], other=0.0
        )
        h += tl.load(
            h_parts_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0
        )
        base_parts_ptr += M * N
        h_parts_ptr += M * R
    _finish(
        base, h, b_ptr, g_ptr, divisor_ptr, bias_ptr, y_ptr, base_ptr, h_ptr,
        offs_m, offs_n, offs_r, mask_m, mask_n, mask_r, mask_h,
        N, R, stride_bn, stride_br, scaling, INTERPRETED,
    )  # fmt: skip


@triton.jit
def _finish(
    base, h, b_ptr, g_ptr, divisor_ptr, bias_ptr, y_ptr, base_ptr, h_ptr,
    offs_m, offs_n, offs_r, mask_m, mask_n, mask_r, mask_h,
    N, R, stride_bn, stride_br, scaling, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """From the sums over K to y. Pointers of unwanted results are None."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    h = cast(h, dtype, INTERPRETED)
    if h_ptr is not None:
        tl.store(h_ptr + offs_m[:, None] * R + offs_r[None, :], h, mask=mask_h)
    offs = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if base_ptr is not None:
        tl.store(base_ptr + offs, cast(base, dtype, INTERPRETED), mask=mask)
    b = tl.load(
        b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br,
        mask=mask_n[None, :] & mask_r[:, None],
        other=0.0,
    )
    low = dot(h, cast(b, dtype, INTERPRETED), tl.zeros(base.shape, tl.float32), 1, INTERPRETED)
    y = base + scaling * low
    if g_ptr is not None:
        g = tl.load(g_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if divisor_ptr is not None:
            g = tl.div_rn(g, tl.load(divisor_ptr + offs_n, mask=mask_n, other=1.0))
        y *= g[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, cast(y, dtype, INTERPRETED), mask=mask)


def one_pass(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    g: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    keep: bool,
    divisor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``(y, h, base)`` in x's dtype.

    Args:
        x: columns adjacent in memory.
        keep: True returns the base product, False None.
        divisor: if given, `g` is the magnitude, and the kernel divides it by this.
    """
    (M, K), N, R = x.shape, weight.shape[0], lora_A.shape[0]
    if not (0 < M <= 64 and 0 < R <= 64):
        raise ValueError(f"x, lora_A: expected 1 to 64 rows, got {M} and {R}")
    g = None if g is None else g.contiguous()
    bias = None if bias is None else bias.contiguous()
    config = one_pass_config(M, R, lora_A.dtype == torch.float32)
    strides = x.stride()[0], weight.stride(), lora_A.stride(), lora_B.stride()
    plan, second, parts = _plans(config, N, K, R, *strides)
    y = x.new_empty(M, N)
    h, base = x.new_empty(M, R), x.new_empty(M, N) if keep else None
    tensors = lora_B, g, divisor, bias, y, base, h
    grid = blocks(N, plan.config.BLOCK_N), parts
    if parts == 1:
        launch(one_pass_kernel, plan, grid, (x, weight, lora_A, *tensors), (M, float(scaling)))
        return y, h, base
    made = tuple(torch.empty((parts, M, size), dtype=torch.float32, device=x.device) for size in (N, R))
    launch(one_pass_kernel, plan, grid, (x, weight, lora_A, *tensors[:5], *made), (M, float(scaling)))
    launch(finish_kernel, second, grid[:1], (*made, *tensors), (M, parts, float(scaling)))
    return y, h, base


@functools.lru_cache(PLANS)
def _plans(
    config: OnePassConfig,
    N: int,
    K: int,
    R: int,
    row: int,
    strides_w: tuple[int, ...],
    strides_a: tuple[int, ...],
    strides_b: tuple[int, ...],
) -> tuple[Plan, Plan, int]:
    """Both kernels' plans, and into how many parts K is split."""
    steps = blocks(K, config.BLOCK_K)
    span = blocks(steps, one_pass_parts(blocks(N, config.BLOCK_N), steps)) * config.BLOCK_K
    parts = blocks(K, span)
    sizes = N, K, R, row, *strides_w, *strides_a, *strides_b, span
    finish = Plan((N, R, *strides_b), (INTERPRETED,), config.finish)
    return Plan(sizes, (parts > 1, INTERPRETED), config), finish, parts
