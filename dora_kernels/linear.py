"""Forward and backward of the DoRA linear layer on flattened tokens, in terms of a backend's primitives.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_A [r, K]``, ``lora_B [N, r]``; ``g`` is the magnitude over the norm,
``[N]`` (axis "out") or ``[K]`` ("in"), None for plain LoRA. The derivation is in docs/math.md. The large products
go to the vendor BLAS in x's dtype; a backend supplies what surrounds them: `compose` and `scale_reduce`. The products
of rank r are in h's dtype (`low_rank_dtype`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels import torch_backend
from dora_kernels.reference import accumulation_dtype, autocast_enabled, cast
from dora_kernels.torch_backend import mm_accumulate, mm_mixed, mm_wide, quotient, scaled_rows


class Needs(NamedTuple):
    """Which gradients somebody asked for."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    magnitude: bool
    bias: bool


class ComposeNeeds(NamedTuple):
    """Which gradients of `compose` are wanted; the magnitude's is where something was kept for it."""

    base: bool
    h: bool
    lora_B: bool
    sum: bool


class Grads(NamedTuple):
    x: Tensor | None
    weight: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    magnitude: Tensor | None
    bias: Tensor | None


backwards = 0
"""How many backwards have produced gradients of what a norm depends on: it may be written unseen after that."""


def note_backward(of_norm: bool) -> None:
    """Count one of `backwards`, if it produced gradients of what a norm depends on."""
    global backwards
    backwards += of_norm


def primitives(backend: str) -> ModuleType:
    """The module of the named backend. The kernels are imported here, on first use, since they import triton."""
    if backend == "torch":
        return torch_backend
    from dora_kernels import kernels

    return kernels


def keeps_base(magnitude_axis: str, detach_norm: bool, has_magnitude: bool, needs: Needs) -> bool:
    """Whether the backward reads what `compose` keeps: for the magnitude's gradient along "out", and nothing else."""
    return has_magnitude and magnitude_axis == "out" and _needs_dm(detach_norm, needs)


def _needs_dm(detach_norm: bool, needs: Needs) -> bool:
    """dm is also the factor of the gradient through an undetached norm, even where the magnitude is frozen."""
    return needs.magnitude or (not detach_norm and (needs.lora_A or needs.lora_B or needs.weight))


def low_rank_dtype(x: Tensor, factor: Tensor) -> torch.dtype:
    """The dtype of the low-rank branch beside an x in the compute dtype: the factor's where that is wider.

    As in PEFT's layer, which casts x to it. Under autocast, as there, all products are in the compute dtype.
    """
    if factor.dtype == x.dtype:
        return x.dtype
    wider = torch.finfo(factor.dtype).bits > torch.finfo(x.dtype).bits
    return factor.dtype if wider and not autocast_enabled(x.device) else x.dtype


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    g: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    keep_base: bool,
    backend: str,
    divisor: Tensor | None = None,
    low_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y [M, N], h = x Aᵀ [M, r], base [M, N] or None)``, in x's dtype, but h in `low_dtype` where one is given.

    Where a divisor is given, g is the magnitude, still to be divided by it.
    What `base` holds is the backend's: the base product, or (`keeps_sum`) its sum with the low-rank product.
    Along "in", h is taken from ``x * g``, and the scaled x is dropped again.
    """
    dtype, h, g_in = x.dtype, None, None
    if g is not None and magnitude_axis == "in":
        g_in, g = g, None
        if divisor is not None:
            g_in, divisor = quotient(g_in, divisor, x), None
    if low_dtype is not None and low_dtype != dtype:
        # Not of the scaled x, which is rounded.
        h = mm_mixed(x, (lora_A if g_in is None else lora_A * g_in).t())
    if g_in is not None:
        x = torch.mul(x, g_in, out=torch.empty_like(x))
    if h is None:
        h = F.linear(x, lora_A if lora_A.dtype == dtype else lora_A.to(dtype))
    base = F.linear(x, weight if weight.dtype == dtype else weight.to(dtype))
    y = primitives(backend).compose(base, h, lora_B, g, bias, scaling, keep_base, divisor)
    return y, h, base if keep_base else None


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    g: Tensor | None,
    divisor: Tensor | None,
    h: Tensor,
    base: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    detach_norm: bool,
    needs: Needs,
    backend: str,
    eps: float = 0.0,
) -> Grads:
    """Gradients of `forward`, each in its parameter's dtype (dm and db in float32), None where not needed.

    `divisor` is the norm with infinity in place of 0, so that a zero row has g = dm = 0; or the norm plus eps.
    """
    note_backward(needs.lora_A or needs.lora_B or needs.weight)
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    axis_in = g is not None and magnitude_axis == "in"
    side = _backward_in if axis_in else _backward_out
    grads = side(dy, x, weight, lora_A, lora_B, g, divisor, h, base, scaling, detach_norm, needs, primitives(backend))
    if g is not None and not detach_norm and (needs.weight or needs.lora_A or needs.lora_B):
        assert grads.magnitude is not None and divisor is not None
        c = -grads.magnitude * g / (_without_eps(divisor, eps) if eps else divisor)
        of_w, of_a, of_b = norm_gradient(weight, lora_A, lora_B, c, scaling, axis_in, needs)
        grads = grads._replace(
            weight=_sum(grads.weight, of_w), lora_A=_sum(grads.lora_A, of_a), lora_B=_sum(grads.lora_B, of_b)
        )
    d_x, d_weight, d_a, d_b, d_magnitude, d_bias = grads
    return Grads(
        d_x,
        None if d_weight is None else as_parameter(d_weight, weight),
        None if d_a is None else as_parameter(d_a, lora_A),
        None if d_b is None else as_parameter(d_b, lora_B),
        d_magnitude if needs.magnitude else None,
        d_bias,
    )


def _backward_out(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    g: Any,
    divisor: Any,
    h: Tensor,
    base: Any,
    scaling: float,
    detach_norm: bool,
    needs: Needs,
    kernels: ModuleType,
) -> Grads:
    """Rows scaled by g; plain LoRA is g = 1."""
    wanted = ComposeNeeds(needs.x or needs.weight, needs.x or needs.lora_A, needs.lora_B, needs.bias)
    dg, d_low, d_b, dm, total = compose_backward(
        dy, lora_B, g, divisor, h, base, scaling, detach_norm, wanted, kernels
    )
    dx: Any = None
    if needs.x:
        dx = torch.mm(cast(d_low, dy.dtype), cast(lora_A, dy.dtype)).addmm_(dg, cast(weight, dy.dtype))
    dw = mm_accumulate(dg.t(), x, _grad_dtype(weight, x, detach_norm)) if needs.weight else None
    del dg  # before the last gradient takes its memory
    d_a = mm_accumulate(d_low.t(), x, _grad_dtype(lora_A, x, detach_norm)) if needs.lora_A else None
    return Grads(dx, dw, d_a, d_b, dm, total)


def compose(
    result: Tensor,
    h: Tensor,
    lora_B: Tensor,
    g: Tensor,
    bias: Tensor | None,
    scaling: float,
    keep_base: bool,
    backend: str,
    divisor: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``(y, base)``: the backend's `compose` on another module's ``result [M, N]``, bias included, left as it is.

    The base that is kept holds the bias too where `holds_bias`.
    """
    kernels = primitives(backend)
    keeps_sum = kernels.keeps_sum(result, h, lora_B)
    if bias is not None and not holds_bias(result):
        base = result - cast(bias, result.dtype)
    else:
        base = result.clone() if keeps_sum else result
        if bias is not None:
            if divisor is not None:
                g, divisor = quotient(g, divisor, result), None
            bias = (1.0 - g) * bias
    y = kernels.compose(base, h, lora_B, g, bias, scaling, keep_base or not keeps_sum, divisor)
    return y, base if keep_base else None


def holds_bias(result: Tensor) -> bool:
    """Whether a bias is taken out of the magnitude's gradient, where its sums in float32 lose nothing by that.

    Out of a 16-bit result it would be rounded once more. Out of a float32 one it has to be: with a bias 60 times the
    output the magnitude's gradient would be six times as far off as PEFT's.
    """
    return result.dtype != accumulation_dtype(result)


def compose_backward(
    dy: Tensor,
    lora_B: Tensor,
    g: Any,
    divisor: Any,
    h: Tensor,
    base: Any,
    scaling: float,
    detach_norm: bool,
    needs: ComposeNeeds,
    kernels: ModuleType,
    base_bias: Tensor | None = None,
) -> tuple[Any, Any, Any, Any, Any]:
    """Gradients of ``g * (base + s h Bᵀ)`` for base, h, B and the magnitude, and ``Σ_t dy``; None where not wanted.

    `base` is what `compose` kept. `base_bias`: what it holds beside the product, to be left out of the magnitude's.
    """
    scaled = g is not None and needs.base
    dg: Any = dy
    dot: Any = None
    out: Any = None
    total: Any = None
    want_sum = needs.sum or (base is not None and base_bias is not None)
    lacks_low_rank = base is not None and not kernels.keeps_sum(dy, h, lora_B)
    if scaled or base is not None or want_sum:
        one_pass = kernels.scale_partials if lacks_low_rank else kernels.scale_reduce
        out, dot, total = one_pass(dy, base, g, scaled, want_sum)
        dg = out if scaled else dy
        if lacks_low_rank and total is not None:
            total = total.sum(0)

    # Ĝ may stand for dy in the products of rank r too where that rounds no more often than B scaled by g would.
    rounds_once = detach_norm or dy.dtype == accumulation_dtype(dy)
    uses_scaled = scaled and lora_B.dtype == dy.dtype == h.dtype and rounds_once
    left: Any = dg if uses_scaled else dy
    factor: Any = scaling if g is None or uses_scaled else g * scaling
    d_low = _low_rank_gradient(left, lora_B, factor, h) if needs.h else None
    d_b, dm = None, None
    if lacks_low_rank:
        p = mm_accumulate(dy.t(), h, accumulation_dtype(dy, h))
        dtype = _grad_dtype(lora_B, dy, detach_norm) if needs.lora_B else None
        d_b, dm = kernels.factor_grads(p, lora_B, dot, g, divisor, scaling, dtype)
    else:
        if uses_scaled and needs.lora_B:
            d_b = torch.addmm(lora_B, left.t(), h, beta=0, alpha=scaling)
        elif needs.lora_B:
            p = mm_accumulate(dy.t(), h, accumulation_dtype(dy, h))
            d_b = p.mul_(factor.unsqueeze(1) if isinstance(factor, Tensor) else factor)
        dm = None if dot is None else dot.div_(divisor)
    if dm is not None and base_bias is not None:
        dm = dm - base_bias * total / divisor
    return dg, d_low, d_b, dm, total


def _backward_in(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    g: Any,
    divisor: Any,
    h: Tensor,
    base: Any,
    scaling: float,
    detach_norm: bool,
    needs: Needs,
    kernels: ModuleType,
) -> Grads:
    """Columns scaled by g: plain LoRA on ``x * g``, whose gradient is scaled once more on its way out."""
    need_dm = _needs_dm(detach_norm, needs)
    d_low: Any = _low_rank_gradient(dy, lora_B, scaling, h) if needs.x or need_dm or needs.lora_A else None
    accumulate = accumulation_dtype(dy, h)
    dx, dm = None, None
    mixed = h.dtype != dy.dtype
    q: Any = mm_accumulate(d_low.t(), x, accumulate) if needs.lora_A or (mixed and need_dm) else None
    if mixed and (needs.x or need_dm):
        # The transposed problem's forward: the base product rounded once, its sum with the low-rank one once more.
        base = torch.mm(dy, cast(weight, dy.dtype))
        if need_dm:
            dot = kernels.scale_reduce(base, x, None, False, False)[1]
            dm = (dot + cast((q * lora_A).sum(0), dot.dtype)) / divisor
        dx = kernels.compose(base, d_low, lora_A.t(), g, None, 1.0, False) if needs.x else None
    elif needs.x or need_dm:
        d_scaled = torch.mm(d_low, cast(lora_A, dy.dtype)).addmm_(dy, cast(weight, dy.dtype))
        dx, dot, _ = kernels.scale_reduce(d_scaled, x if need_dm else None, g, needs.x, False)
        dm = None if dot is None else dot / divisor
    d_a = q.mul_(g) if needs.lora_A else None
    d_b = mm_accumulate(dy.t(), h, accumulate).mul_(scaling) if needs.lora_B else None
    dw = mm_accumulate(dy.t(), x, accumulation_dtype(dy)).mul_(g) if needs.weight else None
    total = kernels.scale_reduce(dy, None, None, False, True)[2] if needs.bias else None
    return Grads(dx, dw, d_a, d_b, dm, total)


def _low_rank_gradient(dy: Tensor, lora_B: Tensor, factor: Tensor | float, h: Tensor) -> Tensor:
    """``D = dy (factor * B)``, the gradient of ``h = x Aᵀ``: ``[M, r]`` in h's dtype, rounded once."""
    if h.dtype != dy.dtype:
        wide = cast(lora_B, h.dtype)
        return mm_mixed(dy, wide * (factor.unsqueeze(1) if isinstance(factor, Tensor) else factor))
    if isinstance(factor, Tensor):
        return torch.mm(dy, scaled_rows(lora_B, factor, dy.dtype))
    return torch.addmm(h, dy, cast(lora_B, dy.dtype), beta=0, alpha=factor)


def _without_eps(divisor: Tensor, eps: float) -> Tensor:
    """The norm with infinity in place of 0, and of what is no more than the rounding of eps."""
    return torch.threshold(divisor - eps, 2.0 * eps * torch.finfo(divisor.dtype).eps, torch.inf)


def norm_gradient(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, c: Tensor, scaling: float, axis_in: bool, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradient through an undetached norm, ``c * V`` with respect to V, for W, A and B: without forming V.

    Only where W itself trains is V formed, as its gradient has that size anyway. Along "in" this is the transposed
    problem: W.T with lora_B.T in the place of lora_A.
    """
    dtype = c.dtype
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


def _sum(first: Any, second: Tensor | None) -> Tensor | None:
    return first if second is None else first.to(second.dtype) + second


def _grad_dtype(parameter: Tensor, x: Tensor, final: bool) -> torch.dtype:
    """What a product for this parameter's gradient comes out as: unrounded where more is added to it."""
    return parameter.dtype if final and parameter.dtype == x.dtype else accumulation_dtype(parameter, x)


def as_parameter(grad: Tensor, parameter: Tensor) -> Tensor:
    """In the parameter's dtype and strides, so that the gradient is accumulated without another copy."""
    if grad.dtype != parameter.dtype:
        grad = grad.to(parameter.dtype)
    return grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)
