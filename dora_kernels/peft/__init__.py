"""PEFT's DoRA layers on this package: `patch` is the entrance, a module for each kind of layer.

PEFT's contract, as of 0.16 to 0.21, is described in docs/integration.md.
"""

from dora_kernels.peft.check import check_adapter
from dora_kernels.peft.patch import PatchHandle, patch_peft, patch_peft_globally

__all__ = ["PatchHandle", "check_adapter", "patch_peft", "patch_peft_globally"]
