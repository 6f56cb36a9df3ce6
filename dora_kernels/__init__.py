"""DoRA (weight-decomposed low-rank adaptation) at the price of LoRA. See README.md."""

import importlib.util
from typing import TYPE_CHECKING, Any

from dora_kernels.engine.dispatch import UnsupportedError
from dora_kernels.engine.model_norms import FrozenNorms, frozen_norms, invalidate
from dora_kernels.engine.norm_cache import set_norm_reuse
from dora_kernels.functional import dora_linear, dora_weight_norm, merge_dora
from dora_kernels.model.apply import (
    TrainableSummary,
    adapted_layers,
    apply_dora,
    dora_state_dict,
    mark_only_dora_trainable,
    merge_all,
    remove_dora,
    trainable_summary,
)
from dora_kernels.model.strength import set_dora_strength
from dora_kernels.modules import (
    AdaptedLayer,
    DoRAConv1d,
    DoRAConv2d,
    DoRAConv3d,
    DoRAEmbedding,
    DoRAExperts,
    DoRALinear,
    LoRAExperts,
    LoRALinear,
)

if TYPE_CHECKING:
    from dora_kernels.adapters import (
        Adapter,
        AdapterLayer,
        attach,
        combine_adapters,
        extract,
        load_adapter,
        read_adapter,
        save_adapter,
        with_strength,
    )
    from dora_kernels.peft import PatchHandle, check_adapter, patch_peft, patch_peft_globally
    from dora_kernels.serving import AdapterBank
    from dora_kernels.tuning import Tuned, tune

__version__ = "0.1.0"

__all__ = [
    "AdaptedLayer",
    "Adapter",
    "AdapterBank",
    "AdapterLayer",
    "DoRAConv1d",
    "DoRAConv2d",
    "DoRAConv3d",
    "DoRAEmbedding",
    "DoRAExperts",
    "DoRALinear",
    "FrozenNorms",
    "LoRAExperts",
    "LoRALinear",
    "PatchHandle",
    "TrainableSummary",
    "Tuned",
    "UnsupportedError",
    "adapted_layers",
    "apply_dora",
    "attach",
    "check_adapter",
    "combine_adapters",
    "dora_linear",
    "dora_state_dict",
    "dora_weight_norm",
    "extract",
    "frozen_norms",
    "invalidate",
    "load_adapter",
    "mark_only_dora_trainable",
    "merge_all",
    "merge_dora",
    "patch_peft",
    "patch_peft_globally",
    "read_adapter",
    "remove_dora",
    "save_adapter",
    "set_dora_strength",
    "set_norm_reuse",
    "trainable_summary",
    "tune",
    "with_strength",
]

# PEFT is optional and slow to import, so it is loaded only when the patch is used; the same holds for file formats.
_LAZY = {
    "adapters": (
        "Adapter", "AdapterLayer", "attach", "combine_adapters", "extract", "load_adapter", "read_adapter",
        "save_adapter", "with_strength",
    ),
    "peft": ("PatchHandle", "check_adapter", "patch_peft", "patch_peft_globally"),
    "serving": ("AdapterBank",),
    "tuning": ("Tuned", "tune"),
}

if importlib.util.find_spec("peft") is None:  # keeps `from dora_kernels import *` working
    __all__ = [name for name in __all__ if name not in _LAZY["peft"]]


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def __getattr__(name: str) -> Any:
    for package, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(f"dora_kernels.{package}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
