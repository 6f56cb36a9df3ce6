"""Factor gradients: ``dB = s g P`` and ``dm = (Σ_t dY base + s Σ_r B P) / n`` from P = dYᵀ h, in one launch.

Shapes: the parts of P, ``[parts, N, R]`` float32; B and dB ``[N, R]`` of any strides; `dot`, the partial sums from
`scale_partials`, ``[strips, N]``; g, the divisor n (infinity in place of 0) and dm ``[N]``, float32. Stacks (experts)
have one more dimension in front, of P after the parts.

Bytes: all parts of P, B and dB once, and 4·N per strip.
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


@triton.jit(do_not_specialize=["strips", "parts"])
def factor_grads_kernel(
    p_ptr, b_ptr, dot_ptr, g_ptr, divisor_ptr, db_ptr, dm_ptr,
    N, R, stride_bn, stride_br, stride_dn, stride_dr, stride_bg, stride_dg,
    strips, parts, scaling,
    GROUPED: tl.constexpr, SPLIT: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows. `db_ptr` may be None, and with `dot_ptr` those for dm."""
    part = tl.num_programs(1).to(tl.int64) * N * R
    if GROUPED:
        group = tl.program_id(1).to(tl.int64)
        p_ptr += group * N * R
        b_ptr += group * stride_bg
        g_ptr += group * N
        if dot_ptr is not None:
            dot_ptr += group * strips * N
            divisor_ptr += group * N
            dm_ptr += group * N
        if db_ptr is not None:
            db_ptr += group * stride_dg
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    if dot_ptr is not None:
        for _ in tl.range(0, strips, loop_unroll_factor=8):  # the loads of several strips wait together
            total += tl.load(dot_ptr + offs_n, mask=mask_n, other=0.0)
            dot_ptr += N
    factor = scaling * tl.load(g_ptr + offs_n, mask=mask_n, other=0.0)
    low = tl.zeros((BLOCK_N,), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = (r + tl.arange(0, BLOCK_R)).to(tl.int64)
        mask = mask_n[:, None] & (offs_r < R)[None, :]
        offs_p = offs_n[:, None] * R + offs_r[None, :]
        p = tl.load(p_ptr + offs_p, mask=mask, other=0.0)
        if SPLIT:
            part_ptr = p_ptr
            for _ in tl.range(1, parts, loop_unroll_factor=8):
                part_ptr += part
                p += tl.load(part_ptr + offs_p, mask=mask, other=0.0)
        if dot_ptr is not None:
            b = tl.load(b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br, mask=mask, other=0.0)
            low += tl.sum(p * b.to(tl.float32), 1)
        if db_ptr is not None:
            db = cast(factor[:, None] * p, db_ptr.dtype.element_ty, INTERPRETED)
            tl.store(db_ptr + offs_n[:, None] * stride_dn + offs_r[None, :] * stride_dr, db, mask=mask)
    if dot_ptr is not None:
        divisor = tl.load(divisor_ptr + offs_n, mask=mask_n, other=1.0)
        tl.store(dm_ptr + offs_n, (total + scaling * low) / divisor, mask=mask_n)


def factor_grads(
    p: Tensor,
    lora_B: Tensor,
    dot: Tensor | None,
    g: Tensor,
    divisor: Tensor | None,
    scaling: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """``(dB, dm)`` from the parts of P. dB has B's strides and the given dtype; it is None if `dtype` is None.

    dm is None if `dot` is.
    """
    N, R = p.shape[-2:]
    db = None if dtype is None else torch.empty_like(lora_B, dtype=dtype)
    dm = None if dot is None else p.new_empty(p.shape[1:-1])
    plan = _plan(N, R, lora_B.stride(), None if db is None else db.stride(), p.shape[0] > 1)
    grid = blocks(N, plan.config.BLOCK_N), *p.shape[1:-2]
    tensors = p, lora_B, dot, g, None if dot is None else divisor, db, dm
    strips = 0 if dot is None else dot.shape[-2]
    launch(factor_grads_kernel, plan, grid, tensors, (strips, p.shape[0], float(scaling)))
    return db, dm


@functools.lru_cache(PLANS)
def _plan(N: int, R: int, strides: tuple[int, ...], strides_d: tuple[int, ...] | None, split: bool) -> Plan:
    grouped = len(strides) == 3
    strides_d = strides_d or (0,) * len(strides)
    of_groups = (strides[0], strides_d[0]) if grouped else (0, 0)
    sizes = N, R, *strides[-2:], *strides_d[-2:], *of_groups
    return Plan(sizes, (grouped, split, INTERPRETED), factor_grads_config(R, split))
