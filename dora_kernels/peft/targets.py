"""Layers that ``target_modules`` name, and that PEFT leaves out because it takes their names for experts'."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from dora_kernels.core.shown import listed
from dora_kernels.engine.dispatch import warn_once
from dora_kernels.model.expert_names import is_expert_name, takes_expert_names

CONVERTS = importlib.util.find_spec("peft.utils.transformers_weight_conversion") is not None
"""True if this version of PEFT takes layers' names for experts'."""


def left_out(tuner: Any, model: nn.Module, adapter_name: str, *_: Any, **__: Any) -> Callable[[], None]:
    """Before PEFT adds an adapter, return the function that afterwards warns of the layers that PEFT has left out."""
    config = copy.copy(tuner.peft_config[adapter_name])  # PEFT writes into it
    if not getattr(config, "use_dora", False) or not config.target_modules or not takes_expert_names(model):
        return lambda: None
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = ".*"
    named = {
        name: module for name, module in model.named_modules()
        if is_expert_name(name) and isinstance(module, nn.Linear) and check_target_module_exists(config, name)
    }  # fmt: skip

    def warn() -> None:
        left = [name for name in named if not isinstance(model.get_submodule(name), BaseTunerLayer)]
        whole = [name for name in left if named[name].weight.is_floating_point()]
        ends = sorted({f"{'.'.join(name.split('.')[-2:])}.weight" for name in whole})
        advice = f"; name their weights as well: target_parameters={ends}" if ends else ""
        if left:
            warn_once(
                f"target_modules: PEFT takes the names of {listed(left, 3)} for experts', so these layers get no "
                f"adapter{advice}"
            )

    return warn
