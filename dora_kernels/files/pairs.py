"""An adapter's two files, tensors and configuration: read together, and whether they were saved together.

Two files cannot take their places in one step. A process that is killed between them, or two that write at once without
locks, leave the tensors of one adapter with the scaling of another, which reads as a good adapter. So the tensors' file
carries digests of the configuration's fields that decide about the function. Files of others have none.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_kernels.files import storage
from dora_kernels.files.replacing import leftovers

_KEY = "dora_kernels.configuration"

_SCALES = ("lora_alpha", "use_rslora", "alpha_pattern", "lora_parameters")
_FIELDS = ("peft_type", "r", "rank_pattern", "use_dora", "target_modules", "fine_tune_type", *_SCALES)

# A writer may be between its two files: so often, and with so many seconds between, is it looked again.
_TIMES, _SECONDS = 25, 0.01


def seal(config: Mapping[str, Any] | None) -> dict[str, str]:
    """Metadata for the tensors' file that say which configuration belongs to it; none without configuration."""
    if config is None:
        return {}
    return {_KEY: json.dumps({name: _digest(config.get(name)) for name in _FIELDS})}


def read(
    weights: Path,
    config_file: Path | None,
    *,
    scaled: bool = False,
    wanted: Callable[[str], object] = lambda key: True,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """The tensors whose keys are `wanted`, their file's metadata, and what the configuration says; empty without one.

    Args:
        weights, config_file: the two files.
        scaled: the caller knows the scaling: what the configuration says about it does not matter.
        wanted: as `storage.read_tensors`.

    Raises:
        FileNotFoundError, OSError, ValueError: as `storage.read_all` and `storage.read_json`; or the two were not saved
            together.
    """
    for time_left in reversed(range(_TIMES)):
        config = storage.read_json(config_file, "adapter configuration") if config_file is not None else {}
        tensors, metadata = storage.read_all(weights, wanted)
        different = [] if config_file is None else _different(metadata, config, scaled)
        if not different:
            break
        if not time_left:
            raise _mixture(weights, config_file, different)
        time.sleep(_SECONDS)
    return tensors, metadata, config


def _different(metadata: Mapping[str, str], config: Mapping[str, Any], scaled: bool) -> list[str]:
    """The configuration's fields that are not those that the tensors were saved with."""
    if _KEY not in metadata:
        return []
    try:
        said = json.loads(metadata[_KEY])
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        return [f"metadata {_KEY}"]
    return [name for name in _FIELDS if name in said and not (scaled and name in _SCALES)
            and said[name] != _digest(config.get(name))]  # fmt: skip


def _mixture(weights: Path, config_file: Path | None, different: list[str]) -> ValueError:
    left = [text for file in (weights, config_file) if file is not None for text in leftovers(file)]
    return ValueError(
        f"{weights}: it was not saved with {config_file}, which has another {', '.join(different)}: one of the two is "
        "of another save, that was interrupted or copied in part. Save the adapter again. If the configuration was "
        "changed on purpose, undo that; an adapter that is read with scaling= and saved has another scaling"
        + "".join(f"; {text}" for text in left)
    )


def _digest(value: Any) -> str:
    """The same for what configurations write in several ways: 16 and 16.0, a set's items in any order, None and not."""
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()} or None
    if isinstance(value, list | tuple | set):
        return sorted((_plain(each) for each in value), key=lambda each: json.dumps(each, sort_keys=True)) or None
    if value is False or value is None:
        return None
    return float(value) if type(value) is int and abs(value) < 1 << 53 else value
