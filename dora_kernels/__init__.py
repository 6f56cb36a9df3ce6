"""DoRA (weight-decomposed low-rank adaptation) at the price of LoRA. See README.md."""

from typing import TYPE_CHECKING, Any

from dora_kernels.backends import UnsupportedError
from dora_kernels.functional import dora_linear, dora_weight_norm, merge_dora
from dora_kernels.modules import AdaptedLayer, DoRALinear, LoRALinear
from dora_kernels.norm_cache import invalidate, set_norm_reuse

if TYPE_CHECKING:
    from dora_kernels.peft import PatchHandle, check_adapter, patch_peft, patch_peft_globally, set_dora_strength

__version__ = "0.1.0"

__all__ = [
    "AdaptedLayer",
    "DoRALinear",
    "LoRALinear",
    "PatchHandle",
    "UnsupportedError",
    "check_adapter",
    "dora_linear",
    "dora_weight_norm",
    "invalidate",
    "merge_dora",
    "patch_peft",
    "patch_peft_globally",
    "set_dora_strength",
    "set_norm_reuse",
]

_OF_PEFT = ("PatchHandle", "check_adapter", "patch_peft", "patch_peft_globally", "set_dora_strength")


def __getattr__(name: str) -> Any:
    # PEFT is optional and slow to import: only who asks for the patch loads it.
    if name in _OF_PEFT:
        from dora_kernels import peft

        return getattr(peft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
