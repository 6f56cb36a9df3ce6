"""PEFT's LoRA layers on `nn.Conv1d`, `Conv2d` and `Conv3d`, with one magnitude per output channel.

With groups the default is PEFT's norm: it is not the norm of what the layer computes (`convolution`), but adapters were
trained with it. The exact norm is an option that a saved adapter records (`config`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer
from torch import Tensor, nn

from dora_kernels.core import convolution
from dora_kernels.core.problem import Weights
from dora_kernels.functional import dora_weight_norm
from dora_kernels.peft.layer import DoraLayer, DoraVariant, NormSource
from dora_kernels.peft.state import active_dropout, interpolated, read_modules, settings

_KINDS: dict[Any, tuple[Any, Callable[..., Tensor]]] = {
    nn.Conv1d: (DoraConv1dLayer, F.conv1d),
    nn.Conv2d: (DoraConv2dLayer, F.conv2d),
    nn.Conv3d: (DoraConv3dLayer, F.conv3d),
}


def read_weights(layer: Any, adapter: str) -> Weights | None:
    """`read_modules`, with two-dimensional tensors and the magnitude as a vector.

    Groups are no linear problem: see `_grouped_norm`.
    """
    weights = read_modules(layer, adapter, _fit)
    if weights is None:
        return None
    last = layer._modules["base_layer"].groups == 1 and not weights.weight.is_contiguous()
    w, a = convolution.rows(weights.weight, last), convolution.rows(weights.lora_A, last)
    return Weights(w, a, weights.lora_B.flatten(1), weights.magnitude.view(-1), weights.bias)


def _fit(layer: Any, adapter: str, weights: Weights) -> bool:
    """True if the modules are plain ones and their tensors have fitting shapes."""
    base = layer._modules["base_layer"]
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    lora_A, lora_B, magnitude = (layer._modules[name]._modules[adapter] for name in names)
    if not (type(base) is type(lora_A) is type(lora_B) and type(base) in _KINDS):
        return False
    if type(magnitude) is not _KINDS[type(base)][0] or lora_B.bias is not None or "bias" not in base._parameters:
        return False
    weight, a, b, m, _ = weights
    rank, groups = a.shape[0], base.groups
    if not (convolution.is_view(weight, False) or convolution.is_view(weight, True)):
        return False
    kernel = weight.shape[2:]
    return (
        a.shape == (rank, weight.shape[1] * groups, *kernel)
        and b.shape == (weight.shape[0], rank // groups, *(1 for _ in kernel))
        and m.numel() == weight.shape[0]
    )


class _DoraConvVariant(DoraVariant):
    read = staticmethod(read_weights)

    @staticmethod
    def rows(layer: Any, weight: Tensor) -> Tensor:
        """The weight as rows, for any memory format."""
        return convolution.rows(weight, not weight.is_contiguous())

    @classmethod
    def norm_source(cls, layer: Any, adapter: str, weights: Weights) -> NormSource:
        """The sources of the norm; with groups that is PEFT's or the exact one.

        If the memory formats of A and W differ, A was copied, and a copy does not show writes; A itself is then
        returned.
        """
        scaling, groups = layer.scaling[adapter], layer.base_layer.groups
        a: Tensor = layer.lora_A[adapter].weight
        grouped, exact = groups > 1, adapter in settings(layer).exact_norms
        copied = not convolution.is_view(a, not layer.base_layer.weight.is_contiguous())
        if not grouped and not copied:
            return weights, None

        def norm() -> Tensor:
            tensors = weights.weight.detach(), weights.lora_A.detach(), weights.lora_B.detach()
            if not grouped:
                return dora_weight_norm(*tensors, scaling=scaling)
            if exact:
                return convolution.exact_grouped_norm(*tensors, scaling, groups)
            return convolution.pefts_grouped_norm(*tensors, scaling)

        stored = weights._replace(weight=layer.base_layer.weight, lora_A=a, lora_B=layer.lora_B[adapter].weight)
        return stored, norm

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's ``result + (g - 1) * base + g * scaling * B A x``.

        `Options.dropout` says what active dropout applies to.
        """
        weights = cls.read(module, active_adapter)
        if weights is None:
            return cls.pefts_forward(module, active_adapter, x, result, **kwargs)
        per_channel = (-1, *(1 for _ in range(module.base_layer.weight.dim() - 2)))
        g = cls.scale(module, active_adapter, weights).view(per_channel)
        bias = None if weights.bias is None else weights.bias.view(per_channel)
        scaling = module.scaling[active_adapter]
        base = None
        if active_dropout(module, active_adapter):
            x = module.lora_dropout[active_adapter](x)
            if settings(module).options.dropout == "peft":
                base = cls._base_product(module.base_layer, x)
        low = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        if base is not None:
            dora = result + (g - 1) * base + (g * scaling) * low
        else:
            dora = convolution.compose(result, low, g, bias, scaling)
        return interpolated(module, active_adapter, result, dora)

    @staticmethod
    def _base_product(base: Any, x: Tensor) -> Tensor:
        """The base product after dropout. It pads with zeros whatever the `padding_mode`, as PEFT's does."""
        convolve = _KINDS[type(base)][1]
        return convolve(x, base.weight.to(x.dtype), None, base.stride, base.padding, base.dilation, base.groups)


class DoraConv1dVariant(_DoraConvVariant, variants.DoraConv1dVariant):
    """PEFT's DoRA variant for one-dimensional convolutions."""

    stock = variants.DoraConv1dVariant


class DoraConv2dVariant(_DoraConvVariant, variants.DoraConv2dVariant):
    """PEFT's DoRA variant for two-dimensional convolutions."""

    stock = variants.DoraConv2dVariant


class DoraConv3dVariant(_DoraConvVariant, variants.DoraConv3dVariant):
    """PEFT's DoRA variant for three-dimensional convolutions."""

    stock = variants.DoraConv3dVariant


class DoraConv1d(DoraLayer, peft_layer.Conv1d):
    """PEFT's LoRA layer on an `nn.Conv1d`, with DoRA adapters that run on this package."""

    stock = peft_layer.Conv1d
    variants = {variants.DoraConv1dVariant: DoraConv1dVariant}


class DoraConv2d(DoraLayer, peft_layer.Conv2d):
    """PEFT's LoRA layer on an `nn.Conv2d`, with DoRA adapters that run on this package."""

    stock = peft_layer.Conv2d
    variants = {variants.DoraConv2dVariant: DoraConv2dVariant}


class DoraConv3d(DoraLayer, peft_layer.Conv3d):
    """PEFT's LoRA layer on an `nn.Conv3d`, with DoRA adapters that run on this package."""

    stock = peft_layer.Conv3d
    variants = {variants.DoraConv3dVariant: DoraConv3dVariant}


def unsupported(layer: Any) -> str | None:
    """Return the reason why one of PEFT's convolution layers cannot be patched, or None if it can."""
    kind = type(layer.base_layer)
    if kind not in _KINDS:
        return f"its base layer is a {kind.__module__}.{kind.__name__}, not a plain nn.Conv1d, Conv2d or Conv3d"
    return None
