"""Compose: ``y = g * (base + s h Bᵀ) + bias`` in one read of base and one write of y, at every rank.

Shapes: base and y ``[M, N]``, h ``[M, R]``, B ``[N, R]``, g and bias ``[N]``. g and bias may be None. g may be passed
as magnitude and divisor, so that a call in evaluation needs no launch for the quotient. B is used in h's dtype, which
is base's, or float32 for a 16-bit base.

In groups (experts, or a batch of many adapters) B is ``[G, N, R]``, g and its divisor ``[G, N]``, bias ``[G, N]`` or
``[N]``, and s a number or ``[G]``. Group e has the tokens ``ends[e - 1]`` to ``ends[e]``, or those of that part of
`rows`. Rows of base past the last end stay untouched.

A program computes one BLOCK_M x BLOCK_N tile: the low-rank product in chunks of the rank, accumulated in float32, then
base, g and bias in registers, and one rounding at the store. y may be base itself. A tile has rows of one group, and
each program finds its group in `ends` by itself, so the host need not know them.

Bytes: 2·M·N elements of base and y, plus h once per column block and B once per row block (from the L2 cache).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import blocks, compose_config, group_tiles, power_of_two, products_for
from dora_kernels.kernels.dot import cast, dot
from dora_kernels.kernels.launch import INTERPRETED, PLANS, Plan, launch


@triton.jit(do_not_specialize=["M", "groups"])
def compose_kernel(
    base_ptr, h_ptr, b_ptr, g_ptr, divisor_ptr, bias_ptr, y_ptr, ends_ptr, rows_ptr, scalings_ptr,
    N, R, stride_m, stride_hm, stride_bn, stride_br, stride_ym, stride_bg, stride_biasg,
    M, groups, scaling,
    GROUPS: tl.constexpr, PRODUCTS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of y. base and y are row-major. Programs of the same row block are neighbours."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    # From the last row block: it is what the product has just written, and still in the L2 cache.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    if ends_ptr is None:
        offs_m = (pid // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    else:
        group, start, M = group_tile(ends_ptr, groups, pid // blocks_n, BLOCK_M, GROUPS)
        if start >= M:
            return
        offs_m = start + tl.arange(0, BLOCK_M)
    offs_n = (pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    if ends_ptr is not None:
        if rows_ptr is not None:
            offs_m = tl.load(rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
        b_ptr += group * stride_bg
        if g_ptr is not None:
            g_ptr += group * N
        if divisor_ptr is not None:
            divisor_ptr += group * N
        if bias_ptr is not None:
            bias_ptr += group * stride_biasg
        if scalings_ptr is not None:
            scaling = tl.load(scalings_ptr + group)
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


@triton.jit
def group_tile(ends_ptr, groups, tile, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """The group of a tile where every group is cut into tiles of BLOCK rows by itself, its first row and its stop.

    The first row is not below the stop if there are fewer tiles.
    """
    offs = tl.arange(0, GROUPS)
    mask = offs < groups
    ends = tl.load(ends_ptr + offs, mask=mask, other=0).to(tl.int64)
    starts = tl.load(ends_ptr + offs - 1, mask=mask & (offs > 0), other=0).to(tl.int64)
    tiles = tl.cdiv(ends - starts, BLOCK)
    first = tile - (tl.cumsum(tiles, 0) - tiles)
    here = (first >= 0) & (first < tiles)
    start = tl.sum(tl.where(here, starts + first * BLOCK, 0), 0)
    return tl.sum(tl.where(here, offs, 0), 0).to(tl.int64), start, tl.sum(tl.where(here, ends, 0), 0)


def compose(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    g: Tensor | None,
    bias: Tensor | None,
    scaling: float | Tensor,
    keep: bool,
    divisor: Tensor | None = None,
    ends: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Return ``y = g * (base + s h Bᵀ) + bias``, ``[M, N]`` in base's dtype. y uses base's memory unless `keep`.

    Args:
        base, h: row-major, with or without gaps between rows.
        scaling: a number, or in groups float32 ``[G]``.
        divisor: if given, `g` is the magnitude, and the kernel divides it by this.
        ends: integers ``[G]``, ascending, where the groups' tokens end; the other tensors then have a group dimension.
        rows: integers, the rows of base, h and y in the order that `ends` counts; all in order if None.
    """
    y = torch.empty_like(base) if keep else base
    M, N = base.shape
    if M == 0:
        return y
    g = None if g is None else g.contiguous()
    bias = None if bias is None else bias.contiguous()
    groups = 0 if ends is None else ends.shape[0]
    scalings, number = (scaling, 1.0) if isinstance(scaling, Tensor) else (None, float(scaling))
    plan = _plan(
        M <= 16 * max(groups, 1), power_of_two(groups), N, h.shape[1], base.dtype, h.dtype,
        base.stride()[0], h.stride()[0], lora_B.stride(), y.stride()[0], bias is not None and bias.dim() == 2,
    )  # fmt: skip
    tiles = blocks(M, plan.config.BLOCK_M) if ends is None else group_tiles(M, groups, plan.config.BLOCK_M)
    tensors = base, h, lora_B, g, divisor, bias, y, ends, rows, scalings
    launch(compose_kernel, plan, (tiles * blocks(N, plan.config.BLOCK_N),), tensors, (M, groups, number))
    return y


@functools.lru_cache(PLANS)
def _plan(
    few: bool,
    groups: int,
    N: int,
    R: int,
    base: torch.dtype,
    h: torch.dtype,
    row: int,
    row_h: int,
    strides_b: tuple[int, ...],
    row_y: int,
    biases: bool,
) -> Plan:
    products = products_for(h == torch.float32, base == torch.float32)
    sizes = N, R, row, row_h, *strides_b[-2:], row_y, strides_b[0] if groups else 0, N if biases else 0
    return Plan(sizes, (groups, products, INTERPRETED), compose_config(few, R, products))
