"""NVlabs/DoRA's format: commonsense_reasoning/peft/src/peft/tuners/dora.py, a fork of PEFT from before it had DoRA.

Keys ``base_model.model.<name>.lora_A.weight``, ``.lora_B.weight`` as in PEFT, ``.weight_m_wdecomp.weight``
``[out, 1]``. Scaling ``lora_alpha / r``; norm per output of ``W + scaling * B @ A``, detached with ``dora_simple``;
no eps. Configuration with ``peft_type`` "DORA"; the original writes ``adapter_model.bin``, a pickle.
``Wdecompose_target_modules`` are layers with a magnitude but no low-rank adapter; they raise an error.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, ClassVar

from dora_kernels.adapters.formats.linear_only import LinearFormat
from dora_kernels.adapters.formats.names import targets


class Nvidia(LinearFormat):
    name = "nvidia"
    weights = "adapter_model.safetensors"
    prefix = "base_model.model."
    key = re.compile(
        r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<part>lora_[AB]|weight_m_wdecomp)(?:\.default)?\.weight"
    )
    parts: ClassVar = {"lora_A": "lora_A", "lora_B": "lora_B", "weight_m_wdecomp": "magnitude"}
    called: ClassVar = {part: f"{name}.weight" for name, part in parts.items()}
    magnitude_shape = (-1, 1)

    def matches(self, keys: Collection[str], config: dict[str, Any]) -> bool:
        return config.get("peft_type") == "DORA" or any(".weight_m_wdecomp." in key for key in keys)

    def configuration(self, names: list[str], numbers: dict[str, Any]) -> dict[str, Any]:
        return {
            "peft_type": "DORA", "target_modules": targets(names), **numbers, "lora_dropout": 0.0, "bias": "none",
            "dora_simple": True, "Wdecompose_target_modules": None, "enable_lora": None, "fan_in_fan_out": False,
            "merge_weights": False, "modules_to_save": None, "inference_mode": True, "base_model_name_or_path": None,
            "task_type": None,
        }  # fmt: skip
