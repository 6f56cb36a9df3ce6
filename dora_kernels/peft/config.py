"""Extend PEFT's adapter configuration by the norm of grouped convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from dora_kernels.engine.dispatch import warn_once
from dora_kernels.peft.state import dora_adapters, switch

NORMS = ("peft", "exact")


@dataclasses.dataclass
class DoraLoraConfig(LoraConfig):
    """PEFT's configuration plus the norm of grouped convolutions.

    The norm is saved only if it is not PEFT's own. PEFT warns when it reads the extra entry.
    """

    grouped_norm: str = dataclasses.field(
        default="peft", metadata={"help": "the norm of grouped convolutions: 'peft', or 'exact'"}
    )

    def to_dict(self) -> dict[str, Any]:
        """Leave out the norm if it is PEFT's own."""
        values: dict[str, Any] = super().to_dict()
        if values["grouped_norm"] == "peft":
            del values["grouped_norm"]
        return values


def configs_of(model: nn.Module) -> dict[str, Any]:
    """The configurations of the tuner, or of the model that the adapters were injected into."""
    for module in model.modules():
        configs = vars(module).get("peft_config")
        if isinstance(configs, dict) and configs:
            return configs
    return {}


def set_grouped_norm(configs: dict[str, Any], norm: str) -> None:
    """Record the norm in the configuration of every DoRA adapter.

    A configuration of a user's own class will not save it.
    """
    for config in configs.values():
        if not getattr(config, "use_dora", False):
            continue
        if type(config) is LoraConfig:
            config.__class__ = DoraLoraConfig
        elif not isinstance(config, DoraLoraConfig):
            warn_once(
                f"grouped_norm={norm!r} will not be saved: the adapter's configuration is a {type(config).__name__}, "
                "not a plain LoraConfig"
            )
        config.grouped_norm = norm


def follow_configs(model: nn.Module, configs: dict[str, Any]) -> None:
    """Set the norm of the patched layers' adapters to what their configurations say."""
    exact = {name for name, config in configs.items() if getattr(config, "grouped_norm", "peft") == "exact"}
    for layer in model.modules():
        state = switch(layer)
        if state is not None and state.exact_norms != (wanted := exact & set(dora_adapters(layer))):
            state.exact_norms = wanted
            for cache in state.values():
                cache.invalidate()


def forget_grouped_norm(configs: dict[str, Any]) -> None:
    """Turn the configurations back into PEFT's own class."""
    config: Any
    for config in configs.values():
        if type(config) is DoraLoraConfig:
            config.__class__ = LoraConfig
        if not isinstance(config, DoraLoraConfig):
            getattr(config, "__dict__", {}).pop("grouped_norm", None)


def read_from_files() -> Callable[[], None]:
    """Let PEFT read configurations with the norm from now on. Returns a function that ends this."""
    before = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA]
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = DoraLoraConfig

    def undo() -> None:
        if PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is DoraLoraConfig:
            PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = before

    return undo
