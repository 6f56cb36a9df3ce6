"""Combine adapters into one by a weighted sum, or change an adapter's strength.

See `dora_kernels.core.weighted_sum`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.base_layers import BaseLayer, base_layers_of, check_fit
from dora_kernels.adapters.beside import common_beside
from dora_kernels.adapters.experts import of_expert
from dora_kernels.adapters.formats.stacks import layout, settled
from dora_kernels.adapters.names import COMPONENTS, UNDERSCORED, own_layers
from dora_kernels.core import validation, weighted_sum
from dora_kernels.core.precision import accumulation_dtype
from dora_kernels.core.scale import magnitude_scale
from dora_kernels.functional import dora_weight_norm
from dora_kernels.model.targets import check_loaded


@dataclass(frozen=True)
class CombinedLayer:
    """The result for one layer.

    Attributes:
        rank: of the new adapter.
        error: Frobenius norm of what the rank cuts off from the merged weight, relative to that of the sum's change.
        replaced: number of magnitudes (rows, or columns for axis "in") whose weight cancels in the sum while an update
            remains. They keep a share of the base weight that is as small as rounding.
    """

    rank: int
    error: float
    replaced: int


@dataclass(frozen=True)
class CombineReport:
    """The result of `combine_adapters`, by layer."""

    layers: dict[str, CombinedLayer]

    @property
    def error(self) -> float:
        """The largest error of a layer."""
        return max((layer.error for layer in self.layers.values()), default=0.0)

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers.values()]
        text = f"{len(ranks)} layers, rank {min(ranks)} to {max(ranks)}; "
        worst = max(self.layers, key=lambda name: self.layers[name].error)
        text += f"at most {self.error:.1e} of the change is lost, in {worst}" if self.error else "exact"
        replaced = sum(layer.replaced for layer in self.layers.values())
        return text + (f"; the base weight cancels in {replaced} rows or columns" if replaced else "")


def combine_adapters(
    model: nn.Module, adapters: Sequence[Adapter], weights: Sequence[float], *, rank: int | None = None
) -> tuple[Adapter, CombineReport]:
    """Combine adapters into one that changes a model's weights by the weighted sum of their changes.

    The merged weight is ``W + Σ w_i (merged_i - W)``. The sum of DoRA adapters along one axis, and of plain LoRA, is
    again a DoRA adapter, whose rank is the sum of the ranks. It is exact, in float32 (float64 for float64). A layer
    that an adapter does not have counts as unchanged by it. The result has a scaling of 1. If some layers are DoRA,
    layers with plain LoRA only get a magnitude that leaves them unchanged, because a file has either DoRA or plain
    LoRA.

    Args:
        model: the base model, adapted or not; it is not changed. The norms are computed from its weights.
        adapters: at least one; an adapter may occur several times.
        weights: a finite number for each adapter, of any sign.
        rank: None for the sum of the ranks, or the largest rank that a layer may have. The update is then cut by its
            singular values, which gives the merged weight nearest to the sum for the sum's own factor of the base
            weight. The report says how near.

    Returns:
        The adapter, and a `CombineReport`.

    Raises:
        TypeError: an argument has a wrong type, or a base weight is not a floating-point tensor (quantised).
        ValueError: there is not one weight for each adapter; a weight, or a value of the model or of an adapter, is not
            finite; `rank` is below 1; a layer is missing in the model, has another shape or is on the meta device; a
            convolution has groups, so that its update is not a product of two factors; or a layer's adapters have
            magnitudes along both axes, whose sum is exact only as a dense weight; or the tensors beside the adapters
            (`Adapter.beside`), which the result keeps, have different values.
    """
    _check(model, adapters, weights, rank)
    return _weighted_sum(model, adapters, weights, None if rank is None else int(rank), "adapters")


@torch.no_grad()
def _weighted_sum(
    model: nn.Module, adapters: Collection[Adapter], weights: Collection[float], rank: int | None, argument: str
) -> tuple[Adapter, CombineReport]:
    """`combine_adapters`; `argument` is the caller's name for the adapters."""
    base_layers = base_layers_of(model)
    found: dict[str, list[tuple[float, AdapterLayer]]] = {}
    for weight, adapter in zip(weights, adapters, strict=True):
        for name, layer in _layers(adapter, base_layers, argument).items():
            found.setdefault(name, []).append((float(weight), layer))
    axes = {each.magnitude_axis for parts in found.values() for _, each in parts if each.magnitude is not None}
    common = min(axes, key=("out", "in").index, default=None)
    layers, report, given = {}, {}, []
    for name, parts in found.items():
        combined = _combined_experts if base_layers[name].kind == "experts" else _combined
        layers[name], cut = combined(name, base_layers[name], parts, rank, common, argument)
        error = cut.lost / cut.change if cut.change else 0.0
        report[name] = CombinedLayer(layers[name].rank, error, cut.replaced)
        if common is not None and not any(layer.magnitude is not None for _, layer in parts):
            given.append(
                f"{name} is plain LoRA among DoRA layers, so its magnitude was set to the weight's norm (g = 1)"
            )
    of = " + ".join(f"{weight:g} × {adapter.format}" for weight, adapter in zip(weights, adapters, strict=True))
    result, base = CombineReport(report), common_beside(adapters, argument)
    config = base.config | layout(layers, base_layers, model)
    notes = [f"combined: {of}; {result}", *given]
    return replace(base, layers=layers, notes=notes, config=config), result


def with_strength(model: nn.Module, adapter: Adapter, strength: float) -> Adapter:
    """Return the adapter whose merged weight is ``W + strength * (merged - W)``: exact, with the same ranks.

    Strength 1 is the adapter itself. Strength 0, merged, is the base model bit for bit. (Unmerged, m over the norm is 1
    up to rounding; a layer's own ``strength`` is exact there too.) Numbers beyond 1 and below 0 extrapolate.

    Args:
        model: the base model, adapted or not; it is not changed.
        adapter: the adapter at strength 1; it is not changed.
        strength: any finite number.

    Returns:
        A new adapter; at strength 1 `adapter` itself.

    Raises:
        TypeError: as `combine_adapters`, of `model`, `adapter` and `strength`.
        ValueError: as `combine_adapters`.
    """
    _check_model(model)
    _check_adapter(adapter, "adapter", "an Adapter")
    if not adapter.layers:
        raise ValueError("adapter: expected layers, got none")
    validation.check_strength(strength)
    result, _ = _weighted_sum(model, [adapter], [strength], None, "adapter")
    if strength == 1:
        return adapter
    adapter = settled(adapter, base_layers_of(model))
    config = {name: value for name, value in adapter.config.items() if name not in (UNDERSCORED, COMPONENTS)}
    config |= result.config
    notes = [*adapter.notes, f"at a strength of {strength:g}", *result.notes[1:]]
    return Adapter(result.layers, adapter.format, notes, config, adapter.beside)


_Parts = Sequence[tuple[float, AdapterLayer]]
"""The adapters of one layer, each with its weight."""


def _check(model: Any, adapters: Any, weights: Any, rank: Any) -> None:
    _check_model(model)
    for argument, value, what in (("adapters", adapters, "Adapter"), ("weights", weights, "numbers")):
        if not isinstance(value, Collection) or isinstance(value, str | bytes):
            raise TypeError(f"{argument}: expected a list of {what}, got {type(value).__name__}")
    for adapter in adapters:
        _check_adapter(adapter, "adapters", "Adapter")
    if not adapters:
        raise ValueError("adapters: expected at least one, got none")
    if not any(adapter.layers for adapter in adapters):
        raise ValueError("adapters: expected layers, got none")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: expected {len(adapters)}, one for each adapter, got {len(weights)}")
    for weight in weights:
        validation.check_number(weight, "weights", "numbers")
    if rank is not None:
        validation.check_size(rank, "rank", "an int or None")


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _check_adapter(adapter: Any, argument: str, what: str) -> None:
    if not isinstance(adapter, Adapter):
        hint = "; read_adapter(path) gives one" if isinstance(adapter, str | os.PathLike) else ""
        raise TypeError(f"{argument}: expected {what}, got {type(adapter).__name__}{hint}")


def _layers(adapter: Adapter, base_layers: dict[str, BaseLayer], argument: str) -> dict[str, AdapterLayer]:
    """An adapter's layers by the model's names. The model must have all of them."""

    def error(text: str) -> ValueError:
        return ValueError(f"{argument}: {text}")

    layers = own_layers(settled(adapter, base_layers), base_layers, error, [])
    check_fit(layers, base_layers, error)
    return layers


class _Problem:
    """A layer's base weight as the linear problem, its axis, and the layout of factors and magnitudes in it."""

    def __init__(
        self, name: str, base: BaseLayer, layers: Sequence[AdapterLayer], common: str | None, argument: str
    ) -> None:
        weight = base.weight.detach()
        if not weight.is_floating_point():
            raise TypeError(f"model: {name}: expected a floating-point weight, got {weight.dtype} (quantised)")
        check_loaded(base, f"model: {name}")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"model: {name}: its weight has values that are not finite")
        axes = {layer.magnitude_axis for layer in layers if layer.magnitude is not None}
        if len(axes) > 1:
            raise ValueError(
                f"{argument}: {name}: magnitudes along 'out' and along 'in'; their sum is a dense weight, not a DoRA "
                "adapter"
            )
        for layer in layers:
            for part, tensor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B), ("magnitude", layer.magnitude)):
                if tensor is not None and not bool(tensor.isfinite().all()):
                    raise ValueError(f"{argument}: {name}: {part} has values that are not finite")
            if layer.lora_B.dim() > 2 and layer.lora_A.shape[1] != weight.shape[1]:
                raise ValueError(f"{argument}: {name}: adapters of a grouped convolution cannot be added up")
        self.kernel = base.kernel
        self.weight = weight.t() if base.kind == "embedding" else weight.flatten(1)
        self.plain = common is None
        self.axis = axes.pop() if axes else common or "out"
        self.dtype = accumulation_dtype(weight, *(t for layer in layers for t in (layer.lora_A, layer.lora_B)))
        self.length = base.features[1 if self.axis == "out" else 0]

    def factors(self, layer: AdapterLayer) -> tuple[Tensor, Tensor]:
        a, b = (t.detach().to(self.weight.device, self.dtype) for t in (layer.lora_A, layer.lora_B))
        return a.flatten(1), b.flatten(1)

    def norm(self, a: Tensor, b: Tensor, scaling: float = 1.0) -> Tensor:
        """The norm of the adapted weight, one value per magnitude."""
        norm = dora_weight_norm(self.weight, a, b, scaling=scaling, magnitude_axis=self.axis)
        return norm if norm.numel() == self.length else norm.view(self.length, -1).norm(dim=1)

    def part(self, weight: float, layer: AdapterLayer) -> weighted_sum.Part:
        a, b = self.factors(layer)
        scale = None
        if layer.magnitude is not None:
            norm = self.norm(a, b, layer.scaling)
            scale = magnitude_scale(layer.magnitude.detach().to(norm), norm + layer.eps)
        b = weight * layer.scaling * b
        left, right = (b, a) if self.axis == "out" else (a.t(), b.t())
        return weighted_sum.Part(weight, left, right, scale)


class _Cut(NamedTuple):
    """Norms of what the rank cuts off and of the sum's change (0 if nothing is cut); and `CombinedLayer.replaced`."""

    lost: float
    change: float
    replaced: int


def _combined(
    name: str, base: BaseLayer, found: _Parts, rank: int | None, common: str | None, argument: str
) -> tuple[AdapterLayer, _Cut]:
    problem = _Problem(name, base, [layer for _, layer in found], common, argument)
    first = found[0][1]
    parts = [problem.part(weight, layer) for weight, layer in found]
    a, b = problem.factors(first)
    full = weighted_sum.weighted_sum(parts, lambda: problem.norm(a, torch.zeros_like(b)), problem.dtype, problem.length)
    total, lost = (full, 0.0) if rank is None else weighted_sum.of_rank(full, rank)
    left, right = weighted_sum.divided(total), total.right
    a, b = (right, left) if problem.axis == "out" else (left.t(), right.t())
    a, b = a.contiguous(), b.contiguous()
    magnitude = None if problem.plain else total.factor * problem.norm(a, b)
    change = 0.0
    if total is not full:
        out_first = problem.axis == "out"
        change = weighted_sum.change(full, problem.weight if out_first else problem.weight.t())
    home = first.lora_A.device
    new_rank = a.shape[0]
    layer = replace(
        first,
        lora_A=a.view(new_rank, -1, *problem.kernel).to(home) if problem.kernel else a.to(home),
        lora_B=b.view(*b.shape, *(1 for _ in problem.kernel)).to(home),
        magnitude=None if magnitude is None else magnitude.to(home),
        scaling=1.0, magnitude_axis=problem.axis, eps=0.0,
    )  # fmt: skip
    return layer, _Cut(lost, change, total.replaced)


def _combined_experts(
    name: str, base: BaseLayer, found: _Parts, rank: int | None, common: str | None, argument: str
) -> tuple[AdapterLayer, _Cut]:
    """Expert by expert: each is a linear layer."""
    done = []
    for e, weight in enumerate(base.weight):
        one = BaseLayer("linear", base.features, weight)
        own = [(share, of_expert(layer, e)) for share, layer in found]
        done.append(_combined(f"{name}, expert {e}", one, own, rank, common, argument))
    layers, cuts = zip(*done, strict=True)
    first, magnitudes = layers[0], [layer.magnitude for layer in layers if layer.magnitude is not None]
    layer = replace(
        first,
        kind="experts",
        lora_A=torch.stack([layer.lora_A for layer in layers]),
        lora_B=torch.stack([layer.lora_B for layer in layers]),
        magnitude=torch.stack(magnitudes) if magnitudes else None,
    )
    lost, change = (math.hypot(*(each[i] for each in cuts)) for i in (0, 1))
    return layer, _Cut(lost, change, sum(cut.replaced for cut in cuts))
