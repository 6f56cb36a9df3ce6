"""Factor gradients: ``dB = s g P`` and ``dm = (Σ_t dY base + s Σ_r B P) / n`` from P = dYᵀ h, in one launch.

Shapes: P ``[N, R]`` float32, row-major; B and dB ``[N, R]`` of any strides; `dot`, the partial sums from
`scale_partials`, ``[strips, N]``; g, the divisor n (infinity in place of 0) and dm ``[N]``, float32. Stacks (experts)
have one more dimension in front, in all of them.

Bytes: P and B once, dB once, and 4·N per strip.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import blocks, factor_grads_config
from dora_kernels.kernels.dot import cast
from dora_kernels.kernels.launch import INTERPRETED, PLANS, Plan, launch


@triton.jit(do_not_specialize=["strips"])
def factor_grads_kernel(
    p_ptr, b_ptr, dot_ptr, g_ptr, divisor_ptr, db_ptr, dm_ptr,
    N, R, stride_bn, stride_br, stride_dn, stride_dr, stride_bg, stride_dg,
    strips, scaling,
    GROUPED: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows. `db_ptr` may be None."""
    if GROUPED:
        group = tl.program_id(1).to(tl.int64)
        p_ptr += group * N * R
        b_ptr += group * stride_bg
        dot_ptr += group * strips * N
        g_ptr += group * N
        divisor_ptr += group * N
        dm_ptr += group * N
        if db_ptr is not None:
            db_ptr += group * stride_dg
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for _ in tl.range(0, strips, loop_unroll_factor=8):  # the loads of several strips wait together
        total += tl.load(dot_ptr + offs_n, mask=mask_n, other=0.0)
        dot_ptr += N
    factor = scaling * tl.load(g_ptr + offs_n, mask=mask_n, other=0.0)
    low = tl.zeros((BLOCK_N,), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = mask_n[:, None] & (offs_r < R)[None, :]
        p = tl.load(p_ptr + offs_n[:, None] * R + offs_r[None, :], mask=mask, other=0.0)
        b = tl.load(b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br, mask=mask, other=0.0)
        low += tl.sum(p * b.to(tl.float32), 1)
        if db_ptr is not None:
            db = cast(factor[:, None] * p, db_ptr.dtype.element_ty, INTERPRETED)
            tl.store(db_ptr + offs_n[:, None] * stride_dn + offs_r[None, :] * stride_dr, db, mask=mask)
    divisor = tl.load(divisor_ptr + offs_n, mask=mask_n, other=1.0)
    tl.store(dm_ptr + offs_n, (total + scaling * low) / divisor, mask=mask_n)


def factor_grads(
    p: Tensor, lora_B: Tensor, dot: Tensor, g: Tensor, divisor: Tensor, scaling: float, dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor]:
    """``(dB, dm)``. dB has B's strides and the given dtype; it is None if `dtype` is None."""
    N, R = p.shape[-2:]
    db = None if dtype is None else torch.empty_like(lora_B, dtype=dtype)
    dm = p.new_empty(p.shape[:-1])
    plan = _plan(N, R, lora_B.stride(), None if db is None else db.stride())
    grid = blocks(N, plan.config.BLOCK_N), *p.shape[:-2]
    tensors = p, lora_B, dot, g, divisor, db, dm
    launch(factor_grads_kernel, plan, grid, tensors, (dot.shape[-2], float(scaling)))
    return db, dm


@functools.lru_cache(PLANS)
def _plan(N: int, R: int, strides: tuple[int, ...], strides_d: tuple[int, ...] | None) -> Plan:
    grouped = len(strides) == 3
    strides_d = strides_d or (0,) * len(strides)
    of_groups = (strides[0], strides_d[0]) if grouped else (0, 0)
    return Plan((N, R, *strides[-2:], *strides_d[-2:], *of_groups), (grouped, INTERPRETED), factor_grads_config())
