"""torchtune's adapters: torchtune/modules/peft/dora.py and lora.py, training/checkpointing/_checkpointer.py.

Keys ``<name>.lora_a.weight`` ``[r, in]``, ``<name>.lora_b.weight`` ``[out, r]``, ``<name>.magnitude`` ``[out]``.
Scaling ``alpha / rank``; norm per output of ``W + scaling * B @ A``, detached; no eps. The recipes write
``adapter_model.pt``, a pickle, with an ``adapter_config.json`` that has PEFT's ``r`` and ``lora_alpha``; this module
reads and writes the same keys as safetensors. Names are those of torchtune's models (``layers.0.attn.q_proj``); its
Llama projections of queries and keys have their rows in another order than Hugging Face's.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, ClassVar

from dora_kernels.adapters.formats.linear_only import LinearFormat


class Torchtune(LinearFormat):
    name = "torchtune"
    weights = "adapter_model.safetensors"
    key = re.compile(r"(?P<module>.+)\.(?P<part>lora_[ab]\.weight|magnitude)")
    parts: ClassVar = {"lora_a.weight": "lora_A", "lora_b.weight": "lora_B", "magnitude": "magnitude"}
    called: ClassVar = {part: name for name, part in parts.items()}
    plain = True

    def matches(self, keys: Collection[str], config: dict[str, Any]) -> bool:
        return any(key.endswith((".lora_a.weight", ".lora_b.weight")) for key in keys)

    def configuration(self, names: list[str], numbers: dict[str, Any]) -> dict[str, Any]:
        last = sorted({name.rpartition(".")[2] for name in names})
        return {"peft_type": "LORA", "target_modules": last, **numbers}
