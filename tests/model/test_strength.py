"""`strength` of the adapted layers: ``base + strength * (adapted - base)``, merged too; and rounding in merging."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch
from helpers import bf16, f32, f64
from torch import nn

from dora_kernels import DoRAConv2d, DoRAEmbedding, DoRALinear, LoRALinear, merge_dora, set_dora_strength
from dora_kernels.rounding import stochastic

LAYERS = {
    "linear": (lambda **o: DoRALinear(9, 7, rank=3, **o), lambda dtype: torch.randn(5, 9, dtype=dtype)),
    "linear-in": (
        lambda **o: DoRALinear(9, 7, rank=3, magnitude_axis="in", eps=0.1, **o),
        lambda dtype: torch.randn(5, 9, dtype=dtype),
    ),
    "lora": (lambda **o: LoRALinear(9, 7, rank=3, **o), lambda dtype: torch.randn(5, 9, dtype=dtype)),
    "embedding": (lambda **o: DoRAEmbedding(9, 7, rank=3, **o), lambda _: torch.randint(0, 9, (5,))),
    "embedding-in": (
        lambda **o: DoRAEmbedding(9, 7, rank=3, magnitude_axis="in", **o),
        lambda _: torch.randint(0, 9, (5,)),
    ),
    "conv": (lambda **o: DoRAConv2d(4, 6, 3, rank=3, **o), lambda dtype: torch.randn(2, 4, 5, 5, dtype=dtype)),
    "conv-in": (
        lambda **o: DoRAConv2d(4, 6, 3, rank=3, magnitude_axis="in", **o),
        lambda dtype: torch.randn(2, 4, 5, 5, dtype=dtype),
    ),
}
kinds = pytest.mark.parametrize("kind", LAYERS)


def make(kind, dtype=f64):
    """A layer whose adapter is far from its start, and an input."""
    torch.manual_seed(0)
    build, draw = LAYERS[kind]
    layer = build(dtype=dtype)
    with torch.no_grad():
        for factor in layer.factors:
            factor.normal_()
        if not isinstance(layer, LoRALinear) or isinstance(layer, DoRALinear):
            layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
    return layer, draw(dtype)


@kinds
@pytest.mark.parametrize("dtype", [f64, bf16])
def test_zero_is_the_base_layer_bit_for_bit(kind, dtype):
    layer, x = make(kind, dtype)
    with torch.no_grad():
        layer.factors[1].fill_(torch.inf)  # which nothing may look at
    layer.strength = 0
    assert torch.equal(layer(x), layer.base_layer(x)) and layer(x).dtype == dtype


@kinds
def test_one_is_the_layer_as_it_is(kind):
    layer, x = make(kind)
    before = layer(x)
    layer.strength = 0.5
    assert not torch.equal(layer(x), before) and "strength=0.5" in repr(layer)
    layer.strength = 1
    assert torch.equal(layer(x), before) and "strength" not in repr(layer)


@kinds
@pytest.mark.parametrize("strength", [0.3, 1.7, -0.5])
def test_between_and_beyond(kind, strength):
    """Outputs and gradients are those of the sum; merging gives the same function."""
    layer, x = make(kind)
    names = list(layer.state_dict())
    base, adapted = layer.base_layer(x), layer(x)
    parameters = list(layer.adapter_parameters().values())
    dy = torch.randn_like(base)
    wanted = [strength * g for g in torch.autograd.grad(adapted, parameters, dy)]
    layer.strength = strength
    y = layer(x)
    torch.testing.assert_close(y, base + strength * (adapted - base))
    torch.testing.assert_close(list(torch.autograd.grad(y, parameters, dy)), wanted)
    assert list(layer.state_dict()) == names
    assert torch.equal(copy.deepcopy(layer)(x), y)
    original = layer.base_layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x), y)
    with pytest.raises(ValueError, match="strength: the layer is merged, and keeps the strength"):
        layer.strength = 1.0
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original)


@pytest.mark.parametrize("kind", ["linear", "linear-in", "lora"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtypes", [(bf16, f32), (f32, bf16), (f32, f64)], ids=str)
def test_x_of_another_dtype(kind, autocast, dtypes):
    """Whatever works at 1 works at every strength, and merged: in the same dtype, the compute dtype's roundings off."""
    layer, _ = make(kind, dtypes[0])
    x = torch.randn(5, 9).to(dtypes[1])
    exact = copy.deepcopy(layer).to(f64)
    with torch.autocast("cpu", bf16, enabled=autocast):
        dtype = layer(x).dtype
        for strength in (1.0, 0.5, 0.0):
            layer.strength = exact.strength = strength
            y = layer(x)
            layer.merge()
            merged = layer(x)
            layer.unmerge()
            wanted = exact(x.to(f64))
            step = max(torch.finfo(one).eps for one in (dtype, dtypes[0]))
            for one in (y, merged):
                assert one.dtype == dtype
                assert (one.to(f64) - wanted).norm() <= 4 * step * wanted.norm()


def test_the_base_is_not_run_at_one(monkeypatch):
    layer, x = make("linear")
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("the base layer ran"))
    layer(x)


@pytest.mark.parametrize(
    "value, error, message",
    [
        (float("nan"), ValueError, "strength: expected a finite number, got nan"),
        ("1", TypeError, "strength: expected a number, got str"),
        (True, TypeError, "strength: expected a number, got bool"),
    ],
)
def test_bad_values(value, error, message):
    layer, _ = make("linear")
    with pytest.raises(error, match=message):
        layer.strength = value
    with pytest.raises(error, match=message):
        set_dora_strength(layer, value)
    assert layer.strength == 1.0


def test_any_real_number():
    layer, _ = make("linear")
    for value in (Fraction(1, 2), 0.5):
        layer.strength = 1
        set_dora_strength(layer, value)
        assert layer.strength == 0.5 and type(layer.strength) is float


@kinds
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_stochastic_rounding(kind, strength):
    """The seed's own bits, within a step of the exact weight, and reproducible; the original comes back."""
    layer, _ = make(kind, bf16)
    original = layer.base_layer.weight.clone()
    layer.strength = strength
    exact = copy.deepcopy(layer).to(f64)
    exact.merge()
    merged = []
    for seed in (1, 1, 2):
        layer.merge(rounding="stochastic", seed=seed)
        merged.append(layer.base_layer.weight.clone())
        layer.unmerge()
    assert torch.equal(merged[0], merged[1]) and not torch.equal(merged[0], merged[2])
    assert torch.equal(layer.base_layer.weight, original)
    step = torch.finfo(bf16).eps
    torch.testing.assert_close(merged[0].to(f64), exact.base_layer.weight, rtol=1.01 * step, atol=1e-6)
    with pytest.raises(ValueError, match="rounding: expected 'nearest' or 'stochastic', got 'up'"):
        layer.merge(rounding="up")
    assert not layer.merged


def test_stochastic_rounding_is_merge_doras():
    layer, _ = make("linear", bf16)
    arguments = (layer.base_layer.weight.clone(), *layer.factors, layer.magnitude)
    wanted = merge_dora(*arguments, scaling=layer.scaling, rounding="stochastic", seed=5)
    wide = merge_dora(arguments[0].float(), *arguments[1:], scaling=layer.scaling)
    assert torch.equal(wanted, stochastic(wide, bf16, 5))
    layer.merge("stochastic", 5)
    assert torch.equal(layer.base_layer.weight, wanted)
