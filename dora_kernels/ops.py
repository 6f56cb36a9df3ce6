"""The four operations as `torch.library` ops, for tracing; outside tracing the implementations are called directly.

| op | result |
|---|---|
| `dora_kernels::weight_norm` | norm of every row or column of ``W + s B A`` |
| `dora_kernels::merge` | ``g * (W + s B A)`` |
| `dora_kernels::linear_forward` | output, low-rank activation and what `compose` keeps |
| `dora_kernels::linear_backward` | every gradient that is needed |

The ops know nothing of autograd: `dora_kernels.autograd` joins the last two. A tensor that is absent from an op's
result (ops cannot return None) is an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_kernels import linear
from dora_kernels.linear import Grads, Needs
from dora_kernels.reference import accumulation_dtype, autocast_enabled, no_autocast


def axis_first(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude_axis: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The problem whose *row* norms are wanted."""
    return (weight, lora_A, lora_B) if magnitude_axis == "out" else (weight.t(), lora_B.t(), lora_A.t())


def weight_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    magnitude_axis: str,
    backend: str,
    weight_square: Tensor | None = None,
) -> Tensor:
    """Norms in float32 (float64 for float64 input), no gradient. `weight_square`: ``|W|²`` where somebody keeps it."""
    if torch.compiler.is_compiling():
        return weight_norm_op(weight, lora_A, lora_B, scaling, magnitude_axis, backend)
    rows = axis_first(weight, lora_A, lora_B, magnitude_axis)
    with no_autocast(weight.device):
        return linear.primitives(backend).weight_norm(*rows, scaling, weight_square)


@torch.library.custom_op("dora_kernels::weight_norm", mutates_args=())
def weight_norm_op(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude_axis: str, backend: str
) -> Tensor:
    return weight_norm(weight, lora_A, lora_B, scaling, magnitude_axis, backend)


@weight_norm_op.register_fake
def _(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude_axis: str, backend: str) -> Tensor:
    length = weight.shape[0 if magnitude_axis == "out" else 1]
    return weight.new_empty(length, dtype=accumulation_dtype(weight, lora_A, lora_B))


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
    """``g * (W + s B A)`` in weight's dtype, rounded to nearest or, with a seed, stochastically; no gradient."""
    if torch.compiler.is_compiling():
        return merge_op(weight, lora_A, lora_B, magnitude, scaling, magnitude_axis, backend, seed)
    rows = axis_first(weight, lora_A, lora_B, magnitude_axis)
    with no_autocast(weight.device):
        merged: Tensor = linear.primitives(backend).merge(*rows, magnitude, scaling, seed, magnitude_axis == "in")
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


def linear_forward(
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`linear.forward`."""
    args = (x, weight, lora_A, lora_B, g, bias, scaling, magnitude_axis, keep_base, backend, divisor)
    if torch.compiler.is_compiling():
        y, h, base = linear_forward_op(*args)
        return y, h, base if keep_base else None
    if not autocast_enabled(x.device):
        return linear.forward(*args)
    with no_autocast(x.device):
        return linear.forward(*args)


@torch.library.custom_op("dora_kernels::linear_forward", mutates_args=())
def linear_forward_op(
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
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, base = linear_forward(
        x, weight, lora_A, lora_B, g, bias, scaling, magnitude_axis, keep_base, backend, divisor
    )
    return y, h, x.new_empty(0) if base is None else base


@linear_forward_op.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, x.new_empty(x.shape[0], lora_A.shape[0]), torch.empty_like(y) if keep_base else x.new_empty(0)


def linear_backward(
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
    """`linear.backward`."""
    args = (dy, x, weight, lora_A, lora_B, g, divisor, h, base, scaling, magnitude_axis, detach_norm)
    if not torch.compiler.is_compiling():
        if not autocast_enabled(dy.device):
            return linear.backward(*args, needs, backend, eps)
        with no_autocast(dy.device):
            return linear.backward(*args, needs, backend, eps)
    grads = linear_backward_op(*args, list(needs), backend, eps)
    return Grads(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))


@torch.library.custom_op("dora_kernels::linear_backward", mutates_args=())
def linear_backward_op(
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
    needs: Sequence[bool],
    backend: str,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = linear_backward(
        dy, x, weight, lora_A, lora_B, g, divisor, h, base,
        scaling, magnitude_axis, detach_norm, Needs(*needs), backend, eps,
    )  # fmt: skip
    gx, gw, ga, gb, gm, gbias = (x.new_empty(0) if grad is None else grad for grad in grads)
    return gx, gw, ga, gb, gm, gbias


@linear_backward_op.register_fake
def _(
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
    needs: Sequence[bool],
    backend: str,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    need = Needs(*needs)
    accumulate = accumulation_dtype(dy)
    absent = x.new_empty(0)
    return (
        x.new_empty(x.shape) if need.x else absent,
        torch.empty_like(weight) if need.weight else x.new_empty(0),
        torch.empty_like(lora_A) if need.lora_A else x.new_empty(0),
        torch.empty_like(lora_B) if need.lora_B else x.new_empty(0),
        x.new_empty(g.shape, dtype=accumulate) if need.magnitude and g is not None else x.new_empty(0),
        x.new_empty(dy.shape[1], dtype=accumulate) if need.bias else x.new_empty(0),
    )
