"""What every file format of adapters is: keys that name a layer and its part, and a configuration beside them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from dora_kernels.adapters.layers import Adapter, AdapterLayer, some
from dora_kernels.adapters.reading import Reading
from dora_kernels.adapters.writing import Writing

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
    underscored: ClassVar[bool] = False
    """Whether names have a prefix, and underscores for dots."""
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
        without = [name for name, layer in layers.items() if layer.magnitude is None]
        if without and len(without) < len(layers):
            raise reading.error(f"{without[0]} has no {self._called('magnitude')}, which other layers have")
        return layers

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

    def _groups(self, reading: Reading) -> dict[str, Parts]:
        groups: dict[str, Parts] = defaultdict(dict)
        others: list[str] = []
        for key in reading.tensors:
            found = self.key.fullmatch(key)
            if found is None:
                others.append(key)
                continue
            parts, part = groups[found["module"]], self.parts[found["part"]]
            if part in parts:
                raise reading.error(f"{parts[part]} and {key} are both the {part} of {found['module']}")
            parts[part] = key
        if not groups:
            shown = ", ".join(others[:3]) or "none"
            raise reading.error(f"no adapter of the format {self.name!r}: its keys are {shown}")
        for key in others:
            if _inside(key, groups):
                raise reading.error(f"{key} belongs to an adapted layer and is no part that {self.name!r} knows")
        if others:
            reading.notes.append(f"{some(others)}: no adapter, left out")
        return groups

    def _called(self, part: str) -> str:
        """What the format calls a part."""
        return next(called for called, name in self.parts.items() if name == part)


_ADAPTING = re.compile(r".*(?:lora|dora|magnitude).*|alpha|reshape_weight|diff|diff_b|[wb]_norm")
"""What keys of adapters are called inside a layer, in any format: none can be left out."""


def _inside(key: str, modules: Collection[str]) -> bool:
    """Whether `key` names a part of an adapter inside one of `modules`."""
    key = key.removeprefix("base_model.model.")
    dots = (i for i, character in enumerate(key) if character == ".")
    return any(key[:i] in modules and _ADAPTING.fullmatch(key, i + 1) for i in dots)
