"""`load_adapter`: read a file of any format, check it and, with a model, attach it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.attachment import Models, attach, joined
from dora_kernels.adapters.base_layers import base_layers_of, check_fit
from dora_kernels.adapters.components import is_component, is_underscored, prefix_of
from dora_kernels.adapters.experts import single_names, stacked
from dora_kernels.adapters.formats import FORMATS, check_format, detect
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.stacks import BY_VERSION, EXCHANGED, MATRICES, is_stacked, layout
from dora_kernels.adapters.names import COMPONENTS, PREFIX, UNDERSCORED, check_prefix, resolve, respelled
from dora_kernels.adapters.targeted import missing, sentence
from dora_kernels.core import validation
from dora_kernels.core.shown import listed, shown
from dora_kernels.files import pairs, storage
from dora_kernels.model.apply import adapted_layers, name_of

CONFIG = "adapter_config.json"


def load_adapter(
    path: str | os.PathLike[str],
    model: Models | None = None,
    *,
    format: str = "auto",
    magnitude_axis: str = "auto",
    scaling: float | None = None,
    prefix: str | None = None,
) -> Adapter:
    """Read an adapter file of any format and, with a model, attach it.

    Layers that were adapted before and are not in the file stay adapted, which is warned of; `remove_dora` before takes
    them off. Layers keep their strength, which a note names where it is not 1.

    Args:
        path: the safetensors file, or the folder that holds it.
        model: the model to attach the adapter to, or several of a pipeline's models by its names for them
            (``{"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}``). None only reads the file.
        format: as `read_adapter`.
        magnitude_axis: as `read_adapter`.
        scaling: as `read_adapter`.
        prefix: as `read_adapter`.

    Returns:
        The adapter.

    Warns:
        RuntimeWarning: as `attach`; or the configuration of PEFT's file names layers of the model for which the file
            has no tensors.

    Raises:
        TypeError: as `read_adapter` and `attach`. The model is unchanged by any of these errors.
        FileNotFoundError: as `read_adapter`.
        ValueError: as `read_adapter` and `attach`.
    """
    if model is not None:
        joined(model)
    options: dict[str, Any] = {"format": format, "magnitude_axis": magnitude_axis, "scaling": scaling, "prefix": prefix}
    adapter = read_adapter(path, model, **options)
    if model is not None:
        attached = set(attach(model, adapter))
        whole = joined(model)
        if isinstance(model, nn.Module) and (left := missing(adapter, base_layers_of(whole), attached, whole)):
            adapter.notes.append(sentence(left))
            warnings.warn(f"{path}: {sentence(left)}", RuntimeWarning, stacklevel=2)
        layers = adapted_layers(whole)
        if others := [name for name, layer in layers.items() if name_of(name, layer) not in attached]:
            names = listed(others, 3)
            text = f"{names} stay adapted: the file has no tensors for them; to avoid it call remove_dora(model) first"
            adapter.notes.append(text)
            warnings.warn(f"{path}: {text}", stacklevel=2)
        if weakened := [name for name, layer in layers.items() if layer.strength != 1.0]:
            adapter.notes.append(f"{listed(weakened, 3)} keep a strength other than 1; set_dora_strength changes it")
    return adapter


def read_adapter(
    path: str | os.PathLike[str],
    base: Models | Mapping[str, Tensor] | None = None,
    *,
    format: str = "auto",
    magnitude_axis: str = "auto",
    scaling: float | None = None,
    prefix: str | None = None,
) -> Adapter:
    """Read an adapter file of any format; docs/formats.md describes all of them.

    Only safetensors are read: loading a pickle can run any code.

    Args:
        path: the safetensors file, or the folder that holds it; a configuration is looked for beside it.
        base: the base model, or its state dict, or several of a pipeline's models by its names for them
            (``{"unet": ..., "text_encoder": ...}``). Names with underscores become its names, and where shapes leave
            open which axis a magnitude is along, its weights decide.
        format: one of `FORMATS`, or "auto", which takes it from the keys.
        magnitude_axis: "out" or "in", or "auto", which takes the format's, or decides as `Adapter.notes` says.
        scaling: replaces the one that the file or its configuration gives.
        prefix: read only the layers of a LyCORIS, kohya or diffusers file whose names start with it. "lora_te1" and
            "text_encoder" are the first text encoder's, where a file has layers of several models with the same names.

    Returns:
        The adapter. `Adapter.notes` says what was decided about it.

    Raises:
        TypeError: an argument has a wrong type.
        FileNotFoundError: there is no such file, or no safetensors file in the folder.
        OSError: the file cannot be read.
        ValueError: the file is truncated, oversized, a pickle or of another format; its configuration was saved with
            another file; a tensor is missing, duplicated, of a wrong size or not finite; names or axis are ambiguous;
            or layers are missing in `base`. The message names the file and the key.
    """
    place = storage.as_path(path)
    check_format(format, "auto")
    if magnitude_axis != "auto":
        validation.check_axis(magnitude_axis)
    if scaling is not None:
        validation.check_scaling(scaling)
        scaling = float(scaling)
    if prefix is not None:
        prefix = check_prefix(prefix)
    several = isinstance(base, Mapping) and any(isinstance(each, nn.Module) for each in base.values())
    if not (base is None or several or isinstance(base, nn.Module) or _is_state_dict(base)):
        wanted = "expected a torch.nn.Module, its state dict, or modules by name"
        raise TypeError(f"base: {wanted}, got {type(base).__name__}")
    base_layers = None if base is None else base_layers_of(joined(base) if several else base)  # type: ignore[arg-type]
    weights, config_file = _find(place, format)
    tensors, header, config = pairs.read(weights, config_file, scaled=scaling is not None)
    chosen = _format(weights, tensors, config, format)
    if not FORMATS[chosen].configured:
        config, config_file = {}, None
    reading = Reading(weights, tensors, config_file, config, base_layers, magnitude_axis, scaling, header=header)
    layers, config = FORMATS[chosen].read(reading), dict(config)
    if scaling is not None:
        reading.notes.append(f"scaling {scaling:g}, as requested")
    told = {EXCHANGED: reading.exchanged, BY_VERSION: reading.by_version, MATRICES: reading.matrices}
    config |= {key: names for key, names in told.items() if names}
    unknown: list[str] = []
    if FORMATS[chosen].prefixed:
        layers = _named(reading, layers, config, prefix or "")
        if base_layers is not None and not layers.keys() <= base_layers.keys():
            layers = stacked(reading.decide(layers), base_layers, reading.notes)
    elif prefix is not None:
        raise ValueError(f"prefix: {weights} has the format {chosen!r}, whose names have no prefix")
    elif base_layers is not None:
        layers = stacked(layers, base_layers, reading.notes)
        unknown = [name for name in layers if name not in base_layers]
    if unknown and base_layers is not None:
        names, first = respelled(layers, base_layers), unknown[0]
        if names[first] != first:
            reading.notes.append(f"names like {first} were read as names like {names[first]}, which this model has")
        layers = {names[name]: layer for name, layer in layers.items()}
    if several:
        config[COMPONENTS] = True
    if base_layers is not None:
        check_fit(layers, base_layers, reading.error)
        config |= layout(layers, base_layers, base)
    return Adapter(reading.decide(layers), chosen, reading.notes, config, reading.beside)


def _is_state_dict(base: Any) -> bool:
    """True if `base` maps names to tensors. A module's state dict may also hold other objects."""
    if not isinstance(base, Mapping) or not all(isinstance(key, str) for key in base):
        return False
    return all(isinstance(value, Tensor) for key, value in base.items() if key.endswith(".weight"))


def _named(
    reading: Reading, layers: dict[str, AdapterLayer], config: dict[str, Any], requested: str
) -> dict[str, AdapterLayer]:
    """Return the layers with the requested prefix, under the model's names. What was found is recorded in `config`."""
    names = {name: name for name in layers if not requested or prefix_of(name, requested) == requested}
    if not names:
        there = shown(", ".join(sorted({prefix_of(name) or name for name in layers})), 1000)
        raise reading.error(f"prefix: no layer has {requested!r}; the file has {there}")
    if len(names) < len(layers):
        reading.notes.append(f"{len(layers) - len(names)} layers without the prefix {requested} are left out")
    prefixes = {name: prefix_of(name, requested) for name in names}
    if reading.base_layers is not None:
        known = [*reading.base_layers, *single_names(reading.base_layers)]
        names = resolve(names, known, reading.error, reading.notes, requested)
    elif any(prefix and "." not in name for name, prefix in prefixes.items()):
        config[UNDERSCORED] = True
        reading.notes.append("names are the file's, with underscores for dots; pass the model to get the model's names")
    elif all(is_component(prefix) and not is_underscored(prefix) for prefix in prefixes.values()):
        config[COMPONENTS] = True
    prefix, *others = {prefixes[name] for name in names}
    if prefix and not others and (reading.base_layers is None or any(name != own for name, own in names.items())):
        config[PREFIX] = prefix
    return {own: layers[name] for name, own in names.items()}


@dataclass(frozen=True)
class Contents:
    """The layers of an adapter file, from its keys.

    Attributes:
        file, format: the file and its format.
        layers: names of the adapter's layers, as in the file.
        others: keys that belong to no adapter.
        stacks: True if it adapts stacks of experts.
    """

    file: Path
    format: str
    layers: list[str]
    others: list[str]
    stacks: bool = False


def contents(path: str | os.PathLike[str], format: str = "auto", scaled: bool = False) -> Contents:
    """Return the keys of the file that `read_adapter` would read, without its values.

    Args:
        scaled: True if `read_adapter` is to be called with a scaling.

    Raises:
        TypeError, FileNotFoundError, ValueError: as `read_adapter`, as far as no values are needed.
    """
    check_format(format, "auto")
    file, config_file = _find(storage.as_path(path), format)
    tensors, _, config = pairs.read(file, config_file, scaled=scaled)
    chosen = _format(file, tensors, config, format)
    found = {key: FORMATS[chosen].split(key) for key in tensors}
    layers = dict.fromkeys(each[0] for each in found.values() if each)
    others = [key for key, each in found.items() if not each]
    stacks = bool(config.get("target_parameters")) or (
        chosen == "peft" and any(each and is_stacked(each[0], tensors[key]) for key, each in found.items())
    )
    return Contents(file, chosen, list(layers), others, stacks)


def _find(place: Path, format: str) -> tuple[Path, Path | None]:
    """Return the file with the tensors and, if there is one, the configuration beside it."""
    if place.suffix in storage.PICKLES:
        raise ValueError(f"{place}: a pickle, which can run any code and is not read; save it as safetensors")
    if not place.is_dir():
        config = place.with_name(CONFIG)
        return place, config if config.is_file() else None
    known = [FORMATS[format]] if format != "auto" else list(FORMATS.values())
    found = [place / name for name in dict.fromkeys(each.weights for each in known) if (place / name).is_file()]
    found = found or sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        if found:
            names = shown(", ".join(file.name for file in found), 1000)
            raise ValueError(f"{place}: expected one adapter file, got {names}; pass the path of one of them")
        raise FileNotFoundError(f"{place}: contains no safetensors file{storage.pickle_hint(place)}")
    config = place / CONFIG
    return found[0], config if config.is_file() else None


def _format(file: Path, tensors: Mapping[str, Tensor], config: dict[str, Any], requested: str) -> str:
    found = detect(tensors, config)
    if requested == "auto":
        if found is None:
            keys = ", ".join(list(tensors)[:3]) or "none"
            raise ValueError(f"{file}: not an adapter in a known format: its keys are {keys}")
        return found
    if found not in (None, requested) and not {requested, found} <= {"lycoris", "kohya", "diffusers"}:
        raise ValueError(f"{file}: format={requested!r}, but its keys are those of {found!r}")
    return requested
