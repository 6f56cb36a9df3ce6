"""Scale and reduce: ``g * grad``, ``Σ_t grad * other`` and ``Σ_t grad`` in one pass over grad and other.

Shapes: grad, other and the scaled gradient ``[M, F]``, g ``[F]`` float32, the sums over tokens ``[F]`` float32.
Along "out" grad is dy and other the base product (for g * dy, dm and db). Along "in" they are the gradient of ``x * g``
and x. In groups (experts) g and the sums are ``[G, F]``, and group e has the tokens ``ends[e - 1]`` to ``ends[e]``.

A program walks down a strip of rows of BLOCK_F columns, keeps its sums in registers, and writes them as one row of
partial sums. A second sum adds those: no atomics, the same bits every run.

Bytes: 2 or 3 times M·F, plus 8·F per strip.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.config import blocks, full_grid, scale_reduce_config, splits
from dora_kernels.kernels.dot import cast
from dora_kernels.kernels.launch import INTERPRETED, PLANS, Plan, launch


@triton.jit(do_not_specialize=["M", "span", "strips"])
def scale_reduce_kernel(
    grad_ptr, other_ptr, g_ptr, scaled_ptr, dot_ptr, sum_ptr, ends_ptr,
    F, stride_gm, stride_om,
    M, span, strips,
    INTERPRETED: tl.constexpr, STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Rows ``[strip * span, (strip + 1) * span)`` of BLOCK_F columns. Pointers of unwanted results are None.

    Each of several groups is cut into as many strips.
    """
    offs_f = (tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    mask_f = offs_f < F
    strip = tl.program_id(1).to(tl.int64)
    dot = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    first = strip * span
    if ends_ptr is not None:
        group = strip // strips
        M = tl.load(ends_ptr + group).to(tl.int64)
        start = tl.load(ends_ptr + group - 1, mask=group > 0, other=0).to(tl.int64)
        span = tl.cdiv(tl.cdiv(M - start, BLOCK_M), strips) * BLOCK_M
        first = start + strip % strips * span
        if scaled_ptr is not None:
            g_ptr += group * F
    if scaled_ptr is not None:
        g = tl.load(g_ptr + offs_f, mask=mask_f, other=0.0)[None, :]
    for m in tl.range(0, span, BLOCK_M, num_stages=STAGES):
        offs_m = first + m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_f[None, :]
        grad = tl.load(grad_ptr + offs_m[:, None] * stride_gm + offs_f[None, :], mask=mask, other=0.0).to(tl.float32)
        if dot_ptr is not None:
            other = tl.load(other_ptr + offs_m[:, None] * stride_om + offs_f[None, :], mask=mask, other=0.0)
            dot += grad * other.to(tl.float32)
        if sum_ptr is not None:
            total += grad
        if scaled_ptr is not None:
            scaled = cast(grad * g, scaled_ptr.dtype.element_ty, INTERPRETED)
            tl.store(scaled_ptr + offs_m[:, None] * F + offs_f[None, :], scaled, mask=mask)
    if dot_ptr is not None:
        tl.store(dot_ptr + strip * F + offs_f, tl.sum(dot, 0), mask=mask_f)
    if sum_ptr is not None:
        tl.store(sum_ptr + strip * F + offs_f, tl.sum(total, 0), mask=mask_f)


def scale_reduce(
    grad: Tensor,
    other: Tensor | None,
    g: Tensor | None,
    want_scaled: bool,
    want_sum: bool,
    ends: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One pass over ``grad [M, F]``: ``(g * grad, Σ_t grad * other, Σ_t grad)``.

    The scaled gradient is in grad's dtype, the sums over tokens are float32 ``[F]``. Each is None if not wanted (the
    second if `other` is None). The columns of grad and other are adjacent in memory; g is contiguous. With `ends`,
    integers ``[G]`` where the groups' tokens end, g and the sums are ``[G, F]``; tokens past the last are left out, and
    their scaled gradient is uninitialized.
    """
    scaled, dot, total = scale_partials(grad, other, g, want_scaled, want_sum, ends)
    return scaled, None if dot is None else dot.sum(-2), None if total is None else total.sum(-2)


def scale_partials(
    grad: Tensor,
    other: Tensor | None,
    g: Tensor | None,
    want_scaled: bool,
    want_sum: bool,
    ends: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same as `scale_reduce`, but its two sums are still partial, one row per strip: ``([G,] strips, F)``."""
    M, F = grad.shape
    if other is not None and other.stride()[1] != 1:
        other = other.contiguous()
    groups = () if ends is None else ends.shape
    count = math.prod(groups)
    plan = _plan(M <= 64 * max(count, 1), F, grad.stride()[0], 0 if other is None else other.stride()[0])
    config = plan.config
    columns = blocks(F, config.BLOCK_F)
    steps = max(1, blocks(M, config.BLOCK_M))
    strips = splits(columns * max(count, 1), steps, full_grid())
    span = blocks(steps, strips) * config.BLOCK_M
    if ends is None:
        strips = max(1, blocks(M, span))
    scaled = grad.new_empty(M, F) if want_scaled else None
    shape = *groups, strips, F
    dot = None if other is None else torch.empty(shape, dtype=torch.float32, device=grad.device)
    total = torch.empty(shape, dtype=torch.float32, device=grad.device) if want_sum else None
    tensors = grad, other, g, scaled, dot, total, ends
    launch(scale_reduce_kernel, plan, (columns, strips * max(count, 1)), tensors, (M, span, strips))
    return scaled, dot, total


@functools.lru_cache(PLANS)
def _plan(few: bool, F: int, row: int, row_other: int) -> Plan:
    return Plan((F, row, row_other), (INTERPRETED, 3), scale_reduce_config(few))
