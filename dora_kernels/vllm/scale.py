"""``y = g ⊙ y + (1 - g) ⊙ b`` for the tokens of each slot, in place, as one op that no compiler looks into."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_slots_(y: Tensor, slots: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Multiply what each token's slot scales, in place: ``y[t] = g[slot] * (y[t] - bias) + bias``.

    Tokens of no slot keep their bits, and so do those of a slot whose g is 1. It runs in every forward, whatever
    adapters there are: a branch on them would be traced away by compilation.

    Args:
        y: A layer's output with its bias, ``[..., out_features]``, contiguous; T tokens.
        slots: Each token's slot, integers, T or more. Anything that is no slot, -1 above all, means the base model.
        scale: g of each slot, float32 ``[slots, out_features]``.
        bias: What the output holds beside the product, ``[out_features]``.
    """
    if torch.compiler.is_compiling():
        torch.ops.dora_kernels.scale_slots_(y, slots, scale, bias)
    else:
        _scale_slots_(y, slots, scale, bias)


def _scale_slots_(y: Tensor, slots: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    y = y.view(-1, y.shape[-1])
    slots = slots[: y.shape[0]]
    tokens = ((slots >= 0) & (slots < scale.shape[0])).nonzero().squeeze(1)
    if tokens.numel():
        g = scale[slots[tokens]]
        scaled = y[tokens] * g
        if bias is not None:
            scaled += (1.0 - g) * bias
        y[tokens] = scaled.to(y.dtype)


torch.library.custom_op("dora_kernels::scale_slots_", _scale_slots_, mutates_args=("y",))
