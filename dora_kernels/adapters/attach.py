"""From a model's adapted layers to an adapter, and back."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from dora_kernels import modules
from dora_kernels.adapters.bases import base_modules, bases_of, check_fit
from dora_kernels.adapters.layers import Adapter, AdapterLayer, problem_of
from dora_kernels.adapters.underscores import UNDERSCORED, resolve

_CLASSES = {
    "linear": "DoRALinear",
    "embedding": "DoRAEmbedding",
    "conv1d": "DoRAConv1d",
    "conv2d": "DoRAConv2d",
    "conv3d": "DoRAConv3d",
}


def extract(model: nn.Module) -> Adapter:
    """The adapter of a model with adapted layers (`DoRALinear` and its like), copied.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no adapted layer, or one with a strength that is not 1, which an adapter does not hold.
    """
    layers: dict[str, AdapterLayer] = {}
    bases = bases_of(model) if isinstance(model, nn.Module) else {}
    for name, layer in _adapted(model).items():
        if layer.strength != 1.0:
            raise ValueError(f"model: {name} has strength {layer.strength:g}, which no adapter holds; set it to 1")
        a, b = (factor.detach().clone() for factor in layer.factors)
        dora = isinstance(layer, modules.DoRALayer)
        layers[name] = AdapterLayer(
            kind=bases[name].kind or "linear",
            lora_A=a,
            lora_B=b,
            magnitude=layer.magnitude.detach().reshape(-1).clone() if dora else None,
            scaling=layer.scaling,
            magnitude_axis=layer.magnitude_axis,
            eps=layer.eps if dora else 0.0,
        )
    if not layers:
        raise ValueError("model: it has no adapted layer")
    return Adapter(layers, "model")


def attach(model: nn.Module, adapter: Adapter) -> list[str]:
    """Give a model an adapter, in place: layers named by it are adapted, or take its values if they are already.

    All is planned and checked before anything changes. A layer that is adapted with another rank, axis or eps is
    adapted anew; adapted layers that the adapter does not name stay as they are.

    Returns:
        The names of the layers.

    Raises:
        TypeError: an argument of the wrong type, or a layer of a type that no class adapts.
        ValueError: the model has not one of the layers, or of another size, or merged, or a value is not finite. The
            model is unchanged.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter: expected an Adapter, got {type(adapter).__name__}")
    adapted, bases = _adapted(model), bases_of(model)
    layers = adapter.layers
    if adapter.config.get(UNDERSCORED):
        layers = resolve(layers, bases, _error, adapter.notes)
    check_fit(layers, bases, _error)
    originals, slots = base_modules(model), defaultdict(list)
    for name, module in originals.items():
        slots[id(module)].append(name)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    planned: dict[str, Any] = {}
    try:
        for name, layer in layers.items():
            original = originals[name]
            if other := next((other for other in slots[id(original)] if other in planned), None):
                raise _error(f"{other} and {name} are one module of the model's")
            planned[name] = _prepared(name, layer, original, adapted.get(name))
    except BaseException:
        for parameter, requires_grad in trained:  # a new layer freezes its base layer
            parameter.requires_grad_(requires_grad)
        raise
    for name, prepared in planned.items():
        if prepared is adapted.get(name):
            _copy(layers[name], prepared)
            continue
        for slot in slots[id(originals[name])]:
            parent, _, last = slot.rpartition(".")
            setattr(model.get_submodule(parent), last, prepared)
    return list(layers)


def _adapted(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if isinstance(module, modules.AdaptedLayer)}


def _error(text: str) -> ValueError:
    return ValueError(f"adapter: {text}")


def _prepared(name: str, layer: AdapterLayer, original: Any, present: Any) -> Any:
    """The adapted layer that takes the values: `present`, still unchanged, or a new one that holds them."""
    if problem := problem_of(layer):
        raise _error(f"{name}: {problem}")
    if not name:
        raise _error("the model itself is the layer, which cannot be exchanged inside it")
    if present is not None and present.merged:
        raise ValueError(f"model: {name} is merged; call unmerge() before")
    dora = layer.magnitude is not None
    tensors = [tensor for tensor in (layer.lora_A, layer.lora_B, layer.magnitude) if tensor is not None]
    if present is not None and isinstance(present, modules.DoRALayer) == dora and present.rank == layer.rank:
        if not dora or (present.magnitude_axis, present.eps) == (layer.magnitude_axis, layer.eps):
            _check_values(name, tensors, present.factors[0].dtype)
            return present
    dtype = original.weight.dtype if original.weight.dtype == torch.float64 else tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    _check_values(name, tensors, dtype)
    called = _CLASSES[layer.kind]
    options: dict[str, Any] = {"magnitude_axis": layer.magnitude_axis, "eps": layer.eps}
    if not dora:
        called, options = called.replace("DoRA", "LoRA"), {}
    if not hasattr(modules, called):
        raise _error(f"{name}: there is no layer for plain LoRA of the kind {layer.kind!r}")
    if present is not None:
        options |= {"dropout": present.dropout.p, "backend": present.backend}
    new = getattr(modules, called).from_base(
        original, rank=layer.rank, alpha=layer.scaling * layer.rank, adapter_dtype=dtype, **options
    )
    _copy(layer, new)
    return new


def _check_values(name: str, tensors: list[torch.Tensor], dtype: torch.dtype) -> None:
    for tensor in tensors:
        if not bool(tensor.to(dtype).isfinite().all()):
            raise _error(f"{name}: it has values that are not finite in {dtype}, the layer's")


@torch.no_grad()
def _copy(layer: AdapterLayer, target: Any) -> None:
    a, b = target.factors
    a.copy_(layer.lora_A)
    b.copy_(layer.lora_B)
    if layer.magnitude is not None:
        target.lora_magnitude_vector.copy_(layer.magnitude.view(target.lora_magnitude_vector.shape))
    target.use_rslora, target.alpha = False, layer.scaling * layer.rank
    target.scaling = layer.scaling  # alpha / rank rounds
