"""LyCORIS and kohya files: lycoris/modules/locon.py, functional/general.py and wrapper.py; ComfyUI's reader.

Keys ``<prefix>_<name>.lora_down.weight`` ``[r, in, *kernel]``, ``.lora_up.weight`` ``[out, r, 1, ...]``, ``.alpha``,
``.dora_scale``, where ``<name>`` has underscores for dots. LyCORIS's wrapper has the prefix ``lycoris``; its kohya
network and kohya's sd-scripts (networks/lora.py, which has no DoRA) have ``lora_unet`` and ``lora_te``, ``lora_te1``,
.... Scaling ``alpha / r``; with ``rs_lora`` alpha is stored so that this still holds; without alpha 1, as in ComfyUI's
comfy/weight_adapter/lora.py. Norm of ``W + scaling * B @ A`` with gradient. ``dora_scale`` is ``[1, in, 1, ...]``, per
input, in LyCORIS before 3.2 and with ``wd_on_output=False``, and ``[out, 1, ...]``, per output, since: the shape tells.
Converters also write it with one dimension. LyCORIS adds ``torch.finfo(torch.float32).eps`` to the norm in training.
ComfyUI (comfy/weight_adapter/base.py, 0.3) uses the norm of W alone for files per output: not what was trained.
A Tucker core, ``lora_mid`` ``[r, r, *kernel]``, is multiplied into lora_down. LoHa, LoKr and the like raise an error.
ComfyUI also reads PEFT's keys of the factors, ``<name>.lora_A.weight`` and ``.lora_B.weight``, with ``.alpha`` and
``.dora_scale`` beside them, and gives them the same meaning. So does this reader, unless there is a configuration of
PEFT's. ``lora_magnitude_vector`` is PEFT's: per output, and nothing is added to the norm. diffusers
(utils/state_dict_utils.py, convert_state_dict_to_kohya) leaves the dot before the last part of a layer's name in the
keys of magnitudes, ``lora_unet_..._attn1.to_k.lora_magnitude_vector`` or ``..._attn1.to_k.dora_scale``, which are also
PEFT's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
from torch import Tensor

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.components import (
    in_files,
    is_text_encoder,
    is_underscored,
    kohya_prefixes,
    model_of,
    prefix_of,
)
from dora_kernels.adapters.formats.base import Format, Parts
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.writer import Writing
from dora_kernels.adapters.names import COMPONENTS, UNDERSCORED
from dora_kernels.core.shown import listed

_EPS = torch.finfo(torch.float32).eps

_OTHERS = re.compile(r".+\.(?:(?:hada|lokr|b?oft)_\w+|[ab][12]\.weight|[wb]_norm|diff|diff_b|on_input)")
"""LyCORIS's other algorithms. None of them is a product of two factors."""


class Lycoris(Format):
    name = "lycoris"
    weights = "adapter_model.safetensors"
    configured = False
    prefixed = True
    key = re.compile(
        r"(?P<module>.+?)(?:\.|(?=_lora\.))(?P<part>(?:lora_(?:down|up|mid|A|B)|_?lora\.(?:down|up)|"
        r"lora_linear_layer\.(?:down|up))\.weight|alpha|dora_scale|lora_magnitude_vector)(?:(?<=_vector)\.weight)?"
    )
    parts: ClassVar = {
        "lora_down.weight": "lora_A",
        "lora_up.weight": "lora_B",
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "lora.down.weight": "lora_A",
        "lora.up.weight": "lora_B",
        "_lora.down.weight": "lora_A",
        "_lora.up.weight": "lora_B",
        "lora_linear_layer.down.weight": "lora_A",
        "lora_linear_layer.up.weight": "lora_B",
        "dora_scale": "magnitude",
        "lora_magnitude_vector": "magnitude",
        "lora_mid.weight": "mid",
        "alpha": "alpha",
    }

    def matches(self, keys: Collection[str], config: dict[str, Any]) -> bool:
        own = [key for key in keys if ".lora_down." in key or ".lora_up." in key]
        if "peft_type" not in config:
            own += [key for key in keys if key.endswith((".alpha", ".dora_scale"))
                    and f"{key.rpartition('.')[0]}.lora_A.weight" in keys]  # fmt: skip
        kohya = any(prefix_of(key).startswith("lora_") for key in own)
        return bool(own) and kohya == (self.name == "kohya")

    def read(self, reading: Reading) -> dict[str, AdapterLayer]:
        for key in reading.tensors:
            if _OTHERS.fullmatch(key):
                raise reading.error(f"{key} belongs to a LyCORIS algorithm that is not a product of two factors")
        layers = super().read(reading)
        groups = self._groups(reading) if reading.scaling is None else {}
        without = [parts["lora_A"] for name, parts in groups.items() if self._own_scaling(reading, name, parts) is None]
        if without:
            reading.notes.append(f"{listed(without)} has no alpha: scaling 1")
        return layers

    def model_of(self, name: str) -> str:
        return prefix_of(name)

    def split(self, key: str) -> tuple[str, str] | None:
        found = self.key.fullmatch(key)
        if found is None:
            return None
        module = _as_now(found["module"], found["part"].startswith("_"))
        return module.replace(".", "_") if is_underscored(prefix_of(module)) else module, self.parts[found["part"]]

    def _groups(self, reading: Reading) -> dict[str, Parts]:
        """Group the keys by layer.

        Magnitudes under a name that another program has half converted go to their layers.
        """
        groups = super()._groups(reading)
        flat = {name.replace(".", "_"): name for name, parts in groups.items() if "lora_A" in parts}
        for name in [name for name, parts in groups.items() if parts.keys() == {"magnitude"}]:
            own = flat.get(name.replace(".", "_")) or flat.get(f"{name}.0".replace(".", "_"))
            if own is not None and "magnitude" not in groups[own]:
                groups[own]["magnitude"] = groups.pop(name)["magnitude"]
        return groups

    def layer(self, reading: Reading, module: str, parts: Parts, scaling: float) -> AdapterLayer:
        a, b = reading.tensors[parts["lora_A"]], reading.tensors[parts["lora_B"]]
        if "mid" in parts:
            a = self._without_core(reading, parts, a)
        kind = {3: "conv1d", 4: "conv2d", 5: "conv3d"}.get(a.dim(), "linear")
        magnitude, axis, eps = None, "out", 0.0
        if "magnitude" in parts:
            key, features = parts["magnitude"], (a.shape[1], b.shape[0])
            scale = reading.check_tensor(key)
            pefts = "lora_magnitude_vector" in key or not key.startswith(f"{module}.")
            fixed = "out" if pefts else self._axis(scale, features)
            magnitude, axis = reading.vector(key, scale, features, fixed)
            eps = 0.0 if pefts else _EPS
        return AdapterLayer(kind, a, b, magnitude, scaling, axis, eps)

    @staticmethod
    def _axis(scale: Tensor, features: tuple[int, int]) -> str | None:
        """The axis, from the shape ``[out, 1, ...]`` or ``[1, in, ...]``; None for one dimension."""
        if scale.dim() < 2:
            return None
        said = [axis for axis, dim, size in (("out", 0, features[1]), ("in", 1, features[0]))
                if scale.shape[dim] == size and scale.shape[1 - dim] == 1]  # fmt: skip
        return said[0] if len(said) == 1 else None

    @staticmethod
    def _without_core(reading: Reading, parts: Parts, a: Tensor) -> Tensor:
        mid = reading.check_tensor(parts["mid"])
        if mid.dim() < 3 or mid.shape[:2] != a.shape[:1] * 2 or a.numel() != a.shape[0] * a.shape[1]:
            raise reading.error(f"{parts['mid']} {list(mid.shape)} does not fit lora_down {list(a.shape)}")
        reading.notes.append(f"{parts['mid']}: the Tucker core was multiplied into lora_down, in float32 or wider")
        dtype = torch.promote_types(a.dtype, torch.float32)
        return torch.einsum("ij...,jk->ik...", mid.to(dtype), a.flatten(1).to(dtype))

    def scaling(self, reading: Reading, module: str, parts: Parts) -> float:
        said = self._own_scaling(reading, module, parts)
        return 1.0 if said is None else said

    def _own_scaling(self, reading: Reading, module: str, parts: Parts) -> float | None:
        """The scaling in the file, or None."""
        if "alpha" not in parts:
            return None
        key = parts["alpha"]
        tensor = reading.tensors[key]
        alpha = float(tensor) if tensor.numel() == 1 and not tensor.is_complex() else float("nan")
        if not 0.0 < abs(alpha) <= 1e30:  # LyCORIS reads 0 as "no scaling", others as no adapter
            said = f"{alpha:g}" if tensor.numel() == 1 else f"a tensor {list(tensor.shape)}"
            raise reading.error(f"{key}: expected a number that is not 0, got {said}")
        return alpha / reading.tensors[parts["lora_A"]].shape[0]

    def write(self, adapter: Adapter, writing: Writing) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        if not adapter.config.get(UNDERSCORED):
            self._check_names(adapter, writing)
        axes = dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), ("out", "in"))
        layers = writing.with_eps(writing.fitting(adapter.layers, axes, model_of=model_in(adapter)), _EPS)
        keys = dict.fromkeys(layers, "") if adapter.config.get(UNDERSCORED) else self.names(adapter, writing)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            alpha = torch.tensor(layer.scaling * layer.rank, dtype=torch.float32)
            if not alpha or alpha.isinf():
                raise writing.error(name, f"scaling {layer.scaling:g} would be an alpha of {float(alpha):g}")
            key = keys[name] or name
            tensors[f"{key}.lora_down.weight"] = layer.lora_A
            tensors[f"{key}.lora_up.weight"] = layer.lora_B
            tensors[f"{key}.alpha"] = alpha
            if layer.magnitude is not None:
                shape = [1] * layer.lora_A.dim()
                shape[0 if layer.magnitude_axis == "out" else 1] = -1
                tensors[f"{key}.dora_scale"] = layer.magnitude.reshape(shape)
        return tensors, None

    def names(self, adapter: Adapter, writing: Writing) -> dict[str, str]:
        """The file's name for each layer."""
        return {name: f"{writing.prefix or 'lycoris'}_{name.replace('.', '_')}" for name in adapter.layers}

    def _check_names(self, adapter: Adapter, writing: Writing) -> None:
        """Raise if a name, with underscores for dots, equals that of another layer of the adapter or the model."""
        names: dict[str, set[str]] = defaultdict(set)
        for name in (*adapter.layers, *writing.known):
            names[name.replace(".", "_")].add(name)
        for name in adapter.layers:
            for other in sorted(names[name.replace(".", "_")] - {name}):
                raise writing.error(name, f"with underscores for dots its name is the same as that of {other}")


class Kohya(Lycoris):
    name = "kohya"
    pipelines = True

    def names(self, adapter: Adapter, writing: Writing) -> dict[str, str]:
        """Names with the prefix of each layer's model, and ``text_model`` in the names of a CLIP's layers."""
        if adapter.config.get(COMPONENTS):
            components = {name.partition(".")[0] for name in adapter.layers}
            prefixes = kohya_prefixes(components, [*adapter.layers, *writing.known])
            places = {name: name.partition(".")[::2] for name in adapter.layers}
            for name, (component, _) in places.items():
                if component not in prefixes:
                    raise writing.error(name, f"there is no prefix for a pipeline's {component}")
            parted = {name: (prefixes[component], rest) for name, (component, rest) in places.items()}
        else:
            model = model_of(adapter.layers, writing.known)
            one = "lora_te" if model == "text_encoder" else "lora_te3" if is_text_encoder(model) else "lora_unet"
            parted = {name: (writing.prefix or ("lora_te" if name.startswith("text_model.") else one), name)
                      for name in adapter.layers}  # fmt: skip
        return {name: f"{prefix}_{in_files(rest) if is_text_encoder(prefix) else rest}".replace(".", "_")
                for name, (prefix, rest) in parted.items()}  # fmt: skip


def model_in(adapter: Adapter) -> Callable[[str], str]:
    """Return a function that maps an adapter's layer to the pipeline's model that it belongs to."""
    if adapter.config.get(COMPONENTS):
        return lambda name: name.partition(".")[0]
    return prefix_of if adapter.config.get(UNDERSCORED) else lambda name: ""


_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def _as_now(module: str, processors: bool) -> str:
    """A layer's current name, from that in diffusers before 0.22, when attention had processors of its own.

    Args:
        module: the name in the file, such as ``unet.….attn1.processor.to_q``.
        processors: True if the key has ``_lora`` after it, as those keys have; ``to_out`` is then the first of two.
    """
    parts = [part for part in module.split(".") if part != "processor"]
    if processors and parts[-1] in _OLD:
        if parts[-2:-1] == ["self_attn"]:  # a text encoder's
            parts[-1] = _OLD[parts[-1]]
        elif parts[-1] == "to_out":
            parts.append("0")
    return ".".join(parts)
