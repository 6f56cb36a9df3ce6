"""The patch of a process that `python -m dora_kernels.run` has started, which speaks on standard error."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

from dora_kernels.peft.patch import patch_and_report


def patch_this_process(**options: Any) -> None:
    """Call `patch_peft_globally`, with one line for each model, and a warning at exit for each never called."""
    handle = patch_and_report(_say, **options)

    def at_exit() -> None:
        for warning in handle._never_called():
            _say(warning)

    atexit.register(at_exit)


def _say(message: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once for all processes of a machine
        print(f"dora_kernels: {message}", file=sys.stderr, flush=True)
