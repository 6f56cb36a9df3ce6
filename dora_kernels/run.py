"""Run a training script as it is, with every PEFT model that it makes on this package.

    python -m dora_kernels.run train.py --lr 1e-4
    python -m dora_kernels.run -m package.train --lr 1e-4
    accelerate launch -m dora_kernels.run train.py --lr 1e-4
    torchrun --nproc-per-node 8 -m dora_kernels.run train.py --lr 1e-4

It calls `dora_kernels.patch_peft_globally` and then runs the script as ``python`` would. Options of its own come before
the script.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Patch, then run."""
    parser = argparse.ArgumentParser(
        prog="python -m dora_kernels.run",
        description="Run a training script with every PEFT DoRA model on dora_kernels.",
    )
    parser.add_argument(
        "--dropout", choices=("peft", "lora"), default="peft",
        help="whose formula active lora_dropout takes: PEFT's (default), or that of the low-rank branch alone, which "
        "saves the second base product",
    )  # fmt: skip
    parser.add_argument(
        "--exact-init", action="store_true", help="give fresh magnitudes the float32 norm of the base weight"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="what to run")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    if not options.module and not os.path.exists(options.script):
        parser.error(f"no file {options.script!r}; a module's name needs -m before it")

    import dora_kernels

    try:
        dora_kernels.patch_peft_globally(dropout=options.dropout, exact_init=options.exact_init)
    except ImportError as error:
        parser.error(str(error))
    sys.argv = [options.script, *options.arguments]
    if options.module:
        sys.path[0] = os.getcwd()
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(options.script))
        runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
