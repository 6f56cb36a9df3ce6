"""Adapters in a model: `apply_dora` and what goes with it, for any `nn.Module`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels import validation
from dora_kernels.modules import (
    AdaptedLayer,
    DoRAConv1d,
    DoRAConv2d,
    DoRAConv3d,
    DoRAEmbedding,
    DoRALinear,
    LoRALinear,
)
from dora_kernels.modules.linear import is_conv1d
from dora_kernels.rounding import seed_for

_KINDS: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Linear: DoRALinear,
    nn.Embedding: DoRAEmbedding,
    nn.Conv1d: DoRAConv1d,
    nn.Conv2d: DoRAConv2d,
    nn.Conv3d: DoRAConv3d,
}


def apply_dora(
    model: nn.Module,
    target_modules: str | Iterable[str] = "all-linear",
    *,
    rank: int = 8,
    alpha: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = True,
    magnitude_axis: str = "out",
    detach_norm: bool = True,
    eps: float = 0.0,
    backend: str = "auto",
    adapter_dtype: torch.dtype | None = None,
) -> list[str]:
    """Put an adapted layer in the place of every layer of `model` that the patterns name.

    The layers become base layers, shared and frozen; nothing else is frozen (`mark_only_dora_trainable`). A layer that
    the model holds under several names is adapted once, for all of them. Layers that share a weight each get an adapter
    of their own.

    Args:
        model: changed in place.
        target_modules: as PEFT's: a regular expression that matches whole names, or names or ends of names, or
            "all-linear": every linear layer but the model's output embeddings (``get_output_embeddings``) and the
            projections inside `nn.MultiheadAttention`, which reads their weights itself.
        rank, alpha, dropout, use_rslora, magnitude_axis, detach_norm, eps, backend, adapter_dtype: as `DoRALinear`.
        rank_pattern, alpha_pattern: other values for some layers, as PEFT's: keys are regular expressions that match
            the end of a name, from a dot on; the first that does counts.
        exclude_modules: as `target_modules`, of layers to leave out.
        use_dora: False puts plain LoRA on linear layers (`LoRALinear`).

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        TypeError: a layer that is named is of no kind that can be adapted: a plain `nn.Linear`, `Embedding`, `Conv1d`,
            `Conv2d`, `Conv3d` or GPT-2's `Conv1D` (plain LoRA: the linear ones); or an argument of the wrong type.
        ValueError: nothing is named; a layer is adapted already, parametrized, or has hooks, which would no longer
            run; an argument out of range. The model is as it was then.
    """
    _check_model(model)
    options = {
        "dropout": dropout, "use_rslora": use_rslora, "backend": backend, "adapter_dtype": adapter_dtype,
    }  # fmt: skip
    if use_dora:
        options |= {"magnitude_axis": magnitude_axis, "detach_norm": detach_norm, "eps": eps}
    places = places_of(model)
    chosen = _chosen(model, places, target_modules, exclude_modules)
    for module, name in chosen.items():
        check_layer(model, module, name, use_dora)
    flags = [(p, p.requires_grad) for module in chosen for p in module.parameters(recurse=False)]
    layers: dict[nn.Module, AdaptedLayer] = {}
    try:
        for module, name in chosen.items():
            kind = kind_of(module, use_dora)
            own_rank = _of_pattern(rank_pattern, name, rank)
            own_alpha = _of_pattern(alpha_pattern, name, alpha)
            try:
                layers[module] = kind.from_base(module, rank=own_rank, alpha=own_alpha, **options)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error}") from error
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for module, layer in layers.items():
        put(model, places[module], layer)
    return list(chosen.values())


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers of `model` by name; one that has several names by its first."""
    _check_model(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}


def remove_dora(model: nn.Module) -> nn.Module:
    """Put the base layers back, unmerged, under every name, and forget the adapters. They stay frozen.

    Raises:
        ValueError: `model` has no adapted layers, or is one itself.
    """
    layers = _layers(model)
    places = places_of(model)
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()
        put(model, places[layer], layer.base_layer)
    return model


def merge_all(model: nn.Module, rounding: str = "nearest", seed: int = 0) -> nn.Module:
    """Merge every adapted layer, at its strength, and put its base layer in its place: a model without adapters.

    Layer by layer, each replaced as soon as it is merged, so that no copy of the model is kept.

    Args:
        rounding, seed: as `merge_dora`; each layer draws by its own name (`rounding.seed_for`).

    Raises:
        TypeError, ValueError: as `merge_dora`.
        ValueError: `model` has no adapted layers, or is one itself; an adapter cannot be merged; or a layer's weight is
            another layer's as well (tied embeddings), which merging would change. The model is as it was then.
    """
    validation.check_rounding(rounding, seed)
    layers = _layers(model)
    places = places_of(model)
    for name, layer in layers.items():
        refusal = None if layer.merged else layer._merge_refusal()
        if refusal is not None:
            raise ValueError(f"{name}: the layer cannot be merged: {refusal}")
    _check_untied(model, layers)
    for name, layer in layers.items():
        if not layer.merged:
            layer.merge(rounding, seed_for(seed, name))
        layer._unmerged = None
        put(model, places[layer], layer.base_layer)
    return model


def mark_only_dora_trainable(model: nn.Module) -> None:
    """Freeze every parameter of `model` but those of its adapters, which train.

    Raises:
        ValueError: `model` has no adapted layers.
    """
    layers = _layers(model, itself=True)
    model.requires_grad_(False)
    for layer in layers.values():
        for parameter in layer.adapter_parameters().values():
            parameter.requires_grad_(True)


@dataclasses.dataclass(frozen=True)
class TrainableSummary:
    """How many of a model's parameters train. ``str()`` gives a line as PEFT's ``print_trainable_parameters``."""

    trainable: int
    total: int
    layers: dict[str, int]
    """Of each adapted layer, those that train."""

    @property
    def share(self) -> float:
        """Trainable over all, 0 of a model without parameters."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || "
            f"trainable%: {100 * self.share:.4f}"
        )


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Counts of parameters; one that the model holds several times counts once."""
    per_layer = {name: _trainable(layer) for name, layer in adapted_layers(model).items()}
    return TrainableSummary(_trainable(model), sum(p.numel() for p in model.parameters()), per_layer)


def dora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone, ``<layer>.lora_A.weight`` and so on, as `AdaptedLayer.state_names` has them.

    ``model.load_state_dict(..., strict=False)`` takes them. They are the parameters' own, detached and not copied.
    """
    return {
        f"{name}.{key}" if name else key: parameter.detach()
        for name, layer in adapted_layers(model).items()
        for key, parameter in layer.adapter_parameters().items()
    }


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _layers(model: nn.Module, itself: bool = False) -> dict[str, AdaptedLayer]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapted layers; call apply_dora(model) first")
    if "" in layers and not itself:
        raise ValueError("model: it is an adapted layer itself, which nothing holds; take its base_layer")
    return layers


def places_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module's names."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    return places


def put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _chosen(
    model: nn.Module,
    places: dict[nn.Module, list[str]],
    target_modules: str | Iterable[str],
    exclude_modules: str | Iterable[str] | None,
) -> dict[nn.Module, str]:
    """The modules that the patterns name, and their names: of several the first that is named."""
    targets = _pattern(target_modules, "target_modules")
    excluded = None if exclude_modules is None else _pattern(exclude_modules, "exclude_modules")
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    skipped = _no_linear_layers(model, places) if everything else set()
    chosen = {}
    for module, names in places.items():
        if module in skipped:
            continue
        for name in names:
            if not name or (excluded is not None and _matches(excluded, name)):
                continue
            if _is_linear(module) if everything else _matches(targets, name):
                chosen[module] = name
                break
    if not chosen:
        some = ", ".join(name for names in places.values() for name in names[:1] if name and len(name) < 60)[:300]
        raise ValueError(f"target_modules: {target_modules!r} names no layer of the model; it has {some}")
    return chosen


def _pattern(value: Any, name: str) -> str | list[str]:
    if isinstance(value, str):
        return value
    try:
        names = list(value)
    except TypeError:
        names = [None]
    if not all(isinstance(one, str) for one in names):
        raise TypeError(f"{name}: expected a regular expression or names, got {value!r}")
    return names


def _matches(pattern: str | list[str], name: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in pattern)


def _of_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | LoRALinear) or is_conv1d(module)


def _no_linear_layers(model: nn.Module, places: dict[nn.Module, list[str]]) -> set[nn.Module]:
    """What "all-linear" leaves out."""
    skipped = {
        child
        for module in places
        if isinstance(module, nn.MultiheadAttention | AdaptedLayer)
        for child in module.modules()
        if child is not module
    }
    output = getattr(model, "get_output_embeddings", None)
    head = output() if callable(output) else None
    return skipped if head is None else {*skipped, head}


def kind_of(module: nn.Module, use_dora: bool) -> type[AdaptedLayer]:
    kind = DoRALinear if is_conv1d(module) else _KINDS[type(module)]
    return LoRALinear if kind is DoRALinear and not use_dora else kind


def check_layer(model: nn.Module, module: nn.Module, name: str, use_dora: bool) -> None:
    """Whether the layer may be replaced."""
    parents = [model.get_submodule(name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1)] + [model]
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, AdaptedLayer) or any(isinstance(parent, AdaptedLayer) for parent in parents):
        raise ValueError(f"{name}: the layer is adapted already")
    if any(cls.__module__.startswith("peft.") for one in (module, *parents) for cls in type(one).__mro__):
        raise ValueError(f"{name}: the layer is adapted already, by PEFT; dora_kernels.patch_peft is for its adapters")
    if nn.utils.parametrize.is_parametrized(module):
        raise ValueError(f"{name}: the layer is parametrized; remove the parametrization before")
    if type(module) not in _KINDS and not is_conv1d(module):
        raise TypeError(
            f"{name}: expected a plain nn.Linear, Embedding, Conv1d, Conv2d, Conv3d or GPT-2's Conv1D, got {kind}; "
            "leave it out with exclude_modules"
        )
    if not use_dora and kind_of(module, use_dora) is not LoRALinear:
        raise TypeError(f"{name}: use_dora=False is for linear layers, got {kind}")
    weight: Any = module.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point parameter as weight, got {type(weight)} {weight.dtype}")
    if _hooked(module):
        raise ValueError(f"{name}: the layer has hooks or a replaced forward, which would not run any more")
    if isinstance(parents[0], nn.TransformerEncoderLayer):
        raise TypeError(f"{name}: nn.TransformerEncoderLayer reads the weight itself in evaluation")


def _hooked(module: nn.Module) -> bool:
    own = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or any(own[one] for one in hooks)


def _check_untied(model: nn.Module, layers: dict[str, AdaptedLayer]) -> None:
    """Whether nothing but its layer holds a weight that is to be written."""
    names = model.named_modules(remove_duplicate=False)
    inside = tuple(f"{name}." for name, module in names if isinstance(module, AdaptedLayer))
    pairs = [(name, layer.base_layer.weight) for name, layer in layers.items()]
    for name, module in model.named_modules(remove_duplicate=False):
        if not f"{name}.".startswith(inside):
            pairs += [(f"{name}.{key}", p) for key, p in module.named_parameters(recurse=False)]
    owners: dict[Any, list[str]] = {}
    for name, parameter in pairs:
        owners.setdefault(parameter.data_ptr() or parameter, []).append(name)
    for name, layer in layers.items():
        weight = layer.base_layer.weight
        others = [one for one in owners[weight.data_ptr() or weight] if one != name]
        if others:
            raise ValueError(
                f"{name}: its weight is shared with {', '.join(others)}, which merging would change as well; give it "
                "one of its own before: layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.clone())"
            )
