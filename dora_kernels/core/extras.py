"""Optional packages: their versions, and imports whose errors say what to install, or why that did not help."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

TRITON = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-windows")
"""The distributions that bring the package triton."""


def version_of(*distributions: str) -> str | None:
    """The version of the first of these that is installed, without importing it; None if none is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def load(package: str, extra: str, use: str) -> Any:
    """Import an optional package.

    Args:
        package: the name to import.
        extra: the extra of this package that brings it.
        use: what needs it, with the verb: the first words of the message.

    Raises:
        ModuleNotFoundError: it is not installed.
        ImportError: it is installed, and importing it failed. The message has the cause.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            text = f"{use} {package}: pip install 'dora-kernels[{extra}]'"
            raise ModuleNotFoundError(text, name=package) from error
        text = f"{use} {package}, which is installed but cannot be imported: {type(error).__name__}: {error}"
        raise ImportError(text, name=package) from error
