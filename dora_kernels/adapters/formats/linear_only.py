"""Shared by torchtune's, NVIDIA's and AnswerDotAI's formats: linear layers, magnitudes per output, one scaling."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from dora_kernels.adapters.adapter import Adapter, AdapterLayer
from dora_kernels.adapters.formats.base import Format, Parts
from dora_kernels.adapters.formats.names import whole
from dora_kernels.adapters.formats.reader import Reading
from dora_kernels.adapters.formats.writer import Writing


class LinearFormat(Format):
    """Factors ``[r, in]`` and ``[out, r]`` as in PEFT, a magnitude per output, norm of ``W + scaling * B @ A``, no eps.

    A subclass defines the names of a layer's tensors (`called`) and the configuration.
    """

    called: ClassVar[dict[str, str]]
    """The names under which the parts are written."""
    prefix: ClassVar[str] = ""
    magnitude_shape: ClassVar[tuple[int, ...]] = (-1,)
    plain: ClassVar[bool] = False

    def layer(self, reading: Reading, module: str, parts: Parts, scaling: float) -> AdapterLayer:
        a, b = reading.tensors[parts["lora_A"]], reading.tensors[parts["lora_B"]]
        magnitude, axis = None, "out"
        if "magnitude" in parts:
            key = parts["magnitude"]
            magnitude, axis = reading.vector(key, reading.check_tensor(key), (a.shape[1], b.shape[0]), "out")
        elif not self.plain:
            raise reading.error(f"{module} has no {self._called('magnitude')}, only {', '.join(parts.values())}")
        return AdapterLayer("linear", a, b, magnitude, scaling, axis)

    def scaling(self, reading: Reading, module: str, parts: Parts) -> float:
        """``lora_alpha / r`` from the configuration; r must be the factors' rank."""
        lora_A = reading.tensors[parts["lora_A"]]
        rank = reading.number(reading.config, "r")
        if rank != lora_A.shape[0]:
            raise reading.error(f"{module}: lora_A {list(lora_A.shape)}: the configuration says rank {rank:g}")
        return reading.number(reading.config, "lora_alpha") / rank

    def fitted(self, adapter: Adapter, writing: Writing) -> tuple[dict[str, AdapterLayer], dict[str, Any]]:
        """The layers in a form that the format can hold, and the configuration's r and lora_alpha."""
        layers = writing.with_eps(writing.fitting(adapter.layers, {"linear": ("out",)}, plain=self.plain))
        layers, scaling = writing.one_scaling(layers)
        layers, rank = writing.one_rank(layers)
        return layers, {"r": rank, "lora_alpha": whole(scaling * rank)}

    def write(self, adapter: Adapter, writing: Writing) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        layers, numbers = self.fitted(adapter, writing)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            tensors[f"{self.prefix}{name}.{self.called['lora_A']}"] = layer.lora_A
            tensors[f"{self.prefix}{name}.{self.called['lora_B']}"] = layer.lora_B
            if layer.magnitude is not None:
                shaped = layer.magnitude.reshape(self.magnitude_shape)
                tensors[f"{self.prefix}{name}.{self.called['magnitude']}"] = shaped
        return tensors, self.configuration(list(layers), numbers)

    def configuration(self, names: list[str], numbers: dict[str, Any]) -> dict[str, Any] | None:
        """The configuration that is written beside the tensors."""
        raise NotImplementedError
