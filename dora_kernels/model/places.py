"""The modules and parameters of a model by their names, in which wrappers and the layers around stacks do not show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn


def unwrapped(model: Any) -> nn.Module:
    """Return the module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if "_orig_mod" in model._modules:  # torch.compile's wrapper, found without importing its class
            model = model._modules["_orig_mod"]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module under each of its names.

    Wrappers (`unwrapped`), and their parts of the names, are left out.
    """
    model = unwrapped(model)
    yield prefix, model
    for name, child in model._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}.{name}" if prefix else name)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module with the given name, as in `named_modules`."""
    module = unwrapped(model)
    for part in name.split(".") if name else ():
        module = unwrapped(module._modules[part])
    return module


def places_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Map every module to its names."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in named_modules(model):
        places.setdefault(module, []).append(name)
    return places


def put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    """Put a module under the given names, in place of the modules there and of their wrappers."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(submodule(model, parent), child, module)


def parents_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules around a layer, innermost first."""
    return [submodule(model, name.rsplit(".", depth)[0]) for depth in range(1, name.count(".") + 1)] + [model]


def parameter_name(place: str, key: str) -> str:
    """The full name of the parameter `key` of a module at a place, which may lie inside the layers of its stacks."""
    return re.sub(r"\.base_layer(?=\.)", "", f".{place}.{key}").lstrip(".")
