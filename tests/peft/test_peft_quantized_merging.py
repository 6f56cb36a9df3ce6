"""Merging and unmerging DoRA adapters on quantised layers, of the real libraries on the CPU."""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import f32, f64
from peft import LoraConfig
from peft_models import (
    lora_layers,
    one_thread,  # noqa: F401
)
from test_peft_quantized import FORMATS, KINDS, add, batch, linear_layer, off, peft_model

import dora_kernels
from dora_kernels.peft.state import SWITCH

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def requantising(model, kind):
    """PEFT quantises a merged torchao weight anew; what it asks for comes with a model of transformers' own."""
    if "torchao" in kind:
        quantization = pytest.importorskip("torchao.quantization")
        lora_layers(model)[0].get_apply_tensor_subclass = {
            "torchao int8": lambda: quantization.Int8WeightOnlyConfig(),
            "torchao int8, 2": lambda: quantization.Int8WeightOnlyConfig(version=2),
            "torchao float8": lambda: quantization.Float8WeightOnlyConfig(),
        }[kind]


def merged_weight(layer, weight, names):
    merged = weight
    for name in names:
        a, b, m = (
            part[name].weight.to(f64) for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
        )
        low = layer.scaling[name] * b @ a
        merged = (m / (weight + low).norm(dim=1)).view(-1, 1) * (merged + low)
    return merged


def merged_error(model, kind, weight, names, x, reference):
    """How far the library's quantised layer is from the exactly merged weight."""
    anew = linear_layer(f32)
    with torch.no_grad():
        anew.weight.copy_(merged_weight(lora_layers(model)[0], weight, names))
        return off(FORMATS[kind](anew).forward(x.clone()), reference)


@KINDS
def test_merging(kind):
    """Requantised by PEFT; unmerged bit for bit; a second adapter's norm from the unmerged weight."""
    model, weight, _ = peft_model(kind, f32)
    layer = lora_layers(model)[0]
    requantising(model, kind)
    dora_kernels.patch_peft(model)
    add(model, weight)
    x = batch(f32)
    with torch.no_grad():
        model.train()
        before = layer.base_layer.forward(x.clone())
        for names in (["default"], ["default", "second"]):
            model.base_model.set_adapter(names)
            unmerged = model(x.clone())
            model.merge_adapter(names)
            merged = model(x.clone())
            # Quantised after each: as far off as the library is from the exactly merged weight.
            error = merged_error(model, kind, weight, names, x, unmerged.to(f64))
            assert off(merged, unmerged.to(f64)) <= 2 * len(names) * error
            model.unmerge_adapter()
            assert torch.equal(layer.base_layer.forward(x.clone()), before)
            assert torch.equal(model(x.clone()), unmerged)


@KINDS
@pytest.mark.parametrize("evaluated", [False, True], ids=["", "evaluated"])
@pytest.mark.parametrize("names", [["default"], ["default", "second"]], ids=["", "two"])
def test_without_a_copy(kind, names, evaluated):
    """Merged with norms of the unmerged weight, unmerged by arithmetic, requantised each time.

    After an evaluation, which repacks 4-bit weights on some CPUs, as before it.
    """
    model, weight, b = peft_model(kind, f32)
    requantising(model, kind)
    dora_kernels.patch_peft(model, keep_unmerged=False)
    add(model, weight)
    x, layer = batch(f32), lora_layers(model)[0]
    model.base_model.set_adapter(names)
    model.train(not evaluated)
    with torch.no_grad():
        wanted = model(x.clone()).to(f64)
        error = merged_error(model, kind, weight, names, x, wanted)
        model.merge_adapter(names)
        assert off(model(x.clone()), wanted) <= 2 * len(names) * error
        assert vars(layer)[SWITCH].unmerged is None
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.bias, b)
        # Each merge's rounding, enlarged in the rows that merging made smaller.
        assert off(layer.base_layer.forward(x.clone()), x.to(f64) @ weight.t() + b.to(f64)) <= 8 * len(names) * error


@KINDS
def test_a_failed_safe_merge_leaves_the_layer_as_it_was(kind):
    model, _, _ = peft_model(kind, f32)
    requantising(model, kind)
    dora_kernels.patch_peft(model)
    layer, x = lora_layers(model)[0], batch(f32)
    with torch.no_grad():
        before = layer.base_layer.forward(x.clone())
        layer.lora_magnitude_vector["default"].weight[0] = torch.inf
        with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default"):
            model.merge_adapter(safe_merge=True)
        assert torch.equal(layer.base_layer.forward(x.clone()), before)
    assert not layer.merged_adapters and vars(layer)[SWITCH].unmerged is None


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays(kind, training):
    """Of a layer that is unmerged in another one than it was merged in."""
    model, _, _ = peft_model(kind, f32)
    requantising(model, kind)
    dora_kernels.patch_peft(model)
    model.train(training)
    model.merge_adapter()
    model.train(not training)
    model.unmerge_adapter()
    assert all(module.training != training for module in model.modules())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("change", [False, True], ids=["", "changed"])
def test_a_bias_of_an_adapter(kind, change):
    """What merging has added to the base layer's goes again, bit for bit; what somebody else wrote stays."""
    model, weight, _ = peft_model(kind, f32)
    dora_kernels.patch_peft(model)
    config = LoraConfig(r=2, target_modules=["layer"], lora_bias=True, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("plain", config)
    layer, x = lora_layers(model)[0], batch(f32)
    bias = layer.base_layer.bias
    before = bias.detach().clone()
    with torch.no_grad():
        product = layer.base_layer.forward(x.clone()) - bias
        model.merge_adapter(["plain", "default"])
        assert not torch.equal(layer.base_layer.bias, before)
        layer.base_layer.bias += float(change)
        model.unmerge_adapter()
        assert torch.allclose(layer.base_layer.bias, before + change, atol=1e-6)
        assert change or torch.equal(layer.base_layer.bias, before)
        torch.testing.assert_close(layer.base_layer.forward(x.clone()) - layer.base_layer.bias, product)
