"""A fresh adapter changes nothing, to the bit: a float32 layer with B = 0 and its first magnitude is its base layer."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import f32, f64
from torch import nn

from dora_kernels import DoRAConv2d, DoRAEmbedding, DoRALinear, dora_linear, dora_weight_norm, invalidate
from dora_kernels.core import reference

# With 4096 inputs a product with a bias adds up in another order than one without.
SIZES = [(64, 48), (4096, 24), (24, 4096), (1000, 1000)]
LEADS = [(), (1,), (7,), (2, 3), (0,), (130,)]
axes = pytest.mark.parametrize("magnitude_axis", ["out", "in"])


def scaled_down(layer):
    """A bias of the outputs' size, so that it is there to be lost."""
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


def is_base(layer, base, shape):
    """In training and evaluation, with and without gradients, and a second time with the kept norm."""
    x = torch.randn(shape)
    wanted = base(x)
    for training in (True, False):
        layer.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for _ in range(2):
                    assert torch.equal(layer(x), wanted)


@axes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_linear_layer(sizes, bias, magnitude_axis):
    base = scaled_down(nn.Linear(*sizes, bias=bias))
    layer = DoRALinear.from_linear(copy.deepcopy(base), rank=8, alpha=16, magnitude_axis=magnitude_axis)
    for lead in LEADS:
        is_base(layer, base, (*lead, sizes[0]))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_without_a_layer(sizes, bias):
    """`dora_linear` with the magnitude that `dora_weight_norm` gives, or PyTorch's norm of W."""
    base = scaled_down(nn.Linear(*sizes, bias=bias))
    a, b = torch.randn(4, sizes[0]), torch.zeros(sizes[1], 4)
    x = torch.randn(9, sizes[0])
    weight = base.weight.detach()
    exact = weight.double().norm(dim=1).float()
    for magnitude in (dora_weight_norm(weight, a, b), torch.linalg.vector_norm(weight, dim=1), exact):
        assert torch.equal(dora_linear(x, weight, a, b, magnitude, base.bias), base(x))


def test_gpt2s_layer():
    base = scaled_down(pytest.importorskip("transformers.pytorch_utils").Conv1D(36, 4096))
    with torch.no_grad():
        base.weight.normal_(std=0.02)
    is_base(DoRALinear.from_base(copy.deepcopy(base), rank=8), base, (5, 4096))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_once_b_moves_the_norm_is_the_true_one(bias):
    """And back again, also where A moves and B does not."""
    base = scaled_down(nn.Linear(4096, 24, bias=bias))
    layer = DoRALinear.from_linear(copy.deepcopy(base), rank=8, alpha=16)
    x = torch.randn(5, 4096)
    is_base(layer, base, (5, 4096))
    for training in (True, False):
        layer.train(training)
        with torch.no_grad():
            layer.lora_B.weight[3, 2] = 0.5
            wide = [t.double() for t in (base.weight, *layer.factors, layer.magnitude)]
            bias = None if base.bias is None else base.bias.double()
            norm = reference.weight_norm(*wide[:3], layer.scaling, "out")
            wanted = reference.dora_linear(x.double(), *wide, bias, layer.scaling, "out", True, None, f64)
            torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)
            assert layer._norm_cache._last.divisor[3] != layer.magnitude[3]
            torch.testing.assert_close(layer._norm_cache._last.divisor.double(), norm, rtol=1e-6, atol=0)
            layer.lora_B.weight[3, 2] = 0.0
            layer.lora_A.weight.mul_(3.0)
        is_base(layer.train(training), base, (5, 4096))
        layer.train(training)


def test_the_first_step_moves_b_as_everybodys_does():
    """The gradients of a fresh layer are those of the layer written out in float64."""
    torch.manual_seed(0)
    base = scaled_down(nn.Linear(64, 48))
    layer = DoRALinear.from_linear(base, rank=4, alpha=8)
    x, dy = torch.randn(30, 64, requires_grad=True), torch.randn(30, 48)
    leaves = [x, *layer.factors, layer.magnitude]
    grads = torch.autograd.grad(layer(x), leaves, dy)
    wide = [t.detach().to(f64).requires_grad_() for t in leaves]
    y = reference.dora_linear(
        wide[0], base.weight.to(f64), *wide[1:], base.bias.to(f64), layer.scaling, "out", True, None, f64
    )
    for grad, wanted in zip(grads, torch.autograd.grad(y, wide, dy.to(f64)), strict=True):
        torch.testing.assert_close(grad.to(f64), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_magnitude_that_has_moved_is_no_first_one(bias):
    """By a part in a million of it, with B still 0."""
    base = scaled_down(nn.Linear(64, 48, bias=bias))
    layer = DoRALinear.from_linear(copy.deepcopy(base), rank=4)
    x = torch.randn(200, 64)
    layer(x)
    with torch.no_grad():
        for factor in (1.0 + 2e-6, 1.5):
            layer.magnitude.mul_(factor)
            invalidate(layer)
            norm = base.weight.double().norm(dim=1)
            wanted = layer.magnitude.double() / norm * (x.double() @ base.weight.double().t())
            wanted += 0.0 if base.bias is None else base.bias.double()
            for _ in range(2):
                off = (layer(x).double() - wanted).norm() / wanted.norm()
                assert off < 5e-7


@axes
def test_eps_has_a_norm_of_its_own(magnitude_axis):
    """The first magnitude holds it, so the layer is its base to rounding."""
    base = scaled_down(nn.Linear(64, 48))
    layer = DoRALinear.from_linear(base, rank=4, eps=0.3, magnitude_axis=magnitude_axis)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), base(x))


def test_a_float64_layer():
    base = scaled_down(nn.Linear(64, 48, dtype=f64))
    layer = DoRALinear.from_linear(base, rank=4)
    x = torch.randn(5, 64, dtype=f64)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_layer(dtype):
    """With its float32 adapter, whose first magnitude is the norm of the stored weight."""
    base = scaled_down(nn.Linear(512, 48, dtype=dtype))
    layer = DoRALinear.from_linear(base, rank=4)
    assert layer.magnitude.dtype == f32
    x = torch.randn(30, 512, dtype=dtype)
    for _ in range(2):
        assert torch.equal(layer(x), base(x))


OTHERS = {
    "conv": (lambda: nn.Conv2d(6, 10, 3, padding=1), DoRAConv2d, lambda: torch.randn(4, 6, 5, 5)),
    "conv, no bias": (lambda: nn.Conv2d(6, 10, 3, bias=False), DoRAConv2d, lambda: torch.randn(4, 6, 5, 5)),
    "embedding": (lambda: nn.Embedding(23, 10), DoRAEmbedding, lambda: torch.randint(0, 23, (4, 3))),
}


@axes
@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds(kind, magnitude_axis):
    make, adapted, draw = OTHERS[kind]
    base, x = make(), draw()
    layer = adapted.from_base(base, rank=4, magnitude_axis=magnitude_axis)
    for training in (True, False):
        layer.train(training)
        for _ in range(2):
            assert torch.equal(layer(x), base(x))
