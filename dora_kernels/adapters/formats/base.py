"""What every file format of adapters is: keys that name a layer and its part, and a configuration beside them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from dora_kernels.adapters.adapter import Adapter, AdapterLayer, some
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.writer import Writing

Parts = dict[str, str]
"""The keys of one layer's tensors by part: "lora_A", "lora_B", "magnitude" and what a format has besides."""


class Format:
    """A format: how it is recognised, read and written.

    A class says what the keys are (`key`, whose group "module" is the layer's name), which part each is (`part`),
    and how a layer is read from its parts (`scaling`, `layer`) and written (`write`).
    """

    name: ClassVar[str]
    weights: ClassVar[str]
    """The file's name in a folder."""
    configured: ClassVar[bool] = True
    """Whether an ``adapter_config.json`` belongs to it."""
    prefixed: ClassVar[bool] = False
    """Whether names have a prefix that says which model of a pipeline they are of."""
    pipelines: ClassVar[bool] = False
    """Whether a file may have adapters of several models of a pipeline."""
    key: ClassVar[re.Pattern[str]]
    parts: ClassVar[dict[str, str]]
    """What the key's group "part" says, to the names of `Parts`."""

    def matches(self, keys: Collection[str], config: dict[str, Any]) -> bool:
        """Whether a file with these keys and this configuration is of the format."""
        return any(self.key.fullmatch(key) for key in keys)

    def read(self, reading: Reading) -> dict[str, AdapterLayer]:
        """The layers of a file.

        Raises:
            ValueError: it is not of the format, incomplete, or holds what an adapter cannot be; names file and key.
        """
        groups = self._groups(reading)
        layers: dict[str, AdapterLayer] = {}
        for module, parts in groups.items():
            for part in ("lora_A", "lora_B"):
                if part not in parts:
                    raise reading.error(f"{module} has no {self._called(part)}, only {', '.join(parts.values())}")
                tensor = reading.check_tensor(parts[part])
                if not 2 <= tensor.dim() <= 5 or not tensor.numel():
                    raise reading.error(f"{parts[part]} {list(tensor.shape)} is no factor of a weight")
            scaling = self.scaling(reading, module, parts) if reading.scaling is None else reading.scaling
            layers[module] = self.layer(reading, module, parts, scaling)
            reading.check(module, layers[module])
        dora = {self.model_of(name) for name, layer in layers.items() if layer.magnitude is not None}
        for name, layer in layers.items():
            if layer.magnitude is None and self.model_of(name) in dora:
                raise reading.error(f"{name} has no {self._called('magnitude')}, which other layers have")
        return layers

    def model_of(self, name: str) -> str:
        """Which model of a pipeline a layer is of: DoRA throughout, or plain LoRA."""
        return ""

    def scaling(self, reading: Reading, module: str, parts: Parts) -> float:
        """What the file or its configuration says."""
        raise NotImplementedError

    def layer(self, reading: Reading, module: str, parts: Parts, scaling: float) -> AdapterLayer:
        """One layer from its parts."""
        raise NotImplementedError

    def write(self, adapter: Adapter, writing: Writing) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """The tensors of a file, and its configuration.

        Raises:
            ValueError: the format cannot express the adapter; the message says why.
        """
        raise NotImplementedError

    def split(self, key: str) -> tuple[str, str] | None:
        """The layer and the part (of `Parts`) that a key names; None for what is no adapter's."""
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
            raise reading.error(f"no adapter of the format {self.name!r}: its keys are {shown}")
        for key in others:
            if _inside(key, groups):
                raise reading.error(f"{key} belongs to an adapted layer and is no part that {self.name!r} knows")
            if any(part in _ADAPTERS_ALONE for part in key.split(".")):
                raise reading.error(f"{key} is a part of an adapter, and no layer of this {self.name!r} file has it")
        if others:
            reading.notes.append(f"{some(others)}: no adapter, left out")
        return groups

    def _called(self, part: str) -> str:
        """What the format calls a part."""
        return next(called for called, name in self.parts.items() if name == part)


_ADAPTING = re.compile(r".*(?:lora|dora|magnitude).*|alpha|reshape_weight|diff|diff_b|[wb]_norm")
"""What keys of adapters are called inside a layer, in any format: none can be left out."""


_ADAPTERS_ALONE = {
    "lora_magnitude_vector", "dora_scale", "magnitude", "magnitude_layer", "dora_layer", "weight_m_wdecomp", "lora_mid",
    "lora_A", "lora_B", "lora_a", "lora_b", "lora_down", "lora_up", "lora_embedding_A", "lora_embedding_B",
    "lora_linear_layer",
}  # fmt: skip
"""Parts of keys that nothing but an adapter's have: a key with one is never left out, wherever it is."""


def _inside(key: str, modules: Collection[str]) -> bool:
    """Whether `key` names a part of an adapter inside one of `modules`."""
    key = key.removeprefix("base_model.model.")
    dots = (i for i, character in enumerate(key) if character == ".")
    return any(key[:i] in modules and _ADAPTING.fullmatch(key, i + 1) for i in dots)
