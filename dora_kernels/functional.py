"""The functional interface: `dora_linear`, `dora_weight_norm` and `merge_dora`. Formulas: docs/math.md."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_kernels.core import validation
from dora_kernels.core.problem import Form, Weights
from dora_kernels.core.scale import safe_divisor
from dora_kernels.engine.layer import merged_weight, norm_now, run_layer
from dora_kernels.engine.norm import Norm
from dora_kernels.rounding import is_coarse


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

    ``V = weight + scaling * lora_B @ lora_A`` and ``g = magnitude / ||V||``.
    (DoRA, arXiv 2402.09353, equation 5; with the defaults, the computation of PEFT's ``use_dora=True``.)

    Args:
        x: ``[..., in_features]`` with any number of leading dimensions, including none and empty ones.
        weight: base weight ``[out_features, in_features]``, of any strides.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        magnitude: ``[out_features]`` (axis "out") or ``[in_features]`` ("in"); None for plain LoRA.
        bias: ``[out_features]``, never scaled.
        scaling: factor of the low-rank product: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        magnitude_axis: "out": one norm per output feature (PEFT); "in": one per input feature (several tutorials).
        detach_norm: treat the norm as a constant in the backward (section 4.3 of the paper; PEFT).
        weight_norm: the norm, if the caller already has it, as returned by `dora_weight_norm`. It gets no gradient.
        eps: added to the norm, ``g = magnitude / (norm + eps)`` (1e-8 in several tutorials; PEFT has none).
        backend: "auto", "torch" or "triton". A backend asked for by name never falls back. Under `torch.compile` the
            products and the rescaling are plain operations for the compiler, whatever the backend; the norm is the
            backend's.

    Returns:
        ``[..., out_features]`` in the compute dtype, which is autocast's if it is on (and x not float64), else x's.
        Parameters may have other dtypes; their gradients have the parameter's dtype. Without autocast and with a
        `lora_A` of a wider dtype than x's, the low-rank product and the gradients of lora_A and lora_B are computed in
        that dtype, as in PEFT's layer; all else is in x's. Where V has a row of norm 0 and there is no eps, g is 0, and
        the output is the bias.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape, device, number, axis or backend name does not fit, or `weight_norm` requires grad.
        UnsupportedError: the backend asked for by name is not available or cannot run this call (a `RuntimeError`).
    """
    weights = Weights(weight, lora_A, lora_B, magnitude, bias)
    validation.check_layer(x, weights, scaling, magnitude_axis, weight_norm, backend)
    validation.check_eps(eps)
    validation.check_flag(detach_norm, "detach_norm")
    form = Form(float(scaling), magnitude_axis, bool(detach_norm), float(eps))
    norm = None if weight_norm is None else Norm(safe_divisor(weight_norm, form.eps))
    return run_layer(x, weights, form, backend=backend, norm=norm)


def dora_weight_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    magnitude_axis: str = "out",
    backend: str = "auto",
) -> Tensor:
    """Norm of every row ("out") or column ("in") of ``weight + scaling * lora_B @ lora_A``: a magnitude to start with.

    The factors are used as they are stored, unrounded. The result is accurate to float32; for float32 adapters of a
    16-bit weight the triton backend's relative error may reach 1e-5.

    Args:
        weight: base weight ``[out_features, in_features]``; any strides.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        scaling: factor of the low-rank product.
        magnitude_axis: "out", a norm per output feature, or "in", a norm per input feature.
        backend: "auto", "torch" or "triton". A backend asked for by name never falls back.

    Returns:
        ``[out_features]`` or ``[in_features]`` in float32, in float64 if an input is float64. A constant to autograd.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, number, axis or backend name does not fit.
        UnsupportedError: the backend asked for by name is not available or cannot do this.
    """
    validation.check_adapter(weight, lora_A, lora_B, scaling, magnitude_axis, backend)
    weights = Weights(weight, lora_A, lora_B)
    with torch.no_grad():
        return norm_now(weights, Form(float(scaling), magnitude_axis), backend)


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

    It is computed in float32 (float64 for float64 input), tile by tile, and rounded once to weight's dtype. It is not
    differentiable. Keep the original weight to undo a merge: dividing back is not exact.

    Args:
        weight: base weight ``[out_features, in_features]``; any strides.
        lora_A: ``[rank, in_features]``.
        lora_B: ``[out_features, rank]``.
        magnitude: ``[out_features]`` (axis "out") or ``[in_features]`` ("in"); None merges plain LoRA.
        scaling: factor of the low-rank product.
        magnitude_axis: "out", a norm per output feature, or "in", a norm per input feature.
        eps: added to the norm, ``g = magnitude / (norm + eps)``.
        rounding: "nearest", to nearest even, which loses an update of less than half a step of weight's dtype;
            "stochastic", up or down at random so that the expected result is the exact one (docs/merging.md). A weight
            in float32 or float64 has no coarser grid than the computation: there both round to nearest.
        seed: of the random numbers, in ``[0, 2**63)``. The same seed draws the same for the same element ``[out, in]``,
            whatever the axis, the strides, the device and the backend. `rounding.seed_for` gives each of several
            weights its own.
        backend: "auto", "torch" or "triton". A backend asked for by name never falls back.

    Returns:
        A new tensor of weight's shape and dtype.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device, number, axis, rounding or backend name does not fit, or `seed` is out of range.
        UnsupportedError: the backend asked for by name is not available or cannot do this.
    """
    validation.check_adapter(weight, lora_A, lora_B, scaling, magnitude_axis, backend)
    validation.check_magnitude(magnitude, weight, magnitude_axis, "magnitude")
    validation.check_eps(eps)
    validation.check_rounding(rounding, seed)
    drawn = seed if rounding == "stochastic" and is_coarse(weight.dtype) else None
    with torch.no_grad():
        if eps and magnitude is not None:
            norm = dora_weight_norm(
                weight, lora_A, lora_B, scaling=scaling, magnitude_axis=magnitude_axis, backend=backend
            )
            magnitude = magnitude * (norm / (norm + float(eps)))
        weights = Weights(weight, lora_A, lora_B, magnitude)
        return merged_weight(weights, Form(float(scaling), magnitude_axis), backend, drawn)
