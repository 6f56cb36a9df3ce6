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
from dora_kernels.core.shown import listed
from dora_kernels.engine.merged import check_forward
from dora_kernels.model.places import named_modules, parameter_name, places_of, put, unwrapped
from dora_kernels.model.saving import unwatch_saving, watch_saving
from dora_kernels.model.targets import adapted_layer, adapted_stack, chosen, chosen_stacks
from dora_kernels.modules import AdaptedLayer, LoRAExperts
from dora_kernels.modules.conv import CANNOT_BE_MERGED
from dora_kernels.modules.linear import is_conv1d
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
    target_parameters: Iterable[str] | None = None,
    forward: str = "composed",
) -> list[str]:
    """Replace every layer of `model` that the patterns name by an adapted layer.

    The replaced layers become base layers, shared and frozen. Nothing else is frozen: call `mark_only_dora_trainable`
    for that. A layer that the model holds under several names is adapted once, for all of them. Layers that share a
    weight each get an adapter of their own.

    As long as a model of transformers or diffusers is adapted, its ``save_pretrained`` warns, since ``from_pretrained``
    cannot read what it writes. `save_adapter` saves the adapter, and `merge_all` makes a plain model.

    Args:
        model: changed in place. A wrapper (`torch.compile`, `DataParallel`, `DistributedDataParallel`) stands for the
            model in it.
        target_modules: as PEFT's: a regular expression that matches whole names, or names or ends of names, or
            "all-linear", which is every linear layer but the model's output embeddings (``get_output_embeddings``) and
            the projections inside `nn.MultiheadAttention`, which reads their weights itself. "all-linear" leaves out
            what cannot be adapted, and a warning gives names and reasons: quantised layers, layers whose weights the
            modules around them read (Mamba's ``out_proj``), and parameters that are many matrices in one (experts).
        rank: of the factors, at least 1. It may exceed a layer's smaller side, as in PEFT, which only costs.
        alpha: the low-rank product is scaled by ``alpha / rank``, or ``alpha / sqrt(rank)`` with `use_rslora`. None:
            scaling 1.
        rank_pattern: other ranks for some layers, as PEFT's: keys are regular expressions that match the end of a name,
            from a dot on; the first that matches counts.
        alpha_pattern: other values of alpha for some layers, by the same keys.
        exclude_modules: as `target_modules`, of layers to leave out.
        dropout: probability, on the input of the low-rank branch only, in training.
        use_rslora: divide alpha by the root of the rank instead of the rank.
        use_dora: False puts plain LoRA on linear layers (`LoRALinear`).
        magnitude_axis: "out", a magnitude per output feature, or "in", per input feature.
        detach_norm: no gradient through the norm (section 4.3 of the DoRA paper; PEFT).
        eps: added to the norm.
        backend: as `dora_linear`.
        adapter_dtype: of the adapter; None takes float32 for a 16-bit base layer, else the base layer's dtype.
        target_parameters: names, or ends of names, of parameters that are stacks of experts, as PEFT's:
            ``["experts.gate_up_proj", "experts.down_proj"]`` (`DoRAExperts`). With them `target_modules` may be ``[]``,
            and `dropout` has to be 0. Those of one module may be named in several calls.
        forward: "composed", or "merged" for linear layers that multiply by one merged weight (docs/merged.md).

    Returns:
        The names of the adapted layers, in the model's order, and then those of the parameters. A warning names
        patterns that match nothing, convolutions with groups, whose adapters cannot be saved to a file, and layers
        with a smaller side than their rank.

    Raises:
        TypeError: a layer that is named (not by "all-linear") is of no kind that can be adapted: a plain `nn.Linear`,
            `Embedding`, `Conv1d`, `Conv2d`, `Conv3d` or GPT-2's `Conv1D` (plain LoRA: the linear ones); a module around
            it reads its weight itself (`weight_readers`); or an argument of the wrong type.
        ValueError: nothing is named; a layer is adapted already or parametrized, or has hooks, which would no longer
            run; its weight is on the meta device or not finite; or an argument is out of range. The model is as it was
            then.
    """
    model = unwrapped(model)
    options = {
        "dropout": dropout, "use_rslora": use_rslora, "backend": backend, "adapter_dtype": adapter_dtype,
    }  # fmt: skip
    validation.check_flag(use_dora, "use_dora")
    check_forward(forward)
    if use_dora:
        options |= {"magnitude_axis": magnitude_axis, "detach_norm": detach_norm, "eps": eps}
    places = places_of(model)
    ranks, alphas = ByName(rank_pattern, "rank_pattern"), ByName(alpha_pattern, "alpha_pattern")
    stacks = chosen_stacks(model, places, target_parameters)
    found: dict[nn.Module, str] = {}
    notes: list[str] = []
    if not stacks or not (isinstance(target_modules, list | tuple) and not target_modules):
        adapted = {
            parameter_name(place, name.rpartition(".")[2])
            for module, names in stacks.items() for place in places[module] for name in names
        }  # fmt: skip
        found, notes = chosen(model, places, target_modules, exclude_modules, use_dora, adapted)
    flags = [(p, p.requires_grad) for module in (*found, *stacks) for p in module.parameters()]
    layers: dict[nn.Module, AdaptedLayer] = {}
    around: dict[nn.Module, AdaptedLayer] = {}
    made: dict[str, AdaptedLayer] = {}
    try:
        for module, names in stacks.items():
            for name in names:
                own = {"rank": ranks.get(name, rank), "alpha": alphas.get(name, alpha)}
                inner = around.get(module, module)
                made[name] = around[module] = adapted_stack(inner, name, use_dora, **own, **options)
        for module, name in found.items():
            own = {"rank": ranks.get(name, rank), "alpha": alphas.get(name, alpha)}
            if use_dora and forward != "composed" and (isinstance(module, nn.Linear) or is_conv1d(module)):
                own["forward"] = forward
            made[name] = layers[module] = adapted_layer(module, name, use_dora, **own, **options)
        named = [*found.values(), *(name for names in stacks.values() for name in names)]
        notes += ranks.unmatched(named) + alphas.unmatched(named)
        if unmergeable := [name for name, layer in made.items() if layer._cannot_be_merged]:
            notes.append(f"{', '.join(unmergeable)}: {CANNOT_BE_MERGED}")
        if wide := [name for name, layer in made.items() if _exceeds_full_rank(layer)]:
            sizes = (f"{name} (rank {made[name].rank}, {_size(made[name])})" for name in wide)
            what = "above the smaller side of a layer's weight it adds parameters and no freedom"
            notes.append(f"rank: {what}: {listed(sizes, 3)}")
        for note in notes:
            warnings.warn(note, stacklevel=2)
    except BaseException:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise
    for module, layer in {**layers, **around}.items():
        put(model, places[module], layer)
        watch_saving(model, places[module])
    return named


def _exceeds_full_rank(layer: AdaptedLayer) -> bool:
    """True if a smaller rank could give every product ``B A`` that this one can."""
    rows, columns = layer._problem()[0].shape[-2:]
    groups = getattr(layer.base_layer, "groups", 1)  # a convolution's, each with its part of the rank
    return bool(layer.rank // groups > min(rows // groups, columns))


def _size(layer: AdaptedLayer) -> str:
    return "x".join(str(size) for size in layer._problem()[0].shape[-2:])


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers of `model` by name.

    Args:
        model: any module. A wrapper (`torch.compile`, `DataParallel`, `DistributedDataParallel`) stands for the model
            in it.

    Returns:
        The layers in the model's order; one that has several names by its first.

    Raises:
        TypeError: `model` is no module.
    """
    places = places_of(model)
    return {names[0]: module for module, names in places.items() if isinstance(module, AdaptedLayer)}


def name_of(name: str, layer: nn.Module) -> str:
    """The name in an adapter of an adapted layer with this name in the model: of a stack, its parameter's."""
    if isinstance(layer, LoRAExperts):
        return parameter_name(name, layer.parameter)
    return name


def remove_dora(model: nn.Module) -> nn.Module:
    """Put the base layers back, unmerged, under all their names, and forget the adapters.

    Parameters of the base layers that trained before train again. All others stay as `mark_only_dora_trainable` left
    them.

    Args:
        model: changed in place.

    Returns:
        `model`.

    Raises:
        ValueError: `model` has no adapted layers, or is an adapted layer itself.
    """
    layers = _layers(model)
    places = places_of(model)
    for layer in reversed(list(layers.values())):  # those inside first: experts are adapted one around another
        if layer.merged:
            layer.unmerge()
        put(model, places[layer], layer._release())
    unwatch_saving(model)
    return model


def merge_all(model: nn.Module, rounding: str = "nearest", seed: int = 0) -> nn.Module:
    """Merge every adapted layer, at its strength, and put its base layer back: a model without adapters.

    Each layer is replaced as soon as it is merged, so that no copy of the model is kept. Parameters train afterwards as
    after `remove_dora`.

    Args:
        model: changed in place.
        rounding: "nearest" or "stochastic", as in `merge_dora`.
        seed: of stochastic rounding, in ``[0, 2**63)``; each layer draws by its own name (`rounding.seed_for`),
            which is the parameter's for a stack of experts, and each expert in it by its number.

    Returns:
        `model`.

    Raises:
        TypeError: `seed` is no int.
        ValueError: `rounding` or `seed` does not fit; `model` has no adapted layers, or is one itself; an adapter
            cannot be merged; or a layer's weight is another layer's as well (tied embeddings), which merging would
            change. The model is as it was then.
    """
    validation.check_rounding(rounding, seed)
    layers = _layers(model, pefts="merge_and_unload()")
    places = places_of(model)
    for name, layer in layers.items():
        reason = None if layer.merged else layer._unmergeable_reason()
        if reason is not None:
            raise ValueError(f"{name}: the layer cannot be merged: {reason}")
    _check_untied(model, layers)
    for name, layer in reversed(list(layers.items())):
        if not layer.merged:
            layer.merge(rounding, seed_for(seed, name_of(name, layer)))
        put(model, places[layer], layer._release())
    unwatch_saving(model)
    return model


def mark_only_dora_trainable(model: nn.Module) -> None:
    """Freeze every parameter of `model` except those of its adapters, which train.

    Args:
        model: changed in place.

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
    """How many of a model's parameters train. ``str()`` gives the line of PEFT's ``print_trainable_parameters``."""

    trainable: int
    """The number of parameters that train."""
    total: int
    """The number of all parameters."""
    layers: dict[str, int]
    """The number of parameters that train in each adapted layer, by the layer's name."""

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
    """Count a model's parameters, and those that train.

    Args:
        model: with or without adapted layers. A parameter that it holds several times counts once.

    Returns:
        The counts; ``print`` shows them in one line.
    """
    per_layer = {name: _trainable(layer) for name, layer in adapted_layers(model).items()}
    return TrainableSummary(_trainable(model), sum(p.numel() for p in model.parameters()), per_layer)


def dora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' tensors only: ``<layer>.lora_A.weight`` and so on, named by `AdaptedLayer.state_names`.

    ``model.load_state_dict(..., strict=False)`` takes them; for a wrapped model call the inner one's
    (``compiled._orig_mod``, ``ddp.module``).

    Args:
        model: any module. A wrapper (`torch.compile`, `DataParallel`, `DistributedDataParallel`) stands for the model
            in it.

    Returns:
        The parameters by name, detached and not copied.
    """
    return {
        f"{name}.{key}" if name else key: parameter.detach()
        for name, layer in adapted_layers(model).items()
        for key, parameter in layer.adapter_parameters().items()
    }


def _trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def no_adapted_layers(model: nn.Module, pefts: str) -> ValueError:
    """The error for a model without adapted layers; `pefts` is the call that does the same for PEFT's models."""
    if hasattr(model, "peft_config"):
        return ValueError(f"model: it has no adapted layers of apply_dora; for a PEFT model call model.{pefts}")
    return ValueError("model: it has no adapted layers; call apply_dora(model) first")


def _layers(model: nn.Module, itself: bool = False, pefts: str = "unload()") -> dict[str, AdaptedLayer]:
    layers = adapted_layers(model)
    if not layers:
        raise no_adapted_layers(model, pefts)
    if "" in layers and not itself:
        raise ValueError(
            "model: it is itself an adapted layer, so there is no parent to replace it in; use its base_layer"
        )
    return layers


def _check_untied(model: nn.Module, layers: dict[str, AdaptedLayer]) -> None:
    """Raise ValueError if a weight that merging would write is also held outside its layer."""
    inside = tuple(f"{name}." for name, module in named_modules(model) if isinstance(module, AdaptedLayer))
    pairs = [(name_of(name, layer), layer.weight) for name, layer in layers.items()]
    for module, names in places_of(model).items():  # a base layer may also be held outside
        outside = next((name for name in names if not f"{name}.".startswith(inside)), None)
        if outside is not None:
            pairs += [(f"{outside}.{key}", p) for key, p in module.named_parameters(recurse=False)]
    owners: dict[Any, list[str]] = {}
    for name, parameter in pairs:
        owners.setdefault(parameter.data_ptr() or parameter, []).append(name)
    for place, layer in layers.items():
        name, weight, own = name_of(place, layer), layer.weight, f"layer.base_layer.{layer._weight_name()}"
        others = [one for one in owners[weight.data_ptr() or weight] if one != name]
        if others:
            raise ValueError(
                f"{name}: its weight is shared with {', '.join(others)}, which merging would also change; give it a "
                f"weight of its own first: {own} = nn.Parameter({own}.clone())"
            )
