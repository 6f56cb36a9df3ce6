"""`apply_dora` and related functions: adapters in any `nn.Module`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.core import validation
from dora_kernels.core.patterns import ByName
from dora_kernels.model.saving import unwatch_saving, watch_saving
from dora_kernels.model.targets import adapted_layer, chosen, named_modules, places_of, put, unwrapped
from dora_kernels.modules import AdaptedLayer
from dora_kernels.modules.conv import CANNOT_BE_MERGED
from dora_kernels.rounding import seed_for


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
    """Replace every layer of `model` that the patterns match by an adapted layer.

    The replaced layers become base layers, shared and frozen. Nothing else is frozen (`mark_only_dora_trainable`). A
    layer that the model holds under several names is adapted once, for all of them. Layers that share a weight each get
    an adapter of their own. As long as a transformers or diffusers model is adapted, its ``save_pretrained`` warns,
    because ``from_pretrained`` cannot read what it writes: save the adapter with `save_adapter`, or make a plain model
    with `merge_all`.

    Args:
        model: changed in place. For a compiled, `DataParallel` or `DistributedDataParallel` model, the model inside.
        target_modules: as in PEFT: a regular expression that matches whole names, a list of names or ends of names, or
            "all-linear". The latter means every linear layer except the model's output embeddings
            (``get_output_embeddings``), the projections inside `nn.MultiheadAttention`, which reads their weights
            itself, and layers that cannot be adapted. Those are quantised layers and layers whose weight a module
            around them reads (Mamba's ``out_proj``). A warning names them with the reasons, and also names parameters
            that hold many matrices in one (experts).
        rank, alpha, dropout, use_rslora, magnitude_axis, detach_norm, eps, backend, adapter_dtype: as in `DoRALinear`.
        rank_pattern, alpha_pattern: other values for some layers, as in PEFT. Keys are regular expressions that match
            the end of a name, starting after a dot; the first that matches counts.
        exclude_modules: layers to leave out, in the same form as `target_modules`.
        use_dora: False puts plain LoRA on linear layers (`LoRALinear`).

    Returns:
        The names of the adapted layers, in the model's order. A warning names patterns that match nothing, and
        convolutions with groups, whose adapters cannot be saved to a file.

    Raises:
        TypeError: a matched layer cannot be adapted (not raised for "all-linear"): it is not a plain `nn.Linear`,
            `Embedding`, `Conv1d`, `Conv2d`, `Conv3d` or GPT-2's `Conv1D` (plain LoRA: the linear ones only), or a
            module around it reads its weight itself (`weight_readers`); or an argument has a wrong type.
        ValueError: nothing matches; a layer is adapted already, is parametrized, or has hooks, which would no longer
            run; its weight is on the meta device or not finite; or an argument is out of range. The model is unchanged
            then.
    """
    model = unwrapped(model)
    options = {
        "dropout": dropout, "use_rslora": use_rslora, "backend": backend, "adapter_dtype": adapter_dtype,
    }  # fmt: skip
    if use_dora:
        options |= {"magnitude_axis": magnitude_axis, "detach_norm": detach_norm, "eps": eps}
    places = places_of(model)
    ranks, alphas = ByName(rank_pattern, "rank_pattern"), ByName(alpha_pattern, "alpha_pattern")
    found, notes = chosen(model, places, target_modules, exclude_modules, use_dora)
    flags = [(p, p.requires_grad) for module in found for p in module.parameters(recurse=False)]
    layers: dict[nn.Module, AdaptedLayer] = {}
    try:
        for module, name in found.items():
            own = {"rank": ranks.get(name, rank), "alpha": alphas.get(name, alpha)}
            layers[module] = adapted_layer(module, name, use_dora, **own, **options)
        notes += ranks.unmatched(found.values()) + alphas.unmatched(found.values())
        unmergeable = [found[module] for module, layer in layers.items() if layer._cannot_be_merged]
        if unmergeable:
            notes.append(f"{', '.join(unmergeable)}: {CANNOT_BE_MERGED}")
        for note in notes:
            warnings.warn(note, stacklevel=2)
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for module, layer in layers.items():
        put(model, places[module], layer)
        watch_saving(model, places[module])
    return list(found.values())


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers of `model` by name. A layer with several names is listed under its first.

    Names are those of the model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.
    """
    places = places_of(model)
    return {names[0]: module for module, names in places.items() if isinstance(module, AdaptedLayer)}


def remove_dora(model: nn.Module) -> nn.Module:
    """Put the base layers back, unmerged, under every name, and drop the adapters.

    Parameters of the base layers that trained before they were adapted train again. All others stay as
    `mark_only_dora_trainable` left them.

    Raises:
        ValueError: `model` has no adapted layers, or is an adapted layer itself.
    """
    layers = _layers(model)
    places = places_of(model)
    for layer in layers.values():
        if layer.merged:
            layer.unmerge()
        put(model, places[layer], layer._release())
    unwatch_saving(model)
    return model


def merge_all(model: nn.Module, rounding: str = "nearest", seed: int = 0) -> nn.Module:
    """Merge every adapted layer, at its strength, and put its base layer in its place: a model without adapters.

    Each layer is replaced as soon as it is merged, so no copy of the model is kept. Afterwards parameters train as
    described for `remove_dora`.

    Args:
        rounding, seed: as in `merge_dora`. Each layer's random numbers depend on its name (`rounding.seed_for`).

    Raises:
        TypeError, ValueError: as in `merge_dora`.
        ValueError: `model` has no adapted layers, or is an adapted layer itself; an adapter cannot be merged; or a
            layer's weight also belongs to another layer (tied embeddings), which merging would change. The model is
            unchanged then.
    """
    validation.check_rounding(rounding, seed)
    layers = _layers(model)
    places = places_of(model)
    for name, layer in layers.items():
        reason = None if layer.merged else layer._unmergeable_reason()
        if reason is not None:
            raise ValueError(f"{name}: the layer cannot be merged: {reason}")
    _check_untied(model, layers)
    for name, layer in layers.items():
        if not layer.merged:
            layer.merge(rounding, seed_for(seed, name))
        put(model, places[layer], layer._release())
    unwatch_saving(model)
    return model


def mark_only_dora_trainable(model: nn.Module) -> None:
    """Freeze every parameter of `model` except those of its adapters, which train.

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
    """Counts of a model's trainable parameters. ``str()`` gives a line like PEFT's ``print_trainable_parameters``."""

    trainable: int
    total: int
    layers: dict[str, int]
    """Trainable parameters of each adapted layer, by name."""

    @property
    def share(self) -> float:
        """Trainable over all parameters; 0 for a model without parameters."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,d} || all params: {self.total:,d} || "
            f"trainable%: {100 * self.share:.4f}"
        )


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Count the parameters. One that the model holds several times counts once."""
    per_layer = {name: _trainable(layer) for name, layer in adapted_layers(model).items()}
    return TrainableSummary(_trainable(model), sum(p.numel() for p in model.parameters()), per_layer)


def dora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors only: ``<layer>.lora_A.weight`` and so on, named by `AdaptedLayer.state_names`.

    ``model.load_state_dict(..., strict=False)`` loads them. For a wrapped model (`adapted_layers`) load them into the
    inner one (``compiled._orig_mod``, ``ddp.module``). The tensors are the parameters themselves, detached and not
    copied.
    """
    return {
        f"{name}.{key}" if name else key: parameter.detach()
        for name, layer in adapted_layers(model).items()
        for key, parameter in layer.adapter_parameters().items()
    }


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _layers(model: nn.Module, itself: bool = False) -> dict[str, AdaptedLayer]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("model: it has no adapted layers; call apply_dora(model) first")
    if "" in layers and not itself:
        raise ValueError(
            "model: it is itself an adapted layer, so there is no parent to replace it in; use its base_layer"
        )
    return layers


def _check_untied(model: nn.Module, layers: dict[str, AdaptedLayer]) -> None:
    """Raise ValueError if a weight that merging would write is also held outside its layer."""
    inside = tuple(f"{name}." for name, module in named_modules(model) if isinstance(module, AdaptedLayer))
    pairs = [(name, layer.base_layer.weight) for name, layer in layers.items()]
    for module, names in places_of(model).items():  # a base layer may also be held outside
        outside = next((name for name in names if not f"{name}.".startswith(inside)), None)
        if outside is not None:
            pairs += [(f"{outside}.{key}", p) for key, p in module.named_parameters(recurse=False)]
    owners: dict[Any, list[str]] = {}
    for name, parameter in pairs:
        owners.setdefault(parameter.data_ptr() or parameter, []).append(name)
    for name, layer in layers.items():
        weight = layer.base_layer.weight
        others = [one for one in owners[weight.data_ptr() or weight] if one != name]
        if others:
            raise ValueError(
                f"{name}: its weight is shared with {', '.join(others)}, which merging would also change; give it a "
                "weight of its own first: layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.clone())"
            )
