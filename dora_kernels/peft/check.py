"""Check the adapters of a model before it is patched, and an adapter file before PEFT loads it."""

from __future__ import annotations

import bisect
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from dora_kernels.core.expressions import Expression, Steps
from dora_kernels.core.patterns import bounded, by_pattern
from dora_kernels.core.shown import quoted, shown
from dora_kernels.files import pairs, storage
from dora_kernels.model.expert_names import is_expert_name, takes_expert_names
from dora_kernels.peft import parameters, targets
from dora_kernels.peft.combine import factors
from dora_kernels.peft.state import dora_adapters

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PART = re.compile(r"(?P<module>.+?)\.lora_[^.]*(?:\.[^.]*)?$")
"""The key of any part of an adapter."""

_KEY = re.compile(r"(?P<module>.+?)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?$")


def check_layers(model: nn.Module) -> None:
    """Raise ValueError, naming the layer, if a DoRA layer is merged, not loaded, without magnitude, or not finite.

    Tensors that are out of reach for now are skipped: sharded, offloaded by accelerate, or on the meta device in a
    distributed process.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    tensor: Any
    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        adapters = dora_adapters(layer)
        for adapter, use_dora in layer.use_dora.items():
            if use_dora and adapter not in adapters:
                raise ValueError(f"model: {name}: adapter {adapter!r} has use_dora=True and no magnitude")
        if adapters and layer.merged_adapters:
            raise ValueError(
                f"model: {name}: {layer.merged_adapters} are merged into its weight; call unmerge_adapter() first"
            )
        for adapter in adapters:
            a, b = factors(layer, adapter) or (None, None)
            magnitude = layer.lora_magnitude_vector[adapter].weight
            for part, tensor in (("lora_A", a), ("lora_B", b), ("magnitude", magnitude)):
                if type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
                    continue
                if not tensor.untyped_storage().nbytes():  # freed by FSDP1: reading it ends the process
                    continue
                if tensor.device.type == "meta":
                    if distributed or any(hasattr(module, "_hf_hook") for module in layer.modules()):
                        continue
                    raise ValueError(
                        f"model: {name}: the {part} of adapter {adapter!r} is on the meta device; load the weights "
                        "first, or call patch_peft_globally() before the model is made"
                    )
                if not bool(tensor.detach().isfinite().all()):
                    raise ValueError(f"model: {name}: the {part} of adapter {adapter!r} has values that are not finite")


def check_adapter(path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
    """Check a saved DoRA adapter before PEFT loads it. Raises if it could not be loaded, or not as it was saved.

    PEFT itself accepts a file without magnitudes, with NaN, or of another model's layers, with a warning at most.

    Args:
        path: a folder written by ``save_pretrained``.
        model: the base model, or a `PeftModel` of it. It must have all of the file's layers, in fitting sizes, and the
            file must have every layer that the adapter's configuration names.

    Raises:
        TypeError: `path` is not a path, or `model` not a `torch.nn.Module`.
        FileNotFoundError: the folder, its configuration or its weights do not exist.
        ValueError: the file is truncated or not a safetensors file, a tensor is missing, has a wrong rank or size, or
            values that are not finite, or the model's layers differ. The message names the file and the tensor.
    """
    folder = storage.as_path(path)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one written by save_pretrained")
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            hint = storage.pickle_hint(folder) if name == _WEIGHTS else ""
            raise FileNotFoundError(f"{folder / name}: no such file{hint}")
    file, config_file = folder / _WEIGHTS, folder / _CONFIG
    tensors, metadata, config = pairs.read(file, config_file, wanted=_PART.match)
    _check_config(config_file, config)
    modules = _parts(file, tensors)
    ranks = by_pattern(config.get("rank_pattern"), f"{config_file}: rank_pattern")
    stacks = parameters.of_file(modules, model, file, config_file, config)
    for module, parts in modules.items():
        stack = stacks.get(module)
        rank = ranks.get(module if stack is None else stack.name, config.get("r"))
        # Without a model a stack's name is not known, nor which pattern is its own.
        others = (config.get("rank_pattern") or {}).values() if stack is not None and stack.shape is None else ()
        if stack is not None and parameters.is_stack(stack, parts, [rank, *others]):
            parameters.check_parts(file, stack, parts, [rank, *others])
        else:
            _check_parts(file, module, parts, rank)
    if model is not None:
        parameters.check_sizes(file, stacks, modules, pairs.before_exchange(config, metadata))
        modules = {module: parts for module, parts in modules.items() if module not in stacks}
        _check_layers(file, modules, model, config_file, config)


def _check_config(file: Path, config: dict[str, Any]) -> None:
    """Raise ValueError if the configuration is not that of a DoRA adapter."""
    try:
        peft_type, use_dora, alpha = config["peft_type"], config["use_dora"], config["lora_alpha"]
    except KeyError as error:
        raise ValueError(f"{file}: not an adapter configuration: it has no {error}") from error
    if peft_type != "LORA" or not use_dora:
        raise ValueError(f"{file}: expected peft_type 'LORA' with use_dora, got {peft_type!r}, {use_dora!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"{file}: lora_alpha: expected a number, got {quoted(alpha)}")


def _parts(file: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group the adapter's tensors by module."""
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others = []
    for key, tensor in tensors.items():
        found = _KEY.match(key)
        if found is None:
            others.append(key)
            continue
        storage.check_tensor(file, key, tensor)
        modules[found["module"].removeprefix("base_model.model.")][found["part"].replace("embedding_", "")] = tensor
    if not modules:
        raise ValueError(f"{file}: contains no LoRA tensors")
    for key in others:
        part: Any = _PART.match(key)
        if part["module"].removeprefix("base_model.model.") in modules:
            raise ValueError(f"{file}: {shown(key)} belongs to an adapted layer, but PEFT has no such part")
    return modules


def _check_parts(file: Path, module: str, parts: dict[str, Tensor], rank: Any) -> None:
    missing = {"lora_A", "lora_B", "lora_magnitude_vector"} - parts.keys()
    if missing:
        raise ValueError(f"{file}: {module} has no {', '.join(sorted(missing))}")
    a, b, m = parts["lora_A"], parts["lora_B"], parts["lora_magnitude_vector"]
    if a.dim() < 2 or a.shape[0] != rank:
        said = f"does not have the rank of its configuration, {quoted(rank)}"
        raise ValueError(f"{file}: {module}.lora_A {list(a.shape)} {said}")
    # In a grouped convolution B has only one group's share of the rank.
    if b.dim() != a.dim() or not b.numel() or a.shape[0] % b.shape[1] or (b.dim() == 2 and b.shape[1] != a.shape[0]):
        raise ValueError(f"{file}: {module}.lora_B {list(b.shape)} does not fit lora_A {list(a.shape)}")
    shape = [b.shape[0]] if b.dim() == 2 else [1, b.shape[0], *(1 for _ in b.shape[2:])]
    if list(m.shape) != shape:
        raise ValueError(f"{file}: {module}.lora_magnitude_vector {list(m.shape)}: lora_B needs {shape}")


def _check_layers(
    file: Path, modules: dict[str, dict[str, Tensor]], model: nn.Module, config_file: Path, config: dict[str, Any]
) -> None:
    layers = _layers(model)
    known = config.get("target_modules") not in (None, "all-linear")
    named = _named(config_file, config)
    replicated, found = _replicated(config_file, config.get("layer_replication")), set()
    taken = targets.CONVERTS and takes_expert_names(model)
    for module, parts in modules.items():
        if known and not named(module):
            raise ValueError(f"{file}: {module}: its configuration's target_modules do not name it")
        name = module if module in layers else _before_replication(module, replicated)
        if name not in layers:
            raise ValueError(f"{file}: {module}: the model has no such layer")
        if taken and is_expert_name(module):
            raise ValueError(
                f"{file}: {module}: PEFT takes this name for an expert's, so the layer gets no adapter; its weight "
                "has to be one of target_parameters, as load_adapter and then save_adapter write it"
            )
        found.add(name)
        _check_sizes(file, module, parts, layers[name])
    others = [name for name, base in layers.items() if name not in found and _sizes(base) is not None]
    if known and not replicated:
        by_end = taken and isinstance(config["target_modules"], str)
        ends = {name.rpartition(".")[2] for name in found if by_end}
        for name in others:
            if named(name) or name.rpartition(".")[2] in ends:
                raise ValueError(f"{file}: has no tensors for {name}, which its configuration's target_modules name")


def _named(file: Path, config: dict[str, Any]) -> Callable[[str], bool]:
    """Return a function that is True for the names of modules that PEFT adapts.

    It asks PEFT itself, but evaluates regular expressions in bounded time.
    """

    steps = Steps(str(file))

    def expression(field: str, text: str) -> Expression:
        return bounded(text, Steps(f"{file}: {field}", steps))

    modules, pattern = config.get("modules_to_save") or (), config.get("layers_pattern") or ()
    if not all(isinstance(one, str) for one in modules):
        raise ValueError(f"{file}: modules_to_save: expected names, got {quoted(modules)}")
    for one in [pattern] if isinstance(pattern, str) else pattern:
        if not isinstance(one, str) or not re.fullmatch(r"[\w.-]*", one):
            raise ValueError(f"{file}: layers_pattern: expected the names of modules, got {quoted(pattern)}")
    saved = [expression("modules_to_save", rf"(^|.*\.){one}($|\..*)") for one in modules]
    fields = ("target_modules", "exclude_modules")
    expressions = {field: expression(field, config[field]) for field in fields if isinstance(config.get(field), str)}

    def named(name: str) -> bool:
        if any(one.ends(name, {0}) for one in saved):
            return False
        met = {field: [name] if one.fullmatch(name) else [] for field, one in expressions.items()}
        others = {"target_modules": None, "target_parameters": None, **config, "modules_to_save": None}
        try:
            return bool(check_target_module_exists(SimpleNamespace(**{**others, **met}), name))
        except (AttributeError, TypeError, ValueError) as error:
            which = "target_modules, exclude_modules, layers_to_transform or layers_pattern"
            raise ValueError(f"{file}: {which} cannot be used: {shown(str(error))}") from error

    return named


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules as PEFT finds them, without adapters."""
    layers: dict[str, nn.Module] = {}
    adapted: Any
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside):
            adapted = module
            if isinstance(module, lora.LoraLayer):
                adapted = adapted.get_base_layer()
                inside = (*inside, f"{name}.")
            layers[name.removeprefix("base_model.model.")] = adapted
    return layers


def _replicated(file: Path, layer_map: Any) -> list[tuple[int, int]]:
    """The ranges of ``layer_replication``, as pairs: a range's first new layer, and the base layer it is copied from.

    Ranges instead of layers, because a file may name any number of layers.
    """
    ranges, first = [], 0
    try:
        for start, end in layer_map or ():
            if type(start) is not int or type(end) is not int:
                raise TypeError
            ranges.append((first, start))
            first += max(0, end - start)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: layer_replication: expected pairs of numbers, got {quoted(layer_map)}") from error
    return [*ranges, (first, -1)] if ranges else []


def _before_replication(module: str, ranges: list[tuple[int, int]]) -> str:
    """The name of the base model's layer that ``layer_replication`` made this one from."""
    number = re.search(r"\.(\d+)\.", module)
    if number is None:
        return module
    index = int(number[1])
    place = bisect.bisect_right(ranges, (index, math.inf)) - 1
    own, base = ranges[place] if place >= 0 else (0, -1)
    return module if base < 0 else f"{module[: number.start()]}.{base + index - own}.{module[number.end() :]}"


def _sizes(base: Any) -> tuple[Any, Any] | None:
    """Return a layer's number of inputs and outputs; None if LoRA does not adapt it."""
    if type(base).__name__ == "Conv1D":
        inputs, outputs = base.weight.shape
        return inputs, outputs
    pairs = ("in_features", "out_features"), ("in_channels", "out_channels"), ("num_embeddings", "embedding_dim")
    for first, second in pairs:
        sizes = getattr(base, first, None), getattr(base, second, None)
        if None not in sizes:
            return sizes
    return None


def _check_sizes(file: Path, module: str, parts: dict[str, Tensor], base: nn.Module) -> None:
    size, found = _sizes(base), (parts["lora_A"].shape[1], parts["lora_B"].shape[0])
    if size is not None and size != found:
        raise ValueError(
            f"{file}: {module} belongs to a layer with {found[0]} inputs and {found[1]} outputs, the model's has "
            f"{size[0]} and {size[1]}"
        )
