"""The functional interface: `dora_linear`, `dora_weight_norm` and `merge_dora`. Formulas: docs/math.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dora_kernels import autograd, ops, reference, validation
from dora_kernels.backends import resolve
from dora_kernels.linear import low_rank_dtype
from dora_kernels.norm_cache import NormCache, compute_divisor, safe_divisor, with_eps
from dora_kernels.reference import accumulation_dtype, autocast_enabled, cast
from dora_kernels.rounding import is_coarse, stochastic


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    magnitude_axis: str = "out",
    detach_norm: bool = True,
    weight_norm: Tensor | None = None,
    eps: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Linear layer with a weight-decomposed low-rank adapter: ``y = x @ (g * V).T + bias``.

    ``V = weight + scaling * lora_B @ lora_A`` and ``g = magnitude / ||V||``; V is never formed.
    (DoRA, arXiv 2402.09353, equation 5; with the defaults, the computation of PEFT's ``use_dora=True``.)

    Args:
        x: ``[..., in_features]``, any number of leading dimensions, also none and empty ones.
        weight: base weight ``[out_features, in_features]``; any strides.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        magnitude: ``[out_features]`` (axis "out") or ``[in_features]`` ("in"); None is plain LoRA.
        bias: ``[out_features]``, never scaled.
        scaling: factor of the low-rank product: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        magnitude_axis: "out", a norm per output feature (PEFT), or "in", a norm per input feature (several tutorials).
        detach_norm: treat the norm as a constant in the backward (section 4.3 of the paper; PEFT).
        weight_norm: the norm, if it is at hand: equal to what `dora_weight_norm` returns. Gets no gradient.
        eps: added to the norm, ``g = magnitude / (norm + eps)`` (1e-8 in several tutorials; PEFT has none).
        backend: "auto", "reference", "torch" or "triton". A backend asked for by name never falls back.

    Returns:
        ``[..., out_features]`` in the compute dtype: autocast's if it is on (and x not float64), else x's.
        Parameters may have other dtypes; their gradients come in their own, unrounded from float32 accumulation
        (float64 for float64). Without autocast and with `lora_A` of a wider dtype than x's, the low-rank product and
        the gradients of lora_A and lora_B are computed in that dtype, as in PEFT's layer; all else is in x's. A row of
        V with norm 0 has g = 0 without eps: the output there is the bias.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, number, axis or backend name does not fit, or `weight_norm` requires grad.
        UnsupportedError: the backend asked for by name is not available or cannot do this (a `RuntimeError`).
    """
    validation.check_layer(x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, weight_norm, backend)
    validation.check_eps(eps)
    return run_layer(
        x, weight, lora_A, lora_B, magnitude, bias, float(scaling), magnitude_axis, detach_norm, weight_norm, backend,
        eps=float(eps),
    )  # fmt: skip


def run_layer(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    bias: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    detach_norm: bool,
    weight_norm: Tensor | None = None,
    backend: str = "auto",
    cache: NormCache | None = None,
    training: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """`dora_linear` without its checks, for layers that made them once; `cache` keeps the norm between calls."""
    chosen = resolve(backend, (x, weight, lora_A, lora_B, magnitude, bias, weight_norm))
    dtype = x.dtype
    if dtype != torch.float64 and autocast_enabled(x.device):  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(x.device.type)
    if chosen == "reference":
        return reference.dora_linear(
            x, weight, lora_A, lora_B, magnitude, bias, scaling, magnitude_axis, detach_norm, weight_norm, dtype, eps
        )
    divisor = None
    if magnitude is not None:
        if weight_norm is not None:
            divisor = safe_divisor(weight_norm)
        elif cache is None or torch.compiler.is_compiling():
            divisor = compute_divisor(weight, lora_A, lora_B, scaling, magnitude_axis, chosen)
        else:
            divisor = cache.divisor(weight, lora_A, lora_B, scaling, magnitude_axis, training, chosen)
        if eps:
            divisor = _plus_eps(cast(divisor, accumulation_dtype(x)), eps, cache)
    return autograd.apply(
        cast(x, dtype), weight, lora_A, lora_B, magnitude, bias, divisor,
        scaling, magnitude_axis, detach_norm, chosen, backend != "auto", eps,
    )  # fmt: skip


def run_compose(
    result: Tensor,
    h: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    scaling: float,
    divisor: Callable[[str], Tensor],
    backend: str = "auto",
) -> Tensor:
    """A DoRA layer from another module's ``result = x Wᵀ + bias`` and ``h = x Aᵀ``, in result's dtype.

    An h of a wider dtype is taken unrounded, except under autocast.

    `divisor` gives the `safe_divisor` of the weight norm, on the backend that is chosen.
    """
    chosen = resolve(backend, (result, h, lora_B, magnitude, bias))
    h = cast(h, low_rank_dtype(result, h))
    if chosen == "reference" or torch.compiler.is_compiling():  # the compiler fuses plain operations
        return reference.compose(result, h, lora_B, magnitude, divisor("torch"), bias, scaling)
    return autograd.compose(result, h, lora_B, magnitude, bias, divisor(chosen), scaling, chosen, backend != "auto")


def layer_scale(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    magnitude_axis: str,
    detach_norm: bool,
    backend: str,
    cache: NormCache,
    training: bool,
    eps: float = 0.0,
    norm: Callable[[], Tensor] | None = None,
) -> Tensor:
    """``g = magnitude / (||V|| + eps)`` as a differentiable vector, for layers composed of modules; `layer_divisor`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        cache.unheard = True  # autograd runs the backward here and will not say when
    return magnitude / layer_divisor(
        weight, lora_A, lora_B, scaling, magnitude_axis, detach_norm, backend, cache, training, norm, eps
    )


def layer_divisor(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude_axis: str,
    detach_norm: bool,
    backend: str,
    cache: NormCache | None,
    training: bool,
    norm: Callable[[], Tensor] | None = None,
    eps: float = 0.0,
) -> Tensor:
    """The `safe_divisor` of a layer's norm, or the norm plus eps, differentiable unless `detach_norm`.

    `norm` computes it where it is not the norm of a matrix ``W + s B A`` (`NormCache.divisor`), differentiably.
    """
    chosen = resolve(backend, (weight, lora_A, lora_B))
    compiling = torch.compiler.is_compiling()
    if norm is None and (chosen == "reference" or (compiling and not detach_norm)):
        dense = reference.weight_norm(weight, lora_A, lora_B, scaling, magnitude_axis)
        divisor = safe_divisor(dense.detach() if detach_norm else dense)
    elif norm is not None and not detach_norm and torch.is_grad_enabled():
        divisor = safe_divisor(norm())
    else:
        if compiling or cache is None or chosen == "reference":
            divisor = compute_divisor(weight, lora_A, lora_B, scaling, magnitude_axis, chosen, norm=norm)
        else:
            divisor = cache.divisor(weight, lora_A, lora_B, scaling, magnitude_axis, training, chosen, norm)
        if not detach_norm:
            divisor = autograd.norm(
                weight, lora_A, lora_B, divisor, scaling, magnitude_axis, chosen, backend != "auto"
            )
    return _plus_eps(divisor, eps, cache) if eps else divisor


def _plus_eps(divisor: Tensor, eps: float, cache: NormCache | None) -> Tensor:
    """`with_eps`, kept where `divisor` is."""
    return with_eps(divisor, eps) if cache is None or torch.compiler.is_compiling() else cache.with_eps(divisor, eps)


def dora_weight_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    magnitude_axis: str = "out",
    backend: str = "auto",
) -> Tensor:
    """Norm of every row ("out") or column ("in") of ``weight + scaling * lora_B @ lora_A``: the fresh magnitude.

    Shapes as in `dora_linear`. float32 ``[out_features]`` or ``[in_features]`` (float64 if an input is float64),
    computed from the factors as stored, unrounded, to float32 accuracy; for float32 adapters of a 16-bit weight the
    triton backend's relative error may reach 1e-5. Constant to autograd.

    Raises:
        TypeError, ValueError, UnsupportedError: as `dora_linear`.
    """
    validation.check_adapter(weight, lora_A, lora_B, scaling, magnitude_axis, backend)
    chosen = resolve(backend, (weight, lora_A, lora_B))
    with torch.no_grad():
        if chosen == "reference":
            return reference.weight_norm(weight, lora_A, lora_B, float(scaling), magnitude_axis)
        return ops.weight_norm(weight, lora_A, lora_B, float(scaling), magnitude_axis, chosen)


def merge_dora(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    *,
    scaling: float = 1.0,
    magnitude_axis: str = "out",
    eps: float = 0.0,
    rounding: str = "nearest",
    seed: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The merged weight ``g * (weight + scaling * lora_B @ lora_A)``, ``[out_features, in_features]``.

    Computed in float32 (float64 for float64 input) tile by tile and rounded once to weight's dtype;
    ``magnitude=None`` merges plain LoRA. Not differentiable. Keep the original weight to undo it: dividing back is not
    exact.

    Args:
        rounding: "nearest", to nearest even, which loses an update of less than half a step of weight's dtype;
            "stochastic", up or down at random so that the expected result is the exact one (docs/merging.md). A weight
            in float32 or float64 has no coarser grid than the computation: there both round to nearest.
        seed: of the random numbers, in ``[0, 2**63)``: the same seed draws the same for the same element
            ``[out, in]``, whatever the axis, the strides, the device and the backend. `rounding.seed_for` gives each of
            several weights its own.

    Shapes, the other arguments and the errors are those of `dora_linear`.

    Raises:
        TypeError: also where `seed` is no int.
        ValueError: also where `rounding` is neither of the two, or `seed` is out of range.
        UnsupportedError: as `dora_linear`.
    """
    validation.check_adapter(weight, lora_A, lora_B, scaling, magnitude_axis, backend)
    validation.check_magnitude(magnitude, weight, magnitude_axis, "magnitude")
    validation.check_eps(eps)
    validation.check_rounding(rounding, seed)
    eps = float(eps)
    drawn = seed if rounding == "stochastic" and is_coarse(weight.dtype) else None
    chosen = resolve(backend, (weight, lora_A, lora_B, magnitude))
    with torch.no_grad():
        if eps and magnitude is not None:
            norm = dora_weight_norm(
                weight, lora_A, lora_B, scaling=scaling, magnitude_axis=magnitude_axis, backend=backend
            )
            magnitude = magnitude * (norm / (norm + eps))
        if chosen == "reference":
            merged = reference.merge(weight, lora_A, lora_B, magnitude, float(scaling), magnitude_axis)
            return merged.to(weight.dtype) if drawn is None else stochastic(merged, weight.dtype, drawn)
        return ops.merge(weight, lora_A, lora_B, magnitude, float(scaling), magnitude_axis, chosen, drawn)
