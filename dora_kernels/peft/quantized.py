"""PEFT's LoRA layers on quantised linear layers. The norm comes from blocks of dequantised rows, or from the forward.

The base layer computes the base product; one `compose` replaces the several passes in which PEFT adds the rest. A
training step makes no tensor as large as the dense weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from dora_kernels.core.precision import cast, compute_dtype, no_autocast
from dora_kernels.core.problem import Form, Weights
from dora_kernels.engine import merged
from dora_kernels.engine.dispatch import PLAIN
from dora_kernels.engine.fingerprints import Sample
from dora_kernels.engine.layer import run_compose
from dora_kernels.modules import dequantize
from dora_kernels.modules.opaque import Constants, constants_of, opaque_norm
from dora_kernels.peft.layer import DoraLayer, NormSource
from dora_kernels.peft.lazy_classes import OnDemand, Recipe
from dora_kernels.peft.linear import DoraLinearVariant
from dora_kernels.peft.merging import UnmergedBias
from dora_kernels.peft.plan import factors_fit, single_dora_adapter
from dora_kernels.peft.state import AdapterCache, active_dropout, hooked, norm_cache, read, switch


def read_weights(layer: Any, adapter: str) -> Weights | None:
    """`read`, with the tensor that would show a new weight (`dequantize.carrier`) in the place of the weight."""
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


def _constants(cache: AdapterCache, layer: Any, base: Any, like: Tensor) -> Constants:
    """|W|² of each row, and the bias, of a layer that shows its weight only through its forward. Computed once."""
    tensors, of_base = [*base.parameters(), *base.buffers()], dequantize.carrier(base)
    key = id(base), *((id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
    known = cache.constants
    if known is None or known[0] != key or not (_is_not_compared(layer, of_base) or known[1].is_held_by(of_base)):
        square, bias = constants_of(base, like, layer.in_features)
        with torch.inference_mode(False), torch.no_grad():
            held = None if of_base is None else Sample(of_base)
        cache.constants = known = key, held, square, bias, (base, tensors)  # last: keeps the ids from being reused
    return known[2], known[3]


def _is_not_compared(layer: Any, of_base: Tensor | None) -> bool:
    """True if the weight's sample is not compared: on a GPU the host would wait at every step, a capture would fail."""
    if of_base is None:
        return True
    return of_base.is_cuda and (layer.training or torch.cuda.is_current_stream_capturing())


def _norm(cache: AdapterCache, layer: Any, base: Any, weights: Weights, scaling: float) -> Tensor:
    """Row norms of ``W + s B A``."""
    a, b = weights.lora_A.detach(), weights.lora_B.detach()
    return opaque_norm(base, a, b, scaling, lambda: _constants(cache, layer, base, a))


class DoraQuantizedVariant(DoraLinearVariant):
    """PEFT's DoRA variant for quantised linear layers."""

    read = staticmethod(read_weights)

    @staticmethod
    def rows(layer: Any, weight: Tensor) -> Tensor:
        """The weight as it is: PEFT passes it dequantised."""
        return weight

    @classmethod
    @torch.no_grad()
    def init(cls, module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Set the first magnitude to the norm, in float32.

        PEFT would dequantise all of W, and break an int8 layer on a CPU.
        """
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
    def norm_source(cls, layer: Any, adapter: str, weights: Weights) -> NormSource:
        """The norm from blocks of rows, or from the forward."""
        base, scaling, cache = layer._modules["base_layer"], layer.scaling[adapter], norm_cache(layer, adapter)
        return weights, lambda: _norm(cache, layer, base, weights, scaling)

    @classmethod
    def merge_safe(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the merged weight, from W as it is read here: PEFT misreads a 4-bit weight after it was repacked."""
        return super().merge_safe(module, active_adapter, _dequantized(module, orig_weight)).to(orig_weight.dtype)

    @classmethod
    def unmerge(cls, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Undo `merge_safe`, from W as it is read here."""
        return super().unmerge(module, active_adapter, _dequantized(module, orig_weight)).to(orig_weight.dtype)

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """As the linear variant, but in the base result's dtype under autocast too (peft issue 1692)."""
        dora = super().forward(module, active_adapter, x, result, **kwargs)
        return dora.to(result.dtype) if torch.is_autocast_enabled(result.device.type) else dora

    @staticmethod
    def bias(module: Any, adapter: str, weights: Weights) -> Tensor | None:
        """The layer's bias, or its output for zeros."""
        base = module.base_layer
        shown = isinstance(weights.bias, Tensor) and weights.bias.requires_grad
        if shown or dequantize.row_blocks(base) is not None:
            return weights.bias
        return _constants(norm_cache(module, adapter), module, base, weights.lora_A)[1]

    @classmethod
    def base_product(cls, module: Any, adapter: str, x: Tensor, weights: Weights, result: Tensor) -> Tensor:
        """The base layer's product of what dropout left, without its hooks, which have seen this call already."""
        product: Tensor = module.base_layer.forward(x.to(result.dtype))
        bias = cls.bias(module, adapter, weights)
        return product if bias is None else product - bias


def _dequantized(layer: Any, otherwise: Tensor) -> Tensor:
    weight = dequantize.dequantized(layer.base_layer)
    return otherwise if weight is None else weight


class UnmergedParts:
    """The tensors that a quantised base layer had before merging: packed, on their own device."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._base = layer, layer.base_layer
        self._before = copy.copy(self._base)
        self._before.__dict__.update(_parameters=dict(self._base._parameters), _buffers=dict(self._base._buffers))
        if hasattr(self._base, "state"):
            self._before.state = copy.copy(self._base.state)
        self._bias = UnmergedBias(self._base)
        self._after: list[tuple[Tensor, int]] = []

    @property
    def weight(self) -> Tensor:
        """The whole dequantised weight. Merging makes it whole too."""
        weight = dequantize.dequantized(self._before)
        assert weight is not None
        return weight

    def merged(self, base: Any) -> None:
        """Record which tensors the merged layer has."""
        self._after = [(t, _version(t)) for t in _parts(base)]
        self._bias.merged(base)

    def is_of(self, base: Any) -> bool:
        """True if the layer still has those tensors."""
        now = _parts(base)
        return len(now) == len(self._after) and all(
            one is t and _version(t) == version for one, (t, version) in zip(now, self._after, strict=True)
        )

    def put_back(self, base: Any) -> None:
        """Give the layer its old tensors back."""
        self._bias.put_back(base)
        kept = {name: value for name, value in self._before.__dict__.items() if name != "_modules"}
        self._base.__dict__.update(kept, training=base.training)
        self._layer.base_layer = self._base


def _parts(base: Any) -> list[Tensor]:
    """The layer's tensors, except its bias."""
    return [t for t in (*base.parameters(), *base.buffers()) if t is not getattr(base, "bias", None)]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class DoraQuantized(DoraLayer):
    """A LoRA layer of PEFT's on a quantised base layer: mixed in before PEFT's class."""

    variants = {variants.DoraLinearVariant: DoraQuantizedVariant}

    def _keep(self) -> UnmergedParts:
        return UnmergedParts(self)


def forward(stock: Any, layer: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """The base layer's product, the low-rank one in its dtype, and one `compose`. Else PEFT's own forward."""
    name = None if args or kwargs else single_dora_adapter(layer)
    weights = None if name is None else read_weights(layer, name)
    if name is None or weights is None or nn_module._has_any_global_hook():
        return stock.forward(layer, x, *args, **kwargs)
    dropping = active_dropout(layer, name)
    state: Any = switch(layer)
    factors = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if (dropping and state.options.dropout == "peft") or hooked(*factors):
        return stock.forward(layer, x, *args, **kwargs)
    if state.options.forward == "merged" and not dropping and not torch.compiler.is_compiling():
        y = _merged(layer, name, x, weights)
        if y is not None:
            return y
    result = layer.base_layer(x)
    dropped = layer.lora_dropout[name](x) if dropping else x
    h = F.linear(dropped, weights.lora_A if torch.is_autocast_enabled(x.device.type) else weights.lora_A.to(x.dtype))
    bias = DoraQuantizedVariant.bias(layer, name, weights)
    return run_compose(
        result, h, weights._replace(bias=bias), layer.scaling[name],
        lambda: DoraQuantizedVariant.divisor(layer, name, weights), cache=norm_cache(layer, name),
    )  # fmt: skip


def _merged(layer: Any, adapter: str, x: Tensor, weights: Weights) -> Tensor | None:
    """The layer by the merged forward; None if it has to run composed.

    V' takes the place of the copy of W that the base layer's library writes, dequantised, at each call.
    """
    base, cache, form = layer.base_layer, norm_cache(layer, adapter), Form(layer.scaling[adapter])
    blocks = dequantize.row_blocks(base)
    if blocks is None or hooked(base) or type(x) not in PLAIN or x.shape[-1:] != (layer.in_features,):
        return None
    dtype, result = _dtypes(cache, base, x)
    of_norm = DoraQuantizedVariant.norm_source(layer, adapter, weights)[1]
    source = merged.Dequantized(blocks, of_norm, dtype)  # type: ignore[arg-type]
    x = cast(x, dtype)
    if not merged.runs_merged(x, weights, cache, layer.training, source):
        return None
    return cast(merged.run_merged(x, weights, form, cache, layer.training, source=source), result)


def _dtypes(cache: AdapterCache, base: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which the base layer multiplies and returns; the latter is learned from a call on one token."""
    key = x.dtype, compute_dtype(x)
    if cache.returns is None or cache.returns[0] != key:
        with torch.no_grad():  # an input with a gradient, as in training: else bitsandbytes repacks W
            of_token = base.forward(x.new_zeros(1, x.shape[-1]).requires_grad_())
        cache.returns = key, of_token.dtype
    own = getattr(base, "compute_dtype", None)
    multiplies = key[1] if key[1] != x.dtype or own is None else own
    return multiplies, cache.returns[1]


class DoraHqq(DoraQuantized):
    """A LoRA layer on HQQ's. PEFT's merging replaces HQQ's layer with a new one without its bias."""

    def _merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        with self._keeping_bias():
            super()._merge(safe_merge, adapter_names)

    def _unmerge(self) -> None:
        with self._keeping_bias():
            super()._unmerge()

    @contextmanager
    def _keeping_bias(self: Any) -> Iterator[None]:
        bias = self.base_layer.bias
        try:
            yield
        finally:
            self.base_layer.bias = bias


class DoraTorchao(DoraQuantized):
    """A LoRA layer on torchao's tensors. PEFT's merging would add ``s B A`` and leave out the magnitude."""

    def _merge(self: Any, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Merge one adapter at a time: PEFT's loop loses its weight after the first, and checks before it adds."""
        for name in check_adapters_to_merge(self, adapter_names):
            if safe_merge and not bool(self.get_delta_weight(name).isfinite().all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            super()._merge(safe_merge, [name])

    def _unmerge(self) -> None:
        state: Any = switch(self)  # type: ignore[arg-type]
        state.unmerging = True
        try:
            super()._unmerge()
        finally:
            state.unmerging = False

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """Return what merging adds and unmerging subtracts: with DoRA, the merged weight minus the current one."""
        variant, state = self.lora_variant.get(adapter), switch(self)
        if state is None or not isinstance(variant, DoraQuantizedVariant):
            delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
            return delta
        weight: Any = dequantize.dequantized(self.base_layer)
        if state.unmerging:
            return weight - variant.unmerge(self, adapter, weight)
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
