"""Many adapters in one batch: ``y_t = g_s * (base_t + (x_t A_sᵀ) B_sᵀ) + bias_s`` with the slot s of each token t.

The factors of all slots are stacked, and never gathered per token. `slots_shrink` gives h, and `slots_compose` y. The
route says which slot each token has. It is made once per forward. Tokens without a slot keep base to the bit. The
scaling is part of B.

The two are for inference: they write into what they made, and nothing is recorded for a backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_kernels.engine.dispatch import kernels
from dora_kernels.engine.formula import scaled
from dora_kernels.engine.route import Route

Stack = Tensor | Sequence[Tensor | None]
"""A matrix or a vector for each slot: stacked, or in a sequence, which may have None for a slot."""


def slots_shrink(x: Tensor, lora_A: Stack, route: Route, ranks: tuple[int, ...], backend: str = "torch") -> Tensor:
    """Return ``h = x A_sᵀ``.

    Args:
        x: ``[T, K]``, in lora_A's dtype.
        lora_A: ``[S, R, K]``, or ``[r_s, K]`` for each slot.
        ranks: the rank of each slot, at most R; 0 for a slot that leaves this layer as it is. Beyond a slot's rank its
            factors are 0.
        backend: "torch", or for stacked factors "triton".

    Returns:
        ``[rows, largest rank at work]``. The rows are in an order of the route's own, and only `slots_compose` with the
        same route, ranks and backend can read them.
    """
    if backend == "triton":  # the product is compose's, onto 0
        zeros = x.new_zeros(x.shape[0], lora_A.shape[1])  # type: ignore[union-attr]
        return kernels().compose(zeros, x, lora_A, None, None, 1.0, False, None, route.ends, route.order)
    plan = route.plan(isinstance(lora_A, Tensor), x.dtype.itemsize < 4)
    rows = x if plan.gather is None else x.index_select(0, plan.gather)
    parts = plan.parts(lora_A, ranks, "A")
    if len(parts) == 1 and parts[0][0].stop - parts[0][0].start == rows.shape[0]:
        (group, rank, factor), *_ = parts
        if factor.dim() == 2:
            return torch.mm(rows, factor)
        return torch.bmm(rows.view(-1, group.size, rows.shape[1]), factor).view(-1, rank)
    h = x.new_empty(rows.shape[0], route.width(ranks))
    for group, rank, factor in parts:
        part, out = rows[group.start : group.stop], h[group.start : group.stop, :rank]
        if factor.dim() == 2:
            torch.mm(part, factor, out=out)
        else:
            torch.bmm(part.view(-1, group.size, x.shape[1]), factor, out=out.view(-1, group.size, rank))
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
    backend: str = "torch",
    scalings: Sequence[float] | None = None,
) -> Tensor:
    """Return ``y = g_s * (base + h B_sᵀ) + bias_s``, and base for tokens without a slot.

    Args:
        base: ``[T, N]``, in lora_B's dtype.
        h: from `slots_shrink`.
        lora_B: ``[S, N, R]``, scaling included, or in a sequence ``[N, r_s]`` for each slot.
        g: ``[S, N]``, or ``[N]`` for each slot, in float32 (float64 for float64); None for plain LoRA.
        bias: as g. Where base contains the layer's bias b, this is ``(1 - g) * b``. Not read without g.
        ranks: as for `slots_shrink`.
        keep: False if y may be written into base.
        backend: as for `slots_shrink`.
        scalings: of the factors in a sequence, where B does not include it.

    Returns:
        ``[T, N]`` in base's dtype.
    """
    if backend == "triton":
        y, bias = base.clone() if keep else base, None if g is None else bias
        return kernels().compose(y, h, lora_B, g, bias, 1.0, False, None, route.ends, route.order)
    plan = route.plan(isinstance(lora_B, Tensor), base.dtype.itemsize < 4)
    if plan.gather is None:
        rows = base.clone() if keep else base
    else:
        rows = base.index_select(0, plan.gather)
    parts = plan.parts(lora_B, ranks, "B")
    scales = () if g is None else plan.parts(g, ranks, "g")
    biases = () if g is None or bias is None else plan.parts(bias, ranks, "g")
    whole = len(parts) == 1 and parts[0][0].stop - parts[0][0].start == rows.shape[0]
    for i, (group, rank, factor) in enumerate(parts):
        z, low = (rows, h) if whole else (rows[group.start : group.stop], h[group.start : group.stop, :rank])
        if factor.dim() == 2:
            z.addmm_(low, factor, alpha=1.0 if scalings is None else scalings[group.first])
        else:
            z = z.view(-1, group.size, z.shape[1])
            z.baddbmm_(low.view(-1, group.size, rank), factor)
        if scales and (scale := scales[i][2]) is not None:
            _rescale(z, scale, biases[i][2] if biases else None)
    if plan.gather is None:
        return rows
    if plan.scatter is not None:
        rows = rows.index_select(0, plan.scatter)
    if plan.tokens is None:
        return rows
    return (base.clone() if keep else base).index_copy_(0, plan.tokens, rows)


# Rows of 16 bits from which float32 factors are multiplied by a batch normalization (`formula.scaled`) whose result is
# copied: 512 rows of 1024 take 85 us and 4096 rows 774 us, with `mul_` 114 us and 2114 us; 64 rows take the same (one
# core).
_LONG = 128


def _rescale(z: Tensor, g: Tensor, bias: Tensor | None) -> None:
    """``z = g * z + bias``, in place, rounded once; of several slots z is ``[W, P, N]``, g and bias ``[W, 1, N]``."""
    if z.dtype != g.dtype and z.shape[-2] >= _LONG:
        if z.dim() == 2:
            z.copy_(scaled(z, g, bias))
        else:
            for slot in range(z.shape[0]):
                _rescale(z[slot], g[slot, 0], None if bias is None else bias[slot, 0])
    elif bias is None:
        z.mul_(g)
    elif z.dtype == g.dtype:
        torch.addcmul(bias, z, g, out=z)
    else:
        z.copy_(torch.addcmul(bias, z, g))
