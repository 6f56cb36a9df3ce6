"""Read and write files: safetensors only, never a pickle."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_kernels.core.extras import load
from dora_kernels.core.shown import name_problem, shown

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The most dimensions that torch supports.
_MOST_DIMENSIONS = 64

# Levels of a JSON file. Configurations have about ten, and code that walks through them may be recursive.
_DEEPEST = 100


def as_path(path: Any) -> Path:
    """Return `path` as a Path. Raises TypeError if it is not a path."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a str or os.PathLike, got {type(path).__name__}")
    return Path(path)


def pickle_hint(folder: Path) -> str:
    """The end of the sentence about a missing safetensors file: what to do with a pickle in `folder`, or nothing."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    return f", only {shown(pickles[0])}, a pickle, which is not read: save it as safetensors" if pickles else ""


def read_json(file: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError, naming the file and `what` was expected, otherwise."""
    try:
        text = file.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{file}: not a valid {what}: {type(error).__name__}: {shown(str(error))}") from error
    return json_object(text, f"{file}: not a valid {what}")


def json_object(text: str, problem: str) -> dict[str, Any]:
    """Return the object in JSON text. Raises ValueError, which begins with `problem`, for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{problem}: {type(error).__name__}: {shown(str(error))}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{problem}: expected an object, got {type(content).__name__}")
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    if level:
        raise ValueError(f"{problem}: it is nested more than {_DEEPEST} levels deep")
    return content


def read_tensors(file: Path, wanted: Callable[[str], object] = lambda key: True) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file whose keys are `wanted`, in the file's order. Errors as `read_all`."""
    return read_all(file, wanted)[0]


def read_all(
    file: Path, wanted: Callable[[str], object] = lambda key: True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file whose keys are `wanted`, in the file's order, and its metadata.

    Both come from one file, even if another file replaces it in between.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        ValueError: it is not a safetensors file, is shorter or longer than its header says, or has a name or a shape
            that no tensor can have.
    """
    _check_installed()
    from safetensors import SafetensorError, safe_open

    with _held(file) as place, _naming(file):
        try:
            with safe_open(place, "pt") as opened:
                keys = list(opened.keys())
                for key in keys:
                    if problem := name_problem(key):
                        raise ValueError(f"{file}: {problem}")
                tensors = {key: opened.get_tensor(key) for key in keys if wanted(key)}
                metadata = dict(opened.metadata() or {})
        except (SafetensorError, OverflowError, RuntimeError, AttributeError, TypeError) as error:
            # Other problems: sizes and dtypes that torch does not have.
            reason = shown(str(error).partition("\n")[0])
            raise ValueError(f"{file}: truncated, or not a safetensors file: {reason}") from error
    for key, tensor in tensors.items():
        if tensor.dim() > _MOST_DIMENSIONS or math.prod(max(1, size) for size in tensor.shape) >= 1 << 62:
            raise ValueError(f"{file}: {key} {shown(str(list(tensor.shape)))}: no tensor has such a shape")
    return tensors, metadata


@contextlib.contextmanager
def _held(file: Path) -> Iterator[str]:
    """Yield a name that, if the system has such names, keeps pointing to this file even if another takes its name."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        if not os.fstat(handle).st_size:
            raise ValueError(f"{file}: truncated, or not a safetensors file: it is empty")
        open_files = next((folder for folder in ("/proc/self/fd", "/dev/fd") if os.path.exists(folder)), None)
        yield f"{open_files}/{handle}" if open_files else str(file)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Put the file's name into an OSError that has none, or that has the name of an open file descriptor."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(error.filename).startswith(("/proc", "/dev/fd"))):
            error.filename = str(file)
        raise


def _check_installed() -> None:
    load("safetensors", "files", "adapter files need")


def check_tensor(file: Path, key: str, tensor: Tensor) -> None:
    """Raise ValueError, naming file and key, unless the tensor holds finite floating-point numbers."""
    if tensor.dtype not in _DTYPES:
        kind = "of a type that torch does not compute with" if tensor.is_floating_point() else "no floating-point type"
        raise ValueError(f"{file}: {key} is of {tensor.dtype}, which is {kind}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{file}: {key} has values that are not finite")


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, in place: call it with a name from `replacing`.

    Raises:
        OSError: it cannot be written, e.g. because the disk is full.
    """
    _check_installed()
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors would replace the file by one that only its owner may read
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o666))
    mode = file.stat().st_mode & 0o777
    # clones, because the format cannot hold tensors that share memory
    whole = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
             for key, tensor in tensors.items()}  # fmt: skip
    with _naming(file):
        try:
            save_file(whole, file, {"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            found = re.search(r"(?:os error|code:) (\d+)", str(error))
            if found is None:
                raise ValueError(f"{file}: cannot be written: {shown(str(error))}") from error
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error
        os.chmod(file, mode)


def save_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, in place: call it with a name from `replacing`."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    with _naming(file):
        file.write_text(f"{text}\n", encoding="utf-8")
