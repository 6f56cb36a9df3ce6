"""A slot of one of vLLM's LoRA layers: its magnitudes on this rank, its norm, its g.

For each slice s of the layer's output vLLM keeps the factors of slot i in ``lora_a_stacked[s][i, 0]`` ``[rank, K]`` and
``lora_b_stacked[s][i, 0]`` ``[N, rank]``: cut for this rank, padded to the largest rank, B times the scaling. A merged
layer has a slice for each of its projections. Only attributes of the layer are used here: vLLM need not be installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.core.scale import magnitude_scale
from dora_kernels.functional import dora_weight_norm
from dora_kernels.modules.opaque import constants_of, opaque_norm

Magnitudes = Sequence[Tensor | None]


def magnitudes_here(layer: Any, magnitudes: Magnitudes) -> list[Tensor | None]:
    """Return each slice's magnitude on this rank, cut as the layer cuts the rows of B. None: a slice without one.

    Args:
        magnitudes: one for each projection in the adapter's file, or one for the whole layer.
    """
    columns: Any = [None if m is None else m.unsqueeze(1) for m in magnitudes]
    if layer.n_slices > 1 and len(columns) == 1 and columns[0] is not None:
        columns = list(columns[0].split(list(layer.base_layer.output_sizes)))
    elif len(columns) != layer.n_slices:
        columns = layer.expand_packed_lora(columns, columns)[1]
    if layer.tp_size > 1:
        columns = layer.slice_lora_b(columns) if hasattr(layer, "output_ids") else [layer.slice_lora_b(columns[0])]
    return [None if column is None else column.squeeze(1) for column in columns]


def write_scale(
    layer: Any, slot: int, rank: int, magnitudes: Magnitudes, reduce: Callable[[Tensor], Tensor] | None
) -> None:
    """Compute g of a slot whose factors have been written, in float32, from the layer's unmerged weight.

    Args:
        rank: the adapter's largest rank; the rest of the slot is padding.
        reduce: sums a tensor over the ranks that hold parts of each row of W; None if each row is whole here.
    """
    norms = torch.cat(row_norms(layer, slot, rank))
    if reduce is not None:
        norms = reduce(norms.square()).sqrt()
    here = magnitudes_here(layer, magnitudes)
    for g, magnitude, norm in zip(_slices(layer, layer.dora_scale[slot]), here, _slices(layer, norms)):
        if magnitude is not None:
            g.copy_(magnitude_scale(magnitude.to(norm.device), norm))
    if layer.dora_offset is not None:
        layer.dora_offset[slot] = (1.0 - layer.dora_scale[slot]) * layer.base_layer.bias


def row_norms(layer: Any, slot: int, rank: int) -> list[Tensor]:
    """Norms of the rows of ``W + B A`` on this rank, one tensor for each slice."""
    factors = [(a[slot, 0, :rank], b[slot, 0, :, :rank]) for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked)]
    weight = _weight(layer)
    if weight is not None:
        return [dora_weight_norm(w, a, b) for w, (a, b) in zip(_slices(layer, weight), factors)]
    if layer.dora_constants is None:
        like = factors[0][0]
        layer.dora_constants = constants_of(_Rows(layer.base_layer, slice(None)), like, like.shape[1])
    norms, start = [], 0
    for a, b in factors:
        rows = slice(start, start := start + b.shape[0])
        constants: Any = functools.partial(tuple, [whole[rows] for whole in layer.dora_constants])
        norms.append(opaque_norm(_Rows(layer.base_layer, rows), a, b, 1.0, constants))
    return norms


class _Rows(nn.Module):
    """Some rows of a layer that shows its weight only through its forward, without the bias."""

    def __init__(self, base: Any, rows: slice) -> None:
        super().__init__()
        self._product, self._rows = functools.partial(base.quant_method.apply, base), rows

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._product(x, None)
        return y[:, self._rows]


def _slices(layer: Any, rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split([b.shape[2] for b in layer.lora_b_stacked])


def _weight(layer: Any) -> Tensor | None:
    """W ``[N, K]`` as the layer holds it; None if it is quantised, or packed as vLLM packs it on a CPU."""
    weight = getattr(layer.base_layer, "weight", None)
    shape = sum(b.shape[2] for b in layer.lora_b_stacked), layer.lora_a_stacked[0].shape[3]
    plain = type(layer.base_layer.quant_method).__name__ == "UnquantizedLinearMethod"
    return weight if plain and weight is not None and weight.shape == shape else None
