"""A candidate: base product, low-rank product, rescale and bias in one launch, timed beside the BLAS with `compose`.

The package does not have it: a kernel is taken in where it has been measured faster, and this one has not been measured
yet. Its row in `python -m bench run --suite compose` is to say for which shapes that is.

Shapes: x ``[M, K]``, W ``[N, K]``, h = x Aᵀ ``[M, R]``, B ``[N, R]``, all row-major and 16-bit; g and bias ``[N]``;
y and the base product ``[M, N]``. Bytes: x, W, y and the base product once, where a row of tiles of W stays in the L2
cache; `compose` reads the base product once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.dot import cast, dot
from dora_kernels.kernels.launch import INTERPRETED, on_device

# BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, warps and stages, within 99 KiB of shared memory: sm_86 and sm_120 have no more.
FEW, MANY = (16, 32, 256, 32, 4, 4), (128, 64, 64, 32, 8, 3)
_FEW_TOKENS = 64
# Row blocks of x that go through all of W together, so that W's tiles are fetched once for them.
_GROUP = 8


@triton.jit
def fused_kernel(
    x_ptr, w_ptr, h_ptr, b_ptr, g_ptr, bias_ptr, base_ptr, y_ptr,
    M, N, K, R,
    scaling,
    GROUP: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of y, and of the base product where base_ptr is given."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(M, BLOCK_M)
    each = GROUP * tl.cdiv(N, BLOCK_N)
    first = pid // each * GROUP
    size = tl.minimum(blocks_m - first, GROUP)
    offs_m = ((first + pid % each % size) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (pid % each // size * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    base = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(w_ptr + offs_n[None, :] * K + offs_k[:, None], mask=mask_n[None, :] & mask_k[:, None], other=0.0)
        base = dot(x, w, base, 1, INTERPRETED)
    low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        b = tl.load(b_ptr + offs_n[None, :] * R + offs_r[:, None], mask=mask_n[None, :] & mask_r[:, None], other=0.0)
        low = dot(h, cast(b, h.dtype, INTERPRETED), low, 1, INTERPRETED)
    offs = offs_m[:, None] * N + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if base_ptr is not None:
        tl.store(base_ptr + offs, cast(base, base_ptr.dtype.element_ty, INTERPRETED), mask=mask)
    g = tl.load(g_ptr + offs_n, mask=mask_n, other=0.0)
    y = g[None, :] * (base + scaling * low)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, cast(y, y_ptr.dtype.element_ty, INTERPRETED), mask=mask)


def fused(
    x: Tensor, weight: Tensor, h: Tensor, lora_B: Tensor, g: Tensor, bias: Tensor | None, scaling: float, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """``(g * (x Wᵀ + scaling * h Bᵀ) + bias, x Wᵀ)``, the base product only if `keep`."""
    (M, K), N, R = x.shape, weight.shape[0], h.shape[1]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    base = torch.empty_like(y) if keep else None
    block_m, block_n, block_k, block_r, warps, stages = FEW if M <= _FEW_TOKENS else MANY
    with on_device(x):
        fused_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
            x, weight, h, lora_B, g, bias, base, y,
            M, N, K, R,
            scaling,
            GROUP=_GROUP, INTERPRETED=INTERPRETED,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y, base
