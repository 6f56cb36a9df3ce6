"""Check once per model forward which kept norms are still valid: in evaluation on a GPU, and of split layers.

Without this each layer asks the device itself: two launches per layer and token (`kernels.KeptNorm`). Here one launch
and one read by the host serve all layers (`kernels.Watch`); the answers hold until the forward ends. A write in the
middle of a model's forward takes effect in the next one. While a CUDA graph is captured the host cannot wait, so each
layer asks the device itself.

On a CPU each layer checks for itself: A and B are compared right before their products read them, and are then in the
cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dora_kernels.engine.collectives import all_true
from dora_kernels.engine.dispatch import kernels, norm_backend
from dora_kernels.engine.fingerprints import sample
from dora_kernels.engine.model_norms import KeptNorm
from dora_kernels.engine.norm import Norm, compute_norm
from dora_kernels.engine.norm_cache import NormCache, answers, device_answers, norm_reuse


class AskOnce:
    """Forward hooks for every module that contains all adapted layers of a model.

    The outermost module called does the check.
    """

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._watch: Any = None
        self._keys: list[tuple[Any, ...]] = []
        self._norms: list[Norm] = []
        self._split: list[Any] | None = None
        self._in_order = threading.Lock()

    def __reduce__(self) -> tuple[Callable[..., AskOnce], tuple[Any, ...]]:
        return type(self), (self._layers,)  # copies and pickles start without a watch

    def before(self, module: nn.Module, args: Any) -> None:
        """Do the check, unless a module around this one has done it."""
        if torch.compiler.is_compiling() or answers.norms is not None:
            return
        norms = self._agree(module.training)
        if not module.training and self._may_ask():
            norms.update(self._ask())
        if norms:
            answers.asking, answers.norms = module, norms

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Drop the answers at the end of the forward they were made for."""
        if not torch.compiler.is_compiling() and answers.asking is module:
            answers.asking = answers.norms = None

    @torch.no_grad()
    def _agree(self, training: bool) -> dict[NormCache, Norm]:
        """The norms of layers that are split over a process group, in training too and on any device.

        All processes have to compute such a norm if one of them has to. They exchange that once per forward for all
        layers, not at each layer's call.
        """
        if self._split is None:
            self._split = [layer for layer in self._layers if getattr(layer, "norm_group", None) is not None]
        kept = [each for layer in self._split for each in layer.kept_norms()]
        kept = [each for each in kept if each.form.group is not None and each.cache.frozen is None]
        if not kept:
            return {}
        norms = [each.cache.known(each.weights, each.form, training) for each in kept]
        first = kept[0]
        fresh = all_true(first.form.group, [norm is not None for norm in norms], first.weights.weight.device)
        for i, (each, kept_norm) in enumerate(zip(kept, fresh)):
            if not kept_norm:
                backend = norm_backend(each.backend, each.weights.weight)
                norms[i] = each.cache.renewed(each.weights, each.form, training, backend, each.compute)
        return {each.cache: norm for each, norm in zip(kept, norms) if norm is not None}

    def _may_ask(self) -> bool:
        """True if it is worth looking at all layers: the first one's norm is the kernels'."""
        first = self._layers[0]
        return norm_reuse() and (getattr(first, "backend", "") == "triton" or next(first.parameters()).is_cuda)

    @torch.no_grad()
    def _ask(self) -> dict[NormCache, Norm]:
        kept = [each for layer in self._layers for each in layer.kept_norms() if _is_asked(each)]
        if not kept:
            return {}
        groups = [_watched(each) for each in kept]
        stream = torch.cuda.current_stream().cuda_stream if kept[0].weights.weight.is_cuda else 0
        keys = [
            (id(each.cache), each.cache.generation, each.weights.weight._version, each.form, stream) for each in kept
        ]
        with self._in_order, torch.inference_mode(False):
            try:
                norms = self._renewed(kept, groups, keys)
            except BaseException:  # the watch has noted writes whose norms are not there
                self._watch = None
                raise
            self._keys, self._norms = keys, norms
        return {each.cache: norm for each, norm in zip(kept, norms)}


    def _renewed(
        self, kept: list[KeptNorm], groups: list[tuple[Tensor, ...]], keys: list[tuple[Any, ...]]
    ) -> list[Norm]:
        """The norms of all, those of what has changed computed anew."""
        if self._watch is None or not self._watch.holds(groups):
            self._watch, self._keys = kernels().Watch(groups), []
        changed = set(self._watch.changed())
        if len(keys) == len(self._keys):
            changed |= {i for i, (now, then) in enumerate(zip(keys, self._keys)) if now != then}
            norms = list(self._norms)  # another thread may still use the old list
        else:
            changed, norms = set(range(len(keys))), [Norm(each.weights.magnitude) for each in kept]
        for i in changed:
            norms[i] = compute_norm(kept[i].weights, kept[i].form, "triton")
            norms[i].tensors = kept[i].weights[:3]
        return norms


def _is_asked(kept: KeptNorm) -> bool:
    """True if the device can tell whether this norm is still valid."""
    weight = kept.weights.weight
    if kept.compute is not None or kept.form.group is not None:
        return False
    if kept.cache.frozen is not None or any(t.is_inference() for t in kept.weights[:3]):
        return False
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return device_answers(weight, norm_backend(kept.backend, weight))


def _watched(kept: KeptNorm) -> tuple[Tensor, ...]:
    weight, lora_A, lora_B, _, _ = kept.weights
    return lora_A.detach(), lora_B.detach(), sample(weight.detach())


def around(model: nn.Module, layers: dict[str, Any]) -> list[nn.Module]:
    """The modules of `model` that contain all of `layers`, by name; none if there are no layers."""
    return [
        module
        for name, module in (model.named_modules() if layers else ())
        if name not in layers and all(not name or one.startswith(f"{name}.") for one in layers)
    ]


def ask_once(model: nn.Module) -> Callable[[], None]:
    """Make `model` check its norms once in each forward. Returns a function that removes the hooks.

    The layers are the modules that have a `kept_norms` method.
    """
    layers = {name: layer for name, layer in model.named_modules() if hasattr(type(layer), "kept_norms")}
    hooks = AskOnce(list(layers.values()))
    handles = []
    for module in around(model, layers):
        if not any(isinstance(getattr(hook, "__self__", None), AskOnce) for hook in module._forward_hooks.values()):
            handles.append(module.register_forward_pre_hook(hooks.before))
            handles.append(module.register_forward_hook(hooks.after, always_call=True))

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo
