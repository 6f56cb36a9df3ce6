"""The fused path and the undetached norm as `autograd.Function`s: what the forward saves, and the backward.

Saved beside the parameters: x, h ``[M, r]``, this call's own g and norm, and the base product ``[M, N]`` if the
magnitude's gradient needs it. The output is never saved, because consumers may overwrite it in place. Second
derivatives (``create_graph=True``) come from the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dora_kernels.core.precision import cast, no_autocast
from dora_kernels.core.problem import Form, Weights
from dora_kernels.core.scale import norm_of, quotient, safe_divisor
from dora_kernels.engine import formula, fused, writes
from dora_kernels.engine.dispatch import UnsupportedError
from dora_kernels.engine.fused import ComposeNeeds, Needs, Saved, Scale


class _FusedLinear(torch.autograd.Function):
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
        form: Form,
        named: bool,
    ) -> Tensor:
        ctx.form, ctx.named = form, named
        needs = Needs(*ctx.needs_input_grad[:6])
        weights, scale = Weights(weight, lora_A, lora_B, magnitude, bias), Scale(None, None)
        if magnitude is not None and divisor is not None:
            g = quotient(magnitude, divisor, x)
            scale = Scale(g, cast(divisor, g.dtype))
        keep_base = fused.keeps_base(form, magnitude is not None, needs)
        y, h, base = fused.forward(_flat(x), weights, scale, form, keep_base)
        ctx.save_for_backward(x, *weights, *scale, h, base)
        return _unflat(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs, form = Needs(*ctx.needs_input_grad[:6]), ctx.form
        x, *tensors, g, divisor, h, base = ctx.saved_tensors  # a checkpoint runs the layer again here
        writes.note_backward(needs.norm)
        weights = Weights(*tensors)
        if torch.is_grad_enabled():
            _check_second(ctx.named)
            return *differentiable(x, weights, divisor, form, ctx.needs_input_grad, dy), None, None, None
        with no_autocast(dy.device):
            grads = fused.backward(_flat(dy), weights, Saved(_flat(x), h, base, Scale(g, divisor)), form, needs)
        return (
            None if grads.x is None else grads.x.view(x.shape),
            *grads[1:4],
            _cast_like(grads.magnitude, weights.magnitude),
            _cast_like(grads.bias, weights.bias),
            None,
            None,
            None,
        )


def fused_linear(x: Tensor, weights: Weights, divisor: Tensor | None, form: Form, named: bool) -> Tensor:
    """The layer on ``x [..., K]``, which is already in the compute dtype.

    Args:
        divisor: what the magnitude is divided by; None for plain LoRA.
        named: True if the caller asked for this backend by name; a second derivative then raises instead of using the
            formula.
    """
    if torch.is_grad_enabled():
        return _FusedLinear.apply(x, *weights, divisor, form, named)
    y, _, _ = fused.forward(_flat(x), weights, Scale(None, divisor), form, False)
    return _unflat(y, x)


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unflat(y: Tensor, x: Tensor) -> Tensor:
    """y with x's leading dimensions. Autograd does not see it as a view, so consumers may overwrite it in place."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def _cast_like(grad: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return grad if grad is None or parameter is None else cast(grad, parameter.dtype)


def _check_second(named: bool) -> None:
    if named:
        raise UnsupportedError(
            "backend='triton' has no second derivative, which create_graph=True needs; "
            "use backend='torch', or 'auto', which then uses the formula"
        )


def differentiable(
    x: Tensor, weights: Weights, divisor: Tensor | None, form: Form, needed: tuple[bool, ...], dy: Tensor
) -> list[Tensor | None]:
    """The formula's first derivatives, which can be differentiated again.

    They use the value of the norm that the forward used; with an undetached norm, the formula gives its gradient.
    """

    def layer(x: Tensor, *tensors: Any) -> Tensor:
        weights, g = Weights(*tensors), None
        if divisor is not None:
            used = divisor
            if not form.detach_norm:
                norm = formula.weight_norm(weights, form)
                used = divisor + (norm - norm.detach())
            g = quotient(weights.magnitude, used, x)  # type: ignore[arg-type]
        return formula.linear(x, weights, g, form.scaling, form.magnitude_axis)

    return gradients([x, *weights], needed, layer, dy)


def gradients(
    inputs: list[Tensor | None], needed: tuple[bool, ...], function: Callable[..., Tensor], dy: Tensor
) -> list[Tensor | None]:
    """Return gradients of `function` at `inputs` that can be differentiated again; None for those not needed."""
    needed = needed[: len(inputs)]
    aliases = [t.view_as(t) if need and t is not None else t for t, need in zip(inputs, needed, strict=True)]
    wanted = [t for t, need in zip(aliases, needed, strict=True) if need and t is not None]
    grads = iter(torch.autograd.grad(function(*aliases), wanted, dy, create_graph=True))
    return [next(grads) if need else None for need in needed]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, lora_A: Tensor, lora_B: Tensor, divisor: Tensor, form: Form) -> Tensor:
        ctx.form = form
        ctx.save_for_backward(weight, lora_A, lora_B, divisor)
        return divisor.clone()

    @staticmethod
    def backward(ctx: Any, d_norm: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, divisor = ctx.saved_tensors
        weights, form, needed = Weights(*tensors), ctx.form, ctx.needs_input_grad[:3]
        writes.note_backward(any(needed))
        if torch.is_grad_enabled():

            def dense(*tensors: Any) -> Tensor:
                return safe_divisor(formula.weight_norm(Weights(*tensors), form), form.eps)

            return *gradients(list(tensors), needed, dense, d_norm), None, None
        with no_autocast(d_norm.device):
            c = d_norm / norm_of(divisor, form.eps)
            grads = fused.norm_gradient(weights, c, form, Needs(False, needed[0], needed[1], needed[2], False, False))
        return *(fused.as_parameter(grad, t) for grad, t in zip(grads, tensors, strict=True)), None, None


def norm(weights: Weights, divisor: Tensor, form: Form) -> Tensor:
    """Return the computed `divisor` as a differentiable function of W, A and B. The backward does not form V."""
    result: Tensor = _Norm.apply(*weights[:3], divisor, form)
    return result


class _FusedCompose(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        h: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        divisor: Tensor,
        scaling: float,
        named: bool,
    ) -> Tensor:
        ctx.scaling, ctx.named = scaling, named
        g = quotient(magnitude, divisor, result)
        scale = Scale(g, cast(divisor, g.dtype))
        weights = Weights(lora_B, lora_B, lora_B, magnitude, bias)
        with no_autocast(result.device):
            y, base = fused.compose(_rows(result), _rows(h), weights, scale, scaling, ctx.needs_input_grad[3])
        ctx.save_for_backward(h, lora_B, magnitude, bias, *scale, base)
        return _unflat(y, result)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, lora_B, magnitude, bias, g, divisor, base = ctx.saved_tensors
        need_result, need_h, need_b, _, need_bias = ctx.needs_input_grad[:5]
        writes.note_backward(need_h or need_b)
        if torch.is_grad_enabled():
            return *_differentiable_compose(ctx, dy), None, None, None
        saved = Saved(dy, _rows(h), base, Scale(g, divisor))
        needs = ComposeNeeds(need_result, need_h, need_b, need_bias)
        held = bias if fused.holds_bias(dy) else None
        with no_autocast(dy.device):
            d_result, d_h, d_b, d_magnitude, total = fused.compose_backward(
                _rows(dy), lora_B, saved, Form(ctx.scaling), needs, held
            )
        return (
            d_result.view(dy.shape) if need_result else None,
            d_h.view(h.shape) if need_h else None,
            fused.as_parameter(d_b, lora_B) if need_b else None,
            _cast_like(d_magnitude, magnitude),
            cast((1.0 - g) * total, bias.dtype) if need_bias else None,
            None,
            None,
            None,
        )


def fused_compose(
    result: Tensor, h: Tensor, weights: Weights, divisor: Tensor, scaling: float, named: bool
) -> Tensor:
    """``g * (result - bias + s h Bᵀ) + bias`` for ``result [..., N]`` and ``h [..., r]``. h may have a wider dtype."""
    if torch.is_grad_enabled():
        return _FusedCompose.apply(result, h, *weights[2:], divisor, scaling, named)
    with no_autocast(result.device):
        y, _ = fused.compose(_rows(result), _rows(h), weights, Scale(None, divisor), scaling, False)
    return _unflat(y, result)


def _differentiable_compose(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """The same as `_differentiable`, with the base result as a constant: the kept base product has no history."""
    h, lora_B, magnitude, bias, _, divisor, base = ctx.saved_tensors
    _check_second(ctx.named)
    if ctx.needs_input_grad[0]:
        raise UnsupportedError(
            "create_graph=True: no second derivative is available for a DoRA layer whose base product another module "
            "computes"
        )
    result = torch.zeros_like(dy)
    if base is not None:  # only the magnitude's gradient reads it
        with torch.no_grad():
            result = base.view(dy.shape)
            if bias is not None and not fused.holds_bias(dy):
                result = result + bias

    def layer(result: Tensor, h: Tensor, lora_B: Tensor, magnitude: Tensor, bias: Tensor | None) -> Tensor:
        weights = Weights(lora_B, lora_B, lora_B, magnitude, bias)
        return formula.compose(result, h, weights, quotient(magnitude, divisor, result), ctx.scaling)

    return gradients([result, h, lora_B, magnitude, bias], ctx.needs_input_grad, layer, dy)


def _rows(x: Tensor) -> Tensor:
    return _flat(x).contiguous()
