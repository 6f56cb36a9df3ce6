"""Linear layers that stay PEFT's class: this package as a registered variant, where PEFT lets others register.

No release of PEFT does yet; `upstream/peft.md` proposes it. `patch_peft_globally` takes this way where it exists, and
otherwise exchanges the layers' classes, as `patch_peft` always does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora import variants
from torch import Tensor

from dora_kernels.peft.linear import DoraLinearVariant, whole_layer


def available() -> bool:
    """True if PEFT takes variants of others."""
    return hasattr(peft_layer, "register_lora_variant")


class RegisteredLinearVariant(DoraLinearVariant):
    """The variant that PEFT's own linear layer asks for its whole output."""

    @staticmethod
    def fused_forward(module: Any, active_adapter: str, x: Tensor) -> Tensor | None:
        """The layer's output, or None if its modules have to be called."""
        return whole_layer(module, x)


def register() -> Callable[[], None]:
    """Let adapters made from now on use this package. Returns a function that ends it."""
    peft_layer.register_lora_variant(variants.DoraLinearVariant, RegisteredLinearVariant)
    return lambda: peft_layer.register_lora_variant(variants.DoraLinearVariant, None)
