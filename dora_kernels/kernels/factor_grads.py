"""Factor gradients: ``dB = s g P`` and ``dm = (Σ_t dY base + s Σ_r B P) / n`` from P = dYᵀ h, in one launch.

Shapes: P ``[N, R]`` float32, row-major; B and dB ``[N, R]`` of any strides; `dot`, the partial sums from
`scale_partials`, ``[strips, N]``; g, the divisor n (infinity in place of 0) and dm ``[N]``, float32.

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
    N, R, stride_bn, stride_br, stride_dn, stride_dr,
    strips, scaling,
    INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows. `db_ptr` may be None."""
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for _ in range(0, strips):
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
    N, R = p.shape
    db = None if dtype is None else torch.empty_like(lora_B, dtype=dtype)
    dm = p.new_empty(N)
    plan = _plan(N, R, lora_B.stride(), (0, 0) if db is None else db.stride())
    tensors = p, lora_B, dot, g, divisor, db, dm
    launch(factor_grads_kernel, plan, (blocks(N, plan.config.BLOCK_N),), tensors, (dot.shape[0], float(scaling)))
    return db, dm


@functools.lru_cache(PLANS)
def _plan(N: int, R: int, strides: tuple[int, ...], strides_d: tuple[int, ...]) -> Plan:
    return Plan((N, R, *strides, *strides_d), (INTERPRETED,), factor_grads_config())
