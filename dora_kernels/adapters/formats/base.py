"""The base class of all file formats of adapters.

A file has keys that name a layer and its part, and a configuration.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.beside import NOTE
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.writer import Writing
from dora_kernels.core.shown import listed

Parts = dict[str, str]
"""The keys of one layer's tensors by part: "lora_A", "lora_B", "magnitude" and parts that only this format has."""


class Format:
    """A file format: how it is recognised, read and written.

    A subclass defines the keys (`key`, whose group "module" is the layer's name), the part that each stands for
    (`part`), and how a layer is read from its parts (`scaling`, `layer`) and written (`write`).
    """

    name: ClassVar[str]
    weights: ClassVar[str]
    """The file's name in a folder."""
    configured: ClassVar[bool] = True
    """True if an ``adapter_config.json`` belongs to it."""
    prefixed: ClassVar[bool] = False
    """True if names have a prefix that says which model of a pipeline they belong to."""
    pipelines: ClassVar[bool] = False
    """True if a file may have adapters of several models of a pipeline."""
    key: ClassVar[re.Pattern[str]]
    parts: ClassVar[dict[str, str]]
    """Maps the key's group "part" to the names of `Parts`."""

    def matches(self, keys: Collection[str], config: dict[str, Any]) -> bool:
        """True if a file with these keys and this configuration has this format."""
        return any(self.key.fullmatch(key) for key in keys)

    def read(self, reading: Reading) -> dict[str, AdapterLayer]:
        """Return the layers of a file.

        Raises:
            ValueError: the file has another format, is incomplete, or has something that no adapter can have. The
                message names the file and the key.
        """
        groups = self._groups(reading)
        layers: dict[str, AdapterLayer] = {}
        for module, parts in groups.items():
            for part in ("lora_A", "lora_B"):
                if part not in parts:
                    raise reading.error(f"{module} has no {self._called(part)}, only {', '.join(parts.values())}")
                tensor = reading.check_tensor(parts[part])
                if not 2 <= tensor.dim() <= 5 or not tensor.numel():
                    raise reading.error(f"{parts[part]} {list(tensor.shape)} is not a factor of a weight")
            scaling = self.scaling(reading, module, parts) if reading.scaling is None else reading.scaling
            layers[module] = self.layer(reading, module, parts, scaling)
            reading.check(module, layers[module])
        dora = {self.model_of(name) for name, layer in layers.items() if layer.magnitude is not None}
        for name, layer in layers.items():
            if layer.magnitude is None and self.model_of(name) in dora:
                raise reading.error(f"{name} has no {self._called('magnitude')}, which other layers have")
        return layers

    def model_of(self, name: str) -> str:
        """The model that a layer belongs to. Each model has either DoRA or plain LoRA throughout."""
        return ""

    def scaling(self, reading: Reading, module: str, parts: Parts) -> float:
        """The layer's scaling, from the file or its configuration."""
        raise NotImplementedError

    def layer(self, reading: Reading, module: str, parts: Parts, scaling: float) -> AdapterLayer:
        """Make one layer from its parts."""
        raise NotImplementedError

    def write(self, adapter: Adapter, writing: Writing) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Return the tensors of a file, and its configuration.

        Raises:
            ValueError: the format cannot express the adapter; the message says why.
        """
        raise NotImplementedError

    def split(self, key: str) -> tuple[str, str] | None:
        """Split a key into the layer's name and the part (of `Parts`); None if the key belongs to no adapter."""
        found = self.key.fullmatch(key)
        return None if found is None else (found["module"], self.parts[found["part"]])

    def _groups(self, reading: Reading) -> dict[str, Parts]:
        groups: dict[str, Parts] = defaultdict(dict)
        others: list[str] = []
        for key in reading.tensors:
            found = self.split(key)
            if found is None:
                others.append(key)
                continue
            module, part = found
            parts = groups[module]
            if part in parts:
                raise reading.error(f"{parts[part]} and {key} are both the {part} of {module}")
            parts[part] = key
        if not groups:
            shown = ", ".join(others[:3]) or "none"
            raise reading.error(f"not an adapter of the format {self.name!r}: its keys are {shown}")
        for key in others:
            if _inside(key, groups):
                raise reading.error(f"{key} belongs to an adapted layer, but the format {self.name!r} has no such part")
            if any(part in _ADAPTERS_ALONE for part in key.split(".")):
                raise reading.error(f"{key} is part of an adapter, but belongs to no layer of this {self.name!r} file")
        if others:
            reading.beside = {key: reading.tensors[key] for key in others}
            reading.notes.append(f"{listed(others)}: {NOTE}")
        return groups

    def _called(self, part: str) -> str:
        """The format's name for a part."""
        return next(called for called, name in self.parts.items() if name == part)


_ADAPTING = re.compile(r".*(?:lora|dora|magnitude).*|alpha|reshape_weight|diff|diff_b|[wb]_norm")
"""Names of an adapter's keys inside a layer, in any format. None of them may be ignored."""


_ADAPTERS_ALONE = {
    "lora_magnitude_vector", "dora_scale", "magnitude", "magnitude_layer", "dora_layer", "weight_m_wdecomp", "lora_mid",
    "lora_A", "lora_B", "lora_a", "lora_b", "lora_down", "lora_up", "lora_embedding_A", "lora_embedding_B",
    "lora_linear_layer",
}  # fmt: skip
"""Parts of keys that only adapters have. A key with one is never ignored, wherever it is."""


def _inside(key: str, modules: Collection[str]) -> bool:
    """True if `key` names a part of an adapter inside one of `modules`."""
    key = key.removeprefix("base_model.model.")
    dots = (i for i, character in enumerate(key) if character == ".")
    return any(key[:i] in modules and _ADAPTING.fullmatch(key, i + 1) for i in dots)
