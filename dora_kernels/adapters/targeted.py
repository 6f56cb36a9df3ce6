"""Layers that PEFT's configuration names, to find those for which a file has no tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from dora_kernels.adapters.adapter import Adapter
from dora_kernels.adapters.base_layers import BaseLayer
from dora_kernels.core.expressions import Steps
from dora_kernels.core.patterns import bounded, is_named
from dora_kernels.core.shown import listed
from dora_kernels.model.expert_names import is_expert_name, takes_expert_names

Named = Callable[[str], bool]


def named_layers(config: Mapping[str, Any]) -> Named:
    """Return a function that is True for names that ``target_modules`` certainly names.

    "all-linear", ``layers_pattern`` and expressions that are not supported name nothing here.
    """
    targets, indices = config.get("target_modules"), config.get("layers_to_transform")
    if targets == "all-linear" or config.get("layers_pattern"):
        return lambda name: False
    try:
        named, left_out = _matching(targets, "target_modules"), _matching(config.get("exclude_modules"), "exclude")
    except ValueError:
        return lambda name: False
    saved = [f".{one}." for one in _listed(config.get("modules_to_save"))]
    chosen = {one for one in _listed([indices] if isinstance(indices, int) else indices) if isinstance(one, int)}

    def certainly(name: str) -> bool:
        numbers = {int(number) for number in re.findall(r"\.(\d+)(?=\.)", name)}
        if chosen and not isinstance(targets, str) and not (numbers and numbers <= chosen):
            return False
        if any(one in f".{name}." for one in saved):
            return False
        try:
            return named(name) and not left_out(name)
        except ValueError:  # an expression that takes too many steps
            return False

    return certainly


def named_parameters(config: Mapping[str, Any]) -> Named:
    """Return a function that is True for the parameters that ``target_parameters`` names."""
    return _matching(config.get("target_parameters"), "target_parameters")


def _matching(targets: Any, field: str) -> Named:
    if isinstance(targets, str):
        expression = bounded(targets, Steps(field))
        return lambda name: bool(expression.fullmatch(name))
    ends = [one for one in _listed(targets) if isinstance(one, str)]
    return lambda name: is_named(name, ends)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_servers(adapter: Adapter) -> bool:
    """True for an adapter of experts whose configuration names the last parts of layers, as servers read them."""
    has_stacks = any(layer.kind == "experts" for layer in adapter.layers.values())
    return has_stacks and not adapter.config.get("target_parameters")


def missing(
    adapter: Adapter, base_layers: Mapping[str, BaseLayer], attached: Collection[str], model: nn.Module
) -> list[str]:
    """The layers of a model that the configuration of PEFT's file names and that the file does not adapt.

    Args:
        attached: the names of the layers that it adapts.
    """
    if adapter.format != "peft":
        return []
    layer, parameter = named_layers(adapter.config), named_parameters(adapter.config)
    others = takes_expert_names(model) or _is_servers(adapter)  # then PEFT leaves out layers with experts' names
    there = {id(base_layers[name].weight) for name in attached if name in base_layers}  # also by another name
    return [
        name for name, base in base_layers.items()
        if name not in attached and not base.packed and id(base.weight) not in there
        and (parameter(name) if base.kind == "experts" else layer(name) and not (others and is_expert_name(name)))
    ]  # fmt: skip


def sentence(names: Collection[str]) -> str:
    """What to say of `missing` layers."""
    return (
        f"it has no tensors for {listed(names, 3)}, which its configuration's target_modules or target_parameters "
        "name; they stay as they are"
    )
