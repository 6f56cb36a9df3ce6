"""Stacks of experts with an adapter: `LoRAExperts` and `DoRAExperts`, around the module that has the stack."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.core.precision import accumulation_dtype, cast
from dora_kernels.engine.experts import Adapter, Experts
from dora_kernels.engine.layer import layer_scale, norm_now
from dora_kernels.modules.base import AdaptedLayer
from dora_kernels.modules.dora_layer import DoRALayer
from dora_kernels.modules.stand_in import StandIn, is_transposed, standing_in
from dora_kernels.rounding import seed_for


class LoRAExperts(AdaptedLayer):
    """A module of experts, one of whose stacks ``[E, out, in]`` has a low-rank adapter for each expert.

    The module's own forward runs, and reads the adapted weights (`modules.stand_in`). For a second stack of the same
    module, put another layer around the first, as PEFT does; the keys of a state dict are then PEFT's. A stack is read
    as ``[E, in, out]`` if the module has a true `is_transposed`.

    Args:
        base_layer: the module, or another `LoRAExperts` of it.
        parameter: the stack's name in the module.

    Keyword Args:
        rank (int): of the factors, at least 1.
        alpha (float | None): as `LoRALinear`.
        use_rslora (bool): as `LoRALinear`.
        backend (str): as `dora_linear`.
        adapter_dtype (torch.dtype | None): as `LoRALinear`.

    Raises:
        TypeError: `base_layer` has no such stack, or an option is of the wrong type.
        ValueError: the stack is adapted already; an option is out of range; `dropout` is not 0, for which a low-rank
            product of the weight has no place; or a weight is not finite.
    """

    kind = nn.Module
    lora_A: Any
    lora_B: Any

    def __init__(self, base_layer: nn.Module, parameter: str, *, rank: int, **options: Any) -> None:
        super().__init__()
        self.parameter = parameter
        if options.get("dropout"):
            raise ValueError(f"dropout: expected 0 for experts, got {options['dropout']}")
        factory = self._set_up(base_layer, rank=rank, **options)
        stored = self.weight
        count, outputs, inputs = stored.transpose(1, 2).shape if is_transposed(self._holder()) else stored.shape
        self.lora_A = nn.utils.skip_init(nn.Linear, inputs, count * self.rank, bias=False, **factory)
        self.lora_B = nn.utils.skip_init(nn.Linear, count * self.rank, outputs, bias=False, **factory)
        self._start()

    def _check_base(self, base_layer: Any, rank: int) -> None:
        if not isinstance(base_layer, nn.Module):
            raise TypeError(f"base_layer: expected a torch.nn.Module, got {type(base_layer).__name__}")
        module = base_layer
        while isinstance(module, LoRAExperts):
            if module.parameter == self.parameter:
                raise ValueError(f"parameter: {self.parameter!r} is adapted already, by base_layer")
            module = module.base_layer
        weight = module._parameters.get(self.parameter)
        if weight is None or weight.dim() != 3:
            shape = "none of that name" if weight is None else list(weight.shape)
            raise TypeError(f"parameter: expected a stack of {type(module).__name__}, {self.parameter!r}: {shape}")

    def _holder(self) -> nn.Module:
        """The module that has the stack."""
        return _innermost(self.base_layer)

    def _frozen_in(self, base_layer: Any) -> nn.Module:
        return _innermost(base_layer)

    def _weight_name(self) -> str:
        depth = 0
        inner = self.base_layer
        while isinstance(inner, LoRAExperts):
            inner, depth = inner.base_layer, depth + 1
        return "base_layer." * depth + self.parameter

    def _weight_of(self, base_layer: Any) -> Tensor:
        weight: Any = _innermost(base_layer)._parameters[self.parameter]
        return weight  # type: ignore[no-any-return]

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A ``[E * rank, in]``, expert by expert, and B ``[out, rank * E]``, whose experts take turns, as PEFT's."""
        return self.lora_A.weight, self.lora_B.weight

    def _problem(self) -> tuple[Tensor, Tensor, Tensor]:
        """The stack as ``[E, N, K]``, A as ``[E, r, K]`` and B as ``[E, N, r]``: views."""
        stored, (a, b) = self.weight, self.factors
        count = stored.shape[0]
        weight = stored.transpose(1, 2) if is_transposed(self._holder()) else stored
        return weight, a.view(count, self.rank, a.shape[1]), b.view(b.shape[0], self.rank, count).permute(2, 0, 1)

    @property
    def bias(self) -> Tensor | None:
        """None: the module adds its own biases itself."""
        return None

    def _reset_factors(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, on the adapted stack."""
        if self.merged or self.strength == 0.0:
            return self.base_layer(*args, **kwargs)
        module = self._holder()
        name = f"{type(module).__name__}.{self.parameter}"
        stand_in = StandIn(self._experts, name, not is_transposed(module))
        with standing_in(module, self.parameter, stand_in):
            result = self.base_layer(*args, **kwargs)
        if not torch.compiler.is_compiling():
            stand_in.check_met(args[0] if args else None)
        return result

    def _experts(self) -> Experts:
        weight, lora_A, lora_B = self._problem()
        g = self._scale()
        if isinstance(self, DoRAExperts) and not torch.is_grad_enabled():
            lora_B = self._norm_cache.contiguous_b(lora_B)
        return Experts(weight, [Adapter(lora_A, lora_B, g, self.scaling, self.strength)], self.backend)

    def _scale(self) -> Tensor | None:
        return None

    def merge(self, rounding: str = "nearest", seed: int = 0) -> None:
        """Write the adapted weights into the module, one expert at a time. See `AdaptedLayer.merge`."""
        super().merge(rounding, seed)

    def _merged_weight(self, rounding: str, seed: int) -> Any:
        """Functions that give the merged weight of each expert, so that the merged stack is never there twice."""
        weight, lora_A, lora_B = self._problem()
        return [
            _merged(self, (weight[e], lora_A[e], lora_B[e]), e, rounding, seed_for(seed, str(e)))
            for e in range(weight.shape[0])
        ]

    def _write(self, merged: Any) -> None:
        for target, make in zip(self._problem()[0], merged, strict=True):
            target.copy_(make())

    def extra_repr(self) -> str:
        return f"parameter={self.parameter!r}, shape={list(self.weight.shape)}, {super().extra_repr()}"


class DoRAExperts(DoRALayer, LoRAExperts):
    """A `LoRAExperts` with a magnitude for each output of each expert, ``lora_magnitude_vector`` ``[E, out]``.

    It starts as the norm of the adapted weights, exact to float32, so that a new layer changes nothing. The magnitudes
    are along "out", and no gradient flows through the norm.

    The arguments are those of `LoRAExperts`.
    """

    def _set_up(self, base_layer: nn.Module, **options: Any) -> dict[str, Any]:
        for name, expected in (("magnitude_axis", "out"), ("detach_norm", True), ("eps", 0.0)):
            if options.get(name, expected) != expected:
                raise ValueError(f"{name}: expected {expected!r} for experts, got {options[name]!r}")
        return super()._set_up(base_layer, **options)

    def _weight_norm(self) -> Tensor:
        with torch.no_grad():
            return norm_now(self._weights(), self._form, self.backend)

    def _scale(self) -> Tensor | None:
        g = layer_scale(self._weights(), self._form, self._norm_cache, self.training, self.backend)
        return cast(g, accumulation_dtype(self.weight))


def _innermost(module: Any) -> nn.Module:
    while isinstance(module, LoRAExperts):
        module = module.base_layer
    return module  # type: ignore[no-any-return]


def _merged(
    layer: LoRAExperts, problem: tuple[Tensor, Tensor, Tensor], expert: int, rounding: str, seed: int
) -> Callable[[], Tensor]:
    magnitude = layer.magnitude[expert] if isinstance(layer, DoRALayer) else None

    def make() -> Tensor:
        return layer._merged_matrix(problem, rounding, seed, magnitude)

    return make
