"""Models of one layer of each kind that PEFT gives DoRA to."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import f32
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import Special, move_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

import dora_kernels

VOCAB = 23


class Scaled(nn.Embedding):
    """As Gemma's, which multiplies by the root of the hidden size."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("embed_scale", torch.tensor(3.5), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


def channels_last(layer):
    return layer.to(memory_format=torch.channels_last)


# Each takes [4, 12] numbers, or indices, to some shape.
LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (4, 12)),
    "linear subclass": (lambda: Special(12, 10, bias=False), (4, 3, 12)),
    "Conv1D": (lambda: Conv1D(10, 12), (4, 12)),
    "embedding": (lambda: nn.Embedding(VOCAB, 10, padding_idx=2), None),
    "scaled embedding": (lambda: Scaled(VOCAB, 10), None),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (4, 6, 7)),
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1), (4, 6, 5, 5)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 10, 1, bias=False), (4, 6, 5, 5)),
    "conv2d, channels last": (lambda: channels_last(nn.Conv2d(6, 10, 3)), (4, 6, 5, 5)),
    "conv2d, 2 groups": (lambda: nn.Conv2d(6, 10, 3, groups=2), (4, 6, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(3, 5, 2), (2, 3, 4, 4, 4)),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)
# Before peft 0.18 an embedding's own scale is left out of what DoRA adds, so that merging changes the output.
SCALES = hasattr(BaseTunerLayer, "_get_embed_scale")
MERGEABLE = pytest.mark.parametrize(
    "kind", [kind for kind in LAYERS if "groups" not in kind and (SCALES or "scaled" not in kind)]
)


class Net(nn.Module):
    """A layer of the kind, and something after it to have a gradient through."""

    def __init__(self, kind):
        super().__init__()
        make, self.shape = LAYERS[kind]
        self.layer = make()

    def forward(self, x):
        return torch.tanh(self.layer(x))


def config(kind, **options):
    values = {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["layer"], **options}
    return LoraConfig(fan_in_fan_out=kind == "Conv1D", **values)


def twins(kind, dtype=f32, autocast_adapter_dtype=True, **options):
    """A stock model of one layer, its adapter far from where it starts, and a patched copy."""
    torch.manual_seed(0)
    stock = get_peft_model(Net(kind).to(dtype), config(kind, **options), autocast_adapter_dtype=autocast_adapter_dtype)
    move_adapter(stock)
    ours = copy.deepcopy(stock)
    handle = dora_kernels.patch_peft(ours)
    assert handle.patched == ["base_model.model.layer"] and not handle.skipped
    return stock, ours


def add(models, kind, name="second", seed=5, **options):
    for model in models:
        torch.manual_seed(7)
        model.add_adapter(name, config(kind, **options))
        move_adapter(model, name, seed)


def given(model, seed=3):
    """The input of a model, in its dtype; numbers ask for a gradient."""
    generator = torch.Generator().manual_seed(seed)
    shape = model.base_model.model.shape
    if shape is None:
        return torch.randint(0, VOCAB, (4, 3), generator=generator)
    x = torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)
    return x.requires_grad_()


def solve(model, **extra):
    """Output and every gradient, the input's too; no gradient is left behind."""
    torch.manual_seed(1)
    model.zero_grad(set_to_none=True)
    x = given(model)
    y = model(x, **extra)
    y.double().square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"y": y.detach(), **grads, **({"x": x.grad} if x.is_floating_point() else {})}


def output(model, **extra):
    with torch.no_grad():
        return {"y": model(given(model), **extra)}


def active(model, *names):
    model.base_model.set_adapter(list(names))
    return model
