"""The op by which a compiled graph keeps its norm: pure to the compiler, since what it remembers, it compares.

It returns a new tensor that depends on nothing but its inputs. A graph finds its layer's cache by the address of the
cache's `slot`, which is an input like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_kernels.core.precision import accumulation_dtype
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine import dispatch
from dora_kernels.engine.norm import compute_norm
from dora_kernels.engine.norm_cache import cache_of


def _kept_divisor(
    slot: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float, training: bool
) -> Tensor:
    """`NormCache.norm` for compiled graphs, of the cache with that slot."""
    weights, cache = Weights(weight, lora_A, lora_B, magnitude), cache_of(slot)
    if cache is None:  # a saved graph that another process has loaded
        form = Form(scaling, _axis(slot), True, float(slot.view(())))
        return compute_norm(weights, form, dispatch.norm_backend("auto", weight)).divisor
    form = cache.form
    if form.scaling != scaling:
        form = cache.form = form._replace(scaling=scaling)
    norm = cache.known(weights, form, training)
    if norm is None:
        norm = cache.norm(weights, form, training, dispatch.norm_backend(cache.backend, weight))
    return norm.divisor.clone()  # the graph may reuse its memory


def _divisor_like(
    slot: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, scaling: float, training: bool
) -> Tensor:
    shape = weight.shape[:-1] if _axis(slot) == "out" else weight.shape[1:]
    return weight.new_empty(shape, dtype=accumulation_dtype(weight, lora_A, lora_B))


def _axis(slot: Tensor) -> str:
    return "out" if slot.dim() == 1 else "in"


# Not `custom_op`: its checks at each call cost more than a small layer's arithmetic.
_library = torch.library.Library("dora_kernels", "FRAGMENT")
_library.define(
    "kept_divisor(Tensor slot, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, float scaling,"
    " bool training) -> Tensor"
)
_library.impl("kept_divisor", _kept_divisor, "CompositeExplicitAutograd")
torch.library.register_fake("dora_kernels::kept_divisor", _divisor_like, lib=_library)
kept_divisor = torch.ops.dora_kernels.kept_divisor.default
