"""The names of a transformers model's tensors in a GGUF file, and the order of their rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# transformers' model type -> GGUF's architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}

# For this architecture llama.cpp rotates neighbouring elements of a head, while transformers rotates its two halves.
INTERLEAVED = "llama"


@dataclass(frozen=True)
class Layout:
    """The names and the order of rows of one model. `to_file` and `from_file` take a tensor by its GGUF name."""

    architecture: str
    blocks: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, config: Any) -> Layout:
        """Return the layout of a model with this transformers configuration.

        Raises:
            ValueError: the model type is not in `ARCHITECTURES`.
        """
        kind = getattr(config, "model_type", None)
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"model type {kind!r} cannot be written as GGUF; those that can: {', '.join(sorted(ARCHITECTURES))}"
            )
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(ARCHITECTURES[kind], config.num_hidden_layers, heads, kv_heads)

    def names(self) -> Any:
        """The `gguf` package's map from transformers' names."""
        import gguf

        architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        return gguf.get_tensor_name_map(architecture, self.blocks)

    def to_file(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor`, whose first dimension is the output's, with its rows in the file's order."""
        heads = self._rotated_heads(name)
        return tensor if heads is None else tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)

    def from_file(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of `to_file`."""
        heads = self._rotated_heads(name)
        return tensor if heads is None else tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)

    def _rotated_heads(self, name: str) -> int | None:
        if self.architecture != INTERLEAVED:
            return None
        found = re.search(r"\.attn_([qk])\.", name)
        return {"q": self.heads, "k": self.kv_heads}[found[1]] if found else None

