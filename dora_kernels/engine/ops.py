"""The norm and the merge as `torch.library` ops, for compiled graphs. Other calls go to the backends directly.

| op | result |
|---|---|
| `dora_kernels::weight_norm` | norm of every row or column of ``W + s B A`` |
| `dora_kernels::kept_divisor` | the same with 0 as infinity, or plus eps; computed only if something changed |
| `dora_kernels::merge` | ``g * (W + s B A)`` |

A compiler does not look inside these ops. All are pure: `kept_divisor` returns a new tensor that depends on nothing
but its inputs, since it compares their values before it reuses a result. The products around them are plain operations
that the compiler fuses.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, no_autocast
from dora_kernels.core.problem import row_problem
from dora_kernels.engine import blocked, dispatch


def norm_module(backend: str) -> ModuleType:
    """Return the module that has a backend's `weight_norm` and `merge`."""
    return blocked if backend == "torch" else dispatch.kernels()


def weight_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude_axis: str,
    backend: str,
    weight_square: Tensor | None = None,
) -> Tensor:
    """Norms in float32 (float64 for float64 input), without gradient.

    `weight_square` is ``|W|²`` per row, if it is kept.
    """
    if torch.compiler.is_compiling():
        return weight_norm_op(weight, lora_A, lora_B, scaling, magnitude_axis, backend)
    rows = row_problem(weight, lora_A, lora_B, magnitude_axis)
    with no_autocast(weight.device):
        norm: Tensor = norm_module(backend).weight_norm(*rows, scaling, weight_square)
    return norm


@torch.library.custom_op("dora_kernels::weight_norm", mutates_args=())
def weight_norm_op(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude_axis: str, backend: str
) -> Tensor:
    return weight_norm(weight, lora_A, lora_B, scaling, magnitude_axis, backend)


@weight_norm_op.register_fake
def _(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude_axis: str, backend: str) -> Tensor:
    shape = weight.shape[:-1] if magnitude_axis == "out" else weight.shape[1:]
    return weight.new_empty(shape, dtype=accumulation_dtype(weight, lora_A, lora_B))


def merge(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    backend: str,
    seed: int | None = None,
) -> Tensor:
    """Return ``g * (W + s B A)`` in weight's dtype, rounded to nearest or, with a seed, stochastically. No gradient."""
    if torch.compiler.is_compiling():
        return merge_op(weight, lora_A, lora_B, magnitude, scaling, magnitude_axis, backend, seed)
    rows = row_problem(weight, lora_A, lora_B, magnitude_axis)
    with no_autocast(weight.device):
        merged: Tensor = norm_module(backend).merge(*rows, magnitude, scaling, seed, magnitude_axis == "in")
    return merged if magnitude_axis == "out" else merged.t()


@torch.library.custom_op("dora_kernels::merge", mutates_args=())
def merge_op(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    backend: str,
    seed: int | None = None,
) -> Tensor:
    return merge(weight, lora_A, lora_B, magnitude, scaling, magnitude_axis, backend, seed)


@merge_op.register_fake
def _(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    scaling: float,
    magnitude_axis: str,
    backend: str,
    seed: int | None = None,
) -> Tensor:
    return torch.empty_like(weight) if magnitude_axis == "out" else torch.empty_like(weight.t()).t()
