"""Tensors in an adapter's file beside the adapter. They are written again, but `load_adapter` does not load them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.adapters.adapter import Adapter
from dora_kernels.core.shown import listed

WAY_OUT = "`dora-kernels merge` writes them into a merged model, and PEFT loads them"
NOTE = "not part of the adapter, but beside it"
"""Ends the note of a reader that names them."""
FIELDS = ("modules_to_save", "trainable_token_indices", "bias", "ensure_weight_tying")
"""What PEFT's configuration says of them."""


def own_name(key: str) -> str:
    """The tensor's name in the model."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def trained(adapter: Adapter, base: nn.Module | Mapping[str, Tensor]) -> str:
    """Name the tensors beside an adapter that the base does not have bit for bit; empty if there are none.

    PEFT also saves an adapted model's embeddings as they were: these are not trained.
    """
    if not adapter.beside:
        return ""
    if isinstance(base, nn.Module):
        own = itertools.chain(base.named_parameters(remove_duplicate=False), base.named_buffers(remove_duplicate=False))
        base = {own_name(name): tensor for name, tensor in own}
    keys = [key for key, tensor in adapter.beside.items()
            if (name := own_name(key)) not in base or not _same(tensor, base[name])]  # fmt: skip
    return listed(keys, 3)


def check_written(adapter: Adapter, format: str) -> None:
    """Raise ValueError if an adapter has such tensors and the format has no place for them."""
    if adapter.beside and adapter.format != format:
        raise no_place("source", adapter, f"an adapter of the format {adapter.format!r}, and {format!r}")


def no_place(argument: str, adapter: Adapter, where: str) -> ValueError:
    """The error that something cannot hold what is beside an adapter."""
    return ValueError(
        f"{argument}: {listed(adapter.beside, 3)}: beside {where} has no place for it; Adapter.beside.clear() or "
        "`dora-kernels convert --adapter-only` leaves it out"
    )


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is about these tensors."""
    return {name: config[name] for name in FIELDS if name in config}


def common_beside(adapters: Collection[Adapter], argument: str) -> Adapter:
    """The tensors beside several adapters, as an adapter without layers.

    Raises:
        ValueError: adapters of different formats have some, or they have different values or configurations.
    """
    having = [adapter for adapter in adapters if adapter.beside]
    result = Adapter({})
    for adapter in having:
        if adapter is having[0]:
            result.format, result.config = adapter.format, settings(adapter.config)
        if (adapter.format, settings(adapter.config)) != (result.format, result.config):
            names = ", ".join(listed(each.beside) for each in having)
            raise ValueError(f"{argument}: expected one configuration of the tensors beside them, got several: {names}")
        for key, tensor in adapter.beside.items():
            other = result.beside.setdefault(key, tensor)
            if not (other.shape == tensor.shape and torch.equal(other.double(), tensor.to(other.device).double())):
                raise ValueError(f"{argument}: {key}: expected one value, got different ones; it cannot be combined")
    return result


def _same(tensor: Tensor, stored: Tensor) -> bool:
    if stored.is_meta or stored.shape != tensor.shape:
        return False
    return bool((tensor.to(stored.device, stored.dtype) == stored.detach()).all())
