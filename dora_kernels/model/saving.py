"""Warn if ``save_pretrained`` would write a model that ``from_pretrained`` cannot read completely.

transformers and diffusers load only the layers that a class itself creates. They do not know the tensors of an adapted
layer, ``<layer>.base_layer.weight`` and the adapter's, and leave the layer with random weights.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from dora_kernels.model.places import submodule, unwrapped
from dora_kernels.modules import AdaptedLayer

_NAME = "save_pretrained"


def watch_saving(model: nn.Module, names: Iterable[str]) -> None:
    """Make ``save_pretrained`` of all modules that contain the layers `names` warn, on these objects only."""
    prefixes = {".".join(parts[:depth]) for parts in (name.split(".") for name in names) for depth in range(len(parts))}
    for module in (submodule(model, prefix) for prefix in prefixes):
        if callable(getattr(type(module), _NAME, None)) and _NAME not in vars(module):
            vars(module)[_NAME] = _Warning(module)


def unwatch_saving(model: nn.Module) -> None:
    """Remove the warnings of `watch_saving`."""
    for module in unwrapped(model).modules():
        if isinstance(vars(module).get(_NAME), _Warning):
            del vars(module)[_NAME]


class _Warning:
    """A module's ``save_pretrained`` with a warning before it.

    It holds no reference to the module and is copied with it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def _original(self) -> Any:
        module = self._module()
        return getattr(type(module), _NAME).__get__(module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._original)

    def __call__(self, *args: Any, **options: Any) -> Any:
        module = self._module()
        if module is not None and any(isinstance(part, AdaptedLayer) for part in module.modules()):
            warnings.warn(
                f"save_pretrained writes {type(module).__name__}'s adapted layers under names that from_pretrained "
                "does not know: it gives them random weights. Save the adapter with save_adapter(model, path), for "
                "load_adapter(path, model); or call merge_all(model) before save_pretrained to save the merged model",
                stacklevel=2,
            )
        return self._original(*args, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Warning, (self._module(),)
