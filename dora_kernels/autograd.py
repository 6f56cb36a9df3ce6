"""DoRA as `autograd.Function`s: what is saved, and the hand-written backward's place in autograd.

The linear layer is one function of x, `apply`; where another module makes the base product, `compose` is one of the
base result and the low-rank activation.

Saved for the backward, beside parameters: x (of the linear layer), h ``[M, r]``, whose dtype is that of the low-rank
branch, what the backend's `compose` keeps ``[M, N]`` where the magnitude's gradient needs it, and this call's own g
and norm.
The output is never saved: consumers may overwrite it in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dora_kernels import linear, ops, reference
from dora_kernels.backends import UnsupportedError, warn_once
from dora_kernels.linear import ComposeNeeds, Needs
from dora_kernels.reference import cast, no_autocast
from dora_kernels.torch_backend import quotient


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
        settings: tuple[float, str, bool, str, bool, float],
    ) -> Tensor:
        scaling, magnitude_axis, detach_norm, backend, _, _ = ctx.settings = settings
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
            linear.note_backward(needs.lora_A or needs.lora_B or needs.weight)
            return *_differentiable_backward(ctx, dy), *_NO_GRADIENT
        x, weight, lora_A, lora_B, magnitude, bias, g, divisor, h, base = ctx.saved_tensors
        scaling, magnitude_axis, detach_norm, backend, _, eps = ctx.settings
        d_x, d_weight, d_a, d_b, d_magnitude, d_bias = ops.linear_backward(
            _flat(dy), _flat(x), weight, lora_A, lora_B, g, divisor, h, base,
            scaling, magnitude_axis, detach_norm, needs, backend, eps,
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
    eps: float = 0.0,
) -> Tensor:
    """The layer on ``x [..., K]``, already in the compute dtype; `divisor` is the norm, infinite where it is 0.

    With eps the divisor is the norm with that added.

    `named`: the backend was asked for by name, so a second differentiation raises instead of using the reference.
    """
    if not torch.is_grad_enabled():
        y, _, _ = ops.linear_forward(
            _flat(x), weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, False, backend, divisor
        )
        return _unflat(y, x)
    record = _DoRALinear.apply if torch.compiler.is_compiling() else _record
    settings = (scaling, magnitude_axis, detach_norm, backend, named, eps)
    return record(x, weight, lora_A, lora_B, magnitude, bias, divisor, settings)


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unflat(y: Tensor, x: Tensor) -> Tensor:
    """y with x's leading dimensions, and no view to autograd: consumers may overwrite it in place."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def _differentiable_backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """First derivatives that can be differentiated again (``create_graph=True``): the reference's own."""
    x, weight, lora_A, lora_B, magnitude, bias, _, divisor, _, _ = ctx.saved_tensors
    scaling, magnitude_axis, detach_norm, backend, named, eps = ctx.settings
    _check_second(backend, named)
    warn_once("create_graph=True: the gradients of dora_linear are taken from the dense reference, which is slow")
    norm = None
    if divisor is not None:
        norm = divisor - eps if eps else divisor.masked_fill(torch.isinf(divisor), 0.0)

    def layer(*inputs: Any) -> Tensor:
        x, weight, lora_A, lora_B, magnitude, bias = inputs
        return reference.dora_linear(
            x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm, norm, x.dtype, eps
        )

    return _gradients([x, weight, lora_A, lora_B, magnitude, bias], ctx.needs_input_grad, layer, dy)


def _check_second(backend: str, named: bool) -> None:
    """Whether gradients that can be differentiated again may be the reference's."""
    if named:
        raise UnsupportedError(
            f"backend={backend!r} has no second derivative, and create_graph=True asks for one; "
            "use backend='reference', or 'auto', which takes the reference there"
        )


def _gradients(
    inputs: list[Tensor | None], needed: tuple[bool, ...], function: Callable[..., Tensor], dy: Tensor
) -> list[Tensor | None]:
    """Gradients of `function` at `inputs` that can be differentiated again, None where not needed."""
    needed = needed[: len(inputs)]
    aliases = [t.view_as(t) if need and t is not None else t for t, need in zip(inputs, needed, strict=True)]
    wanted = [t for t, need in zip(aliases, needed, strict=True) if need and t is not None]
    grads = iter(torch.autograd.grad(function(*aliases), wanted, dy, create_graph=True))
    return [next(grads) if need else None for need in needed]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        divisor: Tensor,
        settings: tuple[float, str, str, bool],
    ) -> Tensor:
        ctx.settings = settings
        ctx.save_for_backward(weight, lora_A, lora_B, divisor)
        return divisor.clone()

    @staticmethod
    def backward(ctx: Any, d_norm: Tensor) -> tuple[Tensor | None, ...]:
        weight, lora_A, lora_B, divisor = ctx.saved_tensors
        scaling, magnitude_axis, backend, named = ctx.settings
        needed = ctx.needs_input_grad[:3]
        linear.note_backward(any(needed))
        if torch.is_grad_enabled():
            _check_second(backend, named)

            def dense(*tensors: Any) -> Tensor:
                weight, lora_A, lora_B = tensors
                return reference.weight_norm(weight, lora_A, lora_B, scaling, magnitude_axis)

            return *_gradients([weight, lora_A, lora_B], needed, dense, d_norm), *_NO_GRADIENT
        needs = Needs(False, needed[0], needed[1], needed[2], False, False)
        with no_autocast(d_norm.device):
            grads = linear.norm_gradient(
                weight, lora_A, lora_B, d_norm / divisor, scaling, magnitude_axis == "in", needs
            )
        return *(
            None if grad is None else linear.as_parameter(grad, t)
            for grad, t in zip(grads, (weight, lora_A, lora_B), strict=True)
        ), *_NO_GRADIENT


def norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    divisor: Tensor,
    scaling: float,
    magnitude_axis: str,
    backend: str,
    named: bool,
) -> Tensor:
    """The norm, computed already and infinite where it is 0, as a function of the weight, A and B."""
    return divisor if not torch.is_grad_enabled() else _Norm.apply(
        weight, lora_A, lora_B, divisor, (scaling, magnitude_axis, backend, named)
    )


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        h: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        divisor: Tensor,
        settings: tuple[float, str, bool],
    ) -> Tensor:
        scaling, backend, _ = ctx.settings = settings
        g = quotient(magnitude, divisor, result)
        with no_autocast(result.device):
            y, base = linear.compose(
                _rows(result), _rows(h), lora_B, g, bias, scaling, ctx.needs_input_grad[3], backend
            )
        ctx.save_for_backward(h, lora_B, magnitude, bias, g, divisor, base)
        return _unflat(y, result)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, lora_B, magnitude, bias, g, divisor, base = ctx.saved_tensors
        scaling, backend, _ = ctx.settings
        need_result, need_h, need_b, _, need_bias, _, _ = ctx.needs_input_grad
        linear.note_backward(need_h or need_b)
        if torch.is_grad_enabled():
            return *_differentiable_compose_backward(ctx, dy), None, None
        needs = ComposeNeeds(need_result, need_h, need_b, need_bias)
        with no_autocast(dy.device):
            d_result, d_h, d_b, d_magnitude, total = linear.compose_backward(
                _rows(dy), lora_B, g, divisor.to(g.dtype), _rows(h), base, scaling, True, needs,
                linear.primitives(backend), bias if linear.holds_bias(dy) else None,
            )  # fmt: skip
        return (
            d_result.view(dy.shape) if need_result else None,
            d_h.view(h.shape) if need_h else None,
            linear.as_parameter(d_b, lora_B) if need_b else None,
            None if d_magnitude is None else cast(d_magnitude, magnitude.dtype),
            cast((1.0 - g) * total, bias.dtype) if need_bias else None,
            None,
            None,
        )


def compose(
    result: Tensor,
    h: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    divisor: Tensor,
    scaling: float,
    backend: str,
    named: bool,
) -> Tensor:
    """``g * (result - bias + s h Bᵀ) + bias`` for ``result [..., N]`` and ``h [..., r]``, whose dtype may be wider."""
    if torch.is_grad_enabled():
        return _Compose.apply(result, h, lora_B, magnitude, bias, divisor, (scaling, backend, named))
    with no_autocast(result.device):
        y, _ = linear.compose(_rows(result), _rows(h), lora_B, magnitude, bias, scaling, False, backend, divisor)
    return _unflat(y, result)


def _differentiable_compose_backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """As `_differentiable_backward`, where the base result is a constant: what is kept of it has no history."""
    h, lora_B, magnitude, bias, _, divisor, base = ctx.saved_tensors
    scaling, backend, named = ctx.settings
    _check_second(backend, named)
    if ctx.needs_input_grad[0]:
        raise UnsupportedError(
            "create_graph=True: a DoRA layer whose product another module makes has no second derivative"
        )
    warn_once("create_graph=True: the gradients of a DoRA layer are taken from the reference, which is slow")
    result = torch.zeros_like(dy)
    if base is not None:  # the magnitude's gradient alone reads it
        with torch.no_grad():
            result = base.view(dy.shape)
            if linear.primitives(backend).keeps_sum(dy, h, lora_B):
                result = result - scaling * (h @ lora_B.to(h.dtype).t())
            if bias is not None and not linear.holds_bias(dy):
                result = result + bias
    return _gradients(
        [result, h, lora_B, magnitude, bias],
        ctx.needs_input_grad,
        lambda result, h, lora_B, magnitude, bias: reference.compose(
            result, h, lora_B, magnitude, divisor, bias, scaling
        ),
        dy,
    )


def _rows(x: Tensor) -> Tensor:
    return _flat(x).contiguous()
