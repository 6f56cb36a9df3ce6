"""The rows of all experts on a CPU, one expert after another: forward and hand-written backward.

    y = g ⊙ z,   z = x Wᵀ + s (x Aᵀ) Bᵀ         for the rows x of each expert

As `engine.fused_experts` around the kernels, here around PyTorch's products, which write into tensors that are made
once for all experts. An expert's rows stay in the cache from one product to the next. Kept are x, H and, for the
magnitude's gradient, y in float32 (`engine.rescale`) and z in 16 bits. With float32 adapters on 16-bit experts only H
and the low-rank products are float32. Against autograd's record of the formula, expert by expert, a layer of 64 experts
(256x512, 1024 tokens to 8) takes 0.86 of the time and 0.77 of the memory in float32, 0.8 of the time in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, cast, low_rank_dtype, no_autocast
from dora_kernels.core.problem import Weights
from dora_kernels.engine import formula
from dora_kernels.engine.autograd import gradients
from dora_kernels.engine.fused import as_parameter
from dora_kernels.engine.rescale import lazy_clone, rescales

_PADDING = 16
_FEW = 2
"""Rows for each expert, up to which evaluation gathers the factors."""


class Stack(NamedTuple):
    """The experts' weights and one adapter, as `run` takes them."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    g: Tensor | None
    scaling: float


class Rows(NamedTuple):
    """The rows of one expert."""

    expert: int
    start: int
    end: int


def run(
    x: Tensor,
    rows: Sequence[Rows],
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    g: Tensor | None,
    scaling: float,
) -> Tensor:
    """``[S, K]`` to ``[S, N]``, in x's dtype, which is W's. W is frozen.

    Args:
        rows: of the experts that have some, without gaps; results after the last of them are 0.
        lora_A: ``[E, r, K]``.
        lora_B: ``[E, N, r]``, of any strides.
        g: the magnitude over the norm, ``[E, N]``; None for plain LoRA.
    """
    if torch.is_grad_enabled():
        y: Tensor = _Loop.apply(x, rows, weight, lora_A, lora_B, g, scaling)
        return y
    if rows and len(x) <= _FEW * len(rows):
        return _few(x, rows, Stack(weight, lora_A, lora_B, g, scaling))
    return _forward(x, rows, Stack(weight, lora_A, lora_B, g, scaling), False)[0]


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Sequence[Rows],
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        g: Tensor | None,
        scaling: float,
    ) -> Tensor:
        stack = Stack(weight, lora_A, lora_B, g, scaling)
        y, h, kept, divide = _forward(x, rows, stack, ctx.needs_input_grad[5])
        ctx.rows, ctx.scaling, ctx.divide = rows, scaling, divide
        ctx.save_for_backward(x, weight, lora_A, lora_B, g, h, kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, g, h, kept = ctx.saved_tensors
        need_x, _, _, need_a, need_b, need_g, _ = ctx.needs_input_grad
        rows, scaling = ctx.rows, ctx.scaling
        if torch.is_grad_enabled():

            def layer(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, g: Tensor | None) -> Tensor:
                return _recorded(x, rows, Stack(weight, lora_A, lora_B, g, scaling))

            needed = (need_x, False, need_a, need_b, need_g)
            dx, _, *rest = gradients([x, weight, lora_A, lora_B, g], needed, layer, dy)
            return dx, None, None, *rest, None
        low, count = h.dtype, weight.shape[0]
        dx = torch.empty_like(x) if need_x else None
        d_a = torch.zeros(lora_A.shape, dtype=low) if need_a else None
        d_b = torch.zeros(lora_B.shape, dtype=low) if need_b else None
        d_g = torch.zeros(count, dy.shape[1], dtype=accumulation_dtype(x)) if need_g else None
        with no_autocast(dy.device):
            a, b = cast(lora_A, x.dtype), lora_B.to(low).contiguous()
            # Rows of a power of two bytes apart fall into the same lines of the cache: dYᵀ H takes 57 us, padded 30.
            most, outputs = max((end - start for _, start, end in rows), default=0), dy.shape[1]
            padded, scaled_b = torch.empty(most, outputs + _PADDING, dtype=low), torch.empty_like(b[0])
            for e, start, end in rows:
                up, of_low = dy[start:end], h[start:end]
                factor = scaling if g is None else (scaling * g[e]).unsqueeze(1)
                d_z, dot = _through_scale(up, None if kept is None else kept[start:end], None if g is None else g[e])
                if d_g is not None and dot is not None:
                    d_g[e] = dot
                if low.itemsize < 4:  # products of oneDNN, which are no slower for it
                    wide, factor = d_z, scaling
                else:
                    wide = padded[: end - start, :outputs].copy_(up)
                if d_b is not None:
                    torch.mul(wide.t() @ of_low, factor, out=d_b[e])
                if need_x or need_a:
                    d_low = wide @ torch.mul(b[e], factor, out=scaled_b)
                    if d_a is not None:
                        torch.mm(d_low.t(), cast(x[start:end], low), out=d_a[e])
                    if dx is not None:
                        torch.mm(cast(d_low, x.dtype), a[e], out=dx[start:end]).addmm_(d_z, weight[e])
        if dx is not None:
            dx[rows[-1].end if rows else 0 :] = 0
        if d_g is not None and ctx.divide:
            d_g.div_(g)
        return dx, None, None, as_parameter(d_a, lora_A), as_parameter(d_b, lora_B), d_g, None


def _forward(x: Tensor, rows: Sequence[Rows], stack: Stack, keep: bool) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """y, H, what g's gradient needs, and whether that is y."""
    weight, lora_A, lora_B, g, scaling = stack
    low = low_rank_dtype(x, lora_A)  # which asks for autocast
    y = x.new_empty(x.shape[0], weight.shape[1])
    h = x.new_empty(x.shape[0], lora_A.shape[1], dtype=low)
    divide = keep and g is not None and rescales(y, g)
    z = torch.empty_like(y) if keep and not divide else y
    with no_autocast(x.device):
        a, b = cast(lora_A, low), lora_B.to(low).contiguous()
        for e, start, end in rows:
            read, of_low, inner = x[start:end], h[start:end], z[start:end]
            torch.mm(cast(read, low), a[e].t(), out=of_low)
            if low == x.dtype:
                torch.addmm(inner, of_low, b[e].t(), beta=0.0, alpha=scaling, out=inner)
            else:
                inner.copy_((of_low * scaling) @ b[e].t())
            # Last, so that in 16 bits z is rounded once, from the product's float32 sum.
            inner.addmm_(read, weight[e].t())
            if g is not None:
                torch.mul(inner, g[e], out=y[start:end])
    y[rows[-1].end if rows else 0 :] = 0
    kept = None if not keep else lazy_clone(y) if divide else z  # type: ignore[misc]
    return y, h, kept, divide


def _through_scale(up: Tensor, kept: Tensor | None, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradient of z, in up's dtype, and ``Σ up ⊙ kept`` over the rows."""
    if g is None:
        return up, None
    if kept is None:
        return torch.mul(up, g, out=torch.empty_like(up)), None
    mean, variance = formula.standard(up.shape[1], g.dtype, up.device)
    d_z, dot, _ = torch.ops.aten.native_batch_norm_backward(
        up, kept, g, mean, variance, None, None, False, 0.0, [True, True, False]
    )
    return d_z, dot


def _few(x: Tensor, rows: Sequence[Rows], stack: Stack) -> Tensor:
    """`run` without gradients, for about a row for each expert: the low-rank products of all rows at once, in float32.

    In PEFT's B the experts take turns, so that taking one out of it reads it whole.
    """
    weight, lora_A, lora_B, g, scaling = stack
    y, wide = x.new_empty(x.shape[0], weight.shape[1]), accumulation_dtype(x)
    ids = torch.tensor([e for e, start, end in rows for _ in range(start, end)])
    count = len(ids)
    # Sums of products take two thirds of a batched product's time here.
    h = (cast(lora_A.index_select(0, ids), wide) * cast(x[:count], wide).unsqueeze(1)).sum(2).mul_(scaling)
    if lora_B.is_contiguous():
        z = (cast(lora_B.index_select(0, ids), wide) * h.unsqueeze(1)).sum(2)
    else:
        flat = lora_B.permute(1, 2, 0).reshape(-1, lora_B.shape[0])
        b = cast(flat.index_select(1, ids), wide).view(*lora_B.shape[1:], count)  # [N, r, S]
        z = (b * h.t()).sum(1).t()
    with no_autocast(x.device):
        for e, start, end in rows:
            torch.mm(x[start:end], weight[e].t(), out=y[start:end])
    z = z + y[:count]
    y[:count] = z if g is None else z.mul_(g.index_select(0, ids))
    y[count:] = 0
    return y


def _recorded(x: Tensor, rows: Sequence[Rows], stack: Stack) -> Tensor:
    """`run` in operations that autograd records, for second derivatives."""
    weight, lora_A, lora_B, g, scaling = stack
    parts = [
        formula.linear(x[start:end], Weights(weight[e], lora_A[e], lora_B[e]), None if g is None else g[e], scaling)
        for e, start, end in rows
    ]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - (rows[-1].end if rows else 0), weight.shape[1])])
