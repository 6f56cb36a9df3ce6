"""`save_adapter`: write a model's adapter, or one that was read, to a file of any format."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_kernels.adapters.adapter import Adapter
from dora_kernels.adapters.attachment import extract, joined
from dora_kernels.adapters.base_layers import base_layers_of
from dora_kernels.adapters.beside import check_written, no_place, settings
from dora_kernels.adapters.formats import FORMATS, WRITTEN, check_format
from dora_kernels.adapters.formats.base import Format
from dora_kernels.adapters.formats.stacks import MATRICES
from dora_kernels.adapters.formats.writer import Writing
from dora_kernels.adapters.load import CONFIG
from dora_kernels.adapters.names import COMPONENTS, PREFIX, UNDERSCORED, check_prefix
from dora_kernels.core.shown import shown
from dora_kernels.files import pairs, storage
from dora_kernels.files.replacing import leftovers, replacing


def save_adapter(
    source: nn.Module | Adapter | Mapping[str, nn.Module | Adapter],
    path: str | os.PathLike[str],
    *,
    format: str = "peft",
    prefix: str | None = None,
    force: bool = False,
) -> list[str]:
    """Write an adapter in one of `FORMATS`, "vllm" or "sglang"; docs/formats.md says what each can hold.

    What a format has no place for is folded into the factors if that is mathematically possible: scalings into lora_B,
    lower ranks are padded with zeros. Files are written under temporary names and moved into place when all are
    complete, so a crash leaves old files whole. `read_adapter` rejects tensors whose configuration was saved with
    another file. A link is replaced, not the file it points to. Dtypes stay the same, except that a lora_B with a
    folded scaling becomes float32 unless the result is exact.

    Args:
        source: a model with adapted layers, an `Adapter`, or several of them by a pipeline's names for its models, for
            one file in the formats kohya and diffusers: ``{"unet": unet, "text_encoder": text_encoder}``.
        path: a folder. The formats without configuration (lycoris, kohya, diffusers, qdora) also accept a
            ``.safetensors`` file.
        format: the format's name.
        prefix: for one model in a LyCORIS, kohya or diffusers file: the prefix of the names, e.g. "lora_te1" or
            "text_encoder" for a first text encoder. None: the prefix that the adapter was read with, if it had the same
            format; else "lycoris", or what the layer names suggest: for kohya "lora_te" for CLIP, "lora_te3" for T5 and
            "lora_unet" for others; for diffusers "text_encoder", "text_encoder_3", "unet" and "transformer".
        force: overwrite existing files.

    Returns:
        Notes, one sentence each: what was folded or left out, and files that a killed process has left there.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the format cannot express the adapter; the adapter has tensors in `Adapter.beside`, and was read in
            another format or is in a mapping; a value is not finite; or the path is not a valid name for the format.
        FileExistsError: a file exists and `force` is False; or the folder holds an adapter of another format, which
            this would half replace or sit beside.
        OSError: a file cannot be written.
    """
    place = storage.as_path(path)
    check_format(format, *(name for name in WRITTEN if name not in FORMATS))
    adapter, known = _source(source)
    if not adapter.layers:
        raise ValueError("source: the adapter has no layers")
    check_written(adapter, format)
    chosen = WRITTEN[format]
    if prefix is not None and not chosen.prefixed:
        raise ValueError(f"prefix: names in the format {format!r} have no prefix")
    if adapter.config.get(COMPONENTS):
        adapter = _parted(adapter, chosen, prefix)
    own = adapter.config.get(PREFIX, "") if adapter.format == format else ""
    if (matrices := adapter.config.get(MATRICES)) and format != "peft":
        raise ValueError(f"{matrices[0]} cannot be written as {format!r}: only PEFT's format has parameters like it")
    writing = Writing(format, known, own if prefix is None else check_prefix(prefix))
    if adapter.config.get(UNDERSCORED) and (format != adapter.format or writing.prefix != own):
        name = next(iter(adapter.layers))
        raise writing.error(
            name,
            "its name has underscores for dots; read the adapter with its model to get the model's names: "
            "read_adapter(file, model), or --base MODEL_DIR on the command line",
        )
    weights = place
    if place.suffix in storage.PICKLES:
        raise ValueError(f"{place}: adapters are only written as safetensors, never as a pickle")
    if place.suffix != ".safetensors" or place.is_dir():
        weights = place / chosen.weights
    elif chosen.configured:
        raise ValueError(f"{place}: the format {format!r} has a configuration beside the tensors, so pass a folder")
    _check_place(weights, chosen)
    tensors, config = chosen.write(adapter, writing)
    tensors |= adapter.beside
    if config is not None:
        config |= settings(adapter.config) if adapter.beside else {}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"source: {key} has values that are not finite")
    targets = [weights] if config is None else [weights, weights.with_name(CONFIG)]
    writing.notes += [text for target in targets for text in leftovers(target)]
    with replacing(*targets, force=force) as written:
        storage.save_tensors(written[0], tensors, pairs.seal(config))
        if config is not None:
            storage.save_json(written[1], config)
    return writing.notes


def _source(source: Any) -> tuple[Adapter, Collection[str]]:
    """The adapter to write, of one model or of several, and the names of the models' layers if there are models."""
    if isinstance(source, Adapter):
        return source, ()
    if isinstance(source, nn.Module):
        return extract(source), base_layers_of(source)
    if not isinstance(source, Mapping):
        raise TypeError(f"source: expected a torch.nn.Module or an Adapter, got {type(source).__name__}")
    for component, each in source.items():
        if not isinstance(each, nn.Module | Adapter):
            raise TypeError(f"source: {component}: expected a torch.nn.Module or an Adapter, got {type(each).__name__}")
    models = {name: each for name, each in source.items() if isinstance(each, nn.Module)}
    known = base_layers_of(joined(models)) if models else {}
    result = Adapter({}, config={COMPONENTS: True})
    for component, each in source.items():
        adapter = extract(each) if isinstance(each, nn.Module) else each
        if adapter.config.get(UNDERSCORED):
            raise ValueError(
                f"source: {component}: its names have underscores for dots; read it with its model to get the model's "
                "names"
            )
        start = f"{component}." if adapter.config.get(COMPONENTS) else ""
        if other := next((name for name in adapter.layers if not name.startswith(start)), None):
            raise ValueError(
                f"source: {component}: {other} belongs to another model; pass prefix= when reading to get one model's "
                "layers"
            )
        if adapter.beside:
            raise no_place(f"source: {component}", adapter, "its adapter, and a mapping of models")
        result.layers |= {f"{component}.{name.removeprefix(start)}": layer for name, layer in adapter.layers.items()}
    return result, known


def _parted(adapter: Adapter, chosen: Format, prefix: str | None) -> Adapter:
    """Return a pipeline's adapter as the format can hold it: of several models, or of one without its name."""
    components = sorted({name.partition(".")[0] for name in adapter.layers})
    if chosen.pipelines and prefix is None:
        return adapter
    if len(components) > 1:
        of = shown(", ".join(components), 1000)
        why = f"the format {chosen.name!r} holds only one" if prefix is None else "prefix= needs a single model"
        raise ValueError(
            f"source: it has adapters of {of}, but {why}; pass prefix= when reading to get one model's layers"
        )
    layers = {name.partition(".")[2]: layer for name, layer in adapter.layers.items()}
    config = {name: value for name, value in adapter.config.items() if name not in (COMPONENTS, PREFIX)}
    return replace(adapter, layers=layers, config=config)


def _check_place(weights: Path, chosen: Format) -> None:
    """Raise FileExistsError if files of another format's adapter in the folder would remain beside the new ones."""
    if weights.name not in {format.weights for format in FORMATS.values()}:
        return
    others = {format.weights for format in FORMATS.values()} - {weights.name}
    others |= set() if chosen.configured else {CONFIG}
    for name in sorted(others):
        if weights.with_name(name).exists():
            raise FileExistsError(
                f"{weights.parent}: contains {name} of an adapter in another format than {chosen.name!r}; choose "
                "another folder, also with force=True"
            )
