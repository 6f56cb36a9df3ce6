"""The state that a patched layer holds in addition to PEFT's, and access to its tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora as peft_dora
from torch import Tensor, nn

from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine.formula import transformed
from dora_kernels.engine.layer import layer_norm
from dora_kernels.engine.norm_cache import NormCache
from dora_kernels.peft import shards

# The instance attribute that holds a patched layer's `Switch`. Deleting it turns the patch off, even if some wrapper
# still holds the patched forward.
SWITCH = "_dora_kernels"

_PLAIN = (nn.Parameter, Tensor)


class AdapterCache(NormCache):
    """A layer's kept norm for one adapter, and the result of the last check of its modules and tensors."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.checked: tuple[Any, ...] | None = None
        self.constants: tuple[Any, ...] | None = None
        """|W|² and bias of a base layer that shows its weight only through its forward."""
        self.returns: tuple[Any, torch.dtype] | None = None
        """The dtype that a quantised base layer returns, for an input's dtype and autocast's."""
        self.record: Any = None
        """Where it is noted that the model's layers are called (`calls.Record`)."""

    def renewed(self, *args: Any) -> Any:
        """`NormCache`'s, which a first call on this package asks for; so it is noted."""
        if self.record is not None:
            self.record.called = True
        return super().renewed(*args)

    def invalidate(self) -> None:
        """Forget everything."""
        super().invalidate()
        self.checked = None
        self.constants = None


class Options(NamedTuple):
    """The options of `patch_peft`."""

    dropout: str = "peft"
    """"peft": active dropout also drops in the base product; "lora": in the low-rank branch only."""
    forward: str = "composed"
    """"merged": linear layers multiply by one merged weight (`engine.merged`)."""
    keep_unmerged: bool = True
    """True if merging keeps a copy of the unmerged weight on the CPU."""


class Switch(dict[str, AdapterCache]):
    """A patched layer's kept norms by adapter, and its settings."""

    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.options = options or Options()
        self.name = ""
        """The layer's name in its model, for messages, where the layer cannot be told by its class."""
        self.group: Any = None
        """The process group over which a parameter's experts, or parts of each, are spread."""
        self.cut: Any = None
        """How each expert is cut, if it is (`shards.Cut`)."""
        self.strengths: dict[str, float] = {}
        self.exact_norms: set[str] = set()
        """Adapters of a grouped convolution whose norm is the exact one."""
        self.unmerged: Any = None
        """The base weight before merging, while something is merged."""
        self.unmerging = False
        self.record: Any = None
        self.trained_elsewhere = False
        """True if B has received a gradient while the layer had never been called (`calls`)."""
        self.by_modules = False
        """True once a call has run PEFT's modules, because the weights could not be read."""
        self.plan: Any = None
        """A linear layer's plan from its last call (`plan.Plan`)."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this layer's own tensors only."""
        return {**vars(self), "plan": None, "group": None, "record": None}


def switch(layer: nn.Module) -> Switch | None:
    """Return the layer's state, or None if it is switched off."""
    return vars(layer).get(SWITCH)


def settings(layer: nn.Module) -> Switch:
    """Return the layer's state, or the defaults if another thread has restored the layer since its call began."""
    state = switch(layer)
    return Switch() if state is None else state


def norm_cache(layer: Any, adapter: str) -> AdapterCache:
    """Return the layer's kept norm for one adapter."""
    caches = settings(layer)
    cache = caches.get(adapter)
    if cache is None:
        cache = caches.setdefault(adapter, AdapterCache(Form(), "auto", caches.options.forward == "merged"))
        cache.record = caches.record
    return cache


def forget_norms(layer: Any) -> None:
    """Forget the layer's norms. Call it after writing the base weight in a way that changes no tensor version."""
    for cache in (switch(layer) or {}).values():
        cache.invalidate()


def dora_adapters(layer: nn.Module) -> list[str]:
    """Names of the adapters of `layer` that have a magnitude."""
    return list(getattr(layer, "lora_magnitude_vector", None) or ())


def strength(layer: nn.Module, adapter: str) -> float:
    """The adapter's strength, as set by `dora_kernels.set_dora_strength`."""
    state = switch(layer)
    return 1.0 if state is None else state.strengths.get(adapter, 1.0)


def strengths_of(model: nn.Module) -> list[tuple[str, str, Any, dict[str, float]]]:
    """The DoRA adapters of the patched layers, as ``(layer name, adapter name, layer, dict of its strengths)``."""
    return [
        (name, one, layer, state.strengths)
        for name, layer in model.named_modules()
        if (state := switch(layer)) is not None
        for one in dora_adapters(layer)
    ]


def interpolated(layer: Any, adapter: str, base: Tensor, dora: Tensor) -> Tensor:
    """``base + strength * (dora - base)``."""
    k = strength(layer, adapter)
    if k == 1.0:
        return dora
    # In training the adapter stays in the graph, so that its gradients exist.
    if k == 0.0 and not (layer.training and torch.is_grad_enabled()):
        return base
    return torch.lerp(base.to(dora.dtype), dora, k)


def read_modules(layer: Any, adapter: str, fit: Callable[[Any, str, Weights], bool]) -> Weights | None:
    """`read`, of a layer whose base layer and factors are modules with a weight."""
    children = layer._modules
    base = children["base_layer"]
    lora_A, lora_B = children["lora_A"]._modules[adapter], children["lora_B"]._modules[adapter]
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    a, b = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    identity = base, lora_A, lora_B, type(base), type(lora_A), type(lora_B), lora_B._parameters.get("bias")
    return read(layer, adapter, weight, a, b, bias, identity, fit)


def read(
    layer: Any,
    adapter: str,
    weight: Any,
    lora_A: Any,
    lora_B: Any,
    bias: Any,
    identity: tuple[Any, ...],
    fit: Callable[[Any, str, Weights], bool],
) -> Weights | None:
    """Return the adapter's tensors as PEFT stores them, or None if they cannot be read outside their modules' calls.

    Under tensor parallelism they are this process's parts.

    That is the case for layers that are switched off, and under wrappers that leave the tensors empty, flattened,
    sharded or on another device (FSDP1, DeepSpeed ZeRO-3, offloading).

    Args:
        identity: objects whose replacement, like that of a tensor, makes `fit` run again.
        fit: checks the tensors and the modules. It runs if any of them has been replaced since the last call.
    """
    compiling = torch.compiler.is_compiling()
    if SWITCH not in vars(layer) or isinstance(layer.scaling[adapter], Tensor) or (not compiling and transformed()):
        return None
    # Straight from the dictionaries: nn.Module's attribute lookup costs more than all the checks.
    magnitude = layer._modules["lora_magnitude_vector"]._modules[adapter]
    if hooked(magnitude):  # nothing here calls the module, so a hook on it would not run
        return None
    m = magnitude._parameters.get("weight")
    if type(weight) not in _PLAIN and shards.split_of(layer) is not None:
        weight, lora_A, lora_B, m, bias = map(shards.part, (weight, lora_A, lora_B, m, bias))
    # Not sharded, not gathered away, not on meta.
    if not (type(weight) in _PLAIN and type(lora_A) in _PLAIN and type(lora_B) in _PLAIN and type(m) in _PLAIN):
        return None
    weights = Weights(weight, lora_A, lora_B, m, bias)
    if compiling:
        return weights if _fit(layer, adapter, weights, fit) else None
    # Checked only once: a tensor with the same type, address and shape is on the same device.
    addresses = weight.data_ptr(), lora_A.data_ptr(), lora_B.data_ptr(), m.data_ptr()
    shapes = weight.shape, lora_A.shape, lora_B.shape
    seen = (magnitude, type(magnitude), *weights, *identity)
    cache = norm_cache(layer, adapter)
    known = cache.checked
    if known is None or known[1:] != (addresses, shapes) or not all(map(operator.is_, known[0], seen)):
        if not (all(addresses) and _fit(layer, adapter, weights, fit)):
            return None
        if all(t.grad_fn is None for t in (weight, lora_A, lora_B, m)):  # of computed ones the graph would be kept
            cache.checked = seen, addresses, shapes
    if magnitude.__dict__.get("_dora_cache") or getattr(peft_dora, "ENABLE_DORA_CACHING", False):
        show_caching(magnitude, cache)
    return weights


def show_caching(magnitude: Any, cache: AdapterCache) -> None:
    """Put the kept norm where PEFT's ``DoraCaching`` expects it, if that is on; else do nothing."""
    if peft_dora.ENABLE_DORA_CACHING and not magnitude.training:
        magnitude._cache_store(SWITCH, cache)
    else:
        magnitude._cache_clear()


def _fit(layer: Any, adapter: str, weights: Weights, fit: Callable[[Any, str, Weights], bool]) -> bool:
    weight, a, b, m, _ = weights
    return a.device == b.device == m.device == weight.device and fit(layer, adapter, weights)


def hooked(*modules: Any) -> bool:
    """True if one of `modules` has a hook, or a forward that somebody has replaced (but for tensor parallelism)."""
    for module in modules:
        own = module.__dict__
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or ("forward" in own and not (shards.is_parallel(own["forward"]) or _only_moves_its_input(module)))
        ):
            return True
    return False


def _only_moves_its_input(module: Any) -> bool:
    """True for the forward that ms-swift gives lora_A and lora_B: a plain call, on the device of the weight.

    Tensors on several devices are not read in any case, so here it moves nothing.
    """
    function = getattr(module.__dict__["forward"], "__func__", None)
    named = (getattr(function, "__module__", ""), getattr(function, "__name__", ""))
    origin = getattr(module.__dict__.get("forward_origin"), "__func__", None)
    return named == ("swift.tuners.peft", "keep_device_forward") and origin is nn.Linear.forward


def divisor(layer: Any, adapter: str, weights: Weights, compute: Callable[[], Tensor] | None = None) -> Tensor:
    """The divisor of the magnitude: the linear problem's norm, or that of `compute`, with infinity in place of 0."""
    form, cache = shards.form_of(layer, adapter), norm_cache(layer, adapter)
    return layer_norm(weights, form, cache, layer.training, "auto", compute).divisor


def scale(layer: Any, adapter: str, magnitude: Tensor, divisor: Tensor) -> Tensor:
    """``g = magnitude / ||V||`` as a differentiable vector."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        norm_cache(layer, adapter).unnoticed_backward = True  # autograd runs the backward, without note_backward
    return magnitude / divisor


def active_dropout(layer: Any, adapter: str) -> bool:
    """True in training with a dropout module that is not an identity, as PEFT decides it."""
    if not layer.training:
        return False
    dropout = layer._modules["lora_dropout"]._modules[adapter]
    return not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) != 0.0
