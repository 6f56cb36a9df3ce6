"""PEFT's LoRA layer on `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from dora_kernels.functional import run_compose, run_layer
from dora_kernels.modules.linear import is_conv1d
from dora_kernels.peft.layer import DoraLayer, DoraVariant
from dora_kernels.peft.state import (
    SWITCH,
    Weights,
    active_dropout,
    hooked,
    interpolated,
    norm_cache,
    read,
    scale,
    switch,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_weights(layer: Any, adapter: str) -> Weights | None:
    """`read`, with Conv1D's weight, which is stored transposed, as rows."""
    children = layer._modules
    base = children["base_layer"]
    lora_A, lora_B = children["lora_A"]._modules[adapter], children["lora_B"]._modules[adapter]
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    a, b = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    identity = base, lora_A, lora_B, type(base), type(lora_A), type(lora_B), lora_B._parameters.get("bias")
    weights = read(layer, adapter, weight, a, b, bias, identity, _fit)
    return weights._replace(weight=weights.weight.t()) if weights is not None and layer.fan_in_fan_out else weights


def _fit(layer: Any, adapter: str, weights: Weights) -> bool:
    """Whether the modules are plain, and their tensors of fitting shapes."""
    base = layer._modules["base_layer"]
    if "bias" not in base._parameters or weights.weight.dtype not in _DTYPES:  # a pruned bias is no parameter
        return False
    expected = (layer.out_features, layer.in_features)
    if tuple(weights.weight.shape) != (expected[::-1] if layer.fan_in_fan_out else expected):
        return False
    return factors_fit(layer, adapter, weights)


def factors_fit(layer: Any, adapter: str, weights: Weights) -> bool:
    """Whether the adapter's modules are plain ones, and their tensors of fitting shapes."""
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    lora_A, lora_B, magnitude = (layer._modules[name]._modules[adapter] for name in names)
    if not (type(lora_A) is type(lora_B) is nn.Linear and lora_B.bias is None):
        return False
    if type(magnitude) not in (DoraMagnitude, DoraLinearLayer):
        return False
    _, a, b, m, _ = weights
    shapes = a.dim() == b.dim() == 2 and m.dim() == 1
    return shapes and a.shape[1] == layer.in_features and b.shape[0] == m.shape[0] == layer.out_features


class DoraMagnitude(DoraLinearLayer):
    """PEFT's module of a magnitude, as which it calls lora_A and lora_B once.

    PEFT calls them twice, the first time with an identity for their weights, which may be whole during a call alone.
    """

    def forward(self, x: Tensor, *, lora_A: Any, lora_B: Any, **kwargs: Any) -> Tensor:
        """PEFT's, given what the calls have shown."""
        cached = getattr(peft_dora, "ENABLE_DORA_CACHING", False)  # which leaves the identity out
        if not cached and not torch.compiler.is_compiling() and _inner_linear(lora_A) and _inner_linear(lora_B):
            lora_A = _Called(lora_A, x)
            lora_B = _Called(lora_B, lora_A.result)
        result: Tensor = super().forward(x, lora_A=lora_A, lora_B=lora_B, **kwargs)
        return result


class _Called:
    """lora_A or lora_B after its call, to be called by PEFT: with what shows the weight, then for the result."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        seen: list[Tensor] = []
        inner: Any = _inner_linear(module)
        handle = inner.register_forward_hook(lambda one, *_: seen.append(one.weight.detach().clone()), prepend=True)
        try:
            self.result: Tensor = module(x)
        finally:
            handle.remove()
        self.weight = seen[0]
        self._shown = False

    def __call__(self, x: Tensor) -> Tensor:
        if self._shown:
            return self.result
        self._shown = True
        return F.linear(x, self.weight)


def _inner_linear(module: nn.Module) -> nn.Linear | None:
    """What a wrapper is around, if that shows its weight by what it makes of an identity."""
    inner = next((one for one in module.modules() if isinstance(one, nn.Linear)), None)
    return inner if type(inner) is nn.Linear and inner.bias is None else None


class DoraLinearVariant(DoraVariant, variants.DoraLinearVariant):
    """PEFT's DoRA variant where it calls the modules: hooks, several adapters, active dropout."""

    stock = variants.DoraLinearVariant
    read = staticmethod(read_weights)

    @staticmethod
    def rows(layer: Any, weight: Tensor) -> Tensor:
        """Conv1D's is stored transposed."""
        return weight.t() if layer.fan_in_fan_out else weight

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's ``result + (g - 1) * base + g * scaling * B A x``; active dropout as `Options.dropout` says."""
        weights = cls.read(module, active_adapter)
        if weights is None:
            return cls.pefts_forward(module, active_adapter, x, result, **kwargs)
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropped = None
        if active_dropout(module, active_adapter):
            x = dropped = module.lora_dropout[active_adapter](x)
        of_base = dropped is not None and vars(module)[SWITCH].options.dropout == "peft"
        if of_base or hooked(lora_B) or nn_module._has_any_global_hook():
            base = result
            if of_base:
                base = cls.base_product(module, active_adapter, x, weights, result)
            elif (bias := cls.bias(module, active_adapter, weights)) is not None:
                base = result - bias
            g = scale(module, active_adapter, weights, cls.divisor(module, active_adapter, weights))
            dora = result + (g - 1) * base + (g * module.scaling[active_adapter]) * lora_B(lora_A(x))
        else:
            h = lora_A(x)
            dora = run_compose(
                result.to(torch.promote_types(result.dtype, h.dtype)), h, weights.lora_B, weights.magnitude,
                cls.bias(module, active_adapter, weights), module.scaling[active_adapter],
                cls.divisor(module, active_adapter, weights),
            )  # fmt: skip
        return interpolated(module, active_adapter, result, dora)

    @staticmethod
    def bias(module: Any, adapter: str, weights: Weights) -> Tensor | None:
        """The base layer's."""
        return weights.bias

    @classmethod
    def base_product(cls, module: Any, adapter: str, x: Tensor, weights: Weights, result: Tensor) -> Tensor:
        """``x Wᵀ`` of what dropout left, where `result` is that of all of x."""
        return F.linear(x, weights.weight.to(x.dtype))


class DoraLinear(DoraLayer, lora.Linear):
    """PEFT's LoRA layer on an `nn.Linear` or `Conv1D` whose DoRA adapters run on this package.

    With one active DoRA adapter and plain modules the whole layer is one function, so that the gradient of x is one
    accumulation; otherwise PEFT's own forward calls the modules, and `DoraLinearVariant`.
    """

    stock = lora.Linear
    variants = {variants.DoraLinearVariant: DoraLinearVariant}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else single_dora_adapter(self)
        if name is not None and not (self.training and active_dropout(self, name)):
            weights = read_weights(self, name)
            if weights is not None and _fusable(self, name, x, weights.weight):
                return run_layer(
                    x, *weights, self.scaling[name], "out", True, None, "auto", norm_cache(self, name), self.training
                )
        # Not super(): a wrapper may call this after the layer's class has been restored.
        return lora.Linear.forward(self, x, *args, **kwargs)


def unsupported(layer: Any) -> str | None:
    """Why a `lora.Linear` cannot be patched; None where it can."""
    base = layer.base_layer
    if not isinstance(base, nn.Linear) and not is_conv1d(base):
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}, not an nn.Linear or Conv1D"
    if bool(layer.fan_in_fan_out) != is_conv1d(base):
        return f"fan_in_fan_out={layer.fan_in_fan_out} does not fit its base layer, a {type(base).__name__}"
    return None


def single_dora_adapter(layer: Any) -> str | None:
    """The one active adapter, if it is a DoRA adapter of this package at full strength, nothing merged or disabled."""
    if layer.disable_adapters or layer.merged_adapters:
        return None
    factors = layer._modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in factors]
    if len(active) != 1 or not isinstance(layer.lora_variant.get(active[0]), DoraVariant):
        return None
    state = switch(layer)
    return None if state is not None and state.strengths.get(active[0], 1.0) != 1.0 else active[0]


def _fusable(layer: Any, adapter: str, x: Tensor, weight: Tensor) -> bool:
    """Whether the modules need not be called: nobody hooked them, and stock's base product would run on x as it is."""
    if x.device != weight.device or (type(x) is not Tensor and type(x) is not nn.Parameter):
        return False
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:  # PEFT's own error is the better one
        return False
    if torch.is_autocast_enabled(x.device.type):
        if torch.float64 in (x.dtype, weight.dtype):  # autocast leaves float64 alone
            return False
    elif x.dtype != weight.dtype:
        return False
    if nn_module._has_any_global_hook():
        return False
    children = layer._modules
    if type(children["base_layer"]) is not nn.Linear and not is_conv1d(children["base_layer"]):
        return False
    dropout = children["lora_dropout"]._modules[adapter]
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return False
    factors = children["lora_A"]._modules[adapter], children["lora_B"]._modules[adapter]
    return not hooked(children["base_layer"], *factors, dropout)
