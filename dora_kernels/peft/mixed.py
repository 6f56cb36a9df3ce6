"""Batches with an adapter for each row, on PEFT's linear layers: one route for all layers, and the engine's slots."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from dora_kernels.core.scale import quotient
from dora_kernels.engine.route import Route
from dora_kernels.engine.slots import slots_compose, slots_shrink
from dora_kernels.modules.linear import is_conv1d
from dora_kernels.peft.shards import is_split
from dora_kernels.peft.state import active_dropout, hooked, norm_cache, strength


@functools.lru_cache(maxsize=64)
def _route(names: tuple[str, ...], ranks: tuple[tuple[str, int], ...], tokens: int, device: torch.device) -> Route:
    """The route of a batch. The layers of a forward ask for the same."""
    slots = {name: slot for slot, (name, _) in enumerate(ranks)}
    return Route.of([slots.get(name, -1) for name in names], [rank for _, rank in ranks], tokens, device)


def readable(layer: Any, x: Tensor, names: list[str]) -> dict[str, tuple[Tensor, Tensor, Any]]:
    """Return what `routed` needs of the adapters that can be run by slots: A, B and, of DoRA, the tensors; by name.

    Left to their modules are adapters with hooks, active dropout, a strength, or factors of another dtype than the
    first's, and all of them where gradients, autocast or a compiler are on, or where the layer is split over processes.
    """
    if is_split(layer) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return {}
    if layer.merged or layer.disable_adapters:
        return {}
    if torch.is_autocast_enabled(x.device.type) or nn_module._has_any_global_hook():
        return {}
    children, found, dtype = layer._modules, dict[str, tuple[Tensor, Tensor, Any]](), None
    for name in dict.fromkeys(names):
        lora_A = children["lora_A"]._modules.get(name)
        if lora_A is None or strength(layer, name) != 1.0 or active_dropout(layer, name):
            continue
        lora_B, variant, weights = children["lora_B"]._modules[name], layer.lora_variant.get(name), None
        if hooked(lora_A, lora_B) or type(layer.scaling[name]) not in (float, int):
            continue
        if variant is not None:
            weights = variant.read(layer, name) if getattr(variant, "by_slots", False) else None
            if weights is None:
                continue
            a, b = weights.lora_A, weights.lora_B
        elif type(lora_A) is type(lora_B) is nn.Linear and lora_A.bias is lora_B.bias is None:
            a, b = lora_A.weight, lora_B.weight
        else:
            continue
        dtype = dtype or a.dtype
        if a.dtype == b.dtype == dtype and a.device == b.device == x.device and dtype.itemsize >= x.dtype.itemsize:
            found[name] = a, b, weights
    return found


def routed(
    layer: Any, x: Tensor, result: Tensor, names: list[str], read: dict[str, tuple[Tensor, Tensor, Any]]
) -> Tensor:
    """Return the base layer's `result` with the adapters of the rows that have one of `read`."""
    ranks = tuple((name, a.shape[0]) for name, (a, _, _) in read.items())
    route = _route(tuple(names), ranks, x.shape[1:-1].numel(), x.device)
    scales: list[Tensor | None] = []
    biases: list[Tensor | None] = []
    for name, (_, _, weights) in read.items():
        g = bias = None
        if weights is not None:
            variant, frozen = layer.lora_variant[name], norm_cache(layer, name).frozen
            g = frozen[1] if frozen else quotient(weights.magnitude, variant.divisor(layer, name, weights), result)
            if (of_base := variant.bias(layer, name, weights)) is not None:
                bias = (1.0 - g) * of_base
        scales.append(g)
        biases.append(bias)
    lora_A, lora_B = ([factors[i] for factors in read.values()] for i in (0, 1))
    dtype, own = lora_A[0].dtype, tuple(rank for _, rank in ranks)
    scalings = [layer.scaling[name] for name in read]
    base: Any = layer.base_layer
    keep = hooked(base) or not (type(base) is nn.Linear or is_conv1d(base))
    rows = result.reshape(-1, result.shape[-1]).to(dtype)
    h = slots_shrink(x.reshape(-1, x.shape[-1]).to(dtype), lora_A, route, own)
    y = slots_compose(rows, h, lora_B, scales, biases, route, own, keep, scalings=scalings)
    return y.view(result.shape).to(result.dtype)
