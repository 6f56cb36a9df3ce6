"""MLX's adapters: mlx-lm's mlx_lm/tuner/dora.py, lora.py and utils.py (before, mlx-examples' llms/mlx_lm/tuner).

Keys ``<name>.lora_a`` ``[in, r]``, ``<name>.lora_b`` ``[r, out]``, ``<name>.m`` in ``adapters.safetensors``. Scaling is
``lora_parameters.scale`` of ``adapter_config.json``, not divided by the rank; ``alpha`` there is not used. DoRALinear:
m ``[out]``, norm per output of ``W + scale * (A B)^T``; DoRAEmbedding: A ``[vocabulary, r]``, B ``[r, dimension]``, m
``[vocabulary]``, norm per row of the table. Detached; no eps. The loader adapts all modules named in
``lora_parameters.keys`` of the last ``num_layers`` layers with one rank and one scale.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.formats.base import Format, Parts
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.writer import Writing

_LAYER = re.compile(r"(?:.+\.)?layers\.\d+\.(?P<key>.+)")

_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed\w*|\w*embeddings?|wte|wpe)")


class Mlx(Format):
    name = "mlx"
    weights = "adapters.safetensors"
    key = re.compile(r"(?P<module>.+)\.(?P<part>lora_[ab]|m)")
    parts: ClassVar = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "magnitude"}

    def matches(self, keys: Collection[str], config: dict[str, Any]) -> bool:
        return any(key.endswith((".lora_a", ".lora_b")) for key in keys)

    def read(self, reading: Reading) -> dict[str, AdapterLayer]:
        layers = super().read(reading)
        said, plain = reading.config.get("fine_tune_type"), any(layer.magnitude is None for layer in layers.values())
        if said in ("lora", "dora") and (said == "lora") != plain:
            has = "no magnitudes" if plain else "magnitudes"
            raise reading.error(f"it has {has}, and {reading.config_file} says fine_tune_type={said!r}")
        return layers

    def scaling(self, reading: Reading, module: str, parts: Parts) -> float:
        return reading.number(reading.config, "lora_parameters", "scale")

    def layer(self, reading: Reading, module: str, parts: Parts, scaling: float) -> AdapterLayer:
        a, b = reading.tensors[parts["lora_A"]], reading.tensors[parts["lora_B"]]
        a, b = a.transpose(0, 1), b.transpose(0, 1)
        kind, axis, magnitude = self._kind(reading, module, parts, (a.shape[1], b.shape[0])), "out", None
        if "magnitude" in parts:
            key, fixed = parts["magnitude"], "in" if kind == "embedding" else "out"
            magnitude, axis = reading.vector(key, reading.check_tensor(key), (a.shape[1], b.shape[0]), fixed)
        return AdapterLayer(kind, a, b, magnitude, scaling, axis)

    @staticmethod
    def _kind(reading: Reading, module: str, parts: Parts, features: tuple[int, int]) -> str:
        """Linear or embedding: their keys are the same, so the model, the magnitude's length or the name decides."""
        base = (reading.base_layers or {}).get(module)
        if base is not None and base.kind is not None:
            return base.kind
        if "magnitude" in parts and features[0] != features[1]:
            return "embedding" if reading.tensors[parts["magnitude"]].numel() == features[0] else "linear"
        kind = "embedding" if _EMBEDDING.fullmatch(module) else "linear"
        reading.notes.append(f"{module} was taken for a layer of kind {kind!r} by its name")
        return kind

    def write(self, adapter: Adapter, writing: Writing) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        layers = writing.fitting(adapter.layers, {"linear": ("out",), "embedding": ("in",)})
        layers, scaling = writing.one_scaling(writing.with_eps(layers))
        layers, rank = writing.one_rank(layers)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            tensors[f"{name}.lora_a"] = layer.lora_A.transpose(0, 1)
            tensors[f"{name}.lora_b"] = layer.lora_B.transpose(0, 1)
            if layer.magnitude is not None:
                tensors[f"{name}.m"] = layer.magnitude
        plain = any(layer.magnitude is None for layer in layers.values())
        keys = sorted({found["key"] if (found := _LAYER.fullmatch(name)) else name for name in layers})
        return tensors, {
            "fine_tune_type": "lora" if plain else "dora",
            "num_layers": -1,  # all of them
            "lora_parameters": {"rank": rank, "scale": scaling, "dropout": 0.0, "keys": keys},
        }
