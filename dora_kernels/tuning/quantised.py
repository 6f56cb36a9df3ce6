"""What is measured for a quantised layer: the merged forward beside the composed one, on the model's own layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_kernels import testing
from dora_kernels.core.problem import Weights
from dora_kernels.engine import merged
from dora_kernels.engine.dispatch import norm_backend
from dora_kernels.engine.layer import layer_norm, run_compose
from dora_kernels.engine.norm_cache import NormCache
from dora_kernels.modules import dequantize
from dora_kernels.modules.opaque import opaque_norm
from dora_kernels.tuning.candidates import Call, Layer
from dora_kernels.tuning.shapes import Shape


class QuantisedLayer(Layer):
    """One shape's adapter on a quantised base layer."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, base: nn.Module) -> None:
        self.base: Any = base
        self.blocks: Any = dequantize.row_blocks(base)
        self.carrier: Any = dequantize.carrier(base)
        super().__init__(shape, dtype, device)
        weight: Any = dequantize.dequantized(base)
        self.problem = self.problem.replace(weight=weight)

    def norms(self) -> dict[str, Call]:
        """None: the norm is that of dequantised blocks."""
        return {}

    def ways(self) -> Iterator[str]:
        """By what the base layer's library multiplies, and by V'."""
        yield "composed"
        if self.dtype in merged.DTYPES:
            yield "merged"

    def wrong(self, way: str) -> str | None:
        """What is wrong with the merged way; the other is as exact as the base layer's library."""
        return super().wrong(way) if way == "merged" else None

    def _given(self, problem: testing.Problem) -> tuple[dict[str, Any], Weights]:
        leaves = testing.leaves_of(problem, [name for name in testing.NAMES if name != "weight"])
        return leaves, Weights(self.carrier, *(leaves[name] for name in testing.NAMES[2:]))  # type: ignore[arg-type]

    def _norm(self, weights: Weights) -> Tensor:
        a, b = weights.lora_A.detach(), weights.lora_B.detach()
        return opaque_norm(self.base, a, b, self.form.scaling, None)  # type: ignore[arg-type]

    def _bound(self, way: str, problem: testing.Problem) -> tuple[dict[str, Any], Callable[[], Tensor]]:
        leaves, weights = self._given(problem)
        x, cache, compute = leaves["x"], NormCache(self.form, "torch"), functools.partial(self._norm, weights)
        source = merged.Dequantized(self.blocks, compute, self.dtype)

        def run_merged() -> Tensor:
            return merged.run_merged(x, weights, self.form, cache, True, "auto", source)

        def run_composed() -> Tensor:
            h = F.linear(x, weights.lora_A)
            result = self.base.forward(x)
            norm = functools.partial(layer_norm, weights, self.form, cache, True, "auto", compute)
            return run_compose(result, h, weights, self.form.scaling, lambda: norm().divisor, cache=cache)

        return leaves, run_merged if way == "merged" else run_composed

    def refreshes(self, ways: list[str]) -> dict[str, Call]:
        """What a step does once: the norm, and for the merged way the weight too."""
        _, weights = self._given(self.problem)
        compute = functools.partial(self._norm, weights)

        def norm() -> Any:
            return NormCache(self.form, "torch").norm(weights, self.form, True, "torch", compute)

        source, backend = merged.Dequantized(self.blocks, compute, self.dtype), norm_backend("auto", weights.lora_B)
        calls: dict[str, Call] = {"composed": norm}
        if "merged" in ways:
            calls["merged"] = lambda: merged._make(weights, self.form, norm(), backend, source)
        return calls
