"""DoRA on quantised layers for which PEFT does not allow it: GPTQ, AWQ, EETQ and AQLM.

PEFT raises while it creates the layer, so `patch_peft_globally` replaces the ``__init__`` of its classes as long as it
is on. PEFT has no DoRA that such a layer could be restored to, so it stays patched.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

from peft.tuners import lora
from torch import Tensor, nn

from dora_kernels.peft.lazy_classes import OnDemand, Recipe
from dora_kernels.peft.quantized import DoraQuantized, DoraQuantizedVariant, forward
from dora_kernels.peft.state import SWITCH, Switch


class DoraRefused(DoraQuantized):
    """A quantised layer of a kind for which PEFT has no DoRA."""

    def resolve_lora_variant(self, *, config: Any = None, use_dora: bool = False, **kwargs: Any) -> Any:
        """Return this package's variant for DoRA, which PEFT's class does not know."""
        if use_dora or getattr(config, "use_dora", False):
            return DoraQuantizedVariant()
        arguments = {"use_dora": False, **kwargs} if config is None else {"config": config, **kwargs}
        return super().resolve_lora_variant(**arguments)


def _forward_of(stock: Any) -> Callable[..., Tensor]:
    def run(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # PEFT's forward of these classes ignores variants; that of its linear layer does not.
        return forward(lora.Linear, self, x, args, kwargs)

    return run


_CLASSES = OnDemand(__name__, {
    "DoraGptqLinear": Recipe("peft.tuners.lora.gptq", "GPTQLoraLinear", DoraRefused, _forward_of),
    "DoraAwqLinear": Recipe("peft.tuners.lora.awq", "AwqLoraLinear", DoraRefused, _forward_of),
    "DoraEetqLinear": Recipe("peft.tuners.lora.eetq", "EetqLoraLinear", DoraRefused, _forward_of),
    "DoraAqlmLinear": Recipe("peft.tuners.lora.aqlm", "AqlmLoraLinear", DoraRefused, _forward_of),
})  # fmt: skip

__getattr__, patched_class = _CLASSES.attribute, _CLASSES.instead_of


def allow() -> Callable[[], None]:
    """Let PEFT's classes take DoRA adapters from now on. Returns a function that ends this."""
    undone = []
    for name, recipe in _CLASSES.recipes.items():
        stock = getattr(importlib.import_module(recipe.module), recipe.stock, None)
        if stock is not None:  # EETQ's class exists only if its library is installed
            undone.append((stock, stock.__init__))
            stock.__init__ = _wrapped(stock.__init__, name)

    def undo() -> None:
        for stock, original in undone:
            if getattr(stock.__init__, "__wrapped__", None) is original:
                stock.__init__ = original

    return undo


def _wrapped(original: Any, name: str) -> Any:
    @functools.wraps(original)
    def __init__(self: Any, base_layer: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("config")
        if not (kwargs.get("use_dora") or getattr(config, "use_dora", False)):
            original(self, base_layer, adapter_name, *args, **kwargs)
            return
        if config is None:  # before peft 0.19
            kwargs["use_dora"] = False
        else:
            kwargs["config"] = copy.copy(config)
            kwargs["config"].use_dora = False
        original(self, base_layer, adapter_name, *args, **kwargs)
        self.__class__ = _CLASSES[name]
        setattr(self, SWITCH, Switch())
        self.use_dora[adapter_name] = True
        self.lora_variant[adapter_name] = DoraQuantizedVariant()
        DoraQuantizedVariant.init(self, adapter_name)

    return __init__
