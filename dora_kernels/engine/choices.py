"""Choices that ``dora_kernels.tune`` has measured, read from a table in the user's cache folder or a shipped one.

A table is of one device and dtype, and of the versions it was measured with. One of other versions is ignored; if it is
the user's, with a warning. What the user's table says of a layer counts, then what the shipped table of such a device
says. Without a table the shipped defaults run (`cost`, `blocked`). Nothing here measures.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from dora_kernels.core import extras

FORMAT = 1
SHIPPED = Path(__file__).parents[1] / "tuning" / "tables"
"""Tables of machines that were measured, as `tune` has written them."""


def cache_folder() -> Path:
    """``$DORA_KERNELS_CACHE``, or dora_kernels in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        FileNotFoundError: the user has no home, as some in containers.
    """
    if named := os.environ.get("DORA_KERNELS_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dora_kernels"
    except RuntimeError as error:
        raise FileNotFoundError(f"{error} Set DORA_KERNELS_CACHE to a folder for the tables of `tune`") from error


def device_name(device: torch.device) -> str:
    """What a table is keyed by: the GPU's name, or the CPU's and the number of threads."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).name)
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


@functools.cache
def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    import platform

    return found.group(1).strip() if found else platform.processor() or platform.machine()


def versions(device: torch.device) -> dict[str, str]:
    """The versions that a device's table holds for, the same before and after triton is imported."""
    package: Any = sys.modules[__name__.partition(".engine.")[0]]  # not dora_kernels in the Hub's kernel
    found = {"dora-kernels": package.__version__, "torch": str(torch.__version__)}
    triton = extras.version_of(*extras.TRITON) if device.type == "cuda" else None
    return found if triton is None else {**found, "triton": triton}


def table_path(device: torch.device, dtype: torch.dtype) -> Path:
    """Where the user's table of a device and dtype is."""
    return cache_folder() / _file_name(device, dtype)


def shipped_path(device: torch.device, dtype: torch.dtype) -> Path:
    """Where the shipped table would be."""
    return SHIPPED / _file_name(device, dtype)


def _file_name(device: torch.device, dtype: torch.dtype) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return f"tuned-{slug}-{str(dtype).removeprefix('torch.')}.json"


def read_table(path: Path, device: torch.device) -> tuple[dict[str, Any] | None, str | None]:
    """Return a device's table and None, or None and the reason why it is ignored; both None if there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except (OSError, ValueError) as error:
        return None, f"it cannot be read: {error}"
    parts = (found.get("layers"), found.get("tiles", {})) if isinstance(found, dict) else (None,)
    if not all(isinstance(part, dict) for part in parts) or found.get("format") != FORMAT:
        return None, f"it is no table of format {FORMAT}"
    then, now = found.get("versions"), versions(device)
    if not isinstance(then, dict) or then != now:
        old = ", ".join(f"{name} {version}" for name, version in (then or {}).items() if now.get(name) != version)
        return None, f"it was measured with {old or 'other versions'}; run dora-kernels tune again"
    return found, None


def key_of(out_features: int, in_features: int, rank: int) -> str:
    """A layer's name in a table."""
    return f"{out_features}x{in_features} r{rank}"


@functools.cache
def _table(kind: str, index: int | None, dtype: torch.dtype) -> dict[str, Any]:
    if kind == "cuda" and not torch.cuda.is_available():
        return {}
    device = torch.device(kind if index is None else f"{kind}:{index}")
    shipped, _ = read_table(shipped_path(device, dtype), device)
    try:
        path = table_path(device, dtype)
    except FileNotFoundError:
        return shipped or {}
    found, reason = read_table(path, device)
    if reason is not None:
        warnings.warn(f"dora_kernels: {path} is ignored: {reason}", RuntimeWarning, stacklevel=2)
    of_both = [table for table in (shipped, found) if table is not None]  # the user's counts where both say something
    return {part: {key: value for table in of_both for key, value in table.get(part, {}).items()} for part in _PARTS}


_PARTS = "layers", "tiles"


def forget() -> None:
    """Read the tables again when they are needed next."""
    _table.cache_clear()


def measured(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int, rank: int) -> Any:
    """What was measured for a layer, a dictionary; empty if nothing was."""
    layers = _table(device.type, device.index, dtype).get("layers")
    return layers.get(key_of(out_features, in_features, rank), _NOTHING) if layers else _NOTHING


def tiles(device: torch.device) -> dict[str, Any]:
    """The tiles that were measured for a device's kernels, with layers of any dtype."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):  # the last counts where they differ
        found |= _table(device.type, device.index, dtype).get("tiles", {})
    return found


def factored_norms(device: torch.device) -> dict[tuple[int, ...], bool]:
    """By ``(out_features, in_features, rank)``: whether a GPU's norm of a bfloat16 weight is better factored."""
    layers = _table(device.type, device.index, torch.bfloat16).get("layers", {})
    return {
        tuple(map(int, re.findall(r"\d+", name))): layer["norm"] == "factored"
        for name, layer in layers.items()
        if "norm" in layer
    }


_NOTHING: dict[str, Any] = {}
