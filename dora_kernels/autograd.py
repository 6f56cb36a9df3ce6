"""The DoRA linear layer as one `autograd.Function`: what is saved, and the hand-written backward's place in autograd.

Saved for the backward, beside parameters: x, h ``[M, r]``, what the backend's `compose` keeps ``[M, N]`` where the
magnitude's gradient needs it, and this call's own g and norm.
The output is never saved: consumers may overwrite it in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dora_kernels import linear, ops, reference
from dora_kernels.backends import UnsupportedError, warn_once
from dora_kernels.linear import Needs
from dora_kernels.torch_backend import cast, quotient


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor | None,
        bias: Tensor | None,
        divisor: Tensor | None,
        settings: tuple[float, str, bool, str, bool],
    ) -> Tensor:
        scaling, magnitude_axis, detach_norm, backend, _ = ctx.settings = settings
        needs = Needs(*ctx.needs_input_grad[:6])
        g = None
        if magnitude is not None and divisor is not None:
            g = quotient(magnitude, divisor, x)
            if divisor.dtype != g.dtype:
                divisor = divisor.to(g.dtype)
        keep_base = linear.keeps_base(magnitude_axis, detach_norm, magnitude is not None, needs)
        y, h, base = ops.linear_forward(
            _flat(x), weight, lora_A, lora_B, g, bias, scaling, magnitude_axis, keep_base, backend
        )
        ctx.save_for_backward(x, weight, lora_A, lora_B, magnitude, bias, g, divisor, h, base)
        return _unflat(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = Needs(*ctx.needs_input_grad[:6])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            linear.note_backward(needs)
            return *_differentiable_backward(ctx, dy), *_NO_GRADIENT
        x, weight, lora_A, lora_B, magnitude, bias, g, divisor, h, base = ctx.saved_tensors
        scaling, magnitude_axis, detach_norm, backend, _ = ctx.settings
        d_x, d_weight, d_a, d_b, d_magnitude, d_bias = ops.linear_backward(
            _flat(dy), _flat(x), weight, lora_A, lora_B, g, divisor, h, base,
            scaling, magnitude_axis, detach_norm, needs, backend,
        )  # fmt: skip
        if d_x is not None and x.dim() != 2:
            d_x = d_x.view(x.shape)
        if d_magnitude is not None:
            d_magnitude = cast(d_magnitude, magnitude.dtype)
        if d_bias is not None:
            d_bias = cast(d_bias, bias.dtype)
        return d_x, d_weight, d_a, d_b, d_magnitude, d_bias, *_NO_GRADIENT


_NO_GRADIENT = (None, None)
"""Of the norm and the settings."""

# `Function.apply` without its search for `torch.func` transforms, which `backends.resolve` has made: 16 Python calls.
_record = super(torch.autograd.Function, _DoRALinear).apply


def apply(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None,
    divisor: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    detach_norm: bool,
    backend: str,
    named: bool,
) -> Tensor:
    """The layer on ``x [..., K]``, already in the compute dtype; `divisor` is the norm, infinite where it is 0.

    `named`: the backend was asked for by name, so a second differentiation raises instead of using the reference.
    """
    if not torch.is_grad_enabled():
        y, _, _ = ops.linear_forward(
            _flat(x), weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, False, backend, divisor
        )
        return _unflat(y, x)
    record = _DoRALinear.apply if torch.compiler.is_compiling() else _record
    settings = (scaling, magnitude_axis, detach_norm, backend, named)
    return record(x, weight, lora_A, lora_B, magnitude, bias, divisor, settings)


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unflat(y: Tensor, x: Tensor) -> Tensor:
    """y with x's leading dimensions, and no view to autograd: consumers may overwrite it in place."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def _differentiable_backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """First derivatives that can be differentiated again (``create_graph=True``): the reference's own."""
    x, weight, lora_A, lora_B, magnitude, bias, _, divisor, _, _ = ctx.saved_tensors
    scaling, magnitude_axis, detach_norm, backend, named = ctx.settings
    if named:
        raise UnsupportedError(
            f"backend={backend!r} has no second derivative, and create_graph=True asks for one; "
            "use backend='reference', or 'auto', which takes the reference there"
        )
    warn_once("create_graph=True: the gradients of dora_linear are taken from the dense reference, which is slow")
    inputs = [x, weight, lora_A, lora_B, magnitude, bias]
    aliases = [t.view_as(t) if need else t for t, need in zip(inputs, ctx.needs_input_grad[:6], strict=True)]
    x, weight, lora_A, lora_B, magnitude, bias = aliases
    norm = None
    if divisor is not None:
        norm = divisor.masked_fill(torch.isinf(divisor), 0.0)
    y = reference.dora_linear(
        x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm, norm, x.dtype
    )
    wanted = [t for t, need in zip(aliases, ctx.needs_input_grad[:6], strict=True) if need]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(grads) if need else None for need in ctx.needs_input_grad[:6]]
