"""AnswerDotAI's QDoRA: fsdp_qlora, scripts/dora.py, train.py and scripts/prepare_vllm_weights.py.

Keys ``<name>.dora_layer.lora_A.weight`` ``[r, in]``, ``<name>.dora_layer.lora_B.weight`` ``[out, r]``,
``<name>.magnitude_layer.magnitude`` ``[out]`` in one file, ``model_state_dict.safetensors``, which may also hold
trained layer norms. No scaling (``lora_alpha`` is not used): 1. Norm per output of ``W + B @ A``, detached, where W is
the dequantised weight that was trained on; no eps.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.formats.base import Parts
from dora_kernels.adapters.formats.linear_only import LinearFormat
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.writer import Writing


class QDoRA(LinearFormat):
    name = "qdora"
    weights = "model_state_dict.safetensors"
    configured = False
    key = re.compile(r"(?P<module>.+)\.(?P<part>dora_layer\.lora_[AB]\.weight|magnitude_layer\.magnitude)")
    parts: ClassVar = {
        "dora_layer.lora_A.weight": "lora_A",
        "dora_layer.lora_B.weight": "lora_B",
        "magnitude_layer.magnitude": "magnitude",
    }
    called: ClassVar = {part: name for name, part in parts.items()}

    def scaling(self, reading: Reading, module: str, parts: Parts) -> float:
        return 1.0

    def fitted(self, adapter: Adapter, writing: Writing) -> tuple[dict[str, AdapterLayer], dict[str, Any]]:
        layers = writing.with_eps(writing.fitting(adapter.layers, {"linear": ("out",)}, plain=False))
        return writing.one_scaling(layers, 1.0)[0], {}

    def configuration(self, names: list[str], numbers: dict[str, Any]) -> None:
        return None
