"""The fused path: forward and hand-written backward of the DoRA linear layer around the Triton kernels.

It is made for large problems on a GPU. The vendor's BLAS computes the products with W. Where the formula makes several
passes over ``[M, N]``, one kernel runs in the forward (`compose`) and one in the backward (`scale_reduce`). dX is
accumulated in place. The products of rank r are in h's dtype (`low_rank_dtype`). docs/math.md has the derivation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, cast, low_rank_dtype, no_autocast
from dora_kernels.core.problem import Form, Weights
from dora_kernels.core.products import mm_wide, scaled_rows
from dora_kernels.core.scale import norm_of, quotient
from dora_kernels.engine.dispatch import kernels, takes_one_pass
from dora_kernels.engine.products import mm


class Needs(NamedTuple):
    """Flags: which gradients are wanted."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    magnitude: bool
    bias: bool

    @property
    def norm(self) -> bool:
        """True if the gradient of W, A or B is wanted, the tensors that the norm depends on."""
        return self.weight or self.lora_A or self.lora_B


class ComposeNeeds(NamedTuple):
    """Flags: which gradients of `compose` are wanted.

    The magnitude's gradient has no flag: it is computed if the base product was kept.
    """

    base: bool
    h: bool
    lora_B: bool
    sum: bool


class Grads(NamedTuple):
    """Gradients by input; None if not wanted."""

    x: Tensor | None
    weight: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    magnitude: Tensor | None
    bias: Tensor | None


class Scale(NamedTuple):
    """g ``[N]`` (or ``[K]``) in float32, and the divisor of the magnitude that gave it.

    Both are None for plain LoRA.
    """

    g: Tensor | None
    divisor: Tensor | None


class Saved(NamedTuple):
    """Tensors that the backward reads beside the parameters."""

    x: Tensor
    h: Tensor
    base: Tensor | None
    scale: Scale


def keeps_base(form: Form, has_magnitude: bool, needs: Needs) -> bool:
    """True if the backward reads the base product. Only the magnitude's gradient along "out" needs it."""
    return has_magnitude and form.magnitude_axis == "out" and _needs_dm(form, needs)


def _needs_dm(form: Form, needs: Needs) -> bool:
    """True if dm is wanted: for the magnitude, or as a factor of the gradient through an undetached norm."""
    return needs.magnitude or (not form.detach_norm and needs.norm)


def forward(
    x: Tensor, weights: Weights, scale: Scale, form: Form, keep_base: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ``(y [M, N], h = x Aᵀ [M, r], base product [M, N] or None)``, in x's dtype; h is in `low_rank_dtype`.

    Without gradients g may be None although a divisor is given: `compose` then divides the magnitude itself.
    Along "in", h is computed from ``x * g``; the scaled x is not kept.
    """
    low_dtype = low_rank_dtype(x, weights.lora_A)  # which asks for autocast
    one_pass = form.magnitude_axis == "out" and takes_one_pass(x, weights)
    with no_autocast(x.device):
        if one_pass:
            return _few(x, weights, scale, form, keep_base)
        return _forward(x, weights, scale, form, keep_base, low_dtype)


def _factor(scale: Scale, magnitude: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What a kernel multiplies by, and what it divides that by first: g alone, or the magnitude by the divisor.

    Both are None for plain LoRA.
    """
    g, divisor = scale
    return (magnitude, divisor) if g is None and divisor is not None else (g, None)


def _few(
    x: Tensor, weights: Weights, scale: Scale, form: Form, keep_base: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The forward of few tokens, in one read of W."""
    weight, lora_A, lora_B, magnitude, bias = weights
    g, divisor = _factor(scale, magnitude)
    x = x if x.stride(1) == 1 else x.contiguous()
    made: tuple[Tensor, Tensor, Tensor | None]
    made = kernels().one_pass(x, weight, lora_A, lora_B, g, bias, form.scaling, keep_base, divisor)
    return made


def _forward(
    x: Tensor, weights: Weights, scale: Scale, form: Form, keep_base: bool, low_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    weight, lora_A, lora_B, magnitude, bias = weights
    dtype = x.dtype
    (g, divisor), g_in = _factor(scale, magnitude), None
    if g is not None and form.magnitude_axis == "in":
        g_in = g if divisor is None else quotient(g, divisor, x)
        g = divisor = None
    h = None
    if low_dtype != dtype:  # the scaled x is rounded, so A is scaled instead
        h = mm(x, (lora_A if g_in is None else lora_A * g_in).t(), low_dtype)
    if g_in is not None:
        x = torch.mul(x, g_in, out=torch.empty_like(x))
    if h is None:
        h = mm(x, cast(lora_A, dtype).t(), dtype)
    base = F.linear(x, cast(weight, dtype))
    y = kernels().compose(base, h, lora_B, g, bias, form.scaling, keep_base, divisor)
    return y, h, base if keep_base else None


def backward(dy: Tensor, weights: Weights, saved: Saved, form: Form, needs: Needs) -> Grads:
    """Return the gradients of `forward`, each in its parameter's dtype (dm and db in float32); None if not needed.

    The divisor is infinite where the norm is 0, so that a zero row has g = dm = 0.
    """
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    g, divisor = saved.scale
    axis_in = g is not None and form.magnitude_axis == "in"
    grads = (_backward_in if axis_in else _backward_out)(dy, weights, saved, form, needs)
    if g is not None and not form.detach_norm and needs.norm:
        assert grads.magnitude is not None and divisor is not None
        c = -grads.magnitude * g / norm_of(divisor, form.eps)
        of_w, of_a, of_b = norm_gradient(weights, c, form, needs)
        grads = grads._replace(
            weight=add(grads.weight, of_w), lora_A=add(grads.lora_A, of_a), lora_B=add(grads.lora_B, of_b)
        )
    return grads._replace(
        weight=as_parameter(grads.weight, weights.weight),
        lora_A=as_parameter(grads.lora_A, weights.lora_A),
        lora_B=as_parameter(grads.lora_B, weights.lora_B),
        magnitude=grads.magnitude if needs.magnitude else None,
    )


def _backward_out(dy: Tensor, weights: Weights, saved: Saved, form: Form, needs: Needs) -> Grads:
    """The backward with g per row. Plain LoRA is g = 1."""
    weight, lora_A, lora_B, _, _ = weights
    wanted = ComposeNeeds(needs.x or needs.weight, needs.x or needs.lora_A, needs.lora_B, needs.bias)
    dg, d_low, d_b, dm, total = compose_backward(dy, lora_B, saved, form, wanted)
    dx: Any = None
    if needs.x:
        dx = torch.mm(cast(d_low, dy.dtype), cast(lora_A, dy.dtype)).addmm_(dg, cast(weight, dy.dtype))
    dw = mm(dg.t(), saved.x, _grad_dtype(weight, dy, form.detach_norm)) if needs.weight else None
    del dg  # frees the memory before the last gradient is allocated
    d_a = mm(d_low.t(), saved.x, _grad_dtype(lora_A, dy, form.detach_norm)) if needs.lora_A else None
    return Grads(dx, dw, d_a, d_b, dm, total)


def compose(
    result: Tensor, h: Tensor, weights: Weights, scale: Scale, scaling: float, keep_base: bool
) -> tuple[Tensor, Tensor | None]:
    """Return ``(y, base)`` from another module's ``result [M, N]``, which includes the bias and is not modified.

    The kept base includes the bias if `holds_bias`.
    """
    (g, divisor), bias, base = _factor(scale, weights.magnitude), weights.bias, result
    if bias is not None and not holds_bias(result):
        base = result - cast(bias, result.dtype)
    elif bias is not None:
        if divisor is not None and g is not None:
            g, divisor = quotient(g, divisor, result), None
        bias = (1.0 - g) * bias  # type: ignore[operator]
    y = kernels().compose(base, h, weights.lora_B, g, bias, scaling, True, divisor)
    return y, base if keep_base else None


def holds_bias(result: Tensor) -> bool:
    """True if the kept base product still contains the bias, so that the magnitude's gradient is corrected afterwards.

    Subtracting the bias from a 16-bit result would round it once more, and the float32 sums of the gradient lose
    nothing by the correction. From a float32 result the bias has to be subtracted first: with a bias 60 times the
    output, the magnitude's gradient would otherwise be six times as far off as PEFT's.
    """
    return result.dtype != accumulation_dtype(result)


def compose_backward(
    dy: Tensor, lora_B: Tensor, saved: Saved, form: Form, needs: ComposeNeeds, base_bias: Tensor | None = None
) -> tuple[Any, Any, Any, Any, Any]:
    """Return the gradients of ``g * (base + s h Bᵀ)`` for base, h, B and magnitude, and ``Σ_t dy``; None if not wanted.

    Args:
        base_bias: the bias that the kept base product contains; it is removed from the magnitude's gradient.
    """
    _, h, base, (g, divisor) = saved
    scaling, detach_norm = form.scaling, form.detach_norm
    scaled = g is not None and needs.base
    # g * dy may replace dy in the products of rank r too, if that rounds no more often than scaling B by g would.
    rounds_once = detach_norm or dy.dtype == accumulation_dtype(dy)
    uses_scaled = scaled and lora_B.dtype == dy.dtype == h.dtype and rounds_once
    made: Any = None
    dot: Any = None
    total: Any = None
    p: Any = None
    want_sum = needs.sum or (base is not None and base_bias is not None)
    if base is not None or (needs.lora_B and g is not None and not uses_scaled):
        made, dot, total, p = kernels().scale_partials(dy, base, g, scaled, want_sum, None, h)
        total = None if total is None else total.sum(0)
    elif scaled or want_sum:
        made, _, total = kernels().scale_reduce(dy, None, g, scaled, want_sum)
    dg = made if scaled else dy

    left: Any = dg if uses_scaled else dy
    factor: Any = scaling if g is None or uses_scaled else g * scaling
    d_low = low_rank_gradient(left, lora_B, factor, h.dtype) if needs.h else None
    d_b, dm = None, None
    if p is not None:
        dtype = _grad_dtype(lora_B, dy, detach_norm) if needs.lora_B else None
        d_b, dm = kernels().factor_grads(p, lora_B, dot, g, divisor, scaling, dtype)
    elif needs.lora_B:
        d_b = mm(left.t(), h, h.dtype if uses_scaled else accumulation_dtype(dy, h), scaling)
    if dm is not None and base_bias is not None:
        dm = dm - base_bias * total / divisor
    return dg, d_low, d_b, dm, total


def _backward_in(dy: Tensor, weights: Weights, saved: Saved, form: Form, needs: Needs) -> Grads:
    """The backward with g per column: plain LoRA on ``x * g``; the gradient of that is scaled by g again."""
    weight, lora_A, lora_B, _, _ = weights
    x, h, _, (g, divisor) = saved
    assert g is not None and divisor is not None
    need_dm, accumulate, mixed = _needs_dm(form, needs), accumulation_dtype(dy, h), h.dtype != dy.dtype
    d_low: Any = None
    if needs.x or need_dm or needs.lora_A:
        d_low = low_rank_gradient(dy, lora_B, form.scaling, h.dtype)
    dx, dm = None, None
    q: Any = mm(d_low.t(), x, accumulate) if needs.lora_A or (mixed and need_dm) else None
    if mixed and (needs.x or need_dm):
        # As in the forward of the transposed problem: the base product is rounded once, its sum with the low-rank
        # product again.
        base = torch.mm(dy, cast(weight, dy.dtype))
        if need_dm:
            dot = kernels().scale_reduce(base, x, None, False, False)[1]
            dm = (dot + cast((q * lora_A).sum(0), dot.dtype)) / divisor
        dx = kernels().compose(base, d_low, lora_A.t(), g, None, 1.0, False) if needs.x else None
    elif needs.x or need_dm:
        d_scaled = torch.mm(d_low, cast(lora_A, dy.dtype)).addmm_(dy, cast(weight, dy.dtype))
        dx, dot, _ = kernels().scale_reduce(d_scaled, x if need_dm else None, g, needs.x, False)
        dm = None if dot is None else dot / divisor
    d_a = q.mul_(g) if needs.lora_A else None
    d_b = mm(dy.t(), h, accumulate).mul_(form.scaling) if needs.lora_B else None
    dw = mm(dy.t(), x, accumulation_dtype(dy)).mul_(g) if needs.weight else None
    total = kernels().scale_reduce(dy, None, None, False, True)[2] if needs.bias else None
    return Grads(dx, dw, d_a, d_b, dm, total)


def low_rank_gradient(dy: Tensor, lora_B: Tensor, factor: Tensor | float, dtype: torch.dtype) -> Tensor:
    """``D = dy (factor * B)``, the gradient of ``h = x Aᵀ``: ``[M, r]`` in `dtype`, h's, rounded once."""
    if dtype != dy.dtype:
        wide = cast(lora_B, dtype)
        return mm(dy, wide * (factor.unsqueeze(1) if isinstance(factor, Tensor) else factor), dtype)
    if isinstance(factor, Tensor):
        return mm(dy, scaled_rows(lora_B, factor, dtype), dtype)
    return mm(dy, cast(lora_B, dtype), dtype, factor)


def norm_gradient(
    weights: Weights, c: Tensor, form: Form, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of W, A and B through an undetached norm. The gradient of V is ``c * V``; V is not formed.

    Only if W itself trains is V formed, because W's gradient has that size anyway. Along "in" this is the transposed
    problem: W.T with lora_B.T in the place of lora_A.
    """
    weight, lora_A, lora_B, _, _ = weights
    dtype, scaling, axis_in = c.dtype, form.scaling, form.magnitude_axis == "in"
    rows, left, right = (weight.t(), lora_A.t(), lora_B.t()) if axis_in else (weight, lora_B, lora_A)
    left, right = left.to(dtype), right.to(dtype)
    c_left = c.unsqueeze(1) * left
    need_left, need_right = (needs.lora_A, needs.lora_B) if axis_in else (needs.lora_B, needs.lora_A)
    d_left = d_right = d_weight = None
    if need_left:
        u = mm_wide(rows, right.t()).addmm_(left, right @ right.t(), alpha=scaling)
        d_left = u.mul_((c * scaling).unsqueeze(1))
    if need_right:
        d_right = mm_wide(rows.t(), c_left).t().addmm(left.t() @ c_left, right, alpha=scaling).mul_(scaling)
    if needs.weight:
        d_rows = torch.addmm(rows.to(dtype), left, right, alpha=scaling).mul_(c.unsqueeze(1))
        d_weight = d_rows.t() if axis_in else d_rows
    return (d_weight, _t(d_left), _t(d_right)) if axis_in else (d_weight, d_right, d_left)


def _t(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.t()


def add(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if first is None or second is None else first.to(second.dtype) + second


def _grad_dtype(parameter: Tensor, x: Tensor, final: bool) -> torch.dtype:
    """The dtype in which a product for this parameter's gradient is computed: wide if more is added to it."""
    return parameter.dtype if final and parameter.dtype == x.dtype else accumulation_dtype(parameter, x)


def as_parameter(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return the gradient in the parameter's dtype and strides, so autograd accumulates it without another copy."""
    if grad is None:
        return None
    grad = cast(grad, parameter.dtype)
    return grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)
