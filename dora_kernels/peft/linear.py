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

from dora_kernels.core.precision import accumulation_dtype
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine import formula
from dora_kernels.engine.formula import transformed
from dora_kernels.engine.layer import run_compose, run_layer
from dora_kernels.engine.norm_cache import kept_divisor
from dora_kernels.modules.linear import is_conv1d
from dora_kernels.peft.layer import DoraLayer, DoraVariant
from dora_kernels.peft.state import (
    SWITCH,
    active_dropout,
    hooked,
    interpolated,
    norm_cache,
    read,
    show_caching,
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


class DoraMagnitude(DoraLinearLayer):
    """PEFT's magnitude module, but it calls lora_A and lora_B only once.

    PEFT calls each twice, first with an identity matrix to get their weights, which may be whole only during a call.
    """

    def forward(self, x: Tensor, *, lora_A: Any, lora_B: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, with the weights taken from the calls."""
        cached = getattr(peft_dora, "ENABLE_DORA_CACHING", False)  # with PEFT's cache the identity is not used
        if not cached and not torch.compiler.is_compiling() and _inner_linear(lora_A) and _inner_linear(lora_B):
            lora_A = _Called(lora_A, x)
            lora_B = _Called(lora_B, lora_A.result)
        result: Tensor = super().forward(x, lora_A=lora_A, lora_B=lora_B, **kwargs)
        return result


class _Called:
    """Stands in for lora_A or lora_B after its one call. The first call gives the weight, the second the result."""

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
    """Return the linear layer inside a wrapper, if the wrapper's output for an identity matrix shows its weight."""
    inner = next((one for one in module.modules() if isinstance(one, nn.Linear)), None)
    return inner if type(inner) is nn.Linear and inner.bias is None else None


class DoraLinearVariant(DoraVariant, variants.DoraLinearVariant):
    """PEFT's DoRA variant for calls that go through the modules: with hooks, several adapters or active dropout."""

    stock = variants.DoraLinearVariant
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
        of_base = dropped is not None and vars(module)[SWITCH].options.dropout == "peft"
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
            dora = run_compose(
                result.to(torch.promote_types(result.dtype, h.dtype)), h,
                weights._replace(bias=cls.bias(module, active_adapter, weights)), module.scaling[active_adapter],
                lambda: cls.divisor(module, active_adapter, weights),
            )  # fmt: skip
        return interpolated(module, active_adapter, result, dora)

    @staticmethod
    def bias(module: Any, adapter: str, weights: Weights) -> Tensor | None:
        """The base layer's bias."""
        return weights.bias

    @classmethod
    def base_product(cls, module: Any, adapter: str, x: Tensor, weights: Weights, result: Tensor) -> Tensor:
        """``x Wᵀ`` for the x that dropout left; `result` is the product for all of x."""
        return F.linear(x, weights.weight.to(x.dtype))


class DoraLinear(DoraLayer, lora.Linear):
    """PEFT's LoRA layer on an `nn.Linear` or `Conv1D`, with DoRA adapters that run on this package.

    With one active DoRA adapter and plain modules the whole layer is one function, so the gradient of x is accumulated
    once. Otherwise PEFT's own forward calls the modules and `DoraLinearVariant`.
    """

    stock = lora.Linear
    variants = {variants.DoraLinearVariant: DoraLinearVariant}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (args or kwargs):
            if torch.compiler.is_compiling():
                y = _traced(self, x)
                if y is not None:
                    return y
            else:
                plan, usual = ready(self, x)
                if usual:
                    g, b_is_zero = plan.scale(self.training)
                    return formula.linear(x, plan.weights, g, plan.scaling, b_is_zero=b_is_zero)
                if plan is not None:
                    return run_layer(x, plan.weights, plan.form, plan.cache, self.training)
        # Not super(): a wrapper may call this after the layer's class has been restored.
        return lora.Linear.forward(self, x, *args, **kwargs)


def _single_function(layer: Any) -> tuple[str, Weights] | None:
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


def _accepts(x: Tensor, weight: Tensor, in_features: int) -> bool:
    """True if PEFT's base product would accept x without a cast."""
    if (type(x) is not Tensor and type(x) is not nn.Parameter) or x.device != weight.device:
        return False
    if x.dim() == 0 or x.shape[-1] != in_features:  # PEFT's own error is clearer
        return False
    if torch.is_autocast_enabled(x.device.type):
        return torch.float64 not in (x.dtype, weight.dtype)  # autocast does not change float64
    return x.dtype == weight.dtype


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
    else:
        g = m / kept_divisor(
                cache.slot, weight.detach(), a.detach(), b.detach(), m.detach(), scaling, layer.training
            )
    if g.dtype != torch.float64:
        g = g.to(torch.float32)
    return formula.linear(x, (weight, a, b, m, base.bias), g, scaling)  # type: ignore[arg-type]


class Plan:
    """Everything that a call of a patched layer as one function needs.

    It is valid as long as nothing it was made from changes. Making a plan runs all checks (`_single_function`). It
    records what may change: dictionaries of modules and hooks, which are compared as wholes, and parameters with their
    addresses and shapes.
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
        return (
            not any(self.hooks)
            and own["_active_adapter"] == self.active
            and not own["_disable_adapters"]
            and not own["merged_adapters"]
            and own["_modules"] == self.modules
            and self.owners == self.owned
            and (type(base), type(lora_A), type(lora_B), type(magnitude), type(dropout)) == self.kinds
            and "forward" not in base.__dict__
            and "forward" not in lora_A.__dict__
            and "forward" not in lora_B.__dict__
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
    if state is None:
        return None, False
    plan: Plan | None = state.plan
    if plan is None or not plan.holds(layer):
        found = None if transformed() else _single_function(layer)
        plan = state.plan = None if found is None else Plan(layer, *found)
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
        not (usual or _accepts(x, weight, layer.in_features))
        or (layer.training and plan.drops is not None and plan.drops["p"] != 0.0)
        or (state.strengths and state.strengths.get(plan.adapter, 1.0) != 1.0)
    ):
        return None, False
    if getattr(peft_dora, "ENABLE_DORA_CACHING", False) or plan.magnitude.__dict__.get("_dora_cache"):
        show_caching(plan.magnitude, plan.cache)
    if weight.requires_grad and plan.weights.weight is not weight:  # a view made without autograd has no history
        plan.weights = plan.weights._replace(weight=weight.t())
    return plan, usual and plan.on_cpu


def unsupported(layer: Any) -> str | None:
    """Return the reason why a `lora.Linear` cannot be patched, or None if it can."""
    base = layer.base_layer
    if not isinstance(base, nn.Linear) and not is_conv1d(base):
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}, not an nn.Linear or Conv1D"
    if bool(layer.fan_in_fan_out) != is_conv1d(base):
        return f"fan_in_fan_out={layer.fan_in_fan_out} does not fit its base layer, a {type(base).__name__}"
    return None


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
