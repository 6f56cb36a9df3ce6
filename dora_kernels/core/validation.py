"""Checks of the public functions' arguments. Every message names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
import sys
from typing import Any

import torch
from torch import Tensor

from dora_kernels.core.problem import Weights

BACKENDS = ("auto", "torch", "triton")
AXES = ("out", "in")
ROUNDINGS = ("nearest", "stochastic")

_LARGEST = sys.float_info.max

# No dimension is this large, and torch's own integers end not far beyond.
_SIZES = 1 << 31

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_layer(x: Any, weights: Weights, scaling: Any, magnitude_axis: Any, weight_norm: Any, backend: Any) -> None:
    """Check the arguments of `dora_linear`."""
    weight, lora_A, lora_B, magnitude, bias = weights
    check_adapter(weight, lora_A, lora_B, scaling, magnitude_axis, backend)
    check_features(x, weight.shape[1])
    check_magnitude(magnitude, weight, magnitude_axis, "magnitude")
    if bias is not None:
        _check_tensor(bias, "bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias: expected [{weight.shape[0]}] for a weight of shape {_shape(weight)}, got {_shape(bias)}"
            )
    if weight_norm is not None:
        if magnitude is None:
            raise ValueError(
                "weight_norm: expected None without a magnitude, because plain LoRA (magnitude=None) uses no norm"
            )
        check_magnitude(weight_norm, weight, magnitude_axis, "weight_norm")
        if weight_norm.requires_grad:
            raise ValueError(
                "weight_norm: requires grad, but the layer treats it as a constant; pass weight_norm.detach()"
            )
    for name, tensor in (("x", x), ("magnitude", magnitude), ("bias", bias), ("weight_norm", weight_norm)):
        _check_device(tensor, name, weight)


def check_features(x: Any, in_features: int) -> None:
    """Check the input of a layer: a tensor ``[..., in_features]``."""
    _check_tensor(x, "x")
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x: expected [..., {in_features}], got {_shape(x)}")


def check_adapter(weight: Any, lora_A: Any, lora_B: Any, scaling: Any, magnitude_axis: Any, backend: Any) -> None:
    """Check the arguments that describe the adapted weight."""
    for name, tensor in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        _check_tensor(tensor, name)
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {_shape(tensor)}")
    out_features, in_features = weight.shape
    if out_features < 1 or in_features < 1:
        raise ValueError(f"weight: expected at least one feature on each side, got shape {_shape(weight)}")
    rank = lora_A.shape[0]
    if rank < 1:
        raise ValueError(f"lora_A: expected a rank of at least 1, got shape {_shape(lora_A)}")
    if lora_A.shape[1] != in_features:
        raise ValueError(
            f"lora_A: expected [rank, {in_features}] for a weight of shape {_shape(weight)}, got {_shape(lora_A)}"
        )
    if lora_B.shape != (out_features, rank):
        raise ValueError(
            f"lora_B: expected [{out_features}, {rank}] for a weight of shape {_shape(weight)} and a lora_A of shape "
            f"{_shape(lora_A)}, got {_shape(lora_B)}"
        )
    _check_device(lora_A, "lora_A", weight)
    _check_device(lora_B, "lora_B", weight)
    check_scaling(scaling)
    check_axis(magnitude_axis)
    check_backend(backend)


def check_magnitude(magnitude: Any, weight: Tensor, magnitude_axis: str, name: str) -> None:
    """Check that the magnitude is None or a vector along `magnitude_axis`."""
    if magnitude is None:
        return
    _check_tensor(magnitude, name)
    length = weight.shape[0 if magnitude_axis == "out" else 1]
    if magnitude.shape != (length,):
        raise ValueError(
            f"{name}: expected [{length}] for magnitude_axis={magnitude_axis!r} and a weight of shape "
            f"{_shape(weight)}, got {_shape(magnitude)}"
        )
    _check_device(magnitude, name, weight)


def check_real(value: Any, name: str) -> None:
    """Check for a number that a float can hold, infinities and NaN included."""
    _check_real(value, name, "a number")
    if _overflows_float(value):
        raise ValueError(f"{name}: expected a number, got {_as_text(value)}")


def check_dense(tensor: Any, name: str) -> None:
    """Check for a floating-point tensor with strides: not a sparse, nested or mkldnn one."""
    _check_tensor(tensor, name)


def check_number(value: Any, name: str, expected: str = "a number") -> None:
    """Check for a finite number that a float can hold: no int or fraction beyond its range."""
    _check_real(value, name, expected)
    if not -_LARGEST <= value <= _LARGEST:  # unlike math.isfinite, torch.compile can trace this with a symbolic float
        raise ValueError(f"{name}: expected a finite number, got {_as_text(value)}")


def check_size(value: Any, name: str, expected: str = "an int") -> None:
    """Check for an int that can be the size of a dimension, such as a rank."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if int(value) < 1:
        raise ValueError(f"{name}: expected at least 1, got {_as_text(value)}")
    if int(value) >= _SIZES:
        raise ValueError(f"{name}: expected less than {_SIZES}, got {_as_text(value)}")


def check_scaling(scaling: Any) -> None:
    check_number(scaling, "scaling", "a finite number")


def check_options(rank: Any, alpha: Any, dropout: Any, backend: Any, adapter_dtype: Any) -> None:
    """Check the options that every adapted layer is made with."""
    check_size(rank, "rank")
    if alpha is not None:
        check_number(alpha, "alpha")
    _check_real(dropout, "dropout", "a probability in [0, 1)")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {_as_text(dropout)}")
    check_backend(backend)
    if adapter_dtype is not None and adapter_dtype not in DTYPES:
        raise TypeError(f"adapter_dtype: expected float32, bfloat16, float16 or float64, got {adapter_dtype!r}")


def check_flag(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_strength(strength: Any) -> None:
    check_number(strength, "strength")


def check_eps(eps: Any) -> None:
    _check_real(eps, "eps", "a number")
    if not 0.0 <= eps <= _LARGEST:
        raise ValueError(f"eps: expected a finite number of at least 0, got {_as_text(eps)}")


def check_axis(magnitude_axis: Any) -> None:
    if magnitude_axis not in AXES:
        raise ValueError(f"magnitude_axis: expected 'out' or 'in', got {magnitude_axis!r}")


def check_backend(backend: Any) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def check_rounding(rounding: Any, seed: Any) -> None:
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding: expected 'nearest' or 'stochastic', got {rounding!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int in [0, 2**63), got {type(seed).__name__}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed: expected an int in [0, 2**63), got {_as_text(seed)}")


def _check_real(value: Any, name: str, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")


def _as_text(value: Any) -> str:
    """The number as text. Python refuses to write ints of more than some thousand digits."""
    return "one beyond the range of float64" if _overflows_float(value) else str(value)


def _overflows_float(value: Any) -> bool:
    """True if the number is an int or a fraction too large for a float."""
    number: Any = value  # Any: isinstance would narrow it to a type without an order
    return isinstance(value, numbers.Rational) and not -_LARGEST <= number <= _LARGEST


def _check_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name}: expected a dense tensor, got a {layout} one")


def _check_device(tensor: Tensor | None, name: str, weight: Tensor) -> None:
    if tensor is not None and tensor.device != weight.device:
        raise ValueError(f"{name}: expected the weight's device {weight.device}, got {tensor.device}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
