"""The files of diffusers' pipelines, ``save_lora_weights``: loaders/lora_base.py, utils/state_dict_utils.py.

Keys ``<model>.<name>.lora_A.weight`` ``[r, in, *kernel]``, ``.lora_B.weight`` ``[out, r, 1, ...]`` and
``.lora_magnitude_vector`` as in PEFT, with the pipeline's name of the model: ``unet``, ``transformer``, ``prior``,
``text_encoder``, ``text_encoder_2``, .... The scaling is that of the `LoraConfig` in ``lora_adapter_metadata`` of the
header, ``<model>.<field>``, else 1. Norm per output of ``W + scaling * B @ A``, detached; no eps.

Also read: ``<name>.lora.down.weight`` and ``lora.up.weight``, in text encoders ``lora_linear_layer.down.weight`` (0.16
to 0.21); ``<name before it>.processor.to_q_lora.down.weight`` (before that, also without ``unet.``); kohya's parts,
``lora_down``, ``lora_up``, ``alpha`` and ``dora_scale``, with these names; and those of ComfyUI and musubi-tuner, with
``diffusion_model.`` and ``text_encoders.<which>.transformer.`` before them. Each part has the meaning of the format it
comes from: ``dora_scale`` is LyCORIS's, with its eps and either axis.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

from torch import Tensor

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.components import (
    in_files,
    is_component,
    is_text_encoder,
    is_underscored,
    model_of,
    prefix_of,
)
from dora_kernels.adapters.formats.base import Parts
from dora_kernels.adapters.formats.lycoris import Lycoris, model_in
from dora_kernels.adapters.formats.peft import check_configuration, configured_scaling
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.writer import Writing
from dora_kernels.adapters.names import COMPONENTS
from dora_kernels.core.shown import shown
from dora_kernels.files import storage

HEADER = "lora_adapter_metadata"
"""The entry of the file's header that holds each model's `LoraConfig`."""

_OLD = (".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight")


class Diffusers(Lycoris):
    name = "diffusers"
    weights = "pytorch_lora_weights.safetensors"
    pipelines = True

    def matches(self, keys: Collection[str], config: dict[str, Any]) -> bool:
        if "peft_type" in config:
            return False
        return any(key.endswith(_OLD) or self._dotted(key) for key in keys)

    def _dotted(self, key: str) -> bool:
        found, prefix = self.split(key), prefix_of(key)
        factor = found is not None and found[1] in ("lora_A", "lora_B")
        return factor and is_component(prefix) and not is_underscored(prefix)

    def read(self, reading: Reading) -> dict[str, AdapterLayer]:
        for component, config in _configurations(reading).items():
            reading.notes += check_configuration(config, _where(reading, component))
        return super().read(reading)

    def _own_scaling(self, reading: Reading, module: str, parts: Parts) -> float | None:
        own = super()._own_scaling(reading, module, parts)
        prefix = prefix_of(module)
        config = _configurations(reading).get(prefix)
        if not config:
            return own
        name, lora_A = module[len(prefix) + 1 :], reading.tensors[parts["lora_A"]]
        said = configured_scaling(reading, config, name, lora_A, _where(reading, prefix))
        if own is not None and abs(own - said) > 1e-6 * abs(said):
            raise reading.error(f"{parts['alpha']}: a scaling of {own:g}, and {HEADER} says {said:g}")
        return said

    def write(self, adapter: Adapter, writing: Writing) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        axes = dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), ("out",))
        layers = writing.with_eps(writing.fitting(adapter.layers, axes, grouped=True, model_of=model_in(adapter)))
        layers, _ = writing.one_scaling(layers, 1.0)
        names = self.names(adapter, writing)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            tensors[f"{names[name]}.lora_A.weight"] = layer.lora_A
            tensors[f"{names[name]}.lora_B.weight"] = layer.lora_B
            if layer.magnitude is not None:
                shape = (1, -1, *(1 for _ in layer.lora_B.shape[2:])) if layer.kernel else (-1,)
                tensors[f"{names[name]}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
        return tensors, None

    def names(self, adapter: Adapter, writing: Writing) -> dict[str, str]:
        """Names with the pipeline's name of each layer's model, and ``text_model`` in the names of a CLIP's layers."""
        joined = adapter.config.get(COMPONENTS)
        model = writing.prefix or model_of(adapter.layers, writing.known)
        parted = {name: name.partition(".")[::2] if joined else (model, name) for name in adapter.layers}
        return {name: f"{prefix}.{in_files(rest) if is_text_encoder(prefix) else rest}"
                for name, (prefix, rest) in parted.items()}  # fmt: skip


def _configurations(reading: Reading) -> dict[str, dict[str, Any]]:
    """The configurations in the header, by the name of the model."""
    return _parsed(reading.header.get(HEADER) or "{}", f"{reading.file}: {HEADER}: not a JSON object")


def _where(reading: Reading, component: str) -> str:
    return f"{reading.file}: {HEADER}: {shown(component)}"


@functools.lru_cache(maxsize=4)
def _parsed(text: str, problem: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, value in storage.json_object(text, problem).items():
        component, _, field = key.partition(".")
        found.setdefault(component, {})[field] = value
    return found
