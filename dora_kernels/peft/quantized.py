"""PEFT's LoRA layers on quantised linear layers: the norm from blocks of dequantised rows, or through the forward.

The base product is the base layer's own; what PEFT adds in several passes is one `compose`. Nothing of the dense
weight's size is made in a training step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from dora_kernels.functional import dora_weight_norm, run_compose
from dora_kernels.peft import dequantize
from dora_kernels.peft.layer import DoraLayer
from dora_kernels.peft.linear import DoraLinearVariant, factors_fit, single_dora_adapter
from dora_kernels.peft.on_demand import OnDemand, Recipe
from dora_kernels.peft.state import AdapterCache, Weights, active_dropout, divisor, hooked, norm_cache, read, switch
from dora_kernels.reference import accumulation_dtype, no_autocast
from dora_kernels.torch_backend import CANCELLATION


def read_weights(layer: Any, adapter: str) -> Weights | None:
    """`read`; in the weight's place stands what a new one would show in (`dequantize.carrier`)."""
    children = layer._modules
    base = children["base_layer"]
    lora_A, lora_B = children["lora_A"]._modules[adapter], children["lora_B"]._modules[adapter]
    a, b = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    of_base = dequantize.carrier(base)
    identity = base, lora_A, lora_B, of_base, type(base), type(lora_A), type(lora_B), lora_B._parameters.get("bias")
    weights = read(layer, adapter, a, a, b, getattr(base, "bias", None), identity, factors_fit)
    if weights is None or (of_base is not None and not of_base.data_ptr()):
        return None
    return weights if of_base is None else weights._replace(weight=of_base)


def _constants(cache: AdapterCache, layer: Any, base: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """|W|² of each row and the bias of a layer that shows itself through its forward alone, computed once."""
    of_base = dequantize.carrier(base)
    key = id(base), id(of_base), *((of_base.data_ptr(), of_base._version) if of_base is not None else ())
    if cache.constants is None or cache.constants[0] != key:
        with torch.no_grad(), no_autocast(like.device):
            like = like.detach().to(_input_dtype(base, like))
            bias = base.forward(like.new_zeros(1, layer.in_features))[0].detach()
            square = _forward_square(layer, base, like, None, None, 0.0)
        cache.constants = key, square, bias, (base, of_base)  # which keeps their ids theirs
    return cache.constants[1], cache.constants[2]


def _input_dtype(base: nn.Module, a: Tensor) -> torch.dtype:
    """What an opaque layer may be fed: the dtype of a floating tensor that it holds, else lora_A's."""
    floating = (t.dtype for t in (*base.parameters(), *base.buffers()) if t.dtype in (torch.bfloat16, torch.float16))
    return next(floating, a.dtype)


def _forward_square(
    layer: Any, base: Any, like: Tensor, a: Tensor | None, b: Tensor | None, scaling: float
) -> Tensor:
    """Squared row norms of ``W + s B A``, a block of columns at a time."""
    total: Any = 0.0
    for part, block in dequantize.through_forward(base, like, layer.in_features)():
        wide = block.to(accumulation_dtype(block))
        if a is not None and b is not None:
            wide = torch.addmm(wide, a[:, part].t().to(wide.dtype), b.t().to(wide.dtype), alpha=scaling)
        total = total + wide.square().sum(0)
    result: Tensor = total
    return result


def _norm(cache: AdapterCache, layer: Any, base: Any, weights: Weights, scaling: float) -> Tensor:
    """Row norms of ``W + s B A``."""
    a, b = weights.lora_A.detach(), weights.lora_B.detach()
    blocks = dequantize.row_blocks(base)
    if blocks is not None:
        norm = torch.empty(b.shape[0], dtype=accumulation_dtype(a), device=a.device)
        for rows, block in blocks():
            norm[rows] = dora_weight_norm(block, a, b[rows], scaling=scaling)
        return norm
    square, bias = _constants(cache, layer, base, a)
    low = a.to(square.dtype), b.to(square.dtype)
    gram = low[0] @ low[0].t()
    like = a.to(_input_dtype(base, a))
    u = (base.forward(like) - bias).t().to(square.dtype)
    found = square + 2.0 * scaling * ((u + 0.5 * scaling * (low[1] @ gram)) * low[1]).sum(1)
    terms = square + scaling * scaling * (low[1].square() @ gram.diagonal())
    lost = found < CANCELLATION * terms
    if not (a.is_cuda and torch.cuda.is_current_stream_capturing()) and bool(lost.any()):
        found = torch.where(lost, _forward_square(layer, base, like, a, b, scaling), found)
    return found.clamp_min_(0.0).sqrt_()


class DoraQuantizedVariant(DoraLinearVariant):
    """PEFT's DoRA variant on a quantised linear layer."""

    read = staticmethod(read_weights)

    @staticmethod
    def rows(layer: Any, weight: Tensor) -> Tensor:
        """PEFT hands the dequantised weight over."""
        return weight

    @classmethod
    @torch.no_grad()
    def init(cls, module: Any, adapter_name: str, **kwargs: Any) -> None:
        """The first magnitude: the norm, in float32. PEFT dequantises all of W, and breaks an int8 layer on a CPU."""
        a, b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
        base = module.get_base_layer()
        of_base = dequantize.carrier(base)
        device = a.device if of_base is None else of_base.device
        magnitude = DoraLinearLayer(fan_in_fan_out=False)
        if "meta" in (a.device.type, device.type):
            norm = torch.empty(b.shape[0], dtype=torch.float32, device="meta")
        else:
            weights = Weights(a, a.to(device), b.to(device), b, None)
            with no_autocast(device):
                norm = _norm(AdapterCache(), module, base, weights, module.scaling[adapter_name]).to(a.device)
        magnitude.weight = nn.Parameter(norm)
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        module.lora_magnitude_vector[adapter_name] = magnitude

    @classmethod
    def divisor(cls, layer: Any, adapter: str, weights: Weights) -> Callable[[str], Tensor]:
        """From blocks of rows, or through the forward."""
        base, scaling, cache = layer._modules["base_layer"], layer.scaling[adapter], norm_cache(layer, adapter)
        return divisor(layer, adapter, weights, lambda: _norm(cache, layer, base, weights, scaling))

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """As the linear variant, in the base result's dtype under autocast too (peft issue 1692)."""
        dora = super().forward(module, active_adapter, x, result, **kwargs)
        return dora.to(result.dtype) if torch.is_autocast_enabled(result.device.type) else dora

    @staticmethod
    def bias(module: Any, adapter: str, weights: Weights) -> Tensor | None:
        """The layer's, or what it makes of zeros."""
        base = module.base_layer
        if dequantize.row_blocks(base) is not None:
            return weights.bias
        return _constants(norm_cache(module, adapter), module, base, weights.lora_A)[1]

    @classmethod
    def base_product(cls, module: Any, adapter: str, x: Tensor, weights: Weights) -> Tensor:
        """Of what dropout left: the layer's own, whose hooks have seen this call already."""
        product: Tensor = module.base_layer.forward(x)
        bias = cls.bias(module, adapter, weights)
        return product if bias is None else product - bias


class UnmergedParts:
    """What a quantised base layer consists of before merging makes another of it: kept packed, where it is."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._base = layer, layer.base_layer
        self._before = copy.copy(self._base)
        self._before.__dict__.update(_parameters=dict(self._base._parameters), _buffers=dict(self._base._buffers))
        if hasattr(self._base, "state"):
            self._before.state = copy.copy(self._base.state)
        self._after: list[tuple[Tensor, int]] = []

    @property
    def weight(self) -> Tensor:
        """Dequantised, whole: merging makes it whole too."""
        weight: Any = dequantize.dequantized(self._before)
        return weight  # type: ignore[no-any-return]

    def merged(self, base: Any) -> None:
        """Note what the merged layer consists of."""
        self._after = [(t, t._version) for t in (*base.parameters(), *base.buffers())]

    def put_back(self, base: Any) -> bool:
        """Give the layer its old parts; False if they are no longer what merging left."""
        now = [*base.parameters(), *base.buffers()]
        if len(now) != len(self._after):
            return False
        if not all(one is t and t._version == version for one, (t, version) in zip(now, self._after, strict=True)):
            return False
        own = self._base.__dict__
        own.update({name: value for name, value in self._before.__dict__.items() if name != "_modules"})
        self._layer.base_layer = self._base
        return True


class DoraQuantized(DoraLayer):
    """A LoRA layer of PEFT's on a quantised base layer: mixed in before it."""

    variants = {variants.DoraLinearVariant: DoraQuantizedVariant}

    def _keep(self) -> UnmergedParts:
        return UnmergedParts(self)


def forward(stock: Any, layer: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """The base layer's product, the low-rank one in its dtype, and one `compose`; PEFT's own forward where it must."""
    name = None if args or kwargs else single_dora_adapter(layer)
    weights = None if name is None else read_weights(layer, name)
    if name is None or weights is None or nn_module._has_any_global_hook():
        return stock.forward(layer, x, *args, **kwargs)
    dropping = active_dropout(layer, name)
    state: Any = switch(layer)
    factors = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if (dropping and state.options.dropout == "peft") or hooked(*factors):
        return stock.forward(layer, x, *args, **kwargs)
    result = layer.base_layer(x)
    dropped = layer.lora_dropout[name](x) if dropping else x
    h = F.linear(dropped, weights.lora_A if torch.is_autocast_enabled(x.device.type) else weights.lora_A.to(x.dtype))
    return run_compose(
        result, h, weights.lora_B, weights.magnitude, DoraQuantizedVariant.bias(layer, name, weights),
        layer.scaling[name], DoraQuantizedVariant.divisor(layer, name, weights),
    )  # fmt: skip


class DoraHqq(DoraQuantized):
    """On HQQ's layers, of which PEFT's merging makes new ones without their bias."""

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        """PEFT's, and the bias."""
        bias = self.base_layer.bias
        try:
            super().merge(*args, **kwargs)
        finally:
            self.base_layer.bias = bias


class DoraTorchao(DoraQuantized):
    """On torchao's tensors, whose merging in PEFT adds ``s B A`` and leaves the magnitude out."""

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """One adapter after the other: PEFT's loop loses its weight after the first."""
        for name in check_adapters_to_merge(self, adapter_names):
            super().merge(safe_merge, [name])

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """What merging adds: of a DoRA adapter the merged weight less what it is now."""
        variant = self.lora_variant.get(adapter)
        if switch(self) is None or not isinstance(variant, DoraQuantizedVariant):
            delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
            return delta
        weight: Any = dequantize.dequantized(self.base_layer)
        return variant.merge_safe(self, adapter, weight) - weight


def _forward_of(stock: Any) -> Callable[..., Tensor]:
    def run(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward(stock, self, x, args, kwargs)

    return run


_CLASSES = OnDemand(__name__, {
    "DoraLinear4bit": Recipe("peft.tuners.lora.bnb", "Linear4bit", DoraQuantized, _forward_of),
    "DoraLinear8bitLt": Recipe("peft.tuners.lora.bnb", "Linear8bitLt", DoraQuantized, _forward_of),
    "DoraHqqLinear": Recipe("peft.tuners.lora.hqq", "HqqLoraLinear", DoraHqq, _forward_of),
    "DoraTorchaoLinear": Recipe("peft.tuners.lora.torchao", "TorchaoLoraLinear", DoraTorchao, _forward_of),
})  # fmt: skip

__getattr__, patched_class = _CLASSES.attribute, _CLASSES.instead_of
