"""Sums of adapters in which some layers are plain LoRA and others DoRA."""

from __future__ import annotations

import pytest
import torch
from test_combine import Net, adapter, dense_sum, f32, merged, random_layer, relative

from dora_kernels import dora_weight_norm
from dora_kernels.adapters import Adapter, combine_adapters, save_adapter, with_strength


@pytest.mark.parametrize("dtype", [f32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("rank", [None, 3])
def test_plain_layers_beside_dora_layers(axis, rank, dtype, tmp_path):
    """They get a magnitude at which g is 1, for no file holds both kinds."""
    net = Net("linear", dtype)
    mixed = Adapter({
        "first": random_layer(net.first, "linear", 2, axis, dtype=f32),
        "second": random_layer(net.second, "linear", 2, None, dtype=f32),
    })  # fmt: skip
    plain = adapter(net, "linear", 2, None, ["second"], dtype=f32)
    total, _ = combine_adapters(net, [mixed, plain], [0.5, 0.25], rank=rank)
    layer = total.layers["second"]
    norm = dora_weight_norm(net.second.weight, layer.lora_A, layer.lora_B, magnitude_axis=axis)
    assert layer.magnitude_axis == axis and torch.equal(layer.magnitude, norm)
    assert total.notes[1:] == [
        "second is plain LoRA among DoRA layers, so its magnitude was set to the weight's norm (g = 1)"
    ]
    if rank is None:
        assert relative(merged(net.second, layer), dense_sum(net, "second", [mixed, plain], [0.5, 0.25])) < 1e-6
    assert with_strength(net, mixed, 0.5).layers["second"].magnitude is not None
    assert combine_adapters(net, [plain], [0.5])[0].layers["second"].magnitude is None
    if pytest.importorskip("safetensors"):
        save_adapter(total, tmp_path, format="lycoris" if axis == "in" else "peft")
