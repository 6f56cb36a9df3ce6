"""PEFT's LoRA layer on `nn.Embedding`, with one magnitude per embedding dimension and the norm over the vocabulary.

As a linear problem its weight is the table's transpose, ``[D, V]``: ``y = g * (E[x] + s * e * A[:, x]ᵀ Bᵀ)``, with e
the model's own embedding scale if it has one. No temporary is as large as the table.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraEmbeddingLayer
from torch import Tensor, nn

from dora_kernels.core.problem import Weights
from dora_kernels.engine.layer import run_compose
from dora_kernels.peft import shards, tensor_parallel
from dora_kernels.peft.layer import DoraLayer, DoraVariant
from dora_kernels.peft.state import interpolated, norm_cache, read


def read_weights(layer: Any, adapter: str) -> Weights | None:
    """`read`, with the table as ``[D, V]``."""
    children = layer._modules
    base = children["base_layer"]
    a = children["lora_embedding_A"]._parameters.get(adapter)
    b = children["lora_embedding_B"]._parameters.get(adapter)
    weights = read(layer, adapter, base._parameters.get("weight"), a, b, None, (base, type(base)), _fit)
    return None if weights is None else weights._replace(weight=weights.weight.t())


def _fit(layer: Any, adapter: str, weights: Weights) -> bool:
    """True if the modules are PEFT's and their tensors have fitting shapes."""
    if type(layer._modules["lora_magnitude_vector"]._modules[adapter]) is not DoraEmbeddingLayer:
        return False
    table, a, b, m, _ = weights
    if not (table.dim() == a.dim() == b.dim() == 2 and m.dim() == 1):
        return False
    return a.shape[1] == table.shape[0] and b.shape[0] == m.shape[0] == table.shape[1]


class DoraEmbeddingVariant(DoraVariant, variants.DoraEmbeddingVariant):
    """PEFT's DoRA variant for embeddings."""

    stock = variants.DoraEmbeddingVariant
    init = staticmethod(tensor_parallel.wrapped(stock.init))
    read = staticmethod(read_weights)

    @staticmethod
    def rows(layer: Any, weight: Tensor) -> Tensor:
        """The table's transpose."""
        return weight.t()

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's ``g * (result + embed_scale * scaling * A[x] B)``."""
        weights = cls.read(module, active_adapter)
        if weights is None:
            dora = cls.stock.forward(module, active_adapter=active_adapter, x=x, result=result, **kwargs)
            return interpolated(module, active_adapter, result, dora)
        if shards.split_of(module) is None:
            h = module._embed(x, weights.lora_A.t())
        else:
            functions = module.input_fns[active_adapter], module.output_fns[active_adapter]
            h = module._embed(x, module.lora_embedding_A[active_adapter].T, *functions)
        # Exists since peft 0.18. Earlier versions leave the scale out, and so do adapters trained with them.
        embed_scale = module._get_embed_scale() if hasattr(module, "_get_embed_scale") else None
        if embed_scale is not None:
            h = h * embed_scale.to(h.dtype)
        dora = run_compose(
            result, h, weights, module.scaling[active_adapter], lambda: cls.divisor(module, active_adapter, weights),
            cache=norm_cache(module, active_adapter),
        )  # fmt: skip
        return interpolated(module, active_adapter, result, dora)


class DoraEmbedding(DoraLayer, lora.Embedding):
    """PEFT's LoRA layer on an embedding, with DoRA adapters that run on this package."""

    stock = lora.Embedding
    variants = {variants.DoraEmbeddingVariant: DoraEmbeddingVariant}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() and shards.is_split(self) and not (args or kwargs):
            return tensor_parallel.untraced(self, x)
        return lora.Embedding.forward(self, x, *args, **kwargs)

    def _adapter_input(self, x: Tensor, adapter: str) -> Tensor:
        """Return x as it is: indices need no cast to the adapter's dtype."""
        return x


def unsupported(layer: Any) -> str | None:
    """Return the reason why a `lora.Embedding` cannot be patched, or None if it can."""
    if not isinstance(layer.base_layer, nn.Embedding):
        kind = type(layer.base_layer)
        return f"its base layer is a {kind.__module__}.{kind.__name__}, not an nn.Embedding"
    return shards.problem(layer.base_layer)
