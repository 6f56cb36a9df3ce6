"""Run PEFT's DoRA layers on this package. `patch` has the entry points; each kind of layer has a module.

docs/integration.md describes what this relies on in PEFT, as of 0.16 to 0.21.
"""

from dora_kernels.peft.check import check_adapter
from dora_kernels.peft.patch import PatchHandle, patch_peft, patch_peft_globally

__all__ = ["PatchHandle", "check_adapter", "patch_peft", "patch_peft_globally"]
