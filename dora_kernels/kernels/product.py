"""Product: ``s left right`` with float32 sums, rounded once, for the narrow matrices of rank r.

Shapes: left ``[M, K]``, right ``[K, N]``, out ``[M, N]``; left and right of any strides. In groups (experts, or a batch
of many adapters) right is ``[G, K, N]``, and group e has the rows ``ends[e - 1]`` to ``ends[e]`` of left, or those of
that part of `rows`. Rows past the last end stay uninitialized.

The vendor's BLAS rounds 16-bit results, and between the parts of a long sum it may round too
(`allow_bf16_reduced_precision_reduction`). So it is used for wide results alone, where `torch.mm` can return float32.

A program computes one tile over a part of K. There is more than one part if the tiles alone give too few programs; a
second kernel then adds the parts in their order: no atomics, the same bits every run.

Bytes: left once per BLOCK_N columns and right once per BLOCK_M rows, out once, and 8·M·N per part if there are several.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.combine import combine
from dora_kernels.kernels.compose import group_tile
from dora_kernels.kernels.config import ProductConfig, blocks, group_tiles, power_of_two, product_config, product_parts
from dora_kernels.kernels.dot import cast, dot, dot_by_pieces
from dora_kernels.kernels.launch import INTERPRETED, PLANS, Plan, launch

# A program's tile has at most 64 columns, so up to here it reads the large operand once.
NARROW = 64


@triton.jit(do_not_specialize=["M", "K", "span", "groups"])
def product_kernel(
    left_ptr, right_ptr, out_ptr, ends_ptr, rows_ptr,
    N, stride_lm, stride_lk, stride_rk, stride_rn, stride_rg,
    M, K, span, groups, scaling,
    GROUPS: tl.constexpr, EVEN_M: tl.constexpr, EVEN_K: tl.constexpr, PRODUCTS: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile over `span` steps of BLOCK_K features. EVEN: the tiles cover that size without a rest."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    part = tl.program_id(1)
    out_ptr += part.to(tl.int64) * M * N
    if ends_ptr is None:
        offs_m = (pid // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    else:
        group, start, M = group_tile(ends_ptr, groups, pid // blocks_n, BLOCK_M, GROUPS)
        if start >= M:
            return
        offs_m = start + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < M) | EVEN_M
    if ends_ptr is not None:
        right_ptr += group * stride_rg
        if rows_ptr is not None:
            offs_m = tl.load(rows_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    offs_n = (pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(part * span, tl.minimum((part + 1) * span, tl.cdiv(K, BLOCK_K))):
        offs_k = (step * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask_k = (offs_k < K) | EVEN_K
        left = tl.load(
            left_ptr + offs_m[:, None] * stride_lm + offs_k[None, :] * stride_lk,
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + offs_k[:, None] * stride_rk + offs_n[None, :] * stride_rn,
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )
        if PRODUCTS == 1:
            acc = dot(left, cast(right, left.dtype, INTERPRETED), acc, 1, INTERPRETED)
        elif PRODUCTS == 3:
            acc = dot_by_pieces(left, right, acc, INTERPRETED)
        else:
            acc = dot(left.to(tl.float32), right.to(tl.float32), acc, 6, INTERPRETED)
    out = cast(scaling * acc, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out, mask=mask_m[:, None] & mask_n[None, :])


def product(
    left: Tensor,
    right: Tensor,
    dtype: torch.dtype,
    scaling: float = 1.0,
    ends: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Return ``scaling * left @ right``, ``[M, N]`` in `dtype`, rounded once from float32 sums.

    Args:
        left: ``[M, K]``, of 16 bits or, beside a float32 right, float32.
        right: ``[K, N]``, in groups ``[G, K, N]``; used in left's dtype, or float32, which is not rounded.
        ends, rows: groups, as in `compose`.
    """
    (M, K), N = left.shape, right.shape[-1]
    if ends is None and min(M, N) > NARROW and left.dtype == right.dtype and wide_products(left.device):
        out = torch.mm(left, right, out_dtype=torch.float32)
        return (out if scaling == 1.0 else out.mul_(scaling)).to(dtype)
    groups = 0 if ends is None else ends.shape[0]
    config = product_config(M // max(groups, 1), N, products_of(left.dtype, right.dtype))
    tiles = blocks(M, config.BLOCK_M) if ends is None else group_tiles(M, groups, config.BLOCK_M)
    tiles *= blocks(N, config.BLOCK_N)
    steps = max(1, blocks(K, config.BLOCK_K))
    span = blocks(steps, product_parts(tiles, steps))
    parts = blocks(steps, span)
    plan = _plan(
        config, left.dtype, right.dtype, N, left.stride(), right.stride(), power_of_two(groups),
        left.stride()[0] == 1 and M % config.BLOCK_M == 0 and not groups, K % config.BLOCK_K == 0,
    )  # fmt: skip
    out = torch.empty(M, N, dtype=dtype, device=left.device)
    made = out if parts == 1 else torch.empty(parts, M, N, dtype=torch.float32, device=left.device)
    if tiles:
        free = M, K, span, groups, float(scaling)
        launch(product_kernel, plan, (tiles, parts), (left, right, made, ends, rows), free)
    return out if parts == 1 else combine(made, out)


@functools.lru_cache(PLANS)
def _plan(
    config: ProductConfig,
    left: torch.dtype,
    right: torch.dtype,
    N: int,
    strides_left: tuple[int, ...],
    strides_right: tuple[int, ...],
    groups: int,
    even_m: bool,
    even_k: bool,
) -> Plan:
    sizes = N, *strides_left, *strides_right[-2:], strides_right[0] if groups else 0
    return Plan(sizes, (groups, even_m, even_k, products_of(left, right), INTERPRETED), config)


def products_of(left: torch.dtype, right: torch.dtype) -> int:
    """float16 has too few exponent bits for the pieces of a float32 operand."""
    if right != torch.float32:
        return 1
    return 3 if left == torch.bfloat16 else 6


_wide: dict[torch.device, bool] = {}


def wide_products(device: torch.device) -> bool:
    """True if ``torch.mm(out_dtype=torch.float32)`` of 16-bit matrices works on `device` and returns unrounded sums.

    It is tried once per device. The overload exists on ROCm, where it raises, and does not in torch 2.6 and 2.7. While
    a CUDA graph is captured nothing can be tried: if it is not known by then, the answer is False for now.
    """
    known = _wide.get(device)
    if known is None:
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return False
        known = _wide[device] = all(_is_wide(dtype, device) for dtype in (torch.bfloat16, torch.float16))
    return known


def _is_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """8191 and a small number, whose sum 16 bits cannot hold."""
    left = torch.ones(64, 8192, dtype=dtype, device=device)
    left[:, -1] = 2.0**-10
    try:
        found = torch.mm(left, torch.ones(8192, 64, dtype=dtype, device=device), out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((found == 8191.0 + 2.0**-10).all())
