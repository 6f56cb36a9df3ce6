"""The kept norms of all layers of a model: find, forget or freeze them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dora_kernels.core.problem import Form, Weights
from dora_kernels.core.scale import quotient
from dora_kernels.engine.dispatch import norm_backend
from dora_kernels.engine.norm import Norm, compute_norm
from dora_kernels.engine.norm_cache import NormCache


class KeptNorm(NamedTuple):
    """A norm that a layer keeps. A layer's `kept_norms` method yields these."""

    cache: NormCache
    weights: Weights
    form: Form
    backend: str
    compute: Callable[[], Tensor] | None = None
    """Computes the norm if it is not that of a dense matrix ``W + s B A``."""


def kept_norms(module: nn.Module) -> Iterator[KeptNorm]:
    """Yield the kept norms of `module` and its children."""
    for child in module.modules():
        own = getattr(type(child), "kept_norms", None)
        if own is not None:
            yield from own(child)


def caches(module: nn.Module) -> Iterator[NormCache]:
    """Yield every norm cache in `module` and its children."""
    for child in module.modules():
        for value in vars(child).values():
            for cache in value.values() if isinstance(value, dict) else (value,):
                if isinstance(cache, NormCache):
                    yield cache


def invalidate(module: nn.Module) -> None:
    """Forget every kept norm in `module` and its children, after a write to a weight that nothing can see.

    Args:
        module: a model, or a layer itself.

    Raises:
        TypeError: `module` is not a `torch.nn.Module`.
        ValueError: its norms are frozen.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    found = list(caches(module))
    if any(cache.frozen is not None for cache in found):
        raise ValueError("module: its norms are frozen; release the handle of frozen_norms first")
    for cache in found:
        cache.invalidate()


class FrozenNorms:
    """The handle of `frozen_norms`. Leaving its `with` block, or calling `release`, ends the freeze."""

    def __init__(self, caches: list[NormCache]) -> None:
        self._caches = caches

    def __len__(self) -> int:
        """Return how many norms are frozen."""
        return len(self._caches)

    def release(self) -> None:
        """Unfreeze the norms: from the next call on, layers check their norms again. Calling it twice does nothing."""
        for cache in self._caches:
            cache.frozen = None
        self._caches = []

    def __enter__(self) -> FrozenNorms:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


@torch.no_grad()
def frozen_norms(module: nn.Module) -> FrozenNorms:
    """Freeze the norms of `module` until they are released.

    No layer then asks whether its norm still holds, so a call costs what its products cost, and a CUDA graph or a
    compiled model reads g as a constant. Use it for serving, and wherever a model is called often and not trained. It
    freezes the norms of this package's layers and of those that `patch_peft` has patched, with their active adapters.

    ```python
    with dora_kernels.frozen_norms(model):
        model.generate(...)
    ```

    or ``handle = frozen_norms(model)`` and, before anything is written again, ``handle.release()``.
    A write in spite of the promise is not noticed. A change of device or dtype is a write too.

    Args:
        module: a model or a single layer.

    Returns:
        The handle, a context manager that releases the norms at its end.

    Raises:
        TypeError: `module` is not a `torch.nn.Module`.
        ValueError: there is no norm to freeze, or one is already frozen. Nothing is frozen then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    kept = {id(each.cache): each for each in kept_norms(module)}.values()
    if not kept:
        raise ValueError("module: no DoRA layer with a norm to freeze; call apply_dora or patch_peft first")
    if any(each.cache.frozen is not None for each in kept):
        raise ValueError("module: its norms are frozen already; release that handle first")
    with torch.inference_mode(False):
        found = [(each.cache, _frozen(each)) for each in kept]
    for cache, frozen in found:
        cache.frozen = frozen
    return FrozenNorms([cache for cache, _ in found])


def _frozen(kept: KeptNorm) -> tuple[Norm, Any]:
    weights, magnitude = kept.weights, kept.weights.magnitude
    assert magnitude is not None
    norm = compute_norm(weights, kept.form, norm_backend(kept.backend, weights.weight), compute=kept.compute)
    return norm, quotient(magnitude.detach(), norm.divisor, weights.weight)
