"""Base weights and adapters without usable values, not finite or on meta: refused before anything changes."""

from __future__ import annotations

import math

import pytest
import torch
from test_apply import Net, moved, snapshot, unchanged
from torch import nn

from dora_kernels import (
    DoRAConv2d,
    DoRAEmbedding,
    DoRALinear,
    apply_dora,
    attach,
    combine_adapters,
    extract,
    load_adapter,
    merge_all,
    save_adapter,
    with_strength,
)

bad_values = pytest.mark.parametrize("value", [math.nan, -math.inf])


def spoilt(model, value):
    with torch.no_grad():
        model.block[2].weight[3, 2] = value
    return model


@pytest.fixture
def adapter():
    model = Net()
    apply_dora(model, rank=2)
    return extract(moved(model))


@bad_values
def test_base_weights_that_are_not_finite(value, adapter):
    for call in (apply_dora, lambda model: attach(model, adapter)):
        model = spoilt(Net(), value)
        types, flags = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=r"block\.2: base_layer: its weight has values that are not finite"):
            call(model)
        assert [type(m) for m in model.modules()] == types and [p.requires_grad for p in model.parameters()] == flags
    assert apply_dora(model, ["block.0"]) == ["block.0"]
    for call in (lambda: combine_adapters(model, [adapter], [0.5]), lambda: with_strength(model, adapter, 0.5)):
        with pytest.raises(ValueError, match=r"model: block\.2: its weight has values that are not finite"):
            call()
    bases = {DoRALinear: nn.Linear(2, 2), DoRAEmbedding: nn.Embedding(2, 2), DoRAConv2d: nn.Conv2d(2, 2, 1)}
    for kind, base in bases.items():
        base.weight.data[1, 1] = value
        with pytest.raises(ValueError, match="base_layer: its weight has values that are not finite"):
            kind.from_base(base, rank=1)
        assert base.weight.requires_grad


@bad_values
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
def test_adapters_that_are_not_finite(value, part):
    model = Net()
    apply_dora(model, ["conv", "0", "2"], rank=2)
    with torch.no_grad():
        moved(model).block[2].get_parameter(part).view(-1)[1] = value
    weights = [layer.base_layer.weight.clone() for layer in (model.conv, *model.block[::2])]
    for call, name in ((lambda: merge_all(model), r"block\.2: "), (model.block[2].merge, "")):
        with pytest.raises(ValueError, match=f"{name}the layer cannot be merged: its {part} has values that are not"):
            call()
    with pytest.raises(ValueError, match=r"adapters: block\.2: (lora_A|lora_B|magnitude) has values that are not"):
        combine_adapters(Net(), [extract(model)], [0.5])
    layers = (model.conv, *model.block[::2])
    assert all(torch.equal(w, layer.base_layer.weight) and not layer.merged for w, layer in zip(weights, layers))


def test_models_on_meta(adapter, tmp_path):
    """Their weights come later, and magnitudes are the weights' norms."""
    with torch.device("meta"):
        model = Net()
        adapted = Net()
        adapted.block[0] = adapted.again = DoRALinear.from_linear(adapted.block[0], rank=2)
        adapted.block[2] = DoRALinear.from_linear(adapted.block[2], rank=2)
    text = r"block\.0: its weight is on the meta device, without values; load the weights first"
    calls = [apply_dora, lambda model: attach(model, adapter)]
    with pytest.raises(ValueError, match=text):
        attach(adapted, adapter)
    with pytest.raises(ValueError, match=r"block\.0: the layer cannot be merged: its lora_A\.weight is on the meta"):
        merge_all(adapted)
    with pytest.raises(ValueError, match=rf"model: {text}"):
        combine_adapters(model, [adapter], [0.5])
    if pytest.importorskip("safetensors"):
        save_adapter(adapter, tmp_path)
        calls.append(lambda model: load_adapter(tmp_path, model))
    for call in calls:
        with pytest.raises(ValueError, match=text):
            call(model)
        assert type(model.block[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_a_failed_call_changes_nothing(adapter):
    model = Net()
    before = snapshot(model)
    adapter.layers["block.2"].lora_A[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"block\.2: it has values that are not finite"):
        attach(model, adapter)
    assert unchanged(model, before)
