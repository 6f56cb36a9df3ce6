"""Run a training script unchanged, with every PEFT model that it makes patched by this package.

    python -m dora_kernels.run train.py --lr 1e-4
    python -m dora_kernels.run -m package.train --lr 1e-4
    accelerate launch -m dora_kernels.run train.py --lr 1e-4
    torchrun --nproc-per-node 8 -m dora_kernels.run train.py --lr 1e-4

It calls `dora_kernels.patch_peft_globally` and then runs the script as ``python`` would. Its own options come before
the script.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Patch, then run the script."""
    parser = argparse.ArgumentParser(
        prog="python -m dora_kernels.run",
        usage="%(prog)s [--dropout {peft,lora}] [--exact-init] (SCRIPT | -m MODULE) ...",
        description="Run a training script or module with every PEFT DoRA model on dora_kernels.",
        epilog="Arguments after SCRIPT or MODULE are passed on to it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--dropout", choices=("peft", "lora"), default="peft",
        help="formula for active lora_dropout: PEFT's (default), or dropout on the low-rank branch only, which "
        "saves the second base product",
    )  # fmt: skip
    parser.add_argument(
        "--exact-init", action="store_true", help="give fresh magnitudes the float32 norm of the base weight"
    )
    own, script = _split(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(own)
    module = bool(script) and script[0].startswith("-m")
    if module:
        script = ([script[0][2:]] if script[0] != "-m" else []) + script[1:]
    if not script:
        parser.error("expected a MODULE after -m" if module else "expected a SCRIPT, or -m and a MODULE")
    name = script[0]
    if not module and not os.path.exists(name):
        parser.error(f"no file {name!r}; a module's name needs -m before it")

    import dora_kernels

    try:
        dora_kernels.patch_peft_globally(dropout=options.dropout, exact_init=options.exact_init)
    except ImportError as error:
        parser.error(str(error))
    sys.argv = script
    if module:
        sys.path[0] = os.getcwd()
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        path = os.path.abspath(name)
        sys.path[0] = os.path.dirname(path)
        runpy.run_path(path, run_name="__main__")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into the launcher's own options and the rest, unchanged: argparse would drop a ``--``."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("-") and not arguments[place].startswith("-m"):
        place += 2 if arguments[place] == "--dropout" else 1
    return list(arguments[:place]), list(arguments[place:])


if __name__ == "__main__":
    main()
