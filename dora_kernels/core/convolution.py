"""DoRA on a convolution: its linear problem, its norms with groups, its output. See docs/math.md, "Convolutions".

As a linear problem the weight is ``[out, in * kernel]``, A ``[r, in * kernel]`` and B, a convolution of kernel 1,
``[out, r]``. With g groups the weight is ``[out, in / g * kernel]``, while A reads all channels, as PEFT's does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype


def rows(weight: Tensor, channels_last: bool) -> Tensor:
    """The weight as ``[out, in * kernel]``. The second dimension is in the order in which it lies in memory."""
    return (weight.movedim(1, -1) if channels_last else weight).flatten(1)


def is_view(weight: Tensor, channels_last: bool) -> bool:
    """True if `rows` returns a view."""
    return (weight.movedim(1, -1) if channels_last else weight).is_contiguous()


def from_rows(rows: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """A weight of the given shape, from its `rows`."""
    if not channels_last:
        return rows.reshape(shape)
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def pefts_grouped_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """PEFT's norm of a grouped convolution: it reshapes ``B A``, taken as ``[out / g, in * kernel]``, to W's rows.

    This is not the norm of what the layer computes (25 % off at rank 4 and 2 groups), but adapters were trained with
    it.
    """
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    low = lora_B.to(dtype).reshape(-1, lora_A.shape[0]) @ lora_A.to(dtype)
    return torch.linalg.vector_norm(torch.add(weight.to(dtype), low.view(weight.shape), alpha=scaling), dim=1)


def exact_grouped_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, groups: int, magnitude_axis: str = "out"
) -> Tensor:
    """The norm of what the layer computes: a group's weight on its own channels, plus its share of B A on all channels.

    Shape ``[out]``, or ``[in * kernel]`` along "in". Differentiable.
    """
    dtype = accumulation_dtype(weight, lora_A, lora_B)
    dim = 1 if magnitude_axis == "out" else 0
    norms = []
    parts = (t.to(dtype).chunk(groups) for t in (weight, lora_A, lora_B))
    for group, (w, right, left) in enumerate(zip(*parts, strict=True)):
        update = scaling * (left @ right)
        update[:, group * w.shape[1] : (group + 1) * w.shape[1]] += w
        norms.append(torch.linalg.vector_norm(update, dim=dim))
    return torch.cat(norms) if dim else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def over_kernel(norm: Tensor, shape: torch.Size, groups: int, channels_last: bool) -> Tensor:
    """The norm of each input channel, from that of each column of `rows`; `shape` is the weight's."""
    channels = shape[1] * groups
    by_channel = norm.view(-1, channels).t() if channels_last else norm.view(channels, -1)
    return torch.linalg.vector_norm(by_channel, dim=1)


def compose(result: Tensor, low: Tensor, g: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """``g * (result - bias + scaling * low) + bias``; g and bias have shapes that broadcast over the channels.

    Written so that g = 1 and low = 0 give `result` to the bit.
    """
    if bias is None:
        return g * torch.add(result, low, alpha=scaling)
    base = result - bias
    return result - torch.addcmul(base, g, torch.add(base, low, alpha=scaling), value=-1.0)
