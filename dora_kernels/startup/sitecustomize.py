"""Patch PEFT in each Python process that `python -m dora_kernels.run` starts, right after that process imports peft.

The launcher puts this folder first on PYTHONPATH, so Python imports this module when it starts. It imports nothing of
the package until peft is imported, and runs the `sitecustomize` that it hides, if there is one.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import sys
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.dirname(os.path.dirname(HERE))
OPTIONS, PREFIX = "DORA_KERNELS_RUN", "DORA_KERNELS_PREFIX"
"""Environment variables: the options of the patch, as JSON, and where the launcher's Python is installed."""


class Finder:
    """Finds peft where Python would, and has it patched once it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of peft, with a loader that patches; None for any other name."""
        if name != "peft":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec: Any = next((spec for spec in others if spec is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            load = spec.loader.exec_module

            def load_and_patch(module: Any) -> None:
                load(module)
                patch()

            spec.loader.exec_module = load_and_patch
        return spec


def install() -> None:
    """Patch PEFT when it is imported; now, if it is already."""
    if "peft" in sys.modules:
        patch()
    elif not any(type(finder).__name__ == Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


def patch() -> None:
    """Patch PEFT in this process."""
    if importlib.util.find_spec("dora_kernels") is None:
        if os.environ.get(PREFIX) != sys.prefix:
            print(f"dora_kernels: not installed for {sys.executable}: its PEFT models are not patched", file=sys.stderr)
            return
        sys.path.append(PACKAGE)  # run from a folder that is on the path of the first process alone
    from dora_kernels.peft.launched import patch_this_process

    patch_this_process(**json.loads(os.environ.get(OPTIONS, "{}")))


def run_hidden() -> None:
    """Run the `sitecustomize` that Python would have run without this one."""
    rest = [folder for folder in sys.path if os.path.abspath(folder) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", rest)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    install()
    run_hidden()
