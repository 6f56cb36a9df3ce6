"""Reading and writing files: safetensors alone, never a pickle, and no old file lost to a write that fails."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_path(path: Any) -> Path:
    """`path` as a Path; TypeError for what is none."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a str or os.PathLike, got {type(path).__name__}")
    return Path(path)


def pickle_hint(folder: Path) -> str:
    """The rest of a sentence that misses a safetensors file in `folder`: what to do with a pickle there, or nothing."""
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    return f", only {pickles[0]}, a pickle, which is not read: save it as safetensors" if pickles else ""


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file; ValueError, calling the file no `what`, for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no {what}: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: no {what}: expected an object, got {type(content).__name__}")
    return content


def read_tensors(file: Path, wanted: Callable[[str], object] = lambda key: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose keys are `wanted`, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, is shorter than its header says, or longer.
    """
    _check_installed()
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys() if wanted(key)}  # noqa: SIM118
    except (SafetensorError, OSError, OverflowError, RuntimeError, AttributeError) as error:
        # the last three: sizes and dtypes that torch has not
        raise ValueError(f"{file}: truncated, or no safetensors file: {error}") from error


def read_header(file: Path) -> dict[str, str]:
    """What a safetensors file that `read_tensors` reads says of itself."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return dict(opened.metadata() or {})


def _check_installed() -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        text = "adapter files need safetensors: pip install 'dora-kernels[files]'"
        raise ModuleNotFoundError(text, name="safetensors") from error


def check_tensor(file: Path, key: str, tensor: Tensor) -> None:
    """ValueError, naming file and key, for a tensor that holds no finite floating-point numbers."""
    if tensor.dtype not in _DTYPES:
        kind = "of a type that torch does not compute with" if tensor.is_floating_point() else "no floating-point type"
        raise ValueError(f"{file}: {key} is of {tensor.dtype}, which is {kind}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{file}: {key} has values that are not finite")


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, in place: call it with a name that `replacing` gives."""
    _check_installed()
    from safetensors.torch import save_file

    # a clone of what shares memory, which the format cannot hold
    save_file({key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
               for key, tensor in tensors.items()}, file, {"format": "pt", **(metadata or {})})  # fmt: skip


def save_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, in place: call it with a name that `replacing` gives."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    file.write_text(f"{text}\n", encoding="utf-8")


def settle(written: Iterable[Path]) -> None:
    """Bring files to the disk, with the mode of any new file: mkstemp's and safetensors' are the owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in written:
        os.chmod(file, 0o666 & ~mask)
        with file.open("rb") as content:
            os.fsync(content.fileno())


@contextlib.contextmanager
def replacing(*files: Path, force: bool = False) -> Iterator[list[Path]]:
    """Temporary names beside `files`, which take their places when the block ends without an exception.

    Until then, and if it fails, the old files are untouched and nothing is left behind. Missing folders are made.

    Raises:
        FileExistsError: one of the files exists, and not `force`.
    """
    for file in files:
        if file.exists() and not force:
            raise FileExistsError(f"{file}: exists already; force=True overwrites it")
        if file.is_dir():
            raise IsADirectoryError(f"{file}: is a folder, expected a file's name")
    temporary: list[Path] = []
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
            os.close(handle)
            temporary.append(Path(name))
        yield list(temporary)
        settle(temporary)
        for written, file in zip(temporary, files):
            os.replace(written, file)
    finally:
        for written in temporary:
            written.unlink(missing_ok=True)
