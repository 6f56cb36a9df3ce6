"""``y = g * z`` in training, for a z that nobody else reads: y is written over z, and the backward reads y.

Autograd would keep z for g's gradient. y is often kept by whoever reads it anyway (gate, up and v of a Llama block),
and ``Σ dY ⊙ z`` is ``Σ dY ⊙ y / g``. y itself must not be saved, since a consumer may overwrite it, as rotary
embeddings do. A lazy clone may: it shares y's memory until one of the two is written to, and only then is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype, cast

# Smaller products are left to autograd, whose own node costs 20 us less than one in Python.
_LEAST_ELEMENTS = 1 << 15

# Elements of the blocks of the backward, 1 MB in float32. Of larger temporaries the C library may give the memory back,
# and each call faults its pages in again: forward and backward of 256x1536 took 1.3 ms by autograd and 0.5 ms in blocks
# (one core, alone; in a layer, where freed memory is soon used again, the two take the same time).
_BLOCK_ELEMENTS = 1 << 18

# With a smaller g the products with y may leave float32's range; a g of 0 has lost z.
_SMALLEST = 2.0**-20

lazy_clone = getattr(torch, "_lazy_clone", None)


def rescales(z: Tensor, g: Tensor) -> bool:
    """True if `rescale` takes these: float32 or float64 on the CPU, of some size, and no row of g that loses digits.

    In 16 bits y is rounded once more than z: the gradient of g would be 1.4 times as far off (512 tokens and features,
    bfloat16 and float16). On a GPU the host would wait to see g.
    """
    if z.dtype != g.dtype or not z.is_cpu or z.numel() < _LEAST_ELEMENTS or lazy_clone is None:
        return False
    g = g.detach()
    return float(g.min()) >= _SMALLEST or float(g.abs().min()) >= _SMALLEST


def rescale(z: Tensor, g: Tensor) -> Tensor:
    """``g * z`` for ``z [M, N]`` and ``g [N]``, which `rescales` has accepted. z is overwritten."""
    y: Tensor = _Rescale.apply(z, g)[0]
    return y


class _Rescale(torch.autograd.Function):
    """The clone is an output too, which nobody gets: it has a history then, for second derivatives."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(z.mul_(g))
        kept = lazy_clone(z)  # type: ignore[misc]
        ctx.save_for_backward(g, kept)
        return z, kept

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_kept: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if d_kept is not None:  # of a second derivative
            dy = d_kept if dy is None else dy + d_kept
        if dy is None:
            return None, None
        g, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            return dy * g, (dy * y).sum(0) / g
        dz = torch.empty_like(y) if ctx.needs_input_grad[0] else None
        return dz, dot_over_rows(dy, y, g, dz).div_(g)


def dot_over_rows(dy: Tensor, y: Tensor, g: Tensor | float = 1.0, scaled: Tensor | None = None) -> Tensor:
    """``Σ_t dy ⊙ y`` per column of ``[M, N]``, summed in float32 or wider; ``g * dy`` is written into `scaled`."""
    dtype = accumulation_dtype(y)
    total = torch.zeros(y.shape[1], dtype=dtype, device=y.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, y.shape[1])) if y.is_cpu else y.shape[0]
    for start in range(0, y.shape[0], max(1, step)):
        rows = slice(start, start + step)
        part = dy[rows]
        if scaled is not None:
            torch.mul(part, g, out=scaled[rows])
        total += (cast(part, dtype) * y[rows]).sum(0)
    return total
