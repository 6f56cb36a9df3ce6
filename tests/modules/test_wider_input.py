"""Adapters in 16 bits inside a float32 model: the low-rank branch is computed in float32, as the merged weight is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_kernels import DoRAConv1d, DoRAConv2d, DoRAConv3d, DoRALinear, LoRALinear

CONVOLUTIONS = {
    "1d": (DoRAConv1d, (2, 4, 9)),
    "2d": (DoRAConv2d, (2, 4, 7, 6)),
    "3d": (DoRAConv3d, (2, 4, 5, 4, 5)),
}


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_equal_their_merged_weight(kind, adapter_dtype):
    make, shape = CONVOLUTIONS[kind]
    layer, x = make(4, 6, 3, padding=1, rank=2, adapter_dtype=adapter_dtype), torch.randn(shape)
    nn.init.normal_(layer.lora_B.weight)
    with torch.no_grad():
        y = layer(x)
        layer.merge()
        merged = layer(x)
    assert (y - merged).norm() / merged.norm() < 2e-6


@pytest.mark.parametrize("make", [LoRALinear, DoRALinear])
def test_active_dropout(make):
    layer, x = make(16, 8, rank=2, dropout=0.5, adapter_dtype=torch.bfloat16).train(), torch.randn(5, 16)
    nn.init.normal_(layer.lora_B.weight)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    dropped = layer.dropout(x).double()
    a, b = (factor.double() for factor in layer.factors)
    base = x.double() @ layer.weight.double().T
    wanted = base + layer.scaling * dropped @ a.T @ b.T
    if make is DoRALinear:
        norm = (layer.weight.double() + layer.scaling * b @ a).norm(dim=1)
        wanted = wanted * (layer.magnitude.double() / norm)
    wanted = wanted + layer.bias.double()
    assert (y - wanted).norm() / wanted.norm() < 2e-6
