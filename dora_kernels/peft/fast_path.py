"""Have `nn.TransformerEncoderLayer` call its linear layers in evaluation too.

Its fast path there reads the weights of ``linear1`` and ``linear2``, so that no adapter in them runs, neither here nor
in PEFT. It is not taken where a module inside has a hook. `nn.TransformerEncoder` makes nested tensors for it, which
the other path does not take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from dora_kernels.peft.state import dora_adapters, switch


def call_the_layers(module: nn.Module, args: Any) -> None:
    """A forward pre-hook: being there is all that it does."""


def avoid(model: nn.Module) -> None:
    """Keep `model` off the fast paths that would read patched layers."""
    for module in _encoders(model):
        if call_the_layers in module._forward_pre_hooks.values():
            continue
        if isinstance(module, nn.TransformerEncoder):
            if not getattr(module, "use_nested_tensor", False) or not any(map(_has_adapters, module.layers)):
                continue
            module.use_nested_tensor = False
        elif not _has_adapters(module):
            continue
        module.register_forward_pre_hook(call_the_layers)


def permit(model: nn.Module) -> None:
    """Undo `avoid`."""
    for module in _encoders(model):
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is call_the_layers]:
            del hooks[key]
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = True


def _encoders(model: nn.Module) -> Iterator[Any]:
    return (one for one in model.modules() if isinstance(one, nn.TransformerEncoder | nn.TransformerEncoderLayer))


def _has_adapters(encoder_layer: nn.Module) -> bool:
    return any(switch(layer) is not None and dora_adapters(layer) for layer in encoder_layer.children())
