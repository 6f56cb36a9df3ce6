"""A small model, adapters for it, and the adapted weights in float64 that every file of them has to give."""

from __future__ import annotations

import torch
from torch import nn

from dora_kernels.adapters import Adapter, AdapterLayer

EPS32 = torch.finfo(torch.float32).eps


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(12, 12, bias=False)
        self.up_proj = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv1d(4, 5, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)


class Model(nn.Module):
    """Names with dots and underscores, a square layer, and one of every kind."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(30, 12)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(12, 30, bias=False)
        # as a trained model's: the norms of rows and of columns differ
        for parameter in self.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(1 + torch.rand(parameter.shape[0], *(1 for _ in parameter.shape[1:])))

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = x + block.q_proj(x)
            x = block.down(torch.relu(block.up_proj(x)))
        return self.lm_head(x)


def linear_problem(module):
    """The weight with outputs first: an embedding's table transposed."""
    weight = module.weight.detach().double()
    return weight.t() if isinstance(module, nn.Embedding) else weight


def norm64(weight, axis):
    """Norms of a weight ``[out, in, ...]`` along one of its first two dimensions, shaped to be multiplied with it."""
    dims = [dim for dim in range(weight.dim()) if dim != (0 if axis == "out" else 1)]
    return weight.pow(2).sum(dims, keepdim=True).sqrt()


def adapted64(module, layer):
    """``g * (W + scaling * B @ A)`` in float64, from the formula."""
    weight = linear_problem(module)
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    adapted = weight + layer.scaling * torch.einsum("or...,ri->oi", b.flatten(1), a.flatten(1)).view(weight.shape)
    if layer.magnitude is None:
        return adapted
    norm = norm64(adapted, layer.magnitude_axis)
    return adapted * (layer.magnitude.double().view(norm.shape) / (norm + layer.eps))


def random_layer(module, rank=3, axis="out", scaling=0.75, plain=False, dtype=torch.float32, eps=0.0):
    """An adapter that has been trained: magnitudes within a few percent of their norms."""
    weight = linear_problem(module)
    kind = "linear" if weight.dim() == 2 else f"conv{weight.dim() - 2}d"
    kind = "embedding" if isinstance(module, nn.Embedding) else kind
    groups = getattr(module, "groups", 1)
    inputs = weight.shape[1] * groups
    a = (torch.randn(rank, inputs, *weight.shape[2:]) / inputs**0.5).to(dtype)
    b = (0.3 * torch.randn(weight.shape[0], rank // groups, *(1 for _ in weight.shape[2:]))).to(dtype)
    layer = AdapterLayer(kind, a, b, None, scaling, axis, eps)
    if plain:
        return layer
    if groups == 1:
        plain_weight = adapted64(module, layer)
    else:
        plain_weight = weight
    norm = norm64(plain_weight, axis).flatten()
    magnitude = (norm * (1 + 0.02 * torch.randn(norm.shape))).to(dtype)
    return AdapterLayer(kind, a, b, magnitude, scaling, axis, eps)


def adapter_for(model, names, seed=1, **options):
    """An adapter of `model`'s modules `names`; each of another rank and scaling unless `options` say."""
    torch.manual_seed(seed)
    layers = {}
    for i, name in enumerate(names):
        own = {"rank": 2 + 2 * (i % 2), "scaling": 0.75 + 0.3 * i, **options}
        layers[name] = random_layer(model.get_submodule(name), **own)
    return Adapter(layers)


def assert_same_function(model, adapter, expected, limit=4 * EPS32):
    """The adapted weights are those of `expected` to float32 accuracy, in Frobenius norm of each."""
    assert adapter.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        module = model.get_submodule(name)
        wanted, got = adapted64(module, layer), adapted64(module, adapter.layers[name])
        error = float((got - wanted).norm() / wanted.norm())
        assert error <= limit, f"{name}: {error:.2g}, limit {limit:.2g}"
