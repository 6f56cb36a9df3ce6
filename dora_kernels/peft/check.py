"""Whether an adapter is what it should be: of a model that is to be patched, and of a file before PEFT loads it."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from dora_kernels.peft.combine import factors
from dora_kernels.peft.state import dora_adapters

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_KEY = re.compile(r"(?P<module>.+?)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?$")


def check_layers(model: nn.Module) -> None:
    """Raise ValueError, naming the layer, where a DoRA layer cannot be right: merged, not loaded, without or with NaN.

    What is away for now is not looked at: sharded, offloaded by accelerate, or on meta in a distributed process.
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
                f"model: {name}: {layer.merged_adapters} are merged into its weight; call unmerge_adapter() before"
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
                        "before, or call patch_peft_globally() before the model is made"
                    )
                if not bool(tensor.detach().isfinite().all()):
                    raise ValueError(f"model: {name}: the {part} of adapter {adapter!r} has values that are not finite")


def check_adapter(path: str | os.PathLike[str], model: nn.Module | None = None) -> None:
    """Raise where a saved DoRA adapter could not be loaded, or not as what it was: before PEFT has changed a model.

    (PEFT takes a file without magnitudes, with NaN, or of another model's layers, with a warning at most.)

    Args:
        path: a folder that ``save_pretrained`` has written.
        model: the base model, or a `PeftModel` of it: the layers must be there, of fitting sizes.

    Raises:
        FileNotFoundError: the folder, its configuration or its weights are not there.
        ValueError: the file is truncated or no safetensors file, a tensor is missing, of another rank or size, or has
            values that are not finite, or the model has no such layer; the message names the file and the tensor.
    """
    folder = Path(path)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        peft_type, use_dora = config["peft_type"], config["use_dora"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _CONFIG}: no adapter configuration: {type(error).__name__}: {error}") from error
    if peft_type != "LORA" or not use_dora:
        found = f"{peft_type!r}, {use_dora!r}"
        raise ValueError(f"{folder / _CONFIG}: expected peft_type 'LORA' with use_dora, got {found}")
    file = folder / _WEIGHTS
    for module, parts in _parts(file).items():
        _check_parts(file, module, parts, config)
        if model is not None:
            _check_module(file, module, parts, model)


def _parts(file: Path) -> dict[str, dict[str, Tensor]]:
    """The adapter's tensors by module."""
    from safetensors import SafetensorError, safe_open

    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                found = _KEY.match(key)
                if found is not None:
                    tensor = tensors.get_tensor(key)
                    if not bool(tensor.isfinite().all()):
                        raise ValueError(f"{file}: {key} has values that are not finite")
                    modules[found["module"]][found["part"].replace("embedding_", "")] = tensor
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated, or no safetensors file: {error}") from error
    if not modules:
        raise ValueError(f"{file}: no LoRA tensors in it")
    return modules


def _check_parts(file: Path, module: str, parts: dict[str, Tensor], config: dict[str, Any]) -> None:
    missing = {"lora_A", "lora_B", "lora_magnitude_vector"} - parts.keys()
    if missing:
        raise ValueError(f"{file}: {module} has no {', '.join(sorted(missing))}")
    a, b, m = parts["lora_A"], parts["lora_B"], parts["lora_magnitude_vector"]
    patterns = config.get("rank_pattern") or {}
    short = module.removeprefix("base_model.model.")
    rank = next((r for key, r in patterns.items() if re.match(rf"(.*\.)?({key})$", short)), config.get("r"))
    if a.shape[0] != rank:
        raise ValueError(f"{file}: {module}.lora_A has rank {a.shape[0]}, its configuration says {rank}")
    # A grouped convolution's B has a group's share of the rank.
    if b.dim() < 2 or a.shape[0] % b.shape[1] or (b.dim() == 2 and b.shape[1] != a.shape[0]):
        raise ValueError(f"{file}: {module}.lora_B {list(b.shape)} does not fit lora_A {list(a.shape)}")
    if m.numel() != b.shape[0]:
        raise ValueError(f"{file}: {module}.lora_magnitude_vector has {m.numel()} values, lora_B {b.shape[0]} rows")


def _check_module(file: Path, module: str, parts: dict[str, Tensor], model: nn.Module) -> None:
    name = module.removeprefix("base_model.model.")
    modules = dict(model.named_modules())
    layer: Any = modules.get(module, modules.get(name))
    if layer is None:
        raise ValueError(f"{file}: {module}: the model has no such layer")
    base = layer.get_base_layer() if isinstance(layer, lora.LoraLayer) else layer
    sizes = [
        (getattr(base, first, None), getattr(base, second, None))
        for first, second in (
            ("in_features", "out_features"), ("in_channels", "out_channels"), ("num_embeddings", "embedding_dim")
        )
    ]  # fmt: skip
    if type(base).__name__ == "Conv1D":
        sizes = [tuple(base.weight.shape)]
    size = next((pair for pair in sizes if None not in pair), None)
    found = parts["lora_A"].shape[1], parts["lora_B"].shape[0]
    if size is not None and size != found:
        raise ValueError(
            f"{file}: {module} is of a layer with {found[0]} inputs and {found[1]} outputs, the model's has "
            f"{size[0]} and {size[1]}"
        )
