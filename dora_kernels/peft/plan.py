"""Whether a patched linear layer runs as one function: looked at once, then compared as a whole at each call."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import dora as peft_dora
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from dora_kernels.core.precision import accumulation_dtype
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine.formula import transformed
from dora_kernels.modules.linear import is_conv1d
from dora_kernels.peft import shards
from dora_kernels.peft.layer import DoraVariant
from dora_kernels.peft.magnitude import DoraMagnitude
from dora_kernels.peft.state import (
    SWITCH,
    hooked,
    norm_cache,
    read_modules,
    show_caching,
    switch,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_weights(layer: Any, adapter: str) -> Weights | None:
    """`read_modules`, with Conv1D's weight, which is stored transposed, as rows."""
    weights = read_modules(layer, adapter, _fit)
    return weights._replace(weight=weights.weight.t()) if weights is not None and layer.fan_in_fan_out else weights


def _fit(layer: Any, adapter: str, weights: Weights) -> bool:
    """True if the modules are plain ones and their tensors have fitting shapes."""
    base = layer._modules["base_layer"]
    if "bias" not in base._parameters or weights.weight.dtype not in _DTYPES:  # a pruned bias is not a parameter
        return False
    expected = (layer.out_features, layer.in_features)
    if tuple(weights.weight.shape) != (expected[::-1] if layer.fan_in_fan_out else expected):
        return False
    return factors_fit(layer, adapter, weights)


def factors_fit(layer: Any, adapter: str, weights: Weights) -> bool:
    """True if the adapter's modules are plain ones and their tensors have fitting shapes."""
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    lora_A, lora_B, magnitude = (layer._modules[name]._modules[adapter] for name in names)
    if not (type(lora_A) is type(lora_B) is nn.Linear and lora_B.bias is None):
        return False
    if type(magnitude) not in (DoraMagnitude, DoraLinearLayer):
        return False
    _, a, b, m, _ = weights
    shapes = a.dim() == b.dim() == 2 and m.dim() == 1
    return shapes and a.shape[1] == layer.in_features and b.shape[0] == m.shape[0] == layer.out_features


def single_dora_adapter(layer: Any) -> str | None:
    """Return the one active adapter if it is a DoRA adapter of this package, at full strength, unmerged; else None."""
    if layer.disable_adapters or layer.merged_adapters:
        return None
    factors = layer._modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in factors]
    if len(active) != 1 or not isinstance(layer.lora_variant.get(active[0]), DoraVariant):
        return None
    state = switch(layer)
    return None if state is not None and state.strengths.get(active[0], 1.0) != 1.0 else active[0]


def single_function(layer: Any) -> tuple[str, Weights] | None:
    """Return the active adapter and its tensors, or None if PEFT's forward has to call the modules."""
    name = single_dora_adapter(layer)
    weights = None if name is None else read_weights(layer, name)
    if name is None or weights is None or nn_module._has_any_global_hook():
        return None
    children = layer._modules
    if type(children["base_layer"]) is not nn.Linear and not is_conv1d(children["base_layer"]):
        return None
    dropout = children["lora_dropout"]._modules[name]
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return None
    factors = children["lora_A"]._modules[name], children["lora_B"]._modules[name]
    return None if hooked(children["base_layer"], *factors, dropout) else (name, weights)


def accepts(x: Tensor, weight: Tensor, in_features: int) -> bool:
    """True if PEFT's base product would accept x without a cast."""
    if (type(x) is not Tensor and type(x) is not nn.Parameter) or x.device != weight.device:
        return False
    if x.dim() == 0 or x.shape[-1] != in_features:  # PEFT's own error is clearer
        return False
    if torch.is_autocast_enabled(x.device.type):
        return torch.float64 not in (x.dtype, weight.dtype)  # autocast does not change float64
    return x.dtype == weight.dtype


class Plan:
    """Everything that a call of a patched layer as one function needs. Valid as long as nothing it was made from
    changes.

    Making a plan runs all checks (`single_function`). It records what may change: dictionaries of modules and hooks,
    which are compared as wholes, and parameters with their addresses and shapes.
    """

    def __init__(self, layer: Any, adapter: str, weights: Weights) -> None:
        children = layer._modules
        self.adapter, self.weights, self.cache = adapter, weights, norm_cache(layer, adapter)
        self.scaling, self.variant = layer.scaling[adapter], layer.lora_variant[adapter]
        self.form = Form(self.scaling)
        active = layer._active_adapter
        self.active = active if isinstance(active, str) else list(active)
        names = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout")
        self.owners = tuple(children[name]._modules for name in names)
        self.owned = tuple(dict(owner) for owner in self.owners)
        self.modules = dict(children)
        base = children["base_layer"]
        lora_A, lora_B, magnitude, dropout = (owner[adapter] for owner in self.owners)
        parts = base, lora_A, lora_B, magnitude, dropout
        self.forwards = lora_A.__dict__.get("forward"), lora_B.__dict__.get("forward")  # `hooked` knows them
        self.magnitude, self.parts, self.kinds = magnitude, parts, tuple(map(type, parts))
        self.parameters = base._parameters, lora_A._parameters, lora_B._parameters, magnitude._parameters
        self.tensors = tuple(each["weight"] for each in self.parameters)
        self.bias = base._parameters.get("bias")
        of_w = self.tensors[0]
        self.seen = tuple(t.data_ptr() for t in self.tensors), tuple(t.shape for t in self.tensors), of_w.stride()
        self.norm: Any = None
        """The norm of the last call, for these tensors."""
        weight = weights.weight
        self.dtype, self.features, self.on_cpu = weight.dtype, (layer.in_features,), weight.is_cpu
        # Only for a real dropout: reading `p` of an identity would take three microseconds.
        self.drops = None if isinstance(dropout, nn.Identity) else dropout.__dict__
        self.accumulates = accumulation_dtype(weight)
        self.hooks = *_GLOBAL_HOOKS, *(hooks for part in parts for hooks in _hooks(part))

    def holds(self, layer: Any) -> bool:
        """True if the layer and its modules have not changed."""
        own = layer.__dict__
        weight, a, b, m = self.tensors
        of_base, of_a, of_b, of_m = self.parameters
        base, lora_A, lora_B, magnitude, dropout = self.parts
        forward_A, forward_B = self.forwards
        return (
            not any(self.hooks)
            and own["_active_adapter"] == self.active
            and not own["_disable_adapters"]
            and not own["merged_adapters"]
            and own["_modules"] == self.modules
            and self.owners == self.owned
            and (type(base), type(lora_A), type(lora_B), type(magnitude), type(dropout)) == self.kinds
            and "forward" not in base.__dict__
            and lora_A.__dict__.get("forward") is forward_A
            and lora_B.__dict__.get("forward") is forward_B
            and "forward" not in magnitude.__dict__
            and "forward" not in dropout.__dict__
            and of_base.get("weight") is weight
            and of_base.get("bias") is self.bias
            and of_a.get("weight") is a
            and of_b.get("weight") is b
            and of_b.get("bias") is None
            and of_m.get("weight") is m
            and own["lora_variant"].get(self.adapter) is self.variant
            and own["scaling"].get(self.adapter) is self.scaling
            and (
                (weight.data_ptr(), a.data_ptr(), b.data_ptr(), m.data_ptr()),
                (weight.shape, a.shape, b.shape, m.shape),
                weight.stride(),
            ) == self.seen
        )  # fmt: skip

    def scale(self, training: bool) -> tuple[Tensor, bool]:
        """Return g, and True if B is known to be 0. For the CPU, where only the norm's freshness is left to check."""
        cache, weights, norm = self.cache, self.weights, self.norm
        if cache.frozen is not None:
            norm, g = cache.frozen
            if not torch.is_grad_enabled():
                return g, norm.b_is_zero
        elif norm is None or not cache.still_holds(norm, weights.weight):
            norm = self.norm = cache.norm(weights, self.form, training, "torch")
        g = weights.magnitude / norm.divisor
        return g if g.dtype is self.accumulates else g.to(self.accumulates), norm.b_is_zero


_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    own = module.__dict__
    return own["_forward_hooks"], own["_forward_pre_hooks"], own["_backward_hooks"], own["_backward_pre_hooks"]


def ready(layer: Any, x: Tensor) -> tuple[Any, bool]:
    """Return the plan of a call on x, or None if PEFT's forward has to call the modules.

    The second value is True if x is plain, in the layer's dtype and on the CPU, without autocast.
    """
    state = layer.__dict__.get(SWITCH)
    if state is None or torch._C._get_tracing_state() is not None:  # a trace would keep the norm as a constant
        return None, False
    plan: Plan | None = state.plan
    if plan is None or not plan.holds(layer):
        found = None if transformed() or shards.split_of(layer) is not None else single_function(layer)
        plan = None if found is None else Plan(layer, *found)
        # Computed parameters (`torch.func.functional_call`) are not kept: their graph would live until the next call.
        state.plan = None if plan is None or any(t.grad_fn is not None for t in plan.tensors) else plan
        if plan is None:
            return None, False
    usual = (
        type(x) is Tensor
        and x.dtype is plan.dtype
        and x.is_cpu
        and x.shape[-1:] == plan.features
        and not torch.is_autocast_enabled("cpu")
    )
    weight = plan.tensors[0]
    if (
        not (usual or accepts(x, weight, layer.in_features))
        or (layer.training and plan.drops is not None and plan.drops["p"] != 0.0)
        or (state.strengths and state.strengths.get(plan.adapter, 1.0) != 1.0)
    ):
        return None, False
    if getattr(peft_dora, "ENABLE_DORA_CACHING", False) or plan.magnitude.__dict__.get("_dora_cache"):
        show_caching(plan.magnitude, plan.cache)
    view = plan.weights.weight
    if view is not weight and (weight.requires_grad or view.requires_grad):  # its history is that of its first call
        plan.weights = plan.weights._replace(weight=weight.t())
    return plan, usual and plan.on_cpu
