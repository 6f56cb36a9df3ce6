"""A stack of experts around the Triton kernels: forward and hand-written backward, one launch for all experts each.

As `engine.fused` for one layer, with `ends` for the groups of rows; docs/math.md has the derivation. The products with
W are PyTorch's grouped products, those of rank r are kernels. Nothing is read back to the host where PyTorch's grouped
product runs. Rows after the last end are not computed: results and gradients are uninitialized there, as those of
PyTorch's grouped product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dora_kernels.core.precision import cast, low_rank_dtype, no_autocast
from dora_kernels.core.products import mm_groups
from dora_kernels.engine import writes
from dora_kernels.engine.dispatch import UnsupportedError, kernels
from dora_kernels.engine.fused import as_parameter


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ends: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        g: Tensor | None,
        scaling: float,
    ) -> Tensor:
        keep = g is not None and ctx.needs_input_grad[5]
        y, h, base = _forward(x, ends, weight, lora_A, lora_B, g, scaling, keep)
        ctx.scaling = scaling
        ctx.save_for_backward(x, ends, weight, lora_A, lora_B, g, h, base)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, ends, weight, lora_A, lora_B, g, h, base = ctx.saved_tensors
        need_x, _, _, need_a, need_b, need_g, _ = ctx.needs_input_grad
        writes.note_backward(need_a or need_b)
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "create_graph=True: the Triton kernels have no second derivative of experts; use backend='torch'"
            )
        scaling, dy = ctx.scaling, dy.contiguous()
        with no_autocast(dy.device):
            dx = d_a = d_b = d_scale = None
            need_p = h if need_b or need_g else None
            dg, dot, _, p = kernels().scale_partials(dy, base, g, g is not None, False, ends, need_p)
            dg = dy if dg is None else dg
            if need_x or need_a:
                left, right = dg, cast(lora_B, h.dtype)
                if g is not None and h.dtype != dy.dtype:  # g * dy is rounded, so B is scaled instead
                    left, right = dy, right * g.unsqueeze(2)
                d_low = kernels().product(left, right, h.dtype, scaling, ends)
                if need_x:
                    dx = mm_groups(dg, cast(weight, dg.dtype), ends)
                    dx = kernels().compose(dx, d_low, lora_A.transpose(1, 2), None, None, 1.0, False, None, ends)
                if need_a:
                    d_a = as_parameter(kernels().product_over_tokens(x, d_low, ends, lora_A.dtype, True), lora_A)
            if p is not None and g is not None:
                wanted = lora_B.dtype if need_b else None
                d_b, d_scale = kernels().factor_grads(p, lora_B, dot, g, torch.ones_like(g), scaling, wanted)
            elif p is not None:
                d_b = as_parameter(p.sum(0).mul_(scaling), lora_B)
        return dx, None, None, d_a, d_b, d_scale, None


def grouped(
    x: Tensor, ends: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, g: Tensor | None, scaling: float
) -> Tensor:
    """``[S, K]`` to ``[S, N]``; see `engine.experts.Experts.grouped`."""
    if torch.is_grad_enabled():
        y: Tensor = _FusedExperts.apply(x, ends, weight, lora_A, lora_B, g, scaling)
        return y
    return _forward(x, ends, weight, lora_A, lora_B, g, scaling, False)[0]


def _forward(
    x: Tensor,
    ends: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    g: Tensor | None,
    scaling: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    low = low_rank_dtype(x, lora_A)  # which asks for autocast
    with no_autocast(x.device):
        h = kernels().product(x, cast(lora_A, low).transpose(1, 2), low, 1.0, ends)
        base = mm_groups(x, cast(weight, x.dtype).transpose(1, 2), ends)
        y = kernels().compose(base, h, lora_B, g, None, scaling, keep, None, ends)
    return y, h, base if keep else None
