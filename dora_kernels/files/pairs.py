"""An adapter's two files, tensors and configuration: read both, and check that they were saved together.

Two files cannot be replaced in one step. If a process is killed between them, or two write at once without locks, the
tensors of one adapter end up beside the scaling of another, and together they look like a valid adapter. So the
tensors' file stores digests of the configuration's fields that affect the result. Files from other programs have no
digests.
"""

from __future__ import annotations

import hashlib
import json
import re
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

# A writer may be between its two files, so a mismatch is checked again this many times, with this wait in seconds.
_TIMES, _SECONDS = 25, 0.01


def seal(config: Mapping[str, Any] | None) -> dict[str, str]:
    """Return metadata for the tensors' file that identifies its configuration; empty without a configuration."""
    if config is None:
        return {}
    return {_KEY: json.dumps({name: _digest(config.get(name)) for name in _FIELDS})}


def before_exchange(config: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
    """True if two files are of PEFT before 0.19, which exchanges A and B of all stacks of experts ``[E, out, in]``.

    PEFT's configurations have its version from 0.18 on. Without one, files are this package's, which have digests, or
    those of PEFT 0.17.

    Args:
        metadata: of the tensors' file.
    """
    version = config.get("peft_version")
    numbers = re.findall(r"\d+", version) if isinstance(version, str) else []
    return tuple(map(int, numbers[:2])) < (0, 19) if numbers else _KEY not in metadata


def read(
    weights: Path,
    config_file: Path | None,
    *,
    scaled: bool = False,
    wanted: Callable[[str], object] = lambda key: True,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Return the tensors whose keys are `wanted`, their file's metadata, and the configuration (empty without one).

    Args:
        weights, config_file: the two files.
        scaled: True if the caller knows the scaling, so that what the configuration says about it does not matter.
        wanted: as in `storage.read_tensors`.

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
    """The configuration's fields that differ from those that the tensors were saved with."""
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
    """A digest that is the same for values that configurations write in several ways.

    16 and 16.0 are the same, and so are a set's items in any order, and None and a missing entry.
    """
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()} or None
    if isinstance(value, list | tuple | set):
        return sorted((_plain(each) for each in value), key=lambda each: json.dumps(each, sort_keys=True)) or None
    if value is False or value is None:
        return None
    return float(value) if type(value) is int and abs(value) < 1 << 53 else value
