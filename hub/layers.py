"""Layers for `kernelize`. They have no state of their own: everything is the module's whose forward they replace."""

import torch
from torch import nn
from torch.nn import functional as F

from .core.problem import Form, Weights
from .engine.layer import layer_scale
from .engine.norm_cache import NormCache


class DoraLinear(nn.Module):
    """For PEFT's `DoraLinearLayer`: what DoRA adds to the base layer's output, without forming ``W + s B A``.

    Base layers whose weight is no dense matrix, and adapters that are no plain linear layers, run PEFT's own forward.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name="default"):
        weight, bias, magnitude = getattr(base_layer, "weight", None), getattr(base_layer, "bias", None), self.weight
        dense = isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.is_floating_point()
        tensors = (weight, lora_A.weight, lora_B.weight, magnitude) if dense else ()
        plain = dense and all(type(t) in (torch.Tensor, nn.Parameter) and t.numel() for t in tensors)
        if not plain or type(scaling) is not float or type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
            return type(self).forward(
                self, x, lora_A=lora_A, lora_B=lora_B, scaling=scaling, base_layer=base_layer, base_result=base_result,
                adapter_name=adapter_name,
            )  # fmt: skip
        rows = weight.t() if self.fan_in_fan_out else weight
        cache = self.__dict__.get("_dora_kernels")
        if cache is None:
            cache = self.__dict__["_dora_kernels"] = NormCache()
            cache.move(magnitude.device)
        weights = Weights(rows, lora_A.weight, lora_B.weight, magnitude)
        g = layer_scale(weights, Form(scaling), cache, self.training, "auto")
        if base_result is None:
            base_result = F.linear(x, rows.to(x.dtype))
        elif bias is not None:
            base_result = base_result - bias
        return (g - 1) * base_result + (g * scaling) * lora_B(lora_A(x))
