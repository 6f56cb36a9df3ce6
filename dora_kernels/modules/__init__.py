"""Layers that own their parameters, for models built without PEFT: a frozen base layer and its adapter."""

from dora_kernels.modules.base import AdaptedLayer, DoRALayer
from dora_kernels.modules.linear import DoRALinear, LoRALinear

__all__ = ["AdaptedLayer", "DoRALayer", "DoRALinear", "LoRALinear"]
