"""The rows of all experts on a CPU, one expert after another: forward and hand-written backward.

    y = g ⊙ z,   z = x Wᵀ + s (x Aᵀ) Bᵀ         for the rows x of each expert

As `engine.fused_experts` around the kernels, here around PyTorch's products, which write into tensors that are made
once for all experts. An expert's rows stay in the cache from one product to the next. Kept are x, H and, for the
magnitude's gradient, y in float32 (`engine.rescale`) and z in 16 bits. With float32 adapters on 16-bit experts only H
and the low-rank products are float32. Against autograd's record of the formula, expert by expert, a layer of 64 experts
(256x512, 1024 tokens to 8) takes 0.86 of the time and 0.77 of the memory in float32, 0.8 of the time in bfloat16.

Where a CPU has no products of 16 bits, one expert's W at a time is taken as float32 (`product_dtype`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, cast, low_rank_dtype, no_autocast, product_dtype
from dora_kernels.core.problem import Weights
from dora_kernels.engine import formula
from dora_kernels.engine.autograd import gradients
from dora_kernels.engine.fused import as_parameter
from dora_kernels.engine.rescale import lazy_clone, rescales

_PADDING = 16
_FEW = 8
"""Rows of an expert, up to which evaluation reads a 16-bit W as it is, whatever `product_dtype` says.

At 4096x1024 with AVX2 that takes 0.2 of the time of a product with a float32 copy for 1 row, 0.4 for 4, 0.7 for 8, 1.2
for 16. The low-rank products are float32 then: one of oneDNN in 16 bits takes 15 us, and 4 to 12 us with copies of A
or B in float32 (1 to 8 rows, 1024x512, rank 16).
"""


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
    return _forward(x, rows, Stack(weight, lora_A, lora_B, g, scaling), False, _FEW)[0]


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
        wide, low = product_dtype(x.dtype), h.dtype
        # In 16 bits oneDNN takes the gradient of z as it lies. In float32 it takes dY, padded, and the factors have g.
        padding = low.itemsize >= 4
        experts = slice(None) if len(rows) == len(lora_B) else [e for e, _, _ in rows]  # those that have rows
        scale = (scaling * g[experts]).unsqueeze(2) if padding and g is not None else scaling
        b = torch.empty(len(rows), *lora_B.shape[1:], dtype=low)
        if need_x or need_a:
            torch.mul(lora_B[experts], scale, out=b)
        dx = torch.empty_like(x) if need_x else None
        d_a = torch.zeros(lora_A.shape, dtype=low) if need_a else None
        d_b = torch.empty_like(b) if need_b else None
        d_g = torch.zeros(weight.shape[0], dy.shape[1], dtype=accumulation_dtype(x)) if need_g else None
        with no_autocast(dy.device):
            # Rows of a power of two bytes apart fall into the same lines of the cache: dYᵀ H takes 57 us, padded 30.
            most, outputs = max((end - start for _, start, end in rows), default=0), dy.shape[1]
            padded = torch.empty(most, outputs + _PADDING, dtype=low)
            for i, (e, start, end) in enumerate(rows):
                up, of_low, of_g = cast(dy[start:end], wide), h[start:end], None if g is None else g[e]
                d_z, dot = _through_scale(up, None if kept is None else cast(kept[start:end], wide), of_g)
                if d_g is not None and dot is not None:
                    d_g[e] = dot
                left = padded[: end - start, :outputs].copy_(up) if padding else d_z
                if d_b is not None:
                    torch.mm(left.t(), of_low, out=d_b[i])
                if need_x or need_a:
                    d_low = left @ b[i]
                    if d_a is not None:
                        torch.mm(d_low.t(), cast(x[start:end], low), out=d_a[e])
                    if dx is not None:
                        of_x = dx[start:end] if wide == x.dtype else torch.empty(end - start, dx.shape[1], dtype=wide)
                        torch.mm(cast(d_low, wide), cast(lora_A[e], wide), out=of_x).addmm_(d_z, cast(weight[e], wide))
                        if wide != x.dtype:
                            dx[start:end] = of_x
        if d_b is not None:
            d_b.mul_(scale)
            if isinstance(experts, list):
                d_b = torch.zeros(lora_B.shape, dtype=low).index_copy_(0, torch.tensor(experts, dtype=torch.long), d_b)
        if dx is not None:
            dx[rows[-1].end if rows else 0 :] = 0
        if d_g is not None and ctx.divide:
            d_g.div_(g)
        return dx, None, None, as_parameter(d_a, lora_A), as_parameter(d_b, lora_B), d_g, None


def _forward(
    x: Tensor, rows: Sequence[Rows], stack: Stack, keep: bool, few: int = 0
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """y, H, what g's gradient needs, and whether that is y. With so `few` rows an expert's W is read as it is."""
    weight, lora_A, lora_B, g, scaling = stack
    wide, low = product_dtype(x.dtype), low_rank_dtype(x, lora_A)  # which asks for autocast
    if wide != x.dtype or (few and low.itemsize < 4 and max((end - start for _, start, end in rows), default=0) <= few):
        low = torch.promote_types(low, torch.float32)
    lora_B = _at_hand(lora_B, rows)
    y = x.new_empty(x.shape[0], weight.shape[1])
    h = x.new_empty(x.shape[0], lora_A.shape[1], dtype=low)
    divide = keep and g is not None and rescales(y, g)
    z = torch.empty_like(y) if keep and not divide else y
    with no_autocast(x.device):
        for e, start, end in rows:
            read, of_low, inner = x[start:end], h[start:end], z[start:end]
            if wide != x.dtype and end - start > few:
                inner = torch.empty_like(inner, dtype=wide)
            a, b = cast(lora_A[e], low), cast(lora_B[e], low).contiguous()
            torch.mm(cast(read, low), a.t(), out=of_low)
            if low == inner.dtype:
                torch.addmm(inner, of_low, b.t(), beta=0.0, alpha=scaling, out=inner)
            else:
                inner.copy_((of_low * scaling) @ b.t())
            # Last, so that in 16 bits z is rounded once, from the product's float32 sum.
            inner.addmm_(cast(read, inner.dtype), cast(weight[e], inner.dtype).t())
            if inner.dtype != z.dtype and (g is None or z is not y):
                z[start:end] = inner
            if g is not None:
                torch.mul(inner, g[e], out=y[start:end])
    y[rows[-1].end if rows else 0 :] = 0
    kept = None if not keep else lazy_clone(y) if divide else z  # type: ignore[misc]
    return y, h, kept, divide


def _at_hand(lora_B: Tensor, rows: Sequence[Rows]) -> Tensor:
    """B so that reading one expert's does not read all of it for every expert: in PEFT's B the experts take turns.

    A copy of the whole takes as long as copies of 8 to 26 of 32 experts, one by one.
    """
    return lora_B.contiguous() if 4 * len(rows) > len(lora_B) else lora_B


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


def _recorded(x: Tensor, rows: Sequence[Rows], stack: Stack) -> Tensor:
    """`run` in operations that autograd records, for second derivatives."""
    weight, lora_A, lora_B, g, scaling = stack
    parts = [
        formula.linear(x[start:end], Weights(weight[e], lora_A[e], lora_B[e]), None if g is None else g[e], scaling)
        for e, start, end in rows
    ]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - (rows[-1].end if rows else 0), weight.shape[1])])
