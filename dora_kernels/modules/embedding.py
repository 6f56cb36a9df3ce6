"""`DoRAEmbedding`: an embedding with a weight-decomposed low-rank adapter of its table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels.core.precision import accumulation_dtype, no_autocast
from dora_kernels.core.scale import magnitude_scale
from dora_kernels.engine.layer import layer_norm, layer_scale, run_compose
from dora_kernels.modules.base import showing
from dora_kernels.modules.dora_layer import DoRALayer


@showing("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
class DoRAEmbedding(DoRALayer):
    """``y = g * (E[x] + scaling * A[:, x].T @ B.T)``: the rows of an adapted table, as PEFT's DoRA on `nn.Embedding`.

    As a linear problem the weight is the table's transpose, ``[embedding_dim, num_embeddings]``. No temporary is as
    large as the table. B starts with normal values and A with zeros, as PEFT's. Parameters: ``lora_embedding_A``
    ``[rank, num_embeddings]``, ``lora_embedding_B`` ``[embedding_dim, rank]``, ``lora_magnitude_vector``.

    `padding_idx` and `scale_grad_by_freq` apply to A (and along "in" to the magnitude) as they would to the table. The
    gradients are dense, even for a sparse embedding. `dropout` is not used, as in PEFT: indices cannot be dropped.

    Args:
        *base_args: positional arguments of a new `nn.Embedding`.
        rank: of the factors, at least 1.
        base_layer: an existing embedding to adapt, instead of a new one (`from_base`).
        **options: the following, and keyword arguments of a new `nn.Embedding`.

    Keyword Args:
        alpha (float | None): as `LoRALinear`.
        use_rslora (bool): as `LoRALinear`.
        backend (str): as `dora_linear`.
        adapter_dtype (torch.dtype | None): as `LoRALinear`.
        magnitude_axis (str): "out", a magnitude per embedding dimension, the norm over the vocabulary (PEFT), or "in",
            one per row of the table (MLX).
        detach_norm (bool): no gradient through the norm.
        eps (float): added to the norm.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or the embedding has `max_norm`, which writes its table in every
            forward.
    """

    state_names = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    kind = nn.Embedding

    def __init__(self, *base_args: Any, rank: int, base_layer: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        base_layer, options = self._base_and_options(base_layer, base_args, options)
        factory = self._set_up(base_layer, rank=rank, **options)
        base = self.base_layer
        self.lora_embedding_A = nn.Parameter(torch.empty(self.rank, base.num_embeddings, **factory))
        self.lora_embedding_B = nn.Parameter(torch.empty(base.embedding_dim, self.rank, **factory))
        self._start()

    def _check_base(self, base_layer: Any, rank: int) -> None:
        super()._check_base(base_layer, rank)
        limit = base_layer.max_norm
        if limit is not None:
            raise ValueError(f"max_norm: expected None, got {limit}, which writes the table at each call")

    def _reset_factors(self) -> None:
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``[rank, num_embeddings]`` and B ``[embedding_dim, rank]``."""
        return self.lora_embedding_A, self.lora_embedding_B

    def _problem(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.base_layer.weight.t(), self.lora_embedding_A, self.lora_embedding_B

    def _write(self, merged: Tensor) -> None:
        self.base_layer.weight.t().copy_(merged)

    def _rows(self, x: Tensor, table: Tensor) -> Tensor:
        base = self.base_layer
        return F.embedding(x, table, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)

    def _adapted(self, x: Tensor) -> Tensor:
        """Maps indices ``[...]`` to ``[..., embedding_dim]``."""
        result: Tensor = self.base_layer(x)
        h = self._rows(x, self.lora_embedding_A.t())
        if self.magnitude_axis == "out" and self.detach_norm:
            return run_compose(
                result, h, self._weights(), self.scaling, self._divisor, self.backend, self._norm_cache
            )
        with no_autocast(result.device):
            dtype = accumulation_dtype(result, h)
            total = torch.add(
                result.to(dtype), h.to(dtype) @ self.lora_embedding_B.to(dtype).t(), alpha=self.scaling
            )
            if self.magnitude_axis == "out":
                g = layer_scale(self._weights(), self._form, self._norm_cache, self.training, self.backend)
            else:
                g = self._row_scale(x, total)
            return (g * total).to(result.dtype)

    def _divisor(self) -> Tensor:
        return layer_norm(self._weights(), self._form, self._norm_cache, self.training, self.backend).divisor

    def _row_scale(self, x: Tensor, total: Tensor) -> Tensor:
        """g along "in", from the norms of only those rows that x indexes."""
        norm = torch.linalg.vector_norm(total.detach() if self.detach_norm else total, dim=-1, keepdim=True)
        magnitude = self._rows(x, self.lora_magnitude_vector.unsqueeze(1))
        return magnitude_scale(magnitude, norm, self.eps)
