"""PEFT's LoRA layer on `nn.Linear` and GPT-2's `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import variants
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from dora_kernels.core.problem import Form, Weights
from dora_kernels.core.scale import safe_divisor
from dora_kernels.engine import formula
from dora_kernels.engine.collectives import copied
from dora_kernels.engine.dispatch import PLAIN
from dora_kernels.engine.kept_divisor import kept_divisor
from dora_kernels.engine.layer import exporting, run_compose, run_layer
from dora_kernels.modules.linear import is_conv1d
from dora_kernels.peft import shards, tensor_parallel
from dora_kernels.peft.layer import DoraLayer, DoraVariant
from dora_kernels.peft.magnitude import DoraMagnitude
from dora_kernels.peft.plan import read_weights, ready
from dora_kernels.peft.state import (
    SWITCH,
    active_dropout,
    hooked,
    interpolated,
    norm_cache,
    settings,
)


class DoraLinearVariant(DoraVariant, variants.DoraLinearVariant):
    """PEFT's DoRA variant for calls that go through the modules: with hooks, several adapters or active dropout."""

    stock = variants.DoraLinearVariant
    by_slots = True
    init = staticmethod(tensor_parallel.wrapped(stock.init))
    read = staticmethod(read_weights)

    @staticmethod
    def rows(layer: Any, weight: Tensor) -> Tensor:
        """The weight as rows; Conv1D stores it transposed."""
        return weight.t() if layer.fan_in_fan_out else weight

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's ``result + (g - 1) * base + g * scaling * B A x``.

        `Options.dropout` says what active dropout applies to.
        """
        weights = cls.read(module, active_adapter)
        if weights is None:
            return cls.pefts_forward(module, active_adapter, x, result, **kwargs)
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropped = None
        if active_dropout(module, active_adapter):
            x = dropped = module.lora_dropout[active_adapter](x)
        of_base = dropped is not None and settings(module).options.dropout == "peft"
        if of_base or hooked(lora_B) or nn_module._has_any_global_hook():
            base = result
            if of_base:
                base = cls.base_product(module, active_adapter, x, weights, result)
            elif (bias := cls.bias(module, active_adapter, weights)) is not None:
                base = result - bias
            g = cls.scale(module, active_adapter, weights)
            dora = result + (g - 1) * base + (g * module.scaling[active_adapter]) * lora_B(lora_A(x))
        else:
            h = lora_A(x)
            split = shards.split_of(module)
            if split is not None and split.of_rows:
                (h,) = copied(split.group, h)
            dora = run_compose(
                result.to(torch.promote_types(result.dtype, h.dtype)), h,
                weights._replace(bias=cls.bias(module, active_adapter, weights)), module.scaling[active_adapter],
                lambda: cls.divisor(module, active_adapter, weights), cache=norm_cache(module, active_adapter),
            )  # fmt: skip
        return interpolated(module, active_adapter, result, dora)

    @staticmethod
    def bias(module: Any, adapter: str, weights: Weights) -> Tensor | None:
        """The base layer's bias."""
        return weights.bias

    @classmethod
    def base_product(cls, module: Any, adapter: str, x: Tensor, weights: Weights, result: Tensor) -> Tensor:
        """``x Wᵀ`` for the x that dropout left; `result` is the product for all of x."""
        weight, split = weights.weight.to(x.dtype), shards.split_of(module)
        return F.linear(x, weight) if split is None else tensor_parallel.base_product(split, x, weight)


class DoraLinear(DoraLayer, lora.Linear):
    """PEFT's LoRA layer on an `nn.Linear` or `Conv1D`, with DoRA adapters that run on this package.

    With one active DoRA adapter and plain modules the whole layer is one function, so the gradient of x is accumulated
    once. Otherwise PEFT's own forward calls the modules and `DoraLinearVariant`.
    """

    stock = lora.Linear
    variants = {variants.DoraLinearVariant: DoraLinearVariant}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs):
            y = whole_layer(self, x)
            if y is not None:
                return y
        # Not super(): a wrapper may call this after the layer's class has been restored.
        return lora.Linear.forward(self, x, *args, **kwargs)


def whole_layer(layer: Any, x: Tensor) -> Tensor | None:
    """Run the layer as one function; returns None if PEFT's forward has to call the modules."""
    if torch.compiler.is_compiling():
        return tensor_parallel.untraced(layer, x) if shards.is_split(layer) else _traced(layer, x)
    plan, usual = ready(layer, x)
    if usual and not plan.cache.merges:
        g, b_is_zero = plan.scale(layer.training)
        return formula.linear(x, plan.weights, g, plan.scaling, b_is_zero=b_is_zero)
    if plan is not None:
        return run_layer(x, plan.weights, plan.form, plan.cache, layer.training)
    return tensor_parallel.forward(layer, x)


def _traced(layer: Any, x: Tensor) -> Tensor | None:
    """Run the layer while torch.compile traces it; returns None if PEFT's forward has to call the modules.

    The compiler guards everything that is read here and checks it again at each call. So this reads as little as
    possible, and inline, since each function, global and tuple adds a guard. It ignores hooks, as the compiler does by
    default.
    """
    state, name = layer.__dict__.get(SWITCH), layer._active_adapter
    if type(name) is list and len(name) == 1:
        name = name[0]
    if state is None or type(name) is not str or layer._disable_adapters or layer.merged_adapters or state.strengths:
        return None
    cache, scaling = state.get(name), layer.scaling.get(name)
    if cache is None or type(scaling) is not float:
        return None
    children = layer._modules
    base, lora_A, lora_B = children["base_layer"], children["lora_A"]._modules[name], children["lora_B"]._modules[name]
    magnitude = children["lora_magnitude_vector"]._modules[name]
    if not (type(lora_A) is type(lora_B) is nn.Linear and type(magnitude) is DoraMagnitude):
        return None
    if layer.training and active_dropout(layer, name):
        return None
    weight, a, b, m = base._parameters.get("weight"), lora_A.weight, lora_B.weight, magnitude.weight
    if not all(type(tensor) in PLAIN for tensor in (weight, a, b, m)):
        return None
    if type(base) is not nn.Linear:
        if not is_conv1d(base):
            return None
        weight = weight.t()
    dtype = weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        if torch.float64 in (x.dtype, dtype):
            return None
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
    if x.dtype != dtype:
        return None
    if cache.frozen is not None:
        norm, g = cache.frozen
        if torch.is_grad_enabled():
            g = m / norm.divisor
    elif exporting():
        g = m / safe_divisor(formula.weight_norm(Weights(weight, a, b), Form(scaling)).detach())
    else:
        g = m / kept_divisor(
            cache.slot, weight.detach(), a.detach(), b.detach(), m.detach(), scaling, layer.training
        )
    if g.dtype != torch.float64:
        g = g.to(torch.float32)
    return formula.linear(x, (weight, a, b, m, base.bias), g, scaling)  # type: ignore[arg-type]


def unsupported(layer: Any) -> str | None:
    """Return the reason why a `lora.Linear` cannot be patched, or None if it can."""
    base = layer.base_layer
    if not isinstance(base, nn.Linear) and not is_conv1d(base):
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}, not an nn.Linear or Conv1D"
    if bool(layer.fan_in_fan_out) != is_conv1d(base):
        return f"fan_in_fan_out={layer.fan_in_fan_out} does not fit its base layer, a {type(base).__name__}"
    return shards.problem(base)
