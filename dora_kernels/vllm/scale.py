"""``y = g ⊙ y + (1 - g) ⊙ b`` for the tokens of each slot, in place, as one op that no compiler looks into."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_kernels.engine.dispatch import kernels


class Route:
    """Which tokens have a slot with magnitudes. The tensors are refilled in place before a forward, as a graph needs.

    Attributes:
        scaled: ``[slots]`` bool, the slots with magnitudes.
        order: int64, those tokens, sorted by slot, before all others.
        ends: int32 ``[slots]``: slot s has the tokens ``order[ends[s - 1]:ends[s]]``.
    """

    def __init__(self, tokens: int, slots: int, device: torch.device) -> None:
        self.scaled = torch.zeros(slots, dtype=torch.bool, device=device)
        self.order = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.ends = torch.zeros(slots, dtype=torch.int32, device=device)

    def fill(self, slots: Tensor) -> None:
        """Take each token's slot, ``[T]``; -1 is the base model. The host does not wait."""
        count = self.scaled.shape[0]
        scaled = (slots >= 0) & self.scaled[slots.clamp(0, count - 1)]
        key, order = torch.where(scaled, slots, count).sort(stable=True)
        self.order[: order.shape[0]] = order
        torch.searchsorted(key, torch.arange(count, device=key.device), right=True, out_int32=True, out=self.ends)


def scale_slots_(y: Tensor, order: Tensor, ends: Tensor, scale: Tensor, offset: Tensor | None) -> None:
    """Scale the tokens of each slot in place: ``y[t] = scale[slot] * y[t] + offset[slot]``. Others keep their bits.

    It runs in every forward, whatever adapters there are: a branch on them would be traced away by compilation.

    Args:
        y: A layer's output with its bias b, ``[..., out_features]``, contiguous.
        order: See `Route`.
        ends: See `Route`.
        scale: g of each slot, float32 ``[slots, out_features]``.
        offset: ``(1 - g) * b`` of each slot, as `scale`; None for a layer without a bias.
    """
    if torch.compiler.is_compiling():
        torch.ops.dora_kernels.scale_slots_(y, order, ends, scale, offset)
    else:
        _scale_slots_(y, order, ends, scale, offset)


def _scale_slots_(y: Tensor, order: Tensor, ends: Tensor, scale: Tensor, offset: Tensor | None) -> None:
    y = y.view(-1, y.shape[-1])
    (_with_compose if y.is_cuda else _with_torch)(y, order, ends, scale, offset)


torch.library.custom_op("dora_kernels::scale_slots_", _scale_slots_, mutates_args=("y",))


def _with_compose(y: Tensor, order: Tensor, ends: Tensor, scale: Tensor, offset: Tensor | None) -> None:
    """One launch, which reads and writes only the rows of those tokens: `compose` of rank 0, in groups."""
    h, b = y.new_empty(y.shape[0], 0), y.new_empty(*scale.shape, 0)
    kernels().compose(y, h, b, scale, offset, 1.0, False, None, ends, order)


def _with_torch(y: Tensor, order: Tensor, ends: Tensor, scale: Tensor, offset: Tensor | None) -> None:
    tokens = order[: int(ends[-1])]
    if tokens.numel():
        slots = torch.searchsorted(ends, torch.arange(tokens.shape[0], dtype=ends.dtype), right=True)
        scaled = y.index_select(0, tokens) * scale.index_select(0, slots)
        if offset is not None:
            scaled += offset.index_select(0, slots)
        y.index_copy_(0, tokens, scaled.to(y.dtype))
