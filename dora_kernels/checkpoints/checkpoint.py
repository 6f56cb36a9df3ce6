"""Read a model's folder of safetensors, layer by layer, without loading the model."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.adapters import FORMATS, Adapter, AdapterLayer, attach, read_adapter
from dora_kernels.adapters.base_layers import CONVOLUTIONS
from dora_kernels.adapters.blocks import names_in_model
from dora_kernels.adapters.components import prefix_of
from dora_kernels.adapters.experts import EXPERT, of_expert, stacks_with
from dora_kernels.adapters.load import Contents, contents
from dora_kernels.adapters.names import RENAMINGS, check_prefix, readings
from dora_kernels.adapters.targeted import named_layers, named_parameters
from dora_kernels.checkpoints.experts import (
    check_halves,
    check_whole,
    holds_stacks,
    places_of,
    read_stacks_for,
    stack_transposed,
)
from dora_kernels.core.scale import magnitude_scale
from dora_kernels.core.shown import name_problem, quoted
from dora_kernels.files import storage
from dora_kernels.model.expert_names import is_expert_name
from dora_kernels.modules import AdaptedLayer, DoRALayer

# Files of transformers and diffusers. Several shards have an index.
_FILES, _INDEX, CONFIG = ("model", "diffusion_pytorch_model"), ".index.json", "config.json"

# Prefixes that a layer's name may have in the model but not in its file, or the other way round.
_PREFIXES = ("model.", "transformer.", "language_model.", "model.language_model.", "base_model.", "text_model.")

# Names of output layers, names of embeddings, and models without an output layer.
_OUTPUTS = ("lm_head", "embed_out", "output", "decoder", "proj_out")
_EMBEDDING = re.compile(r"^(?!embed_out$).*(embed|shared|wte|wpe)")
_HEADLESS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")

# Models whose linear layers are stored transposed (transformers' Conv1D), and the names of these layers.
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a model's folder, ``model.safetensors`` or the shards of ``model.safetensors.index.json``, by key.

    For a diffusers model the files are ``diffusion_pytorch_model.safetensors`` and its index.
    Files are memory-mapped; a tensor is read when it is used.

    Attributes:
        folder: the folder.
        shards: the keys in each file.
        index: the index file; None if there is only one shard.
        config: the content of ``config.json``; empty without one.

    Raises:
        FileNotFoundError: the folder does not exist, or has none of these files.
        ValueError: a file is damaged, or does not hold what the index says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = storage.as_path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder")
        self.shards, self.index = self._find()
        config = self.folder / CONFIG
        self.config = storage.read_json(config, "model's configuration") if config.is_file() else {}
        self._places = {key: file for file, keys in self.shards.items() for key in keys}
        self._open: dict[str, dict[str, Tensor]] = {}

    def _find(self) -> tuple[dict[str, list[str]], Path | None]:
        names = [f"{name}.safetensors" for name in _FILES]
        for name in names:
            if (self.folder / name).is_file():
                return {name: list(storage.read_tensors(self.folder / name))}, None
        indices = (self.folder / f"{name}{_INDEX}" for name in names)
        index = next((each for each in indices if each.is_file()), None)
        if index is None:
            hint = storage.pickle_hint(self.folder)
            raise FileNotFoundError(f"{self.folder}: neither {' nor '.join(names)}, nor their {_INDEX}, in it{hint}")
        places = storage.read_json(index, "index of shards").get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{index}: no weight_map")
        shards: dict[str, list[str]] = {}
        for key, file in places.items():
            if problem := name_problem(key):
                raise ValueError(f"{index}: {problem}")
            if not isinstance(file, str) or Path(file).name != file or name_problem(file):
                raise ValueError(f"{index}: {key}: expected the name of a file beside it, got {quoted(file)}")
            shards.setdefault(file, []).append(key)
        for file, keys in shards.items():
            missing = set(keys) - storage.read_tensors(self.folder / file).keys()
            if missing:
                raise ValueError(f"{self.folder / file}: {min(missing)} is missing, although the index names it")
        return shards, index

    def __getitem__(self, key: str) -> Tensor:
        file = self._places[key]
        if file not in self._open:
            self._open[file] = storage.read_tensors(self.folder / file)
        return self._open[file][key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def read_for(
    checkpoint: Checkpoint, path: str | os.PathLike[str], *, as_files: bool = True, **options: Any
) -> tuple[Adapter, Mapping[str, str]]:
    """Return an adapter for a checkpoint's model, under the adapter's own names, and its layers' checkpoint keys.

    The names may differ from the checkpoint's in a prefix, such as ``model.``: a layer's weight has the key
    ``keys[f"{name}.weight"]``.

    Args:
        checkpoint: the model's folder.
        path: the adapter.
        as_files: stacks become the layers of single experts where the files have these; False leaves them whole, and
            the keys are still those of the files.
        options: as in `read_adapter`.

    Raises:
        TypeError, FileNotFoundError, ValueError: as `read_adapter`; the names fit in two ways; the layer's weight is
            tied to the embedding; or only some experts of a module are adapted.
    """
    found = contents(path, options.get("format", "auto"), options.get("scaling") is not None)

    def error(text: str) -> ValueError:
        return ValueError(f"{found.file}: {text}")

    prefix = check_prefix(options["prefix"]) if options.get("prefix") is not None else ""
    adapter = read_adapter(path, **options) if found.stacks else None
    keys = _keys(names_in_model(checkpoint), found, adapter.layers if adapter else found.layers, prefix)
    if adapter or holds_stacks(checkpoint, keys, found.layers):
        adapter = adapter or read_adapter(path, **options)
        return read_stacks_for(checkpoint, keys, adapter, kinds_of(checkpoint), error, as_files)
    absent = [name for name in found.layers if f"{name}.weight" not in keys]
    if len(absent) == 1 and absent[0].rpartition(".")[2] in _OUTPUTS:
        raise ValueError(
            f"{path}: {absent[0]}: {checkpoint.folder} has no {absent[0]}.weight, because it is tied to the "
            "embedding, and merging into one would change both"
        )
    adapter = read_adapter(path, {name: checkpoint[key] for name, key in keys.items()}, **options)
    check_whole(adapter.layers, keys, error)
    stacks = {name: keys[name] for name, layer in adapter.layers.items() if layer.kind == "experts"}
    check_halves(stacks, kinds_of(checkpoint), error)
    return adapter, {**keys, **{f"{name}.weight": key for name, key in stacks.items()}}


def missing(checkpoint: Checkpoint, adapter: Adapter, keys: Mapping[str, str], merged: Collection[str]) -> list[str]:
    """The layers of a checkpoint that the configuration of PEFT's file names and that the file does not adapt.

    Args:
        adapter, keys: the results of `read_for`.
        merged: the checkpoint's keys of the layers that it adapts.
    """
    if adapter.format != "peft":
        return []
    layer, parameter = named_layers(adapter.config), named_parameters(adapter.config)
    count = max((each for each in settings(checkpoint.config, "num_hidden_layers") if isinstance(each, int)), default=0)
    has_experts = any(".experts." in name for name in keys)
    found: dict[str, str] = {}
    for name, key in keys.items():
        own = name.removesuffix(".weight")
        number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        if key in merged or (number and count and int(number[1]) >= count):  # more of them only predict further tokens
            continue
        match = EXPERT.fullmatch(own)
        if stack := next((one for one in [name, *(stacks_with(match) if match else ())] if parameter(one)), None):
            found[key] = stack
        elif own != name and layer(own) and not (has_experts and is_expert_name(own)) and checkpoint[key].dim() > 1:
            found[key] = own
    return list(dict.fromkeys(found.values()))


def _keys(
    plain: Mapping[str, str], adapter: Contents, layers: Collection[str], requested: str
) -> Mapping[str, str]:
    """Map the adapter's keys to the checkpoint's, with the renaming that finds most of the adapter's layers.

    Args:
        plain: the checkpoint's keys by their names in the model.
        layers: the names of the adapter's layers.
        requested: only layers whose names in the adapter have this prefix; empty for all.
    """
    prefixed = FORMATS[adapter.format].prefixed
    names = [name for name in layers if not requested or prefix_of(name, requested) == requested]
    ways = [list(readings(name, requested)) if prefixed else places_of(name) for name in names]

    def found(keys: Mapping[str, str]) -> list[str]:
        known = {key.removesuffix(".weight"): own for key, own in keys.items()}
        if prefixed:
            known |= {key.replace(".", "_"): own for key, own in known.items()}
        spelled = ([spelling for way in each for spelling in (way, way.replace(".", "_"))] for each in ways)
        places = (next((known[one] for one in each if one in known), None) for each in spelled)
        return [place for place in places if place is not None]

    best = [(found(plain), plain)]
    for renamed in _renamings():
        keys = {renamed(name): key for name, key in plain.items()}
        places = found(keys)
        if len(set(keys.values())) < len(set(plain.values())) or len(places) < max(1, len(best[0][0])):
            continue
        if len(places) > len(best[0][0]):
            best = []
        if places not in [each for each, _ in best]:
            best.append((places, keys))
    if len(best) > 1 and len(best[0][0]) == len(names) and best[0][1] is not plain:
        either = " or ".join(places[0] for places, _ in best)
        raise ValueError(f"{adapter.file}: its names are ambiguous: {names[0]} may stand for {either}")
    return best[0][1]


def _renamings() -> Iterator[Callable[[str], str]]:
    """Yield functions that map a key in a model's files to a name that an adapter may have for it."""
    for prefix in _PREFIXES:
        yield prefix.__add__
        yield functools.partial(_without, prefix)
    yield from RENAMINGS


def _without(prefix: str, key: str) -> str:
    return key.removeprefix(prefix)


def stored_transposed(checkpoint: Checkpoint, adapter: Adapter, keys: Mapping[str, str]) -> set[str]:
    """Return the linear layers stored as ``[in, out]``.

    Shapes decide; for square weights the kind of model, or what PEFT recorded. PEFT's ``fan_in_fan_out`` is that of the
    last layer it adapted: True means a Conv1D, False may be any layer.

    Raises:
        ValueError: it cannot be decided for a square weight.
    """
    linear = {name: layer for name, layer in adapter.layers.items() if layer.kind == "linear"}
    shapes = {name: tuple(checkpoint[keys[f"{name}.weight"]].shape) for name in linear}
    square = {name for name, layer in linear.items() if layer.features[0] == layer.features[1]}
    found = {name for name, layer in linear.items() if shapes[name] != layer.features[::-1]}
    kinds = kinds_of(checkpoint)
    if not square:
        return found
    if kinds & set(_TRANSPOSED):
        return found | {name for name in square if name.rpartition(".")[2] in _CONV1D}
    if "_diffusers_version" in checkpoint.config:
        kinds.add("diffusers'")  # no diffusers model has a Conv1D
    others = linear.keys() - square
    if found == others and adapter.config.get("fan_in_fan_out") is True:
        return found | square
    if not found and (kinds or others) and adapter.config.get("fan_in_fan_out") is not True:
        return found
    reason = (f"{min(found)} is stored transposed, and " if found else
              "the adapter's fan_in_fan_out is contradicted by its other layers, and " if others else "")  # fmt: skip
    raise ValueError(
        f"{checkpoint.folder}: {reason}whether {min(square)}, which is square, is {'too' if found else 'transposed'} "
        f"is open: no config.json says whether the model is one of {', '.join(_TRANSPOSED)}"
    )


def is_embedding(key: str) -> bool:
    """True if the weight has an embedding's name."""
    module = key.removesuffix(".weight").rpartition(".")[2]
    return key.endswith(".weight") and bool(_EMBEDDING.search(module))


def tied(checkpoint: Checkpoint, key: str) -> bool:
    """True if an embedding's table is also the output layer's weight, so that changing it would change both.

    That is so if the file has no output layer of its size, unless the configuration says that the two are not tied, or
    that there is no output layer. A table smaller than the vocabulary is not one of tokens.
    """
    shape = checkpoint[key].shape
    if any(isinstance(size, int) and shape[0] < size for size in settings(checkpoint.config, "vocab_size")):
        return False
    makers = checkpoint.config.get("architectures")
    if isinstance(makers, list) and makers and all(_HEADLESS.search(str(maker)) for maker in makers):
        return False
    outputs = (name for name in checkpoint if name.endswith(".weight") and name != key
               and not any(part.isdigit() or _EMBEDDING.search(part) for part in name.split(".")))  # fmt: skip
    if any(checkpoint[name].shape == shape for name in outputs):
        return False
    said = settings(checkpoint.config, "tie_word_embeddings")
    return not said or any(each is not False for each in said)


def settings(config: Mapping[str, Any], name: str) -> list[Any]:
    """The values that a model's configuration, and its parts such as ``text_config``, have under a name."""
    found = [config[name]] if name in config else []
    return [*found, *(value for part in config.values() if isinstance(part, Mapping) for value in settings(part, name))]


def kinds_of(checkpoint: Checkpoint) -> set[str]:
    """The types of the model and of its parts, as its configuration names them."""
    return {str(kind) for kind in settings(checkpoint.config, "model_type")}


def scales(checkpoint: Checkpoint, adapter: Adapter, keys: Mapping[str, str]) -> Iterator[tuple[str, Tensor | None]]:
    """Yield each layer's name and g, the magnitude over the adapted weight's norm (None for plain LoRA).

    The arguments are the results of `read_for`.

    Raises:
        ValueError: a weight is quantised or not finite, or it cannot be decided whether it is stored transposed.
    """
    transposed = stored_transposed(checkpoint, adapter, keys)
    kinds = kinds_of(checkpoint)
    for name, layer in adapter.layers.items():
        g = None
        if layer.magnitude is not None:
            storage.check_tensor(checkpoint.folder, keys[f"{name}.weight"], checkpoint[keys[f"{name}.weight"]])
            stored = checkpoint[keys[f"{name}.weight"]]
            if layer.kind == "experts":
                turned = stack_transposed(layer, stored, kinds)
                g = torch.stack([_scale(one, of_expert(layer, e), turned) for e, one in enumerate(stored)])
            else:
                g = _scale(stored, layer, name in transposed)
        yield name, g


def _scale(stored: Tensor, layer: AdapterLayer, transposed: bool) -> Tensor:
    adapted = attached(stored, layer, transposed)
    assert isinstance(adapted, DoRALayer)
    return magnitude_scale(adapted.magnitude.detach().flatten(), adapted._weight_norm() + layer.eps)


def attached(stored: Tensor, layer: AdapterLayer, transposed: bool) -> AdaptedLayer:
    """Make the adapted layer with that weight and adapter."""
    holder = nn.ModuleDict({"layer": _module(layer, stored.t() if transposed else stored)})
    attach(holder, Adapter({"layer": layer}))
    adapted = holder["layer"]
    assert isinstance(adapted, AdaptedLayer)
    return adapted


def _module(layer: AdapterLayer, weight: Tensor) -> nn.Module:
    """Make a torch layer with that weight."""
    module: nn.Module
    if layer.kind == "embedding":
        module = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    elif layer.kind == "linear":
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        inputs, outputs = layer.features
        convolution: Any = CONVOLUTIONS[layer.kind]
        module = convolution(inputs, outputs, tuple(weight.shape[2:]), bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module
