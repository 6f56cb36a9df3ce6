"""Merge an adapter into a model's folder of safetensors, shard by shard, in a new folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_kernels.adapters import Adapter, AdapterLayer
from dora_kernels.adapters.beside import NOTE
from dora_kernels.adapters.experts import of_expert
from dora_kernels.adapters.load import CONFIG as ADAPTER_CONFIG
from dora_kernels.adapters.load import contents
from dora_kernels.adapters.targeted import sentence
from dora_kernels.checkpoints.checkpoint import (
    CONFIG,
    Checkpoint,
    attached,
    kinds_of,
    missing,
    read_for,
    stored_transposed,
    tied,
)
from dora_kernels.checkpoints.experts import seed_and_place, stack_transposed
from dora_kernels.checkpoints.modules_to_save import TrainedTensors, trained_beside
from dora_kernels.core import validation
from dora_kernels.core.shown import shown
from dora_kernels.files import storage
from dora_kernels.files.replacing import leftovers, replacing_folder
from dora_kernels.rounding import seed_for

# Files with weights other than safetensors. They are not copied, since they would stay unmerged.
_WEIGHTS = (*storage.PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")

# Files that mark an adapter's folder, which is never replaced: a training's result may be nowhere else.
_OF_ADAPTER = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")

# Suffixes and names of files that a model's folder has, and that may therefore be replaced.
_USUAL = (".safetensors", ".json", ".model", ".jinja", "merges.txt", "vocab.txt", "README.md", ".gitattributes")


def merge_checkpoint(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rounding: str = "nearest",
    seed: int = 0,
    strength: float = 1.0,
    force: bool = False,
    adapter_only: bool = False,
    advance: Callable[[str, int], None] = lambda step, total: None,
    **options: Any,
) -> Adapter:
    """Merge an adapter into a checkpoint's weights, in a new folder with the same files.

    Tensors that were trained beside the adapter (`modules_to_save`) are written too, as PEFT's merge_and_unload does.
    Only one shard is in memory at a time. The folder is made under another name beside `out`, and moved into place when
    it is complete. Files keep their modes, less the umask. A link is copied as the file it points to; a note names it
    if that lies outside the folder. Anything that is not a file is left out, with a note. Notes also name what a killed
    process has left beside `out`.

    Args:
        checkpoint: the base model.
        path: the adapter.
        out: the new folder.
        rounding, seed: as in `merge_dora`. Each layer's random numbers depend on its name (`rounding.seed_for`).
        strength: as in `set_dora_strength`.
        force: replace `out` if it exists and is a model's folder.
        adapter_only: leave out tensors that were trained beside the adapter.
        advance: called after each merged layer with its name and the number of layers.
        options: as in `read_adapter`.

    Raises:
        FileExistsError: `out` exists and `force` is False, or it holds files that do not belong to a model,
            or an adapter's.
        TypeError, FileNotFoundError, ValueError: as `read_for`; a weight is quantised, tied to another, or not finite
            when merged; or it cannot be decided whether one is stored transposed. Nothing is written then.
        OSError: a file cannot be read or written. `out` is unchanged; if it cannot be restored, the message says where
            its content is.
    """
    target = storage.as_path(out)
    validation.check_rounding(rounding, seed)
    _check_target(target, checkpoint.folder, storage.as_path(path), force)
    if "quantization_config" in checkpoint.config:
        raise ValueError(f"{checkpoint.folder / CONFIG}: quantization_config: cannot merge into quantised weights")
    adapter, keys = read_for(checkpoint, path, **options)
    adapter.notes += leftovers(target)
    transposed = stored_transposed(checkpoint, adapter, keys)
    kinds = kinds_of(checkpoint)
    transposed |= {
        name for name, layer in adapter.layers.items()
        if layer.kind == "experts" and stack_transposed(layer, checkpoint[keys[f"{name}.weight"]], kinds)
    }  # fmt: skip
    wanted = {}
    for name in adapter.layers:
        key = keys[f"{name}.weight"]
        storage.check_tensor(checkpoint.folder, key, checkpoint[key])
        if adapter.layers[name].kind == "embedding" and tied(checkpoint, key):
            raise ValueError(
                f"{path}: {name}: the model's output layer is tied to this embedding, and merging would change both; "
                f"if they are not tied, set tie_word_embeddings to false in {CONFIG}"
            )
        wanted[key] = name
    if left := missing(checkpoint, adapter, keys, wanted):
        adapter.notes.append(sentence(left))
    beside = TrainedTensors()
    if not adapter_only:
        found = contents(path, options.get("format", "auto"), options.get("scaling") is not None)
        beside = trained_beside(checkpoint, found, adapter, keys)
        if len(beside) and strength != 1.0:
            raise ValueError(
                f"strength: expected 1, because {next(iter(beside))} was trained beside the adapter, got {strength:g}; "
                "adapter_only=True leaves it out"
            )
        adapter.notes[:] = [note for note in adapter.notes if not note.endswith(NOTE)]
        adapter.notes += [f"{key}: as trained beside the adapter" for key in (*beside.whole, *beside.rows)]
        adapter.notes += [f"{key}: added as trained beside the adapter; the base model's files do not have it"
                          for key in beside.added]  # fmt: skip
    mode = checkpoint.folder.stat().st_mode & 0o777
    with replacing_folder(target, mode, force) as folder:
        for shard, own in checkpoint.shards.items():
            added = beside.added if shard == list(checkpoint.shards)[-1] else {}
            if not added and not {*wanted, *beside} & set(own):
                _copy(checkpoint.folder / shard, folder / shard)
                continue
            tensors = storage.read_tensors(checkpoint.folder / shard)
            beside.put(tensors)
            for key in (key for key in own if key in wanted):
                name = wanted[key]
                layer, (own_seed, above) = adapter.layers[name], seed_and_place(adapter, name, seed)
                tensors[key] = _merged(tensors[key], layer, name in transposed, strength, rounding, own_seed, above)
                if not bool(tensors[key].isfinite().all()):
                    raise ValueError(f"{key}: merged, it has values that are not finite in {tensors[key].dtype}")
                advance(name, len(wanted))
            _create(checkpoint.folder / shard, folder / shard)
            storage.save_tensors(folder / shard, {**tensors, **added})
        for shard in checkpoint.shards:
            adapter.notes += _leading_out(checkpoint.folder / shard, checkpoint.folder)
        adapter.notes += _copy_others(checkpoint, folder)
        if checkpoint.index is not None and beside.added:
            _add_to_index(folder / checkpoint.index.name, shard, beside.added)
    return adapter


def _add_to_index(index: Path, shard: str, added: Mapping[str, Tensor]) -> None:
    content = storage.read_json(index, "index of shards")
    content["weight_map"].update(dict.fromkeys(added, shard))
    metadata = content.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("total_size"), int):
        metadata["total_size"] += sum(tensor.nbytes for tensor in added.values())
    storage.save_json(index, content)


def _check_target(target: Path, base: Path, adapter: Path, force: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target}: is a file, expected a folder")
    if target.exists() and not force:
        raise FileExistsError(f"{target}: exists already; force=True replaces it, if it is a model's folder")
    for place in (base.resolve(), adapter.resolve()):
        if place == target.resolve() or place in target.resolve().parents or target.resolve() in place.parents:
            raise ValueError(f"{target}: expected a folder outside {place}, and not one that contains it")
    if not target.exists():
        return
    held = list(target.rglob("*"))
    trained = sorted(str(place.relative_to(target)) for place in held if place.name in _OF_ADAPTER)
    if trained:
        raise FileExistsError(f"{target}: not replaced: it contains {trained[0]}, so it is an adapter's folder")
    foreign = sorted(str(place.relative_to(target)) for place in held if not _of_model(place, target, base))
    if foreign:
        raise FileExistsError(
            f"{target}: not replaced: it contains {foreign[0]}, which is neither a model's file nor in {base}"
        )
    if held and not any(place.name == CONFIG or place.suffix == ".safetensors" for place in held):
        raise FileExistsError(
            f"{target}: not replaced: it contains neither {CONFIG} nor safetensors, so it is not a model's folder"
        )
    if Path.cwd().is_relative_to(target.resolve()):
        raise FileExistsError(f"{target}: not replaced: it contains the working directory")


def _of_model(place: Path, target: Path, base: Path) -> bool:
    """True if a file or folder in `target` belongs to a model's folder, or exists in the base model's."""
    usual = place.parent == target and (place.suffix in _USUAL or place.name in _USUAL)
    return (usual and place.is_file()) or (base / place.relative_to(target)).exists()


def _merged(
    stored: Tensor, layer: AdapterLayer, transposed: bool, strength: float, rounding: str, seed: int, above: int = 0
) -> Tensor:
    """The merged weight, as it is stored, computed by the layer that would run it.

    Args:
        above: the number of parts of the same size that lie above it in a stack, so that its first element is not the
            first that draws.
    """
    if above and rounding == "stochastic":
        dim = 1 if transposed else 0
        m = None if layer.magnitude is None else layer.magnitude.repeat(above + 1)
        layer = replace(layer, lora_B=layer.lora_B.repeat(above + 1, 1), magnitude=m)
        merged = _merged(torch.cat([stored] * (above + 1), dim), layer, transposed, strength, rounding, seed)
        return merged.chunk(above + 1, dim)[-1].clone()
    if layer.kind == "experts":
        parts = (of_expert(layer, e) for e in range(len(stored)))
        return torch.stack([
            _merged(one, part, transposed, strength, rounding, seed_for(seed, str(e)))
            for e, (one, part) in enumerate(zip(stored, parts, strict=True))
        ])  # fmt: skip
    adapted = attached(stored.clone(), layer, transposed)
    adapted.strength = strength
    adapted.merge(rounding, seed)
    written: Tensor = adapted.base_layer.weight.detach()
    return written.t().contiguous() if transposed else written


def _copy_others(checkpoint: Checkpoint, target: Path) -> list[str]:
    """Copy every file that holds no weights, including those in subfolders, but no adapter's configuration.

    Returns:
        A sentence for each link that points out of the folder, and for anything that is not a file.
    """
    notes: list[str] = []
    folders = [Path()]
    while folders:
        inside = folders.pop()
        for place in sorted((checkpoint.folder / inside).iterdir()):
            kept = place == checkpoint.index
            own = place.name in checkpoint.shards or place.name == ADAPTER_CONFIG
            if place.is_dir() and not place.is_symlink():
                (target / inside / place.name).mkdir(place.stat().st_mode & 0o777 | 0o700)
                folders.append(inside / place.name)
            elif not kept and (place.name.endswith((*_WEIGHTS, ".index.json")) or (own and inside == Path())):
                continue
            elif place.is_file():
                _copy(place, target / inside / place.name)
                notes += _leading_out(place, checkpoint.folder)
            else:
                notes.append(f"{shown(str(place), 500)}: left out, because it is neither a file nor a link to one")
    return notes


def _copy(source: Path, target: Path) -> None:
    _create(source, target)
    shutil.copyfile(source, target)


def _create(source: Path, target: Path) -> None:
    """Create an empty file with the mode of `source`, so that only those who may read `source` may read it."""
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, source.stat().st_mode & 0o777 | 0o200))


def _leading_out(place: Path, folder: Path) -> list[str]:
    """Return a sentence if a file of `folder` is a link out of it, but not to a blob of Hugging Face's cache."""
    real, root = place.resolve(), folder.resolve()
    homes = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    if any(real.is_relative_to(home) for home in homes):
        return []
    return [f"{shown(str(place), 500)}: a link; copied from {shown(str(real), 500)}, outside the folder"]
