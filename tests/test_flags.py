"""Options that are yes or no take a bool; tensors are dense: errors name the argument, what came, what was expected."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_kernels import DoRAConv2d, DoRALinear, apply_dora, dora_linear, dora_weight_norm


def layer_arguments():
    w, a, b = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2)
    return torch.randn(3, 6), w, a, b, dora_weight_norm(w, a, b)


@pytest.mark.parametrize("value", [0, 1, "yes", None])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("detach_norm", lambda value: dora_linear(*layer_arguments(), detach_norm=value)),
        ("detach_norm", lambda value: DoRALinear(4, 4, rank=1, detach_norm=value)),
        ("detach_norm", lambda value: DoRAConv2d(4, 4, 1, rank=1, detach_norm=value)),
        ("use_rslora", lambda value: DoRALinear(4, 4, rank=1, use_rslora=value)),
        ("use_dora", lambda value: apply_dora(nn.Sequential(nn.Linear(4, 4)), rank=1, use_dora=value)),
    ],
    ids=["function", "linear", "convolution", "rslora", "apply"],
)
def test_flags(name, call, value):
    with pytest.raises(TypeError, match=f"{name}: expected a bool, got {type(value).__name__}"):
        call(value)


LAYOUTS = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr(),
    "_mkldnn": lambda t: t.to_mkldnn(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index", range(4), ids=["x", "weight", "lora_A", "lora_B"])
def test_tensors_that_are_not_dense(index, layout):
    arguments = list(layer_arguments())
    arguments[index] = LAYOUTS[layout](arguments[index])
    name = ["x", "weight", "lora_A", "lora_B"][index]
    with pytest.raises(TypeError, match=f"{name}: expected a dense tensor, got a {layout} one"):
        dora_linear(*arguments)
