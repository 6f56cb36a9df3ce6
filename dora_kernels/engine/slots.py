"""Many adapters in one batch: ``y_t = g_s * (base_t + (x_t A_sᵀ) B_sᵀ) + bias_s`` with the slot s of each token t.

The factors of all slots are stacked, and never gathered per token. `slots_shrink` gives h, and `slots_compose` y. The
route says which slot each token has. It is made once per forward. Tokens without a slot keep base to the bit. The
scaling is part of B.

The two are for inference: they write into what they made, and nothing is recorded for a backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_kernels.engine.route import Route

Stack = Tensor | Sequence[Tensor | None]
"""A matrix or a vector for each slot: stacked, or in a sequence, which may have None for a slot."""


def slots_shrink(x: Tensor, lora_A: Stack, route: Route, ranks: tuple[int, ...]) -> Tensor:
    """Return ``h = x A_sᵀ``.

    Args:
        x: ``[T, K]``, in lora_A's dtype.
        lora_A: ``[S, R, K]``, or ``[r_s, K]`` for each slot.
        ranks: the rank of each slot, at most R; 0 for a slot that leaves this layer as it is. Beyond a slot's rank its
            factors are 0.

    Returns:
        ``[rows, largest rank at work]``. The rows are in an order of the route's own, and only `slots_compose` with the
        same route and ranks can read them.
    """
    stacked = isinstance(lora_A, Tensor)
    plan = route.plan if stacked else route.loop
    factors: Any = lora_A
    rows = x if plan.gather is None else x.index_select(0, plan.gather)
    width, batched = plan.widths(ranks)
    h = x.new_empty(rows.shape[0], width)
    if batched and plan.batch is not None:
        first, end, size = plan.batch
        groups = rows[: (end - first) * size].view(end - first, size, -1)
        out = h[: (end - first) * size, :batched].view(end - first, size, batched)
        torch.bmm(groups, factors[first:end, :batched].mT, out=out)
    for slot, start, end in plan.segments:
        if rank := ranks[slot]:
            torch.mm(rows[start:end], factors[slot][:rank].t(), out=h[start:end, :rank])
    return h


def slots_compose(
    base: Tensor,
    h: Tensor,
    lora_B: Stack,
    g: Stack | None,
    bias: Stack | None,
    route: Route,
    ranks: tuple[int, ...],
    keep: bool = True,
) -> Tensor:
    """Return ``y = g_s * (base + h B_sᵀ) + bias_s``, and base for tokens without a slot.

    Args:
        base: ``[T, N]``, in lora_B's dtype.
        h: from `slots_shrink`.
        lora_B: ``[S, N, R]``, scaling included, or ``[N, r_s]`` for each slot.
        g: ``[S, N]``, or ``[N]`` for each slot, in float32 (float64 for float64); None for plain LoRA.
        bias: as g. Where base contains the layer's bias b, this is ``(1 - g) * b``. Not read without g.
        ranks: as for `slots_shrink`.
        keep: False if y may be written into base.

    Returns:
        ``[T, N]`` in base's dtype.
    """
    stacked = isinstance(lora_B, Tensor)
    plan = route.plan if stacked else route.loop
    factors: Any = lora_B
    scales: Any = g
    biases: Any = bias
    if plan.gather is None:
        rows = base.clone() if keep else base
    else:
        rows = base.index_select(0, plan.gather)
    _, batched = plan.widths(ranks)
    if batched and plan.batch is not None:
        first, end, size = plan.batch
        part = rows[: (end - first) * size].view(end - first, size, -1)
        low = h[: (end - first) * size, :batched].view(end - first, size, batched)
        part.baddbmm_(low, factors.mT[first:end, :batched])
        if scales is not None:
            _rescale(part, scales[first:end, None], None if biases is None else biases[first:end, None])
    for slot, start, end in plan.segments:
        if rank := ranks[slot]:
            part = rows[start:end]
            part.addmm_(h[start:end, :rank], factors[slot].t()[:rank])
            if scales is not None and (scale := scales[slot]) is not None:
                _rescale(part, scale, None if biases is None else biases[slot])
    if plan.gather is None:
        return rows
    if plan.scatter is not None:
        rows = rows.index_select(0, plan.scatter)
    if plan.tokens is None:
        return rows
    return (base.clone() if keep else base).index_copy_(0, plan.tokens, rows)


def _rescale(z: Tensor, g: Tensor, bias: Tensor | None) -> None:
    """``z = g * z + bias``, in place, rounded once."""
    if bias is None:
        z.mul_(g)
    elif z.dtype == g.dtype:
        torch.addcmul(bias, z, g, out=z)
    else:
        z.copy_(torch.addcmul(bias, z, g))
