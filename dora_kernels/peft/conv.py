"""PEFT's LoRA layers on `nn.Conv1d`, `Conv2d` and `Conv3d`: one magnitude per output channel.

As a linear problem the weight is ``[out, in * kernel]``, A ``[r, in * kernel]`` and B, a convolution of kernel 1,
``[out, r]``.

**Groups.** With g groups the weight is ``[out, in / g * kernel]``, but PEFT's A reads all channels: a row of it is g
rows of the weight long. PEFT's norm cuts ``B A``, taken as ``[out / g, in * kernel]``, into the weight's rows. That is
no norm of what the layer computes (25 % off at rank 4 and 2 groups), but adapters were trained with it. The exact norm,
of each channel's update over all inputs, is an option that the saved adapter records (`config`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer
from torch import Tensor, nn

from dora_kernels.functional import dora_weight_norm
from dora_kernels.peft.layer import DoraLayer, DoraVariant
from dora_kernels.peft.state import SWITCH, Weights, active_dropout, divisor, interpolated, read, scale
from dora_kernels.reference import accumulation_dtype

_KINDS: dict[Any, tuple[Any, Callable[..., Tensor]]] = {
    nn.Conv1d: (DoraConv1dLayer, F.conv1d),
    nn.Conv2d: (DoraConv2dLayer, F.conv2d),
    nn.Conv3d: (DoraConv3dLayer, F.conv3d),
}


def read_weights(layer: Any, adapter: str) -> Weights | None:
    """`read`, all of two dimensions and the magnitude of one. With groups it is no linear problem: `_grouped_norm`."""
    children = layer._modules
    base = children["base_layer"]
    lora_A, lora_B = children["lora_A"]._modules[adapter], children["lora_B"]._modules[adapter]
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    a, b = lora_A._parameters.get("weight"), lora_B._parameters.get("weight")
    identity = base, lora_A, lora_B, type(base), type(lora_A), type(lora_B), lora_B._parameters.get("bias")
    weights = read(layer, adapter, weight, a, b, bias, identity, _fit)
    if weights is None:
        return None
    last = base.groups == 1 and not weights.weight.is_contiguous()
    rows = _rows(weights.weight, last), _rows(weights.lora_A, last), weights.lora_B.flatten(1)
    return Weights(*rows, weights.magnitude.view(-1), bias)


def _rows(weight: Tensor, channels_last: bool) -> Tensor:
    """``[out, in * kernel]``, the latter in the order in which it lies in memory."""
    return (weight.movedim(1, -1) if channels_last else weight).flatten(1)


def _fit(layer: Any, adapter: str, weights: Weights) -> bool:
    """Whether the modules are plain ones, and their tensors of fitting shapes."""
    base = layer._modules["base_layer"]
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    lora_A, lora_B, magnitude = (layer._modules[name]._modules[adapter] for name in names)
    if not (type(base) is type(lora_A) is type(lora_B) and type(base) in _KINDS):
        return False
    if type(magnitude) is not _KINDS[type(base)][0] or lora_B.bias is not None or "bias" not in base._parameters:
        return False
    weight, a, b, m, _ = weights
    rank, groups = a.shape[0], base.groups
    if not (weight.is_contiguous() or weight.movedim(1, -1).is_contiguous()):
        return False
    kernel = weight.shape[2:]
    return (
        a.shape == (rank, weight.shape[1] * groups, *kernel)
        and b.shape == (weight.shape[0], rank // groups, *(1 for _ in kernel))
        and m.numel() == weight.shape[0]
    )


def _grouped_norm(weights: Weights, scaling: float) -> Tensor:
    """PEFT's norm of a grouped convolution."""
    weight, a, b = (t.detach() for t in weights[:3])
    dtype = accumulation_dtype(weight, a, b)
    low = b.to(dtype).reshape(-1, a.shape[0]) @ a.to(dtype)
    return torch.linalg.vector_norm(torch.add(weight.to(dtype), low.view(weight.shape), alpha=scaling), dim=1)


def _exact_grouped_norm(weights: Weights, scaling: float, groups: int) -> Tensor:
    """Of what the layer computes: a group's weight in its own channels, and its share of B and A in all of them."""
    weight, a, b = (t.detach() for t in weights[:3])
    dtype = accumulation_dtype(weight, a, b)
    norms = []
    parts = (t.to(dtype).chunk(groups) for t in (weight, a, b))
    for group, (w, right, left) in enumerate(zip(*parts, strict=True)):
        update = scaling * (left @ right)
        update[:, group * w.shape[1] : (group + 1) * w.shape[1]] += w
        norms.append(torch.linalg.vector_norm(update, dim=1))
    return torch.cat(norms)


class _DoraConvVariant(DoraVariant):
    read = staticmethod(read_weights)

    @staticmethod
    def rows(layer: Any, weight: Tensor) -> Tensor:
        """Whatever its memory format."""
        return _rows(weight, not weight.is_contiguous())

    @classmethod
    def divisor(cls, layer: Any, adapter: str, weights: Weights) -> Callable[[str], Tensor]:
        """With groups PEFT's or the exact one. Where memory formats differ A was copied, and a copy shows no writes."""
        scaling, groups = layer.scaling[adapter], layer.base_layer.groups
        a: Tensor = layer.lora_A[adapter].weight
        grouped, exact = groups > 1, adapter in vars(layer)[SWITCH].exact_norms
        copied = not (a if layer.base_layer.weight.is_contiguous() else a.movedim(1, -1)).is_contiguous()
        if not grouped and not copied:
            return super().divisor(layer, adapter, weights)

        def norm() -> Tensor:
            if grouped:
                return _exact_grouped_norm(weights, scaling, groups) if exact else _grouped_norm(weights, scaling)
            return dora_weight_norm(*(t.detach() for t in weights[:3]), scaling=scaling)

        stored = weights._replace(weight=layer.base_layer.weight, lora_A=a, lora_B=layer.lora_B[adapter].weight)
        return divisor(layer, adapter, stored, norm)

    @classmethod
    def forward(cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's ``result + (g - 1) * base + g * scaling * B A x``; active dropout as `Options.dropout` says."""
        weights = cls.read(module, active_adapter)
        if weights is None:
            return cls.pefts_forward(module, active_adapter, x, result, **kwargs)
        per_channel = (-1, *(1 for _ in range(module.base_layer.weight.dim() - 2)))
        g = scale(module, active_adapter, weights, cls.divisor(module, active_adapter, weights)).view(per_channel)
        bias = None if weights.bias is None else weights.bias.view(per_channel)
        scaling = module.scaling[active_adapter]
        base = None
        if active_dropout(module, active_adapter):
            x = module.lora_dropout[active_adapter](x)
            if vars(module)[SWITCH].options.dropout == "peft":
                base = cls._base_product(module.base_layer, x)
        low = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        if base is not None:
            dora = result + (g - 1) * base + (g * scaling) * low
        elif bias is None:
            dora = g * torch.add(result, low, alpha=scaling)
        else:
            dora = torch.addcmul(bias, g, torch.add(result - bias, low, alpha=scaling))
        return interpolated(module, active_adapter, result, dora)

    @staticmethod
    def _base_product(base: Any, x: Tensor) -> Tensor:
        """Of what dropout left. As PEFT's it pads with zeros whatever the `padding_mode`."""
        convolve = _KINDS[type(base)][1]
        return convolve(x, base.weight.to(x.dtype), None, base.stride, base.padding, base.dilation, base.groups)


class DoraConv1dVariant(_DoraConvVariant, variants.DoraConv1dVariant):
    """PEFT's DoRA variant of a convolution over one dimension."""

    stock = variants.DoraConv1dVariant


class DoraConv2dVariant(_DoraConvVariant, variants.DoraConv2dVariant):
    """PEFT's DoRA variant of a convolution over two dimensions."""

    stock = variants.DoraConv2dVariant


class DoraConv3dVariant(_DoraConvVariant, variants.DoraConv3dVariant):
    """PEFT's DoRA variant of a convolution over three dimensions."""

    stock = variants.DoraConv3dVariant


class DoraConv1d(DoraLayer, peft_layer.Conv1d):
    """PEFT's LoRA layer on an `nn.Conv1d` whose DoRA adapters run on this package."""

    stock = peft_layer.Conv1d
    variants = {variants.DoraConv1dVariant: DoraConv1dVariant}


class DoraConv2d(DoraLayer, peft_layer.Conv2d):
    """PEFT's LoRA layer on an `nn.Conv2d` whose DoRA adapters run on this package."""

    stock = peft_layer.Conv2d
    variants = {variants.DoraConv2dVariant: DoraConv2dVariant}


class DoraConv3d(DoraLayer, peft_layer.Conv3d):
    """PEFT's LoRA layer on an `nn.Conv3d` whose DoRA adapters run on this package."""

    stock = peft_layer.Conv3d
    variants = {variants.DoraConv3dVariant: DoraConv3dVariant}


def unsupported(layer: Any) -> str | None:
    """Why one of PEFT's convolution layers cannot be patched; None where it can."""
    kind = type(layer.base_layer)
    if kind not in _KINDS:
        return f"its base layer is a {kind.__module__}.{kind.__name__}, not a plain nn.Conv1d, Conv2d or Conv3d"
    return None
