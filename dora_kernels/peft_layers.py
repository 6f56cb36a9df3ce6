"""PEFT's LoRA layer on this package: the classes that `patch_peft` puts in the place of PEFT's own.

All are subclasses of PEFT's, exchanged through ``__class__``, so that state dicts, deepcopy, pickle and isinstance are
untouched. PEFT's contract, as of 0.16 to 0.21, is described in docs/integration.md.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from dora_kernels.functional import layer_scale, run_layer
from dora_kernels.norm_cache import NormCache

# The instance attribute that says "on": {adapter name: AdapterCache}. Deleting it turns a layer off, also where some
# wrapper still holds the patched forward.
SWITCH = "_dora_kernels_norms"

_PLAIN = (nn.Parameter, Tensor)


class Weights(NamedTuple):
    """A DoRA adapter's plain tensors, the base weight as ``[out_features, in_features]``."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    bias: Tensor | None


class DoraLinearVariant(variants.DoraLinearVariant):
    """PEFT's DoRA variant with this package's norm: every module is called once, as hooks and wrappers need."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's ``result + (g - 1) * base + g * scaling * B A x``, active dropout on x in both terms."""
        weights = read_weights(module, active_adapter)
        if weights is None:
            return variants.DoraLinearVariant.forward(
                module, active_adapter=active_adapter, x=x, result=result, **kwargs
            )
        scaling = module.scaling[active_adapter]
        g = layer_scale(
            weights.weight, weights.lora_A, weights.lora_B, weights.magnitude,
            scaling, "out", True, "auto", norm_cache(module, active_adapter), module.training,
        )  # fmt: skip
        if module.training and _dropout_active(module, active_adapter):
            x = module.lora_dropout[active_adapter](x)
            base = F.linear(x, weights.weight.to(x.dtype))
        else:
            base = result if weights.bias is None else result - weights.bias
        low = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        return result + (g - 1) * base + (g * scaling) * low


class DoraLinear(lora.Linear):
    """PEFT's LoRA layer on an `nn.Linear` or `Conv1D` whose DoRA adapters run on this package.

    With one active DoRA adapter and plain modules the whole layer is one function, so that the gradient of x is one
    accumulation; otherwise PEFT's own forward calls the modules, and `DoraLinearVariant`.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else _single_dora_adapter(self)
        if name is not None and not (self.training and _dropout_active(self, name)):
            weights = read_weights(self, name)
            if weights is not None and _fusable(self, name, x, weights.weight):
                return run_layer(
                    x, *weights, self.scaling[name], "out", True, None, "auto", norm_cache(self, name), self.training
                )
        # Not super(): a wrapper may call this after the layer's class has been restored.
        return lora.Linear.forward(self, x, *args, **kwargs)

    def resolve_lora_variant(self, **kwargs: Any) -> Any:
        """PEFT's choice for a new adapter, with its DoRA variant replaced."""
        return patched_variant(super().resolve_lora_variant(**kwargs))

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's merge; it writes the base weight through ``.data``, which no tensor version shows."""
        _forget_norms(self)
        lora.Linear.merge(self, *args, **kwargs)

    def unmerge(self) -> None:
        """PEFT's unmerge."""
        lora.Linear.unmerge(self)
        _forget_norms(self)


class LoraModel(lora.LoraModel):
    """PEFT's LoRA tuner; layers that a later adapter creates are patched as well."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, then the patch."""
        super().inject_adapter(model, *args, **kwargs)
        patch_layers(model)


def patch_layers(model: nn.Module) -> None:
    """Patch every layer of `model` that can be, DoRA adapters or not: one may be added later."""
    for layer in model.modules():
        if type(layer) is lora.Linear and unsupported(layer) is None:
            layer.__class__ = DoraLinear
        if type(layer) is DoraLinear and SWITCH not in vars(layer):
            for name, variant in layer.lora_variant.items():
                layer.lora_variant[name] = patched_variant(variant)
            setattr(layer, SWITCH, {})


def restore_layers(model: nn.Module) -> None:
    """Undo `patch_layers`."""
    for layer in model.modules():
        if isinstance(layer, DoraLinear):
            if type(layer) is DoraLinear:  # a class that FSDP2 derived from it stays, with the switch off
                layer.__class__ = lora.Linear
            for name, variant in layer.lora_variant.items():
                if type(variant) is DoraLinearVariant:
                    layer.lora_variant[name] = variants.DoraLinearVariant()
            layer.__dict__.pop(SWITCH, None)


def patched_variant(variant: Any) -> Any:
    """This package's variant for PEFT's DoRA variant, anything else as it is."""
    return DoraLinearVariant() if type(variant) is variants.DoraLinearVariant else variant


def unsupported(layer: Any) -> str | None:
    """Why `layer`, one of PEFT's LoRA layers, cannot be patched; None where it can."""
    if type(layer) not in (lora.Linear, DoraLinear):
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        return f"{kind}: only LoRA layers on nn.Linear and Conv1D are supported"
    base = layer.base_layer
    if type(base) is not nn.Linear and not _is_conv1d(base):
        return f"its base layer is a {type(base).__module__}.{type(base).__name__}, not a plain nn.Linear or Conv1D"
    if bool(layer.fan_in_fan_out) != _is_conv1d(base):
        return f"fan_in_fan_out={layer.fan_in_fan_out} does not fit its base layer, a {type(base).__name__}"
    if type(layer) is lora.Linear and "forward" in vars(layer):
        return "it has a forward of its own (a hook of accelerate, for example): patch before that is installed"
    return None


def out_of_reach(layer: Any) -> str | None:
    """Why the calls of `layer` do not run on this package as things stand; None where they do."""
    reason = unsupported(layer)
    if reason is not None:
        return reason
    if type(layer) is not DoraLinear or SWITCH not in vars(layer):
        return "not patched: restored, or made after the patch"
    if all(read_weights(layer, name) is None for name in dora_adapters(layer)):
        return (
            "its weights cannot be read outside their modules' calls (parametrized, wrapped, sharded, offloaded, "
            "on meta, a hook on the magnitude), or its scaling is a tensor"
        )
    return None


def dora_adapters(layer: nn.Module) -> list[str]:
    """Names of the adapters of `layer` with a magnitude."""
    return list(getattr(layer, "lora_magnitude_vector", None) or ())


class AdapterCache(NormCache):
    """A layer's kept norm for one adapter, and what was checked of its modules and tensors last."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: tuple[Any, ...] | None = None


def norm_cache(layer: Any, adapter: str) -> AdapterCache:
    """The layer's kept norm for one adapter."""
    caches: dict[str, AdapterCache] = getattr(layer, SWITCH)
    cache = caches.get(adapter)
    if cache is None:
        for name in [name for name in caches if name not in layer.lora_A]:  # deleted since
            caches.pop(name, None)
        cache = caches.setdefault(adapter, AdapterCache())
    return cache


def read_weights(layer: Any, adapter: str) -> Weights | None:
    """The adapter's tensors, if they may be read outside their modules' calls; None if not, or if it is switched off.

    Not under wrappers that leave them empty, flattened, sharded or elsewhere: FSDP1, DeepSpeed ZeRO-3, offloading.
    """
    compiling = torch.compiler.is_compiling()
    if SWITCH not in vars(layer) or isinstance(layer.scaling[adapter], Tensor) or (not compiling and _transformed()):
        return None
    # Straight from the dictionaries, and spelled out: nn.Module's attribute look-up costs more than all the checks.
    children = layer._modules
    base = children["base_layer"]
    lora_A = children["lora_A"]._modules[adapter]
    lora_B = children["lora_B"]._modules[adapter]
    magnitude = children["lora_magnitude_vector"]._modules[adapter]
    if _hooked(magnitude):  # nothing here calls it
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    a, b = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    m = magnitude._parameters.get("weight")
    # Not sharded, not gathered away, not on meta.
    if not (type(weight) in _PLAIN and type(a) in _PLAIN and type(b) in _PLAIN and type(m) in _PLAIN):
        return None
    weights = Weights(weight, a, b, m, bias)
    if compiling:
        return _as_rows(layer, weights) if _fit(layer, base, lora_A, lora_B, magnitude, weights) else None
    # Looked at once: what has the same type, address and shape has not changed its device either.
    addresses = weight.data_ptr(), a.data_ptr(), b.data_ptr(), m.data_ptr()
    shapes = weight.shape, a.shape, b.shape
    kinds = type(base), type(lora_A), type(lora_B), type(magnitude), lora_B._parameters.get("bias")
    seen = (base, lora_A, lora_B, magnitude, *weights, *kinds)
    cache = norm_cache(layer, adapter)
    known = cache.checked
    if known is None or known[1:] != (addresses, shapes) or not all(map(operator.is_, known[0], seen)):
        if not (all(addresses) and _fit(layer, base, lora_A, lora_B, magnitude, weights)):
            return None
        cache.checked = seen, addresses, shapes
    return _as_rows(layer, weights)


def _as_rows(layer: Any, weights: Weights) -> Weights:
    """Conv1D's weight is stored transposed."""
    return weights._replace(weight=weights.weight.t()) if layer.fan_in_fan_out else weights


def _fit(layer: Any, base: Any, lora_A: Any, lora_B: Any, magnitude: Any, weights: Weights) -> bool:
    """Whether the modules are plain, and their tensors of fitting shapes on one device."""
    if not (type(lora_A) is type(lora_B) is nn.Linear and (type(base) is nn.Linear or _is_conv1d(base))):
        return False
    # A pruned bias is no parameter any more.
    if type(magnitude) is not DoraLinearLayer or lora_B.bias is not None or "bias" not in base._parameters:
        return False
    weight, a, b, m, _ = weights
    expected = (layer.out_features, layer.in_features)
    if tuple(weight.shape) != (expected[::-1] if layer.fan_in_fan_out else expected):
        return False
    shapes = a.shape[1:] == expected[1:] and b.shape[:1] == expected[:1] and a.dim() == b.dim() == 2 and m.dim() == 1
    return shapes and a.device == b.device == m.device == weight.device


def _transformed() -> bool:
    """Whether `torch.func`, forward-mode AD or `torch.jit.trace` is at work: they need plain operations."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _single_dora_adapter(layer: Any) -> str | None:
    """The one active adapter, if it is a DoRA adapter of this package and nothing is merged or disabled."""
    if layer.disable_adapters or layer.merged_adapters:
        return None
    factors = layer._modules["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in factors]
    if len(active) != 1 or type(layer.lora_variant.get(active[0])) is not DoraLinearVariant:
        return None
    return active[0]


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
    dropout = children["lora_dropout"]._modules[adapter]
    if type(dropout) is not nn.Identity and type(dropout) is not nn.Dropout:
        return False
    factors = children["lora_A"]._modules[adapter], children["lora_B"]._modules[adapter]
    return not _hooked(children["base_layer"], *factors, dropout)


def _dropout_active(layer: Any, adapter: str) -> bool:
    """As PEFT decides it in training: any dropout module that is not an identity."""
    dropout = layer._modules["lora_dropout"]._modules[adapter]
    return not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) != 0.0


def _hooked(*modules: Any) -> bool:
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False


def _is_conv1d(module: Any) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _forget_norms(layer: Any) -> None:
    for cache in vars(layer).get(SWITCH, {}).values():
        cache.invalidate()
