"""Names of linear layers that PEFT takes for experts.

Before transformers 5 experts and routers of many models were linear layers. PEFT from 0.19 on takes the last parts of
their names in ``target_modules`` for the stacks and routers of today, also where they are a shared expert's or a dense
layer's. From 0.20 on an expression stands for the last parts of all names that it matches
(peft/utils/transformers_weight_conversion.py).
"""

from __future__ import annotations

import sys
from typing import Any

LINEAR = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""The last parts of experts' names."""

_NAMES = LINEAR | {"gate"}


def takes_expert_names(model: Any) -> bool:
    """True for a model of transformers whose layers' names PEFT takes for experts (`is_expert_name`)."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    converted = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", None)
    return converted is not None and (kind == "mixtral" or converted.get(kind) in ("mixtral", "qwen2_moe"))


def is_expert_name(name: str) -> bool:
    """True if PEFT takes a layer of this name for an expert's or a router."""
    return name.rpartition(".")[2] in _NAMES
