"""Convert a model's adapted layers to an adapter (`extract`), and attach an adapter to a model (`attach`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dora_kernels import modules
from dora_kernels.adapters.adapter import Adapter, AdapterLayer, article, problem_of
from dora_kernels.adapters.base_layers import base_layers_of, base_modules, check_fit
from dora_kernels.adapters.beside import WAY_OUT, trained
from dora_kernels.adapters.experts import fill, plan_stacks, single_names, stacked
from dora_kernels.adapters.formats.stacks import layout, settled
from dora_kernels.adapters.names import COMPONENTS, own_layers
from dora_kernels.model.apply import adapted_layers, name_of, no_adapted_layers
from dora_kernels.model.places import places_of, put, submodule, unwrapped
from dora_kernels.model.saving import watch_saving
from dora_kernels.model.targets import adapted_layer, check_layer, check_loaded
from dora_kernels.model.weight_readers import WeightReaders

Models = nn.Module | Mapping[str, nn.Module]
"""A model, or several models of a pipeline by the names it has for them: ``{"unet": ..., "text_encoder": ...}``."""


def joined(models: Any) -> nn.Module:
    """Return one model as it is; several as one model, whose layer names start with the pipeline's name of their model.

    Raises:
        TypeError: `model` is not one of `Models`.
        ValueError: a name contains a dot, or one of the models is an adapted layer itself.
    """
    if not isinstance(models, Mapping) or not models:
        return unwrapped(models)
    holder = nn.Module()
    for name, model in models.items():
        if not isinstance(name, str) or not isinstance(model, nn.Module):
            raise TypeError(f"model: expected torch.nn.Modules by name, got {type(model).__name__} for {name!r}")
        if not name or "." in name:
            raise ValueError(f"model: expected a pipeline's name of a model, such as 'text_encoder', got {name!r}")
        if not unwrapped(model)._modules:
            raise ValueError(f"model: {name} is itself a layer, so there is no parent to replace it in")
        holder._modules[name] = model
    return holder


def extract(model: Models) -> Adapter:
    """Copy the adapter of a model with adapted layers (`DoRALinear` and the others).

    Args:
        model: a model, or several of a pipeline's models by its names for them, each of which may have adapted layers.
            The names of the adapter's layers start with these names then.

    Returns:
        The adapter, of copies.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no adapted layer, or one whose strength is not 1, which an adapter cannot hold.
    """
    layers: dict[str, AdapterLayer] = {}
    several = isinstance(model, Mapping)
    model = joined(model)
    adapted: dict[str, Any] = dict(adapted_layers(model))
    base_layers = base_layers_of(model)
    for name, layer in adapted.items():
        if layer.strength != 1.0:
            raise ValueError(
                f"model: {name} has strength {layer.strength:g}, which an adapter cannot hold; set it to 1, then use "
                f"with_strength(model, adapter, {layer.strength:g}) on the adapter"
            )
        dora = isinstance(layer, modules.DoRALayer)
        if isinstance(layer, modules.LoRAExperts):
            _, stacked_a, stacked_b = layer._problem()
            name = name_of(name, layer)
            magnitude = layer.magnitude.detach().clone() if isinstance(layer, modules.DoRAExperts) else None
            layers[name] = AdapterLayer(
                "experts", stacked_a.detach().clone(), stacked_b.detach().contiguous(), magnitude, layer.scaling
            )
            continue
        a, b = (factor.detach().clone() for factor in layer.factors)
        layers[name] = AdapterLayer(
            kind=base_layers[name].kind or "linear",
            lora_A=a,
            lora_B=b,
            magnitude=layer.magnitude.detach().reshape(-1).clone() if dora else None,
            scaling=layer.scaling,
            magnitude_axis=layer.magnitude_axis,
            eps=layer.eps if dora else 0.0,
        )
    if not layers:
        raise no_adapted_layers(model, "save_pretrained(folder)")
    config = layout(layers, base_layers, model) | ({COMPONENTS: True} if several else {})
    return Adapter(layers, "model", config=config)


def attach(model: Models, adapter: Adapter) -> list[str]:
    """Attach an adapter to a model, in place: adapt its layers, or give adapted layers the adapter's values.

    All is planned and checked before anything changes. A layer that is adapted with another rank, axis or eps is
    adapted anew, with the dropout, backend, detach_norm, strength and frozen parameters that it had (a stack of experts
    has to have the adapter's rank and kind); adapted layers that the adapter does not name stay as they are.

    Args:
        model: changed in place; or several of a pipeline's models by its names for them, for an adapter of all of them.
        adapter: from `read_adapter`, `extract` or `combine_adapters`.

    Returns:
        The names of the layers.

    Warns:
        RuntimeWarning: tensors were trained beside the adapter (`Adapter.beside`), which are left out. It names them.

    Raises:
        TypeError: an argument has a wrong type, `apply_dora` cannot adapt a layer, or the adapter is plain LoRA of a
            convolution or an embedding.
        ValueError: one of the layers is missing in the model, has another size, is merged, has hooks or is on the meta
            device; or a value of the adapter, or of a layer that is adapted for it, is not finite. The model is
            unchanged.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter: expected an Adapter, got {type(adapter).__name__}")
    model = joined(model)
    base_layers = base_layers_of(model)
    single = stacked(settled(adapter, base_layers).layers, base_layers, adapter.notes)
    known = [*base_layers, *single_names(base_layers)]
    layers = own_layers(replace(adapter, layers=single), known, _error, adapter.notes)
    layers = stacked(layers, base_layers, adapter.notes)  # those whose names had lost their dots
    check_fit(layers, base_layers, _error)
    check_plain(layers)
    stacks = {name: layer for name, layer in layers.items() if layer.kind == "experts"}
    layers = {name: layer for name, layer in layers.items() if name not in stacks}
    originals, places = base_modules(model), places_of(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    planned: dict[str, Any] = {}
    readers = WeightReaders()
    try:
        for name, layer in layers.items():
            present = submodule(model, name)
            if other := next((other for other in places[present] if other in planned), None):
                raise _error(f"{other} and {name} are the same module in the model")
            if not isinstance(present, modules.AdaptedLayer):
                check_layer(model, present, name, layer.magnitude is not None, readers)
            check_loaded(originals[name], name)
            planned[name] = present, _prepared(name, layer, originals[name], present)
        around, values = plan_stacks(model, stacks, originals, places, _error)
    except BaseException:
        for parameter, requires_grad in flags:  # a new layer freezes its base layer
            parameter.requires_grad_(requires_grad)
        raise
    for name, (present, prepared) in planned.items():
        if prepared is present:
            _copy(layers[name], prepared)
        else:
            put(model, places[present], prepared)
            watch_saving(model, places[present])
    for present, adapted in around.items():
        put(model, places[present], adapted)
        watch_saving(model, places[present])
    for layer, adapted in values:
        fill(layer, adapted)
    if names := trained(adapter, model):
        text = f"adapter: {names} trained beside the adapter, left out; {WAY_OUT}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return [*layers, *stacks]


def check_plain(layers: Mapping[str, AdapterLayer]) -> None:
    """Raise TypeError for plain LoRA on layers that this package adapts only with a magnitude."""
    for name, layer in layers.items():
        if layer.magnitude is None and layer.kind not in ("linear", "experts"):
            raise TypeError(
                f"adapter: {name}: plain LoRA of {article(layer.kind)} cannot be attached: without magnitudes only "
                "linear layers can; the adapter can only be converted to other formats"
            )


def _error(text: str) -> ValueError:
    return ValueError(f"adapter: {text}")


def _prepared(name: str, layer: AdapterLayer, original: Any, present: Any) -> Any:
    """Return the adapted layer that takes the values: `present`, still unchanged, or a new one that holds them."""
    adapted, dora = isinstance(present, modules.AdaptedLayer), layer.magnitude is not None
    if problem := problem_of(layer):
        raise _error(f"{name}: {problem}")
    if not name:
        raise _error("the model is itself the layer, so there is no parent to replace it in")
    if adapted and present.merged:
        raise ValueError(f"model: {name} is merged; call unmerge() first")
    tensors = [tensor for tensor in (layer.lora_A, layer.lora_B, layer.magnitude) if tensor is not None]
    if adapted and isinstance(present, modules.DoRALayer) == dora and present.rank == layer.rank:
        if not dora or (present.magnitude_axis, present.eps) == (layer.magnitude_axis, layer.eps):
            _check_values(name, tensors, present.factors[0].dtype)
            _check_shapes(name, layer, present)
            return present
    dtype = original.weight.dtype if original.weight.dtype == torch.float64 else tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    _check_values(name, tensors, dtype)
    options = {"magnitude_axis": layer.magnitude_axis, "eps": layer.eps} if dora else {}
    if adapted:
        options |= {"dropout": present.dropout.p, "backend": present.backend}
        if dora and isinstance(present, modules.DoRALayer):
            options["detach_norm"] = present.detach_norm
    alpha = layer.scaling * layer.rank
    new = adapted_layer(original, name, dora, rank=layer.rank, alpha=alpha, adapter_dtype=dtype, **options)
    _check_shapes(name, layer, new)
    _copy(layer, new)
    if adapted:
        new.strength, new._thawed = present.strength, present._thawed
        before = present.adapter_parameters()
        for key, parameter in new.adapter_parameters().items():
            parameter.requires_grad_(key not in before or before[key].requires_grad)
        new.train(present.training)
    return new


def _check_values(name: str, tensors: list[torch.Tensor], dtype: torch.dtype) -> None:
    for tensor in tensors:
        if not bool(tensor.to(dtype).isfinite().all()):
            raise _error(f"{name}: it has values that are not finite in {dtype}, the layer's")


def _check_shapes(name: str, layer: AdapterLayer, target: Any) -> None:
    """Check the factors' shapes, which must not broadcast. Those of a convolution also depend on its groups."""
    for part, came, expected in zip("AB", (layer.lora_A, layer.lora_B), target.factors, strict=True):
        if came.shape != expected.shape:
            raise _error(f"{name}: lora_{part} {list(came.shape)}: expected {list(expected.shape)}")


@torch.no_grad()
def _copy(layer: AdapterLayer, target: Any) -> None:
    a, b = target.factors
    a.copy_(layer.lora_A)
    b.copy_(layer.lora_B)
    if layer.magnitude is not None:
        target.lora_magnitude_vector.copy_(layer.magnitude.view(target.lora_magnitude_vector.shape))
    target.use_rslora, target.alpha = False, layer.scaling * layer.rank
    target.scaling = layer.scaling  # alpha / rank would round
