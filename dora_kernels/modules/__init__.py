"""Layers that own their parameters, for models built without PEFT: a frozen base layer and its adapter."""

from dora_kernels.modules.base import AdaptedLayer, DoRALayer
from dora_kernels.modules.conv import DoRAConv1d, DoRAConv2d, DoRAConv3d
from dora_kernels.modules.embedding import DoRAEmbedding
from dora_kernels.modules.experts import DoRAExperts, LoRAExperts
from dora_kernels.modules.linear import DoRALinear, LoRALinear

__all__ = [
    "AdaptedLayer", "DoRAConv1d", "DoRAConv2d", "DoRAConv3d", "DoRAEmbedding", "DoRAExperts", "DoRALayer",
    "DoRALinear", "LoRAExperts", "LoRALinear",
]  # fmt: skip
