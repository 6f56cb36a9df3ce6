"""Which layers of a model are adapted: its modules by name, whatever wraps it, what patterns name, what is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from dora_kernels.modules import (
    AdaptedLayer,
    DoRAConv1d,
    DoRAConv2d,
    DoRAConv3d,
    DoRAEmbedding,
    DoRALinear,
    LoRALinear,
)
from dora_kernels.modules.conv import CONFINED
from dora_kernels.modules.linear import is_conv1d

_KINDS: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Linear: DoRALinear,
    nn.Embedding: DoRAEmbedding,
    nn.Conv1d: DoRAConv1d,
    nn.Conv2d: DoRAConv2d,
    nn.Conv3d: DoRAConv3d,
}


def unwrapped(model: Any) -> nn.Module:
    """The module inside what `torch.compile`, `DataParallel` and `DistributedDataParallel` make of it.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if "_orig_mod" in model._modules:  # torch.compile's; its class is not imported for this
            model = model._modules["_orig_mod"]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its names, without wrappers (`unwrapped`) and their parts of the names."""
    model = unwrapped(model)
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}.{name}" if prefix else name)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of a name of `named_modules`."""
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        module = unwrapped(module._modules[part])
    return module


def places_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module's names."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in named_modules(model):
        places.setdefault(module, []).append(name)
    return places


def put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    """Put a module under names, in the place of what is there and of what wraps it."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(submodule(model, parent), child, module)


def chosen(
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
    found = {}
    for module, names in places.items():
        if module in skipped:
            continue
        for name in names:
            if not name or (excluded is not None and _matches(excluded, name)):
                continue
            if _is_linear(module) if everything else _matches(targets, name):
                found[module] = name
                break
    if not found:
        some = ", ".join(name for names in places.values() for name in names[:1] if name and len(name) < 60)[:300]
        raise ValueError(f"target_modules: {target_modules!r} names no layer of the model; it has {some}")
    return found


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


def of_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
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
    return skipped if head is None else {*skipped, unwrapped(head)}


def kind_of(module: nn.Module, use_dora: bool) -> type[AdaptedLayer]:
    kind = DoRALinear if is_conv1d(module) else _KINDS[type(module)]
    return LoRALinear if kind is DoRALinear and not use_dora else kind


def adapted_layer(module: nn.Module, name: str, use_dora: bool, **options: Any) -> AdaptedLayer:
    """A module's adapted layer (`from_base`), with its name in what is refused and without warnings of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", re.escape(f"groups: {CONFINED}"))
        try:
            return kind_of(module, use_dora).from_base(module, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error


def check_layer(model: nn.Module, module: nn.Module, name: str, use_dora: bool) -> None:
    """Whether the layer may be replaced."""
    parents = [submodule(model, name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1)] + [model]
    kind = f"{type(module).__module__}.{type(module).__name__}"
    held = parents[0]._modules.get(name.rpartition(".")[2], module)
    if held is not module:
        raise ValueError(f"{name}: the layer is wrapped by itself ({type(held).__name__}); adapt it before")
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
    check_loaded(weight, name)


def check_loaded(weight: Tensor, name: str) -> None:
    """Whether a base weight has values that an adapter can start from."""
    if weight.is_meta:
        raise ValueError(f"{name}: its weight is on the meta device, without values; load the weights before")


def _hooked(module: nn.Module) -> bool:
    own = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or any(own[one] for one in hooks)
