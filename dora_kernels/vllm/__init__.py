"""A plugin for vLLM: DoRA adapters beside plain LoRA ones, in vLLM as it is. See docs/vllm.md.

vLLM finds `register` through the entry point group ``vllm.general_plugins``. Importing this package imports no vLLM.
"""

from __future__ import annotations

import logging

TESTED = ("0.32.0", "0.33.0")
"""The versions of vLLM that `make test-vllm` was run with. It replaces methods, so it takes no other."""


def register() -> None:
    """Make vLLM serve DoRA adapters, in this process. vLLM calls it in each of its processes.

    In a version of vLLM that was not tested nothing is changed: a warning says so, plain LoRA works, and vLLM refuses
    DoRA adapters by itself.
    """
    import vllm

    reason = refusal(vllm.__version__)
    if reason is None:
        from dora_kernels.vllm import hooks

        hooks.install()
    else:
        logging.getLogger("vllm.dora_kernels").warning(reason)


def refusal(version: str) -> str | None:
    """Return why the plugin does not touch this version of vLLM; None if it was tested. A local part is ignored."""
    if version.partition("+")[0] in TESTED:
        return None
    return (
        f"dora_kernels.vllm: vLLM {version} has not been tested, expected {' or '.join(TESTED)}: DoRA adapters will be "
        "refused; plain LoRA is as without the plugin"
    )
