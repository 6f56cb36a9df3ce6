"""Scale and reduce: ``g * grad``, ``Σ_t grad * other``, ``Σ_t grad`` and ``gradᵀ h`` in one pass over grad and other.

Shapes: grad, other and the scaled gradient ``[M, F]``, h ``[M, R]``, g ``[F]`` float32, the sums over tokens ``[F]``
and ``[F, R]`` float32. Along "out" grad is dy and other the base product (for g * dy, dm, db and dB). Along "in" they
are the gradient of ``x * g`` and x. In groups (experts) g and the sums have one more dimension in front, and group e
has the tokens ``ends[e - 1]`` to ``ends[e]``.

A program walks down a strip of rows of BLOCK_F columns, keeps its sums in registers, and writes them as one row of
partial sums. A second sum adds those: no atomics, the same bits every run.

Bytes: 2 or 3 times M·F; 8·F, and with h 8·F·R, for each strip; with h M·R for each BLOCK_F columns.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dora_kernels.kernels.combine import combine
from dora_kernels.kernels.config import blocks, reduce_strips, scale_reduce_config
from dora_kernels.kernels.dot import cast, dot, dot_by_pieces
from dora_kernels.kernels.launch import INTERPRETED, PLANS, Plan, launch
from dora_kernels.kernels.product import NARROW, product, products_of


@triton.jit(do_not_specialize=["M", "span", "strips"])
def scale_reduce_kernel(
    grad_ptr, other_ptr, g_ptr, h_ptr, scaled_ptr, dot_ptr, sum_ptr, low_ptr, ends_ptr,
    F, R, stride_gm, stride_om, stride_hm, stride_lf, stride_lr,
    M, span, strips,
    PRODUCTS: tl.constexpr, INTERPRETED: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows ``[strip * span, (strip + 1) * span)`` of BLOCK_F columns. Pointers of unwanted results are None.

    Each of several groups is cut into as many strips. PRODUCTS is 0 without a product.
    """
    blocks_r = tl.cdiv(R, BLOCK_R)
    offs_f = (tl.program_id(0) // blocks_r * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    mask_f = offs_f < F
    strip = tl.program_id(1).to(tl.int64)
    dots = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
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
    offs_r = (tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    mask_r = offs_r < R
    low = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    for m in tl.range(0, span, BLOCK_M, num_stages=STAGES):
        offs_m = first + m + tl.arange(0, BLOCK_M)
        mask_m = (offs_m < M)[:, None]
        mask = mask_m & mask_f[None, :]
        given = tl.load(grad_ptr + offs_m[:, None] * stride_gm + offs_f[None, :], mask=mask, other=0.0)
        grad = given.to(tl.float32)
        if dot_ptr is not None:
            other = tl.load(other_ptr + offs_m[:, None] * stride_om + offs_f[None, :], mask=mask, other=0.0)
            dots += grad * other.to(tl.float32)
        if sum_ptr is not None:
            total += grad
        if scaled_ptr is not None:
            scaled = cast(grad * g, scaled_ptr.dtype.element_ty, INTERPRETED)
            tl.store(scaled_ptr + offs_m[:, None] * F + offs_f[None, :], scaled, mask=mask)
        if low_ptr is not None:
            h = tl.load(h_ptr + offs_m[:, None] * stride_hm + offs_r[None, :], mask=mask_m & mask_r[None, :], other=0.0)
            if PRODUCTS == 1:
                low = dot(tl.trans(given), h, low, 1, INTERPRETED)
            elif PRODUCTS == 3:
                low = dot_by_pieces(tl.trans(given), h, low, INTERPRETED)
            else:
                low = dot(tl.trans(grad), h.to(tl.float32), low, 6, INTERPRETED)
    if dot_ptr is not None:
        tl.store(dot_ptr + strip * F + offs_f, tl.sum(dots, 0), mask=mask_f)
    if sum_ptr is not None:
        tl.store(sum_ptr + strip * F + offs_f, tl.sum(total, 0), mask=mask_f)
    if low_ptr is not None:
        # A part has all groups.
        low_ptr += (strip % strips * (tl.num_programs(1) // strips) + strip // strips) * F * R
        at = low_ptr + offs_f[:, None] * stride_lf + offs_r[None, :] * stride_lr
        tl.store(at, cast(low, low_ptr.dtype.element_ty, INTERPRETED), mask=mask_f[:, None] & mask_r[None, :])


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
    scaled, dot, total, _ = scale_partials(grad, other, g, want_scaled, want_sum, ends)
    return scaled, None if dot is None else dot.sum(-2), None if total is None else total.sum(-2)


def scale_partials(
    grad: Tensor,
    other: Tensor | None,
    g: Tensor | None,
    want_scaled: bool,
    want_sum: bool,
    ends: Tensor | None = None,
    h: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The same as `scale_reduce`, with sums that are still partial, and ``gradᵀ h`` if h is given.

    The two sums have a row per strip, ``[(G,) strips, F]``; the product's parts come first, ``[parts, (G,) F, R]``.
    h is ``[M, R]``, row-major, in grad's dtype or float32. Above rank 64 it takes a launch of its own.
    """
    groups = () if ends is None else tuple(ends.shape)
    if other is not None and other.stride()[1] != 1:
        other = other.contiguous()
    narrow = h if h is not None and h.shape[1] <= NARROW else None
    plan, grid, free = _cut(grad, other, narrow, ends)
    F, strips = grad.shape[1], free[2]
    f32 = torch.float32
    scaled = torch.empty_like(grad, memory_format=torch.contiguous_format) if want_scaled else None
    dot = None if other is None else grad.new_empty((*groups, strips, F), dtype=f32)
    total = grad.new_empty((*groups, strips, F), dtype=f32) if want_sum else None
    low = None if narrow is None else grad.new_empty((strips, *groups, F, narrow.shape[1]), dtype=f32)
    if want_scaled or want_sum or other is not None or narrow is not None:
        launch(scale_reduce_kernel, plan, grid, (grad, other, g, narrow, scaled, dot, total, low, ends), free)
    if h is not None and low is None:
        low = product(grad.t(), h, f32) if ends is None else product_over_tokens(grad, h, ends, f32)
        low = low.unsqueeze(0)
    return scaled, dot, total, low


def product_over_tokens(left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype, turned: bool = False) -> Tensor:
    """Each group's ``leftᵀ right``, ``[G, F, R]`` in `dtype`, rounded once from float32 sums; 0 for an empty group.

    Args:
        left: ``[M, F]``.
        right: ``[M, R]``, row-major, in left's dtype or float32.
        ends: integers ``[G]`` where the groups' tokens end; tokens past the last are left out.
        turned: return ``[G, R, F]``.
    """
    F, R = left.shape[1], right.shape[1]
    if left.stride()[1] != 1:
        left = left.contiguous()
    plan, grid, free = _cut(left, None, right, ends, turned)
    out = left.new_empty((*ends.shape, R, F) if turned else (*ends.shape, F, R), dtype=dtype)
    made = out if free[2] == 1 else left.new_empty((free[2], *out.shape), dtype=torch.float32)
    launch(scale_reduce_kernel, plan, grid, (left, None, None, right, None, None, None, made, ends), free)
    return out if made is out else combine(made, out)


def _cut(
    grad: Tensor, other: Tensor | None, h: Tensor | None, ends: Tensor | None, turned: bool = False
) -> tuple[Plan, tuple[int, int], tuple[int, int, int]]:
    """The plan, the grid, and M, the rows of a strip and the strips of a group."""
    M, F = grad.shape
    groups = 1 if ends is None else max(1, ends.shape[0])
    row_other = 0 if other is None else other.stride()[0]
    of_h = (0, 0, 0) if h is None else (h.shape[1], h.stride()[0], products_of(grad.dtype, h.dtype))
    plan = _plan(M <= 64 * groups, F, grad.stride()[0], row_other, *of_h, turned)
    config, R = plan.config, of_h[0]
    columns = blocks(F, config.BLOCK_F) * max(1, blocks(R, config.BLOCK_R))
    steps = max(1, blocks(M, config.BLOCK_M))
    strips = reduce_strips(columns * groups, steps, M // groups, R)
    span = blocks(steps, strips) * config.BLOCK_M
    if ends is None:
        strips = max(1, blocks(M, span))
    return plan, (columns, strips * groups), (M, span, strips)


@functools.lru_cache(PLANS)
def _plan(few: bool, F: int, row: int, row_other: int, R: int, row_h: int, products: int, turned: bool) -> Plan:
    of_low = (1, F) if turned else (R, 1)
    sizes = F, max(R, 1), row, row_other, row_h, *of_low
    return Plan(sizes, (products, INTERPRETED, 3), scale_reduce_config(few, R, products))
