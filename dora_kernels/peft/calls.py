"""Whether the layers of a patched model are called at all.

Some modules read the weight of a layer inside them in every path, `nn.MultiheadAttention` that of its ``out_proj`` for
one. Their source tells, so this is known at once.

Kernels of other packages (axolotl's `lora_qkv_kernel`, for one) and replaced forwards of the modules around a layer
read its weights and never call it. Then nothing of this package runs, whatever the layer's class is. The proof is a
gradient of B without a call. It is looked for in the model's first training step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.engine.dispatch import warn_once
from dora_kernels.engine.model_forward import around
from dora_kernels.model.weight_readers import WeightReaders
from dora_kernels.peft.combine import factors
from dora_kernels.peft.state import dora_adapters, switch

REASON = "another kernel or module computes it: B has received a gradient, and the layer's forward was never called"


def called(layer: nn.Module) -> bool:
    """True if a norm of the layer has been asked for, as each call on this package does."""
    caches = (switch(layer) or {}).values()
    return any(cache.computed or cache.reused or cache.asked for cache in caches)


def bypassed(layer: nn.Module) -> bool:
    """True if the layer takes part in training and is never called."""
    state = switch(layer)
    return state is not None and state.trained_elsewhere and not called(layer)


def read_by_others(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Of `layers`, by name, those that the modules around them read and never call, each with the reason."""
    readers, modules, found = WeightReaders(), dict(model.named_modules()), {}
    for name in layers:
        around = [modules[name.rsplit(".", depth)[0]] for depth in range(1, name.count(".") + 1)]
        reader = readers.never_calling([*around, model], name)
        if reader is not None:
            found[name] = f"{type(reader).__name__} reads its weight and never calls it"
    return found


def warn_of(read: dict[str, str], model: nn.Module) -> None:
    """Warn, once, of the layers of `read_by_others`."""
    if read:
        name, reason = next(iter(read.items()))
        others = f", and {len(read) - 1} more" if len(read) > 1 else ""
        warn_once(f"DoRA layers of {type(model).__name__} whose adapter has no effect, with or without dora_kernels: "
                  f"{name} ({reason}){others}; leave them out of target_modules")  # fmt: skip


class Record:
    """What is known of one model's calls, shared by its layers. It does not keep the model."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        self.name, self.count = type(model).__name__, len(layers)
        self.ran = self.called = False
        """Whether its forward has been seen to run, and whether any of its layers was called."""
        for layer in layers.values():
            state: Any = switch(layer)
            state.record = self
            for cache in state.values():
                cache.record = self

    def warning(self) -> str | None:
        """One line, if none of the model's layers has ever been called."""
        if self.called or not self.count:
            return None
        cause = ": other code computes them, and not dora_kernels" if self.ran else ", nor was the model"
        return f"WARNING: none of the {self.count} patched DoRA layers of {self.name} was ever called{cause}"


class FirstStep:
    """Forward hooks of a model that remove themselves after its first forward in training, and those on gradients."""

    def __init__(self, record: Record, layers: dict[str, nn.Module]) -> None:
        self._record, self._layers = record, layers
        self._handles: list[Any] = []

    def watch(self, modules: list[nn.Module]) -> None:
        """Hook into these modules: not all of them need be called."""
        self._handles = [module.register_forward_hook(self.after) for module in modules]

    def remove(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Look which layers were called. The others are watched for a gradient."""
        if torch.compiler.is_compiling():
            return
        record = self._record
        record.ran = True
        record.called = record.called or any(map(called, self._layers.values()))
        if module.training and torch.is_grad_enabled():
            self.remove()
            for name, layer in self._layers.items():
                if not called(layer):
                    self._handles += _watch_gradient(name, layer, record.name)


def _dora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: one for name, one in model.named_modules() if switch(one) is not None and dora_adapters(one)}


def _watch_gradient(name: str, layer: Any, model: str) -> list[Any]:
    own = weakref.ref(layer)

    def note(parameter: Tensor) -> None:
        while handles:
            handles.pop().remove()
        layer = own()
        state = None if layer is None else switch(layer)
        if layer is None or state is None or state.by_modules or called(layer):
            return
        state.trained_elsewhere = True
        warn_once(
            f"DoRA layers of {model} train and are never called, the first of them {name}: other kernels compute them, "
            "not dora_kernels; the `skipped` of the patch's handle lists them"
        )

    tensors = [(factors(layer, adapter) or (None, None))[1] for adapter in dora_adapters(layer)]
    of_autograd = [b for b in tensors if isinstance(b, nn.Parameter) and b.requires_grad]
    handles = [b.register_post_accumulate_grad_hook(note) for b in of_autograd]
    return list(handles)


def watch(model: nn.Module) -> tuple[Record, Callable[[], None]]:
    """Watch the model's first training step. Returns what will be known of it, and a function that ends the watch."""
    layers = _dora_layers(model)
    record = Record(model, layers)
    first = FirstStep(record, layers)
    first.watch(around(model, layers))
    return record, first.remove
