"""Tensors in an adapter's file beside the adapter, which `load_adapter` and `AdapterBank` do not load."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from torch import Tensor, nn

from dora_kernels.adapters.adapter import Adapter, listed

WAY_OUT = "`dora-kernels merge` writes them into a merged model, and PEFT loads them"


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


def _same(tensor: Tensor, stored: Tensor) -> bool:
    if stored.is_meta or stored.shape != tensor.shape:
        return False
    return bool((tensor.to(stored.device, stored.dtype) == stored.detach()).all())
