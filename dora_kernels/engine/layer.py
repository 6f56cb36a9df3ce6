"""Run a layer: choose its backend and its norm, then call the formula or the fused kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, cast, compute_dtype, low_rank_dtype, no_autocast
from dora_kernels.core.problem import Form, Weights
from dora_kernels.core.scale import quotient, safe_divisor
from dora_kernels.engine import autograd, collectives, formula, merged, ops
from dora_kernels.engine.dispatch import PLAIN, norm_backend, resolve
from dora_kernels.engine.kept_divisor import kept_divisor
from dora_kernels.engine.norm import Norm, compute_norm
from dora_kernels.engine.norm_cache import NormCache


def run_layer(
    x: Tensor,
    weights: Weights,
    form: Form,
    cache: NormCache | None = None,
    training: bool = True,
    backend: str = "auto",
    norm: Norm | None = None,
) -> Tensor:
    """`dora_linear` without its checks: ``x [..., K]`` to ``[..., N]``.

    Args:
        cache: keeps the norm between calls.
        norm: the norm, if the caller already has it.
    """
    kind, magnitude, g = x.device.type, weights.magnitude, None
    if kind != "meta" and torch.is_autocast_enabled(kind):
        x = cast(x, compute_dtype(x))
    if cache is not None and cache.merges and merged.runs_merged(x, weights, cache, training):
        return merged.run_merged(x, weights, form, cache, training, backend)
    chosen = "torch" if kind == "cpu" and backend != "triton" else resolve(backend, x, weights)
    if magnitude is None:
        norm = _PLAIN_LORA
    elif cache is not None and cache.frozen is not None:
        norm, g = cache.frozen
        norm = _differentiable(norm, weights, form)
    elif norm is not None:
        norm = _differentiable(norm, weights, form)
    else:
        if cache is not None and form.detach_norm and not is_compiling() and torch._C._get_tracing_state() is None:
            norm = cache.known(weights, form, training)
        if norm is None:
            norm = layer_norm(weights, form, cache, training, backend)
    if chosen == "triton":
        divisor = None if magnitude is None else norm.divisor
        return autograd.fused_linear(x, weights, divisor, form, backend != "auto")
    if magnitude is not None and (g is None or torch.is_grad_enabled()):
        g = magnitude / norm.divisor
        if cache is not None:
            cache.unnoticed_backward = True  # autograd runs the backward, without note_backward
    if g is not None and g.dtype != x.dtype:
        g = cast(g, accumulation_dtype(x))
    return formula.linear(x, weights, g, form.scaling, form.magnitude_axis, norm.b_is_zero)


is_compiling = torch.compiler.is_compiling


def exporting() -> bool:
    """True under `torch.export`: what leaves PyTorch (ONNX, say) knows no op of this package. torch 2.6 cannot tell."""
    return bool(getattr(torch.compiler, "is_exporting", bool)())


_PLAIN_LORA = Norm(torch.ones(()))


def run_compose(
    result: Tensor,
    h: Tensor,
    weights: Weights,
    scaling: float,
    divisor: Callable[[], Tensor],
    backend: str = "auto",
    cache: NormCache | None = None,
) -> Tensor:
    """A DoRA layer from another module's ``result = x Wᵀ + bias`` and ``h = x Aᵀ``, in result's dtype.

    If h has a wider dtype it is not rounded, except under autocast. Of `weights` only B, magnitude and bias are read.

    Args:
        divisor: called to get what the magnitude is divided by.
    """
    chosen = resolve(backend, result, weights)
    h = cast(h, low_rank_dtype(result, h))
    if chosen == "triton":
        return autograd.fused_compose(result, h, weights, divisor(), scaling, backend != "auto")
    if cache is not None and torch.is_grad_enabled() and not is_compiling():
        cache.unnoticed_backward = True  # autograd runs the backward, without note_backward
    assert weights.magnitude is not None
    return formula.compose(result, h, weights, quotient(weights.magnitude, divisor(), result), scaling)


def layer_norm(
    weights: Weights,
    form: Form,
    cache: NormCache | None,
    training: bool,
    backend: str,
    compute: Callable[[], Tensor] | None = None,
) -> Norm:
    """Return a layer's norm from `cache`, or compute it. It is differentiable unless ``form.detach_norm``.

    Args:
        compute: computes the norm, differentiably, if it is not that of a matrix ``W + s B A`` (see `NormCache.norm`).
    """
    compiling = is_compiling()
    if compute is not None and not form.detach_norm and torch.is_grad_enabled():
        return Norm(safe_divisor(compute(), form.eps))
    if cache is not None and cache.frozen is not None and not compiling:
        return cache.frozen[0] if compute is not None else _differentiable(cache.frozen[0], weights, form)
    if compute is None and _needs_plain_operations(weights, form, compiling):
        with no_autocast(weights.weight.device):
            dense = formula.weight_norm(weights, form)
        return Norm(safe_divisor(dense.detach() if form.detach_norm else dense, form.eps))
    # A quantised weight is none that the kernels read, but they run for the rest of its layer.
    chosen = norm_backend(backend, weights.weight if compute is None else weights.lora_B)
    if compiling and cache is not None and compute is None and form.group is None:
        tensors = [t.detach() for t in weights[:4]]
        norm = Norm(kept_divisor(cache.slot, *tensors, form.scaling, training))
    elif compiling or cache is None:  # with a group the compiler sees the reduction
        norm = compute_norm(weights, form, chosen, compute=compute)
    else:
        norm = cache.norm(weights, form, training, chosen, compute)
    return norm if compute is not None else _differentiable(norm, weights, form)


def _needs_plain_operations(weights: Weights, form: Form, compiling: bool) -> bool:
    """True if autograd, a transform or a tensor subclass has to see every step of the norm."""
    if not all(type(tensor) in PLAIN for tensor in weights):
        return True
    return not form.detach_norm or exporting() if compiling else formula.transformed()


def _differentiable(norm: Norm, weights: Weights, form: Form) -> Norm:
    """The norm with an autograd history, if its gradient is wanted."""
    if form.detach_norm or not torch.is_grad_enabled():
        return norm
    if _needs_plain_operations(weights, form, is_compiling()):
        dense = formula.weight_norm(weights, form)
        return Norm(norm.divisor + (dense - dense.detach()))
    dtype = accumulation_dtype(*weights[:3])
    return Norm(autograd.norm(weights, cast(norm.divisor, dtype), form), norm.b_is_zero)


def layer_scale(
    weights: Weights,
    form: Form,
    cache: NormCache,
    training: bool,
    backend: str,
    compute: Callable[[], Tensor] | None = None,
) -> Tensor:
    """``g = magnitude / (||V|| + eps)`` as a differentiable vector, for layers composed of modules.

    See `layer_norm`.
    """
    assert weights.magnitude is not None
    if torch.is_grad_enabled() and not is_compiling():
        cache.unnoticed_backward = True  # autograd runs the backward, without note_backward
    return weights.magnitude / layer_norm(weights, form, cache, training, backend, compute).divisor


def norm_now(weights: Weights, form: Form, backend: str) -> Tensor:
    """Compute the norm itself, without eps. Differentiable only if plain operations are needed."""
    if _needs_plain_operations(weights, form, is_compiling()):
        with no_autocast(weights.weight.device):
            return formula.weight_norm(weights, form)
    chosen = norm_backend(backend, weights.weight)
    norm = ops.weight_norm(*weights[:3], form.scaling, form.magnitude_axis, chosen)
    return norm if form.group is None else collectives.whole_norm(form.group, norm)[0]


def merged_weight(weights: Weights, form: Form, backend: str, seed: int | None) -> Tensor:
    """Return ``g * V`` in weight's dtype, rounded to nearest or, with a seed, stochastically."""
    chosen = norm_backend(backend, weights.weight)
    return ops.merge(*weights[:4], form.scaling, form.magnitude_axis, chosen, seed)
