"""Run a training command unchanged, with every PEFT model that it makes patched by this package.

    python -m dora_kernels.run train.py --lr 1e-4
    python -m dora_kernels.run -m package.train --lr 1e-4
    python -m dora_kernels.run trl sft --config sft.yaml
    python -m dora_kernels.run torchrun --nproc-per-node 8 train.py --lr 1e-4
    accelerate launch -m dora_kernels.run train.py --lr 1e-4

Every Python process of the command calls `dora_kernels.patch_peft_globally` when it imports peft
(`startup/sitecustomize.py`, which the environment of these processes names). Nothing is written to disk. The launcher's
own options come before the command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence

from dora_kernels.startup import sitecustomize
from dora_kernels.startup.sitecustomize import OPTIONS, PREFIX


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the environment, then run the script, the module or the command."""
    parser = argparse.ArgumentParser(
        prog="python -m dora_kernels.run",
        usage="%(prog)s [--dropout {peft,lora}] [--exact-init] (SCRIPT | -m MODULE | COMMAND) ...",
        description="Run a training script, module or command with every PEFT DoRA model on dora_kernels.",
        epilog="Arguments after SCRIPT, MODULE or COMMAND are passed on to it.",
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
        parser.error("expected a MODULE after -m" if module else "expected a SCRIPT, a COMMAND, or -m and a MODULE")
    name = script[0]
    command = None if module or _is_python(name) else _command(name)
    if command is None and not module and not os.path.exists(name):
        parser.error(f"no file and no command {name!r}; a module's name needs -m before it")
    if module:
        sys.path[0] = os.getcwd()
        if not _is_module(name):
            parser.error(f"no module named {name!r}")
    _prepare_environment(vars(options))
    if command is not None:
        _become([command, *script[1:]])
    if importlib.util.find_spec("peft") is None:
        parser.error("peft is not installed: pip install 'dora-kernels[peft]'")
    sitecustomize.install()
    if module:
        sys.argv = script
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.argv = script
        path = os.path.abspath(name)
        sys.path[0] = os.path.dirname(path)
        runpy.run_path(path, run_name="__main__")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into the launcher's own options and the rest, unchanged: argparse would drop a ``--``."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("-") and not arguments[place].startswith("-m"):
        place += 2 if arguments[place] == "--dropout" else 1
    return list(arguments[:place]), list(arguments[place:])


def _is_python(name: str) -> bool:
    """True for a file that this process runs itself: a Python script, or whatever cannot be executed."""
    return os.path.isfile(name) and (name.endswith(".py") or not os.access(name, os.X_OK))


def _is_module(name: str) -> bool:
    """True if Python finds the module; an error inside a package around it is raised."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return False
        raise


def _command(name: str) -> str | None:
    """The program of that name: a path, or beside this Python, or on PATH."""
    beside = os.path.dirname(sys.executable)
    return shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))


def _prepare_environment(options: dict[str, object]) -> None:
    """Let every Python process below this one import `sitecustomize` of this package first."""
    folder = sitecustomize.HERE
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != folder]
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *paths])
    os.environ.update({OPTIONS: json.dumps(options), PREFIX: sys.prefix})


def _become(command: list[str]) -> None:
    """Replace this process by the command: signals and the exit status are then its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # where `exec` would return to the shell at once
        raise SystemExit(subprocess.call(command))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
