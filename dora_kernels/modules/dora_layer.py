"""What all layers with a magnitude share: it, the options of the norm, and the norm that is kept between calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.core import validation
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine.model_norms import KeptNorm
from dora_kernels.engine.norm_cache import NormCache
from dora_kernels.functional import dora_weight_norm
from dora_kernels.modules.base import AdaptedLayer


class DoRALayer(AdaptedLayer):
    """An `AdaptedLayer` with a magnitude: ``lora_magnitude_vector`` in PEFT's shape, and as a vector under `magnitude`.

    It starts as the norm of the adapted weight (plus eps), exact to float32, so a new layer equals its base layer.

    The norm is kept between calls while nothing it depends on changes. Call `dora_kernels.invalidate(layer)` after
    writing weights in a way that PyTorch cannot see.

    Attributes:
        magnitude_axis: "out" or "in", the dimension of the weight that the magnitudes run along.
        detach_norm: True if no gradient flows through the norm (section 4.3 of the DoRA paper; PEFT).
        eps: added to the norm, ``g = magnitude / (norm + eps)``.
    """

    lora_magnitude_vector: nn.Parameter
    detach_norm: bool
    eps: float

    def _set_up(
        self,
        base_layer: nn.Module,
        *,
        magnitude_axis: str = "out",
        detach_norm: bool = True,
        eps: float = 0.0,
        **options: Any,
    ) -> dict[str, Any]:
        validation.check_axis(magnitude_axis)
        validation.check_eps(eps)
        validation.check_flag(detach_norm, "detach_norm")
        factory = super()._set_up(base_layer, **options)
        self.magnitude_axis = magnitude_axis
        self.detach_norm = bool(detach_norm)
        self.eps = float(eps)
        self._norm_cache = NormCache(self._form._replace(detach_norm=True), self.backend)
        return factory

    def _start(self) -> None:
        super()._start()
        dtype, device = self.factors[0].dtype, self.weight.device
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self._magnitude_shape(), dtype=dtype, device=device))
        self._norm_cache.move(device)
        self._reset_magnitude()

    state_names = (*AdaptedLayer.state_names, "lora_magnitude_vector")

    def _weights(self) -> Weights:
        """The linear problem, with the magnitude as a vector and the bias."""
        return Weights(*self._problem(), self.magnitude, self.bias)

    @property
    def _form(self) -> Form:
        return Form(self.scaling, self.magnitude_axis, self.detach_norm, self.eps)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """PyTorch's, for `to` and similar methods; the norm cache forgets, and with it the old tensors' memory."""
        result = super()._apply(*args, **kwargs)
        self._norm_cache.invalidate()
        self._norm_cache.move(self.weight.device)
        return result

    def kept_norms(self) -> Iterator[KeptNorm]:
        """Yield the norms that `frozen_norms` may freeze."""
        if not self.merged:
            yield KeptNorm(self._norm_cache, self._weights(), self._form, self.backend)

    @property
    def magnitude(self) -> Tensor:
        """The magnitude as a vector. If PEFT's shape is a vector, this is the parameter itself."""
        return self.lora_magnitude_vector

    def _magnitude_shape(self) -> tuple[int, ...]:
        weight = self._problem()[0]
        return tuple(weight.shape[:-1] if self.magnitude_axis == "out" else weight.shape[1:])

    def _weight_norm(self) -> Tensor:
        """The norm of the adapted weight, one value per magnitude."""
        return dora_weight_norm(
            *self._problem(), scaling=self.scaling, magnitude_axis=self.magnitude_axis, backend=self.backend
        )

    def reset_adapter(self) -> None:
        """Set the adapter to its initial values, with which the layer equals its base layer."""
        super().reset_adapter()
        self._reset_magnitude()

    @torch.no_grad()
    def _reset_magnitude(self) -> None:
        magnitude = self.lora_magnitude_vector
        if not magnitude.is_meta:
            magnitude.copy_((self._weight_norm() + self.eps).view(magnitude.shape))

    def _merge_arguments(self) -> dict[str, Any]:
        return {
            **super()._merge_arguments(),
            "magnitude": self.magnitude,
            "magnitude_axis": self.magnitude_axis,
            "eps": self.eps,
        }

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, magnitude_axis={self.magnitude_axis!r}, detach_norm={self.detach_norm}"
        return f"{text}, eps={self.eps:g}" if self.eps else text
