"""Run PEFT's DoRA layers on this package. `patch` has the entry points; each kind of layer has a module.

docs/integration.md describes what this relies on in PEFT, as of 0.17 to 0.21.
"""

import importlib

from dora_kernels.core.extras import load

_peft = load("peft", "peft", "patch_peft needs")
if not hasattr(importlib.import_module("peft.tuners.lora.layer"), "LoraVariant"):
    raise ImportError(f"patch_peft needs peft 0.17 or later, found {_peft.__version__}", name="peft")

from dora_kernels.peft.check import check_adapter  # noqa: E402
from dora_kernels.peft.patch import PatchHandle, patch_peft, patch_peft_globally  # noqa: E402

__all__ = ["PatchHandle", "check_adapter", "patch_peft", "patch_peft_globally"]
