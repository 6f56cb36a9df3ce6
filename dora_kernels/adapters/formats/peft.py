"""Hugging Face PEFT's adapters: src/peft/utils/save_and_load.py, tuners/lora/layer.py, dora.py and config.py.

Keys ``base_model.model.<name>.lora_A.weight`` ``[r, in]``, ``.lora_B.weight`` ``[out, r]``, ``.lora_magnitude_vector``
``[out]``; convolutions with A ``[r, in, *kernel]``, B ``[out, r / groups, 1, ...]`` and m ``[1, out, 1, ...]``;
embeddings with ``lora_embedding_A`` ``[r, vocabulary]``, ``lora_embedding_B`` ``[dimension, r]`` and m ``[dimension]``.
Scaling ``lora_alpha / r``, with ``use_rslora`` ``lora_alpha / sqrt(r)``, both per layer through ``rank_pattern`` and
``alpha_pattern``. Norm per output (channel, embedding dimension) of ``W + scaling * B @ A``, detached; no eps.
With groups PEFT uses a norm that is not that of what the layer computes: an error, unless it is plain LoRA.
Parameters (``target_parameters``): A ``[rank * E, in]``, B ``[out, rank * E]``, m ``[E, out]``; `formats.stacks`.
torchtune's recipes also write such files, without ``use_dora`` in the configuration.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.experts import split
from dora_kernels.adapters.formats import stacks
from dora_kernels.adapters.formats.base import Format, Parts
from dora_kernels.adapters.formats.names import targets_again, whole
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.writer import Layers, Writing
from dora_kernels.core.shown import quoted, shown

_PREFIX = "base_model.model."

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base weight: the file then belongs to another weight than the model's."""


_UNSUPPORTED = (
    "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
"""Fields that change the layer's formula ``W + scaling * B @ A``, or adapt something other than layers."""

_KNOWN = {
    # Read.
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    # Which layers are adapted; the file's keys say so too.
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "trainable_token_indices", "bias", "ensure_weight_tying",
    # How the adapter was trained or initialised.
    "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "runtime_config",
    "qalora_group_size", "inference_mode", "task_type", "megatron_config", "megatron_core", "fan_in_fan_out",
    # Where it comes from.
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version",
}  # fmt: skip
"""Fields of `LoraConfig` (0.21) that do not change what the file's tensors compute."""


def check_configuration(config: Mapping[str, Any], where: str) -> list[str]:
    """Return a sentence for each field of a `LoraConfig` that is not known. Raise ValueError for unsupported ones."""
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{where}: peft_type: expected 'LORA', got {quoted(config['peft_type'])}")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{where}: {name}={quoted(config[name])} is not supported")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"{where}: init_lora_weights={quoted(start)} changes the base weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which makes it one of the original weights"
        )
    return [f"{shown(name)}={quoted(config[name])} in the configuration is unknown and was ignored"
            for name in sorted(config.keys() - _KNOWN) if config[name]]  # fmt: skip


def configured_scaling(
    reading: Reading, config: Mapping[str, Any], module: str, lora_A: Tensor, where: str = "", count: int = 1
) -> float:
    """A layer's scaling from a `LoraConfig`: alpha over the rank or its square root. A pattern may give either.

    Args:
        where: the name in errors, if it is not the configuration's file.
        count: the number of experts, whose factors are one above the other.
    """
    rank, alpha = (
        reading.by_pattern(config.get(name), f"{where or reading.config_file}: {name}").get(module, config.get(default))
        for name, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    rank = reading.number({"r": rank}, "r", where=where)
    if rank * count != lora_A.shape[0] or rank < 1:
        of = f" for each of {count} experts" if count != 1 else ""
        raise reading.error(f"{module}: lora_A {list(lora_A.shape)}: the configuration says rank {rank:g}{of}")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return reading.number({"lora_alpha": alpha}, "lora_alpha", where=where) / divisor


class Peft(Format):
    name = "peft"
    weights = "adapter_model.safetensors"
    key = re.compile(
        r"(?:base_model\.model\.)?(?P<module>.+)\."
        r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(?!bias$)[^.]+)??(?:\.weight)?"
    )
    parts: ClassVar = {
        "lora_A": "lora_A",
        "lora_B": "lora_B",
        "lora_embedding_A": "lora_A",
        "lora_embedding_B": "lora_B",
        "lora_magnitude_vector": "magnitude",
    }

    def read(self, reading: Reading) -> dict[str, AdapterLayer]:
        config = reading.config
        where = str(reading.config_file)
        reading.notes += check_configuration(config, where)
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in reading.tensors.items():
            if (found := self.split(key)) is not None:
                groups.setdefault(found[0], {})[found[1]] = tensor
        reading.stacks = stacks.names(groups, config.get("target_parameters"), reading)
        layers = {stacks.named(reading, module): layer for module, layer in super().read(reading).items()}
        reading.notes += stacks.note(reading.by_version, layers)
        plain = next((name for name, layer in layers.items() if layer.magnitude is None), None)
        use_dora = config.get("use_dora")
        if use_dora and plain is not None:
            raise reading.error(f"{plain} has no lora_magnitude_vector, and {where} says use_dora")
        if not use_dora and plain is None and layers:
            if use_dora is not None:
                raise reading.error(f"it has magnitudes, and {where} says use_dora={quoted(use_dora)}")
            reading.notes.append("read as DoRA because it has magnitudes; no configuration says use_dora")
        return layers

    def layer(self, reading: Reading, module: str, parts: Parts, scaling: float) -> AdapterLayer:
        a, b = reading.tensors[parts["lora_A"]], reading.tensors[parts["lora_B"]]
        magnitude = reading.tensors[parts["magnitude"]] if "magnitude" in parts else None
        stack = stacks.read(reading, module, a, b, magnitude, scaling)
        if stack is not None:
            if magnitude is not None and reading.magnitude_axis == "in":
                only = "a stack of experts has magnitudes along 'out' only"
                raise reading.error(f"{module}: magnitude_axis='in': {only}")
            return stack
        if (name := stacks.named(reading, module)) != module:
            reading.matrices.append(name)
        embedding = "lora_embedding_" in parts["lora_A"]
        if embedding != ("lora_embedding_" in parts["lora_B"]):
            raise reading.error(f"{parts['lora_A']} and {parts['lora_B']} belong to different kinds of layers")
        kind = "embedding" if embedding else {3: "conv1d", 4: "conv2d", 5: "conv3d"}.get(a.dim(), "linear")
        magnitude, axis = None, "out"
        if "magnitude" in parts:
            key = parts["magnitude"]
            magnitude, axis = reading.vector(key, reading.check_tensor(key), (a.shape[1], b.shape[0]), "out")
        layer = AdapterLayer(kind, a, b, magnitude, scaling, axis)
        if layer.grouped and magnitude is not None:
            raise reading.error(f"{module}: for a convolution with groups PEFT's norm is not that of the weight")
        return layer

    def scaling(self, reading: Reading, module: str, parts: Parts) -> float:
        a, b = (reading.tensors[parts[part]] for part in ("lora_A", "lora_B"))
        m = reading.tensors[parts["magnitude"]] if "magnitude" in parts else None
        if a.dim() == 3 and stacks.is_stack(module, a, b):
            a = a[0]
        count = stacks.count(reading, module, a, b, m) if module in reading.stacks else 1
        return configured_scaling(reading, reading.config, reading.stacks.get(module, module), a, count=count)

    def write(self, adapter: Adapter, writing: Writing) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        axes = dict.fromkeys(("linear", "embedding", "conv1d", "conv2d", "conv3d", "experts"), ("out",))
        adapter = self._adapter(adapter, writing)
        layers = writing.with_eps(writing.fitting(adapter.layers, axes, grouped=True))
        tensors: dict[str, Tensor] = {}
        matrices = adapter.config.get(stacks.MATRICES, ())
        parameters = [name for name, layer in layers.items() if layer.kind == "experts" or name in matrices]
        keys = stacks.keys(parameters, writing)
        for name, layer in layers.items():
            if layer.kind == "experts":
                exchanged = name in adapter.config.get(stacks.EXCHANGED, ())
                tensors |= self._of_stack(name, keys[name], layer, exchanged)
                continue
            key = keys.get(name, name)
            a, b = ("embedding_A", "embedding_B") if layer.kind == "embedding" else ("A.weight", "B.weight")
            tensors[f"{_PREFIX}{key}.lora_{a}"] = layer.lora_A
            tensors[f"{_PREFIX}{key}.lora_{b}"] = layer.lora_B
            if layer.magnitude is not None:
                shape = (1, -1, *(1 for _ in layer.lora_B.shape[2:])) if layer.kind.startswith("conv") else (-1,)
                tensors[f"{_PREFIX}{key}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
        return tensors, self._configuration(layers, adapter.config)

    def _adapter(self, adapter: Adapter, writing: Writing) -> Adapter:
        """The adapter as the format has it."""
        return stacks.guarded(adapter)

    def _of_stack(self, name: str, key: str, layer: AdapterLayer, exchanged: bool) -> dict[str, Tensor]:
        """The tensors of a stack."""
        return stacks.written(f"{_PREFIX}{key}", layer, exchanged)

    @staticmethod
    def _configuration(layers: Layers, read: Mapping[str, Any]) -> dict[str, Any]:
        matrices = read.get(stacks.MATRICES, ())
        parameters = sorted(name for name, layer in layers.items() if layer.kind == "experts" or name in matrices)
        others = [name for name in layers if name not in parameters]
        ranks = {name: layer.rank for name, layer in layers.items()}
        alphas = {name: layer.scaling * layer.rank for name, layer in layers.items()}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        return {
            "peft_type": "LORA", "use_dora": all(layer.magnitude is not None for layer in layers.values()),
            "r": rank, "lora_alpha": whole(alpha),
            "target_modules": targets_again(others, read.get("target_modules")) if others else [],
            **({"target_parameters": parameters} if parameters else {}),
            "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {f"^{re.escape(name)}": whole(a) for name, a in alphas.items() if a != alpha},
            "use_rslora": False, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "init_lora_weights": True, "modules_to_save": None, "inference_mode": True, "task_type": None,
            "base_model_name_or_path": str(read.get("base_model_name_or_path") or "") or None,
        }  # fmt: skip


class Vllm(Peft):
    """vLLM's adapters of experts: PEFT's keys, with the linear layers of each expert, ``experts.3.gate_proj``.

    vLLM and SGLang take one rank and one alpha from the configuration for all layers and read no patterns, so factors
    of smaller rank are padded with zeros, and other scalings are multiplied into B.
    """

    name = "vllm"

    def matches(self, keys: Collection[str], config: dict[str, Any]) -> bool:
        """False: its files are PEFT's."""
        return False

    def _adapter(self, adapter: Adapter, writing: Writing) -> Adapter:
        return replace(adapter, layers=_uniform(split(self._plain(adapter, writing)), writing))

    def _plain(self, adapter: Adapter, writing: Writing) -> Layers:
        """The adapter's layers, which are plain LoRA."""
        names = [name for name, layer in adapter.layers.items() if layer.kind == "experts"]
        for name, layer in adapter.layers.items():
            if layer.magnitude is not None:
                raise writing.error(name, f"{self.name!r} has no magnitudes; merge the adapter into the model instead")
            if name in adapter.config.get(stacks.ALTERNATING, ()):
                raise writing.error(name, "gate and up take turns in it; merge the adapter into the model instead")
        if stacks.ALTERNATING not in adapter.config and any(name.endswith(".gate_up_proj") for name in names):
            writing.notes.append(
                "gate_up_proj was read as gate above up; in gpt-oss they take turns, which only the model tells: "
                "read_adapter(file, model), or --base MODEL_DIR on the command line"
            )
        return adapter.layers


class Sglang(Vllm):
    """SGLang's adapters of experts: ``<stack>.lora_A.weight`` ``[E, r, in]`` and ``.lora_B.weight`` ``[E, out, r]``.

    From python/sglang/srt/lora (lora.py, mem_pool.py, utils.py): of a stack ``gate_up_proj`` it uses A for both halves
    of B, and the configuration has to list the last parts of all layers' names.
    """

    name = "sglang"

    def _adapter(self, adapter: Adapter, writing: Writing) -> Adapter:
        layers = self._plain(adapter, writing)
        for name, layer in layers.items():
            if layer.kind == "experts" and name.rpartition(".")[2] not in ("gate_up_proj", "down_proj"):
                raise writing.error(name, "SGLang knows stacks named gate_up_proj and down_proj")
        split(layers)  # which raises for outputs that are not gate's and up's
        return replace(adapter, layers=_uniform(layers, writing))

    def _of_stack(self, name: str, key: str, layer: AdapterLayer, exchanged: bool) -> dict[str, Tensor]:
        return {
            f"{_PREFIX}{name}.lora_A.weight": layer.lora_A.contiguous(),
            f"{_PREFIX}{name}.lora_B.weight": layer.lora_B.contiguous(),
        }

    @staticmethod
    def _configuration(layers: Layers, read: Mapping[str, Any]) -> dict[str, Any]:
        config = Peft._configuration(layers, read) | {"target_modules": sorted({n.rpartition(".")[2] for n in layers})}
        config.pop("target_parameters", None)
        return config


def _uniform(layers: Layers, writing: Writing) -> Layers:
    """The same function with one scaling, and one rank for all layers but convolutions."""
    layers, _ = writing.one_scaling(layers)
    rest = {name: layer for name, layer in layers.items() if not layer.kind.startswith("conv")}
    return layers | (writing.one_rank(rest)[0] if rest else {})
