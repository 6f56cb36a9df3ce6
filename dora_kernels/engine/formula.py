"""The forward of DoRA from its scale g, in plain differentiable operations that PyTorch's autograd records.

    axis "out":  y = g ⊙ z + b              z = x Wᵀ + s (x Aᵀ) Bᵀ
    axis "in":   y = z + b, with x ⊙ g instead of x

It runs on CPUs, for small problems on any device, under `torch.compile`, `torch.func`, forward mode and second
derivatives, and on tensor subclasses. On two cores it takes as long as PEFT's LoRA (bench/results). The fused kernels
(`engine.fused`) run large problems on a GPU.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, cast, low_rank_dtype
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine.rescale import rescale, rescales


def linear(
    x: Tensor, weights: Weights, g: Tensor | None, scaling: float, magnitude_axis: str = "out", b_is_zero: bool = False
) -> Tensor:
    """The layer on ``x [..., K]``, which is already in the compute dtype. Returns ``[..., N]`` in x's dtype.

    Args:
        g: the magnitude over the norm; None for plain LoRA.
        b_is_zero: True if B is known to be 0. The base product then adds the bias itself, as the base layer does, so
            that g = 1 gives the base layer's output to the bit.
    """
    weight, lora_A, lora_B, _, bias = weights
    dtype = x.dtype
    if weight.dtype != dtype:
        weight = weight.to(dtype)
    low_dtype, wide_adapter = dtype, lora_B.dtype.itemsize > dtype.itemsize
    if lora_A.dtype != dtype or lora_B.dtype != dtype:
        low_dtype = low_rank_dtype(x, lora_A)
        lora_A, lora_B = cast(lora_A, low_dtype), cast(lora_B, low_dtype)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    read = rows if low_dtype == dtype else rows.to(low_dtype)
    if g is not None and magnitude_axis == "in":
        read, g = scaled(read, g), None
        rows = cast(read, dtype)
    h = F.linear(read, lora_A)
    if g is None or (b_is_zero and bias is not None):
        # A 16-bit base product is rounded less without the bias, so the wider low-rank product adds it.
        of_base, of_low = (bias, None) if low_dtype == dtype or b_is_zero else (None, bias)
        y = F.linear(rows, weight, None if of_base is None else cast(of_base, dtype))
        if low_dtype == dtype:
            y = _addmm(y, h, lora_B, scaling)
        else:
            y = y + F.linear(h * scaling, lora_B, None if of_low is None else cast(of_low, low_dtype))
        if g is not None and bias is not None:
            y = torch.addcmul(y, y - bias, g - 1.0)
    else:
        if low_dtype != dtype:
            z = F.linear(rows, weight) + F.linear(h * scaling, lora_B)
        elif dtype == g.dtype:
            z = _addmm(F.linear(rows, weight), h, lora_B, scaling)
        elif wide_adapter and g.requires_grad:
            # Under autocast PEFT adds the two up in float32: z in 16 bits would make dm 1.2 times as inexact as PEFT's.
            z = F.linear(rows, weight).to(g.dtype) + F.linear(h * scaling, lora_B)
        else:  # in 16 bits the base product is added inside its own float32 sum, so z is rounded once
            z = _addmm(F.linear(h * scaling, lora_B), rows, weight)
        y = _scaled_in_place(z, g) if bias is None else scaled(z, g, bias)
    if y.dtype != dtype:
        y = y.to(dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _scaled_in_place(z: Tensor, g: Tensor) -> Tensor:
    """`scaled`, of a z that nobody else reads."""
    if type(z) is type(g) is Tensor and not torch.compiler.is_compiling() and not transformed():
        if g.requires_grad and torch.is_grad_enabled():
            return rescale(z, g) if rescales(z, g) else scaled(z, g)
        if z.dtype == g.dtype:
            return z.mul_(g)
    return scaled(z, g)


def _addmm(product: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """``product + alpha * left @ right.T``, written into `product`, which no backward reads.

    A copy would cost 2 % of a layer's training (SmolLM2's shapes, 128 and 256 tokens, two cores).
    """
    if type(product) is Tensor and torch._C._functorch.peek_interpreter_stack() is None:
        return product.addmm_(left, right.t(), alpha=alpha)
    return torch.addmm(product, left, right.t(), alpha=alpha)


def scaled(z: Tensor, g: Tensor, bias: Tensor | None = None) -> Tensor:
    """``g * z + bias`` for ``z [M, N]`` and vectors ``[N]``, in z's dtype, rounded once.

    16-bit elements are multiplied by float32 factors through batch normalization in evaluation mode, with mean 0 and
    variance 1. It is PyTorch's one operation that reads 16 bits, computes in 32, and keeps float32 sums over tokens in
    its backward. Elementwise operations would make a float32 copy of z in the forward and in the backward. Relative to
    PEFT's LoRA, at 2048² in bfloat16 on two cores: forward and backward at 512 tokens 1.03, elementwise 1.05; one token
    0.99, elementwise 1.03.
    """
    if z.dtype == g.dtype:
        return z * g if bias is None else torch.addcmul(cast(bias, g.dtype), z, g)
    # With a frozen g the batch normalization would keep z for nobody.
    if _normalizes(z, g) and (g.requires_grad or not torch.is_grad_enabled()):
        mean, variance = standard(z.shape[1], torch.float32, z.device)
        bias = None if bias is None else cast(bias, torch.float32)
        return torch.batch_norm(z, g, bias, mean, variance, False, 0.0, 0.0, False)
    y = z * g if bias is None else torch.addcmul(cast(bias, g.dtype), z, g)
    return cast(y, z.dtype)


def _normalizes(z: Tensor, g: Tensor) -> bool:
    return type(z) is type(g) is Tensor and z.numel() > 0 and not torch.compiler.is_compiling() and not transformed()


@functools.lru_cache(maxsize=64)
def standard(features: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1 for `torch.batch_norm`."""
    with torch.inference_mode(False):
        return torch.zeros(features, dtype=dtype, device=device), torch.ones(features, dtype=dtype, device=device)


def transformed() -> bool:
    """True under `torch.func` transforms, forward-mode AD and `torch.jit.trace`, which need plain operations."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def compose(result: Tensor, h: Tensor, weights: Weights, g: Tensor, scaling: float) -> Tensor:
    """``g * (result - bias + scaling * h @ B.T) + bias`` in result's dtype, rounded once.

    For layers whose ``result = x Wᵀ + bias`` and ``h = x Aᵀ`` are computed by other modules.
    """
    dtype = accumulation_dtype(result, h)
    bias = None if weights.bias is None else cast(weights.bias, dtype)
    base = cast(result, dtype)
    if bias is not None:
        base = base - bias
    low = F.linear(cast(h, low_rank_dtype(result, h)) * scaling, cast(weights.lora_B, h.dtype))
    z = base + low
    return cast(_scaled_in_place(z, g) if bias is None else torch.addcmul(bias, z, g), result.dtype)


def weight_norm(weights: Weights, form: Form) -> Tensor:
    """The norm of every row or column of ``W + s B A``, which is formed whole.

    It is used where the other ways to compute the norm cannot be differentiated.
    """
    weight, lora_A, lora_B, _, _ = weights
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    v = cast(weight, dtype) + form.scaling * (cast(lora_B, dtype) @ cast(lora_A, dtype))
    return torch.linalg.vector_norm(v, dim=1 if form.magnitude_axis == "out" else 0)
