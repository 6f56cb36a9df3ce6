"""Fit an adapter to a format: fold into the factors what the format has no place for, else raise an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dora_kernels.adapters.adapter import SMALL_EPS, AdapterLayer, eps_note, problem_of
from dora_kernels.modules.conv import KEPT_BY

LARGEST = 1e20
"""Largest scaling in a file: readers accept an alpha up to 1e30; ranks, folding and rounding need a margin."""

Layers = dict[str, AdapterLayer]


@dataclass
class Writing:
    """The context of a format's `write`: errors that name the layer, and notes about what was folded.

    Attributes:
        known: the names of the model's layers, adapted or not, if the source is a model.
        prefix: the caller's prefix of the names, for formats that have one; empty for the format's choice.
    """

    format: str
    known: Collection[str] = ()
    prefix: str = ""
    notes: list[str] = field(default_factory=list)

    def error(self, name: str, reason: str) -> ValueError:
        return ValueError(f"{name} cannot be written as {self.format!r}: {reason}")

    def fitting(
        self,
        layers: Mapping[str, AdapterLayer],
        axes: Mapping[str, Collection[str]],
        *,
        plain: bool = True,
        grouped: bool = False,
        model_of: Callable[[str], str] = lambda name: "",
    ) -> Layers:
        """Return `layers` after checking that the format supports their kinds and their magnitudes' axes.

        Args:
            axes: the axes that the format has, by kind.
            plain: True if the format also has plain LoRA.
            grouped: True if its plain LoRA of convolutions with groups is the same as here.
            model_of: maps a layer to the model it belongs to; each model has either DoRA or plain LoRA throughout.

        Raises:
            ValueError: a layer does not fit.
        """
        for name, layer in layers.items():
            if problem := problem_of(layer):
                raise self.error(name, problem)
            if abs(layer.scaling) > LARGEST:
                raise self.error(name, f"scaling {layer.scaling:g}: expected a finite number up to {LARGEST:g}")
            if layer.kind not in axes:
                raise self.error(name, f"the format has no {layer.kind}, only {', '.join(axes)}")
            if layer.magnitude is not None and layer.magnitude_axis not in axes[layer.kind]:
                has = " or ".join(map(repr, axes[layer.kind]))
                raise self.error(name, f"magnitude_axis is {layer.magnitude_axis!r}, the format only has {has} for "
                                        f"{layer.kind} layers, and factors cannot turn one into the other")  # fmt: skip
            if layer.grouped and not (grouped and layer.magnitude is None):
                raise self.error(
                    name, f"for a convolution with groups the format has another low-rank product or norm; {KEPT_BY}"
                )
        without = [name for name, layer in layers.items() if layer.magnitude is None]
        dora = {model_of(name) for name, layer in layers.items() if layer.magnitude is not None}
        if mixed := [name for name in without if model_of(name) in dora]:
            raise self.error(
                mixed[0], "it has no magnitude, but other layers have one; a file holds either DoRA or LoRA"
            )
        if without and not plain:
            raise self.error(without[0], "it has no magnitude (plain LoRA), but the format only has DoRA")
        return dict(layers)

    def with_eps(self, layers: Layers, eps: float = 0.0) -> Layers:
        """Return `layers` for a format that adds `eps` to the norm."""
        dora = {name: layer.eps for name, layer in layers.items() if layer.magnitude is not None}
        different = {name: own for name, own in dora.items() if own != eps}
        for name, own in different.items():
            if abs(own - eps) > SMALL_EPS:
                raise self.error(name, f"it adds eps {own:g} to its norm, but the format adds {eps:g}")
        if different:
            change = max(abs(own - eps) for own in different.values())
            self.notes.append(eps_note(eps, change))
        return {name: replace(layer, eps=eps) if name in different else layer for name, layer in layers.items()}

    def one_scaling(self, layers: Layers, scaling: float | None = None) -> tuple[Layers, float]:
        """Return `layers` with a common scaling: `scaling`, or the most common one. The rest is folded into lora_B."""
        if scaling is None:
            scaling = Counter(layer.scaling for layer in layers.values()).most_common(1)[0][0] or 1.0
        folded = {name: self._fold(layer, scaling) for name, layer in layers.items()}
        changed = sum(folded[name] is not layer for name, layer in layers.items())
        if changed:
            widened = sum(folded[name].lora_B.dtype != layer.lora_B.dtype for name, layer in layers.items())
            text = f"the scaling of {changed} of {len(layers)} layers was folded into lora_B: the format has only one"
            self.notes.append(f"{text}; {widened} lora_B became float32" if widened else text)
        return folded, scaling

    def one_rank(self, layers: Layers) -> tuple[Layers, int]:
        """Return `layers` with a common rank, the highest one. The other factors are padded with zeros."""
        rank = max(layer.rank for layer in layers.values())
        padded = {name: _pad(layer, rank) for name, layer in layers.items()}
        changed = sum(padded[name] is not layer for name, layer in layers.items())
        if changed:
            self.notes.append(f"{changed} of {len(layers)} layers were padded with zeros to rank {rank}")
        return padded, rank

    def _fold(self, layer: AdapterLayer, scaling: float) -> AdapterLayer:
        if layer.scaling == scaling:
            return layer
        return replace(layer, lora_B=_times(layer.lora_B, layer.scaling / scaling), scaling=scaling)


def _times(tensor: Tensor, factor: float) -> Tensor:
    """``factor * tensor``, in the tensor's dtype if that is exact (a power of two), else in float32."""
    product = tensor.double() * factor
    same = product.to(tensor.dtype)
    return same if torch.equal(same.double(), product) else product.to(torch.promote_types(tensor.dtype, torch.float32))


def _pad(layer: AdapterLayer, rank: int) -> AdapterLayer:
    more = rank - layer.rank
    if not more:
        return layer
    stacked = layer.kind == "experts"  # [E, r, K] and [E, N, r]
    after = (0, 0) * (layer.lora_A.dim() - 1 - stacked)
    return replace(
        layer,
        lora_A=F.pad(layer.lora_A, (*after, 0, more)),
        lora_B=F.pad(layer.lora_B, (*after[2:], 0, more)),
    )
