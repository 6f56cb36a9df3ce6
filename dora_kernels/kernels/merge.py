"""Merge: ``g (W + s B A)`` with ``g = m / |W + s B A|`` per row, or without g, in W's dtype: one kernel.

Shapes: W and the merged weight ``[N, K]``, A ``[R, K]``, B ``[N, R]``, any strides; m ``[N]``. Along "in" this is the
transposed problem, ``(W.T, B.T, A.T)``. Stacks (experts) have one more dimension in front; one launch serves them all.

A program sweeps over its rows twice (`norm.sweep`): first for their norm, then to write them. Without a magnitude there
is only the second sweep. Computed in float32 and rounded once, stochastically if there is a seed (rounding.py).

Bytes: W is read and written once in memory, and read once more, from the cache if a program's rows fit there.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import blocks, merge_config, norm_products
from dora_kernels.kernels.launch import INTERPRETED, on_device
from dora_kernels.kernels.norm import strides, sweep


@triton.jit(do_not_specialize=["seed"])
def merge_kernel(
    w_ptr, a_ptr, b_ptr, m_ptr, merged_ptr,
    N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_mn, stride_mk,
    stride_wg, stride_ag, stride_bg, stride_mg,
    scaling, seed, index_n, index_k,
    GROUPS: tl.constexpr, PRODUCTS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, HOLD_B: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one of GROUPS merged weights. A row of zeros stays zero."""
    block = tl.program_id(0)
    index = 0
    if GROUPS > 1:
        group = (block // tl.cdiv(N, BLOCK_N)).to(tl.int64)
        block = block % tl.cdiv(N, BLOCK_N)
        w_ptr += group * stride_wg
        a_ptr += group * stride_ag
        b_ptr += group * stride_bg
        merged_ptr += group * stride_mg
        if m_ptr is not None:
            m_ptr += group * N
        index = group * N * K
    offs_n = (block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    g = tl.full((BLOCK_N,), 1.0, tl.float32)
    if m_ptr is not None:
        square, _ = sweep(
            w_ptr, a_ptr, b_ptr, None,
            offs_n, mask_n, None,
            0, K, K, R,
            stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, 0, 0,
            scaling,
            PRODUCTS, INTERPRETED, BLOCK_N, BLOCK_K, BLOCK_R, HOLD_B,
        )  # fmt: skip
        m = tl.load(m_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        zero = square == 0.0
        g = tl.where(zero, 0.0, m / tl.sqrt(tl.where(zero, 1.0, square)))
    sweep(
        w_ptr, a_ptr, b_ptr, merged_ptr,
        offs_n, mask_n, g,
        0, K, K, R,
        stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_mn, stride_mk,
        scaling,
        PRODUCTS, INTERPRETED, BLOCK_N, BLOCK_K, BLOCK_R, HOLD_B,
        seed, index, index_n, index_k,
    )  # fmt: skip


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    seed: int | None = None,
    transposed: bool = False,
) -> Tensor:
    """The same as `engine.blocked.merge`, and of stacks. Their elements are numbered one weight after another."""
    N, K = weight.shape[-2:]
    R = lora_A.shape[-2]
    groups = math.prod(weight.shape[:-2])
    merged = torch.empty_like(weight)
    products = norm_products(weight.dtype, lora_A.dtype, lora_B.dtype, K, exact=True)
    config = merge_config(R, products, stochastic=seed is not None)
    with on_device(weight):
        merge_kernel[(groups * blocks(N, config.BLOCK_N),)](
            weight, lora_A, lora_B, None if magnitude is None else magnitude.contiguous(), merged,
            N, K, R,
            *strides(weight, lora_A, lora_B, merged),
            scaling, seed, *((1, N) if transposed else (K, 1)),
            GROUPS=groups, PRODUCTS=products, INTERPRETED=INTERPRETED, HOLD_B=R <= config.BLOCK_R, **config._asdict(),
        )  # fmt: skip
    return merged
