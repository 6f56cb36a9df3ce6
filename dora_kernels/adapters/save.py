"""`save_adapter`: a model's adapter, or one that was read, in a file of any format."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from dora_kernels import files, pairs
from dora_kernels.adapters.attaching import extract
from dora_kernels.adapters.bases import bases_of
from dora_kernels.adapters.formats import FORMATS, check_format
from dora_kernels.adapters.formats.base import Format
from dora_kernels.adapters.layers import Adapter
from dora_kernels.adapters.load import CONFIG
from dora_kernels.adapters.underscores import PREFIX, UNDERSCORED, check_prefix
from dora_kernels.adapters.writing import Writing
from dora_kernels.replacing import leftovers, replacing


def save_adapter(
    source: nn.Module | Adapter,
    path: str | os.PathLike[str],
    *,
    format: str = "peft",
    prefix: str | None = None,
    force: bool = False,
) -> list[str]:
    """Write an adapter in a format of `FORMATS`; docs/formats.md says what each can hold.

    What a format has no place for is folded into the factors where the mathematics allows: scalings into lora_B, ranks
    filled up with zeros. Files are written beside their places and moved there when all are complete, so that a crash
    leaves old ones whole; `read_adapter` refuses tensors whose configuration is of another save. A link is replaced,
    not the file that it leads to. Dtypes stay, but a lora_B that a scaling is folded into becomes float32 unless that
    is exact.

    Args:
        source: a model with adapted layers, or an `Adapter`.
        path: a folder; the formats without configuration (lycoris, kohya, qdora) take a ``.safetensors`` file, too.
        format: which.
        prefix: of the names in a LyCORIS or kohya file, "lora_te1" for a first text encoder's. None: the one that the
            adapter was read with, if it was of the same format, else "lycoris", or kohya's "lora_te" for modules in
            ``text_model`` and "lora_unet" for others.
        force: overwrite files that are there.

    Returns:
        What was folded or left out, and which files a killed run has left there, a sentence each.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the format cannot express the adapter, a value is not finite, or the path is no name for it.
        FileExistsError: a file is there, and not `force`; or the folder holds another format's adapter, of which this
            would exchange one half or be the second.
        OSError: a file cannot be written.
    """
    place = files.as_path(path)
    check_format(format)
    if not isinstance(source, nn.Module | Adapter):
        raise TypeError(f"source: expected a torch.nn.Module or an Adapter, got {type(source).__name__}")
    adapter = source if isinstance(source, Adapter) else extract(source)
    if not adapter.layers:
        raise ValueError("source: the adapter has no layers")
    known = bases_of(source) if isinstance(source, nn.Module) else ()
    chosen = FORMATS[format]
    if prefix is not None and not chosen.underscored:
        raise ValueError(f"prefix: the format {format!r} has none in its names")
    own = adapter.config.get(PREFIX, "") if adapter.format == format else ""
    writing = Writing(format, known, own if prefix is None else check_prefix(prefix))
    if adapter.config.get(UNDERSCORED) and (format != adapter.format or writing.prefix != own):
        name = next(iter(adapter.layers))
        raise writing.refuse(name, "that is a name with underscores for dots; read it with its model for the model's")
    weights = place
    if place.suffix in files.PICKLES:
        raise ValueError(f"{place}: adapters are written as safetensors alone, never as a pickle")
    if place.suffix != ".safetensors" or place.is_dir():
        weights = place / chosen.weights
    elif chosen.configured:
        raise ValueError(f"{place}: the format {format!r} has a configuration beside the tensors; give a folder")
    _check_place(weights, chosen)
    tensors, config = chosen.write(adapter, writing)
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"source: {key} has values that are not finite")
    targets = [weights] if config is None else [weights, weights.with_name(CONFIG)]
    writing.notes += [text for target in targets for text in leftovers(target)]
    with replacing(*targets, force=force) as written:
        files.save_tensors(written[0], tensors, pairs.seal(config))
        if config is not None:
            files.save_json(written[1], config)
    return writing.notes


def _check_place(weights: Path, chosen: Format) -> None:
    """FileExistsError where the folder holds files that belong to another format's adapter and would stay."""
    if weights.name not in {format.weights for format in FORMATS.values()}:
        return
    others = {format.weights for format in FORMATS.values()} - {weights.name}
    others |= set() if chosen.configured else {CONFIG}
    for name in sorted(others):
        if weights.with_name(name).exists():
            raise FileExistsError(
                f"{weights.parent}: {name} in it belongs to an adapter of another format than {chosen.name!r}; give a "
                "folder of its own, also with force=True"
            )
