"""Compose: ``y = g * (base + s h Bᵀ) + bias`` in one read of base and one write of y, at every rank.

Shapes: base and y ``[M, N]``, h ``[M, R]``, B ``[N, R]``, g and bias ``[N]``. g and bias may be None. g may be passed
as magnitude and divisor, so that a call in evaluation needs no launch for the quotient. B is used in h's dtype, which
is base's, or float32 for a 16-bit base.

A program computes one BLOCK_M x BLOCK_N tile: the low-rank product in chunks of the rank, accumulated in float32, then
base, g and bias in registers, and one rounding at the store. y may be base itself.

Bytes: 2·M·N elements of base and y, plus h once per column block and B once per row block (from the L2 cache).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import blocks, compose_config, products_for
from dora_kernels.kernels.dot import cast, dot
from dora_kernels.kernels.launch import INTERPRETED, PLANS, Plan, launch


@triton.jit(do_not_specialize=["M"])
def compose_kernel(
    base_ptr, h_ptr, b_ptr, g_ptr, divisor_ptr, bias_ptr, y_ptr,
    N, R, stride_m, stride_hm, stride_bn, stride_br, stride_ym,
    M, scaling,
    PRODUCTS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of y. base and y are row-major. Programs of the same row block are neighbours."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    offs_m = (pid // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask_r = offs_r < R
        h = tl.load(
            h_ptr + offs_m[:, None] * stride_hm + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None] * stride_br,
            mask=mask_n[None, :] & mask_r[:, None],
            other=0.0,
        )
        acc = dot(h, cast(b, h.dtype, INTERPRETED), acc, PRODUCTS, INTERPRETED)
    mask = mask_m[:, None] & mask_n[None, :]
    base = tl.load(base_ptr + offs_m[:, None] * stride_m + offs_n[None, :], mask=mask, other=0.0)
    y = base.to(tl.float32) + scaling * acc
    if g_ptr is not None:
        g = tl.load(g_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if divisor_ptr is not None:
            g = tl.div_rn(g, tl.load(divisor_ptr + offs_n, mask=mask_n, other=1.0))
        y *= g[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], cast(y, y_ptr.dtype.element_ty, INTERPRETED), mask=mask
    )


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
    """Return ``y = g * (base + s h Bᵀ) + bias``, ``[M, N]`` in base's dtype. y uses base's memory unless `keep`.

    Args:
        base, h: row-major, with or without gaps between rows.
        divisor: if given, `g` is the magnitude, and the kernel divides it by this.
    """
    y = torch.empty_like(base) if keep else base
    M, N = base.shape
    if M == 0:
        return y
    g = None if g is None else g.contiguous()
    bias = None if bias is None else bias.contiguous()
    plan = _plan(
        M <= 16, N, h.shape[1], base.dtype, h.dtype, base.stride()[0], h.stride()[0], lora_B.stride(), y.stride()[0]
    )
    grid = (blocks(M, plan.config.BLOCK_M) * blocks(N, plan.config.BLOCK_N),)
    launch(compose_kernel, plan, grid, (base, h, lora_B, g, divisor, bias, y), (M, float(scaling)))
    return y


@functools.lru_cache(PLANS)
def _plan(
    few: bool,
    N: int,
    R: int,
    base: torch.dtype,
    h: torch.dtype,
    row: int,
    row_h: int,
    strides_b: tuple[int, ...],
    row_y: int,
) -> Plan:
    products = products_for(h == torch.float32, base == torch.float32)
    return Plan((N, R, row, row_h, *strides_b, row_y), (products, INTERPRETED), compose_config(few, R, products))
