"""DoRA on base layers that show nothing but their forward, of the kinds that PEFT refuses: GPTQ, AWQ, AQLM."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers import bf16, f32, f64
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import aqlm, awq, gptq
from peft_models import (
    lora_layers,
    one_thread,  # noqa: F401
)
from test_peft_quantized import IN, OUT, Net, batch, check, linear_layer, move, off, oracle, solve
from torch import nn

import dora_kernels
from dora_kernels.peft.gptq import DoraRefused
from dora_kernels.peft.state import SWITCH

STOCK = {"gptq": gptq.GPTQLoraLinear, "awq": awq.AwqLoraLinear, "aqlm": aqlm.AqlmLoraLinear}
KINDS = pytest.mark.parametrize("kind", STOCK)


class Opaque(nn.Module):
    """A product in its own dtype, the sizes that PEFT makes A and B by, and a weight that nobody else can read."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.register_buffer("qweight", torch.empty(0))
        self.register_buffer("scales", torch.ones(1, dtype=linear.weight.dtype))
        self.pack(linear.weight.detach())
        self._bias = [None if linear.bias is None else linear.bias.detach().clone()]
        self.calls = 0

    def pack(self, weight):
        self._dtype = weight.dtype
        self.qweight = ~weight.contiguous().view(torch.uint8)

    def forward(self, x):
        self.calls += 1
        weight, bias = (~self.qweight).view(self._dtype), self._bias[0]
        return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))


@pytest.fixture
def everywhere():
    handle = dora_kernels.patch_peft_globally()
    yield handle
    handle.restore()


def config(kind, **options):
    values = {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["layer"], **options}
    lora_config = LoraConfig(**values)
    lora_config._register_custom_module({Opaque: STOCK[kind]})
    return lora_config


def peft_model(kind, dtype=f32, bias=True, **options):
    linear = linear_layer(dtype, bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net(Opaque(linear)), config(kind, **options))
    return model, linear.weight.detach().to(f64), None if bias is False else linear.bias.detach().to(f64)


@KINDS
def test_stock_refuses(kind):
    with pytest.raises((ValueError, AttributeError), match="DoRA|dora"):
        peft_model(kind)
    handle = dora_kernels.patch_peft_globally()
    peft_model(kind)
    handle.restore()
    with pytest.raises((ValueError, AttributeError), match="DoRA|dora"):
        peft_model(kind)


@KINDS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=["f32", "bf16"])
def test_from_the_start(kind, bias, dtype, everywhere):
    """A fresh adapter changes nothing; a trained one is the dense layer's; norms are renewed after a step."""
    model, weight, b = peft_model(kind, dtype, bias)
    assert everywhere.patched == ["layer"] and isinstance(lora_layers(model)[0], DoraRefused)
    names = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B", "lora_magnitude_vector"}
    x = batch(dtype)
    with torch.no_grad():
        plain = lora_layers(model)[0].base_layer(x)
        assert off(model(x), plain.to(f64)) <= 4 * torch.finfo(dtype).eps
    move(model, weight, "default")
    error = torch.finfo(dtype).eps
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        check(solve(model, x), oracle(model, weight, b, x), error, dtype)
        optimizer.step()
    model.eval()
    wanted = oracle(model, weight, b, x)
    with torch.no_grad():
        calls = []
        for _ in range(3):
            before = lora_layers(model)[0].base_layer.calls
            check({"y": model(x)}, wanted, error, dtype)
            calls.append(lora_layers(model)[0].base_layer.calls - before)
    assert calls[1:] == [1, 1], "an evaluation computes its norm once"


@KINDS
def test_the_norm_where_terms_cancel(kind, everywhere):
    """A row of V that is much smaller than its parts, and one that is nothing, are computed directly."""
    model, weight, b = peft_model(kind)
    move(model, weight, "default")
    layer = lora_layers(model)[0]
    with torch.no_grad():
        a, factor = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        s = layer.scaling["default"]
        # The first rows of W within the span of A, which B takes off again.
        taken = torch.randn(2, 4) * 3
        dense = weight.float()
        dense[:2] = taken @ a
        factor[0] = -taken[0] / s * (1 - 1e-3)
        factor[1] = -taken[1] / s
        layer.base_layer.pack(dense)
    variant = layer.lora_variant["default"]
    divisor = variant.divisor(layer, "default", variant.read(layer, "default"))
    wanted = (dense.double() + s * factor.detach().double() @ a.detach().double()).norm(dim=1)
    assert off(divisor[2:], wanted[2:]) < 1e-6
    assert abs(divisor[0].item() / wanted[0].item() - 1) < 1e-3


@KINDS
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_another_base_weight(kind, training, in_place, everywhere):
    """What was computed once of a layer that shows itself through its forward is of the weight that it was."""
    model, weight, b = peft_model(kind)
    move(model, weight, "default")
    x, layer = batch(f32), lora_layers(model)[0].base_layer
    model.train(training)
    check(solve(model, x), oracle(model, weight, b, x), 1e-7, f32)
    packed = layer.qweight
    layer.pack(weight.float().flip(0))
    if in_place:
        layer.qweight = packed.copy_(layer.qweight)
    check(solve(model, x), oracle(model, weight.flip(0), b, x), 1e-7, f32)


@KINDS
def test_a_base_weight_that_no_version_shows(kind, everywhere):
    """Written through `.data`, in evaluation, which compares a sample of it."""
    model, weight, b = peft_model(kind)
    move(model, weight, "default")
    x, layer = batch(f32), lora_layers(model)[0].base_layer
    model.eval()(x)
    packed = layer.qweight
    layer.pack(weight.float().flip(0))
    packed.data.copy_(layer.qweight)
    layer.qweight = packed
    check({"y": model(x).detach()}, oracle(model, weight.flip(0), b, x), 1e-7, f32)


@KINDS
def test_trained_after_inference_mode(kind, everywhere):
    """What was computed once in it can be saved for a backward."""
    model, weight, b = peft_model(kind)
    move(model, weight, "default")
    x = batch(f32)
    with torch.inference_mode():
        model.eval()(x)
    check(solve(model.train(), x), oracle(model, weight, b, x), 1e-7, f32)


@KINDS
def test_a_bias_that_trains(kind, everywhere):
    model, weight, b = peft_model(kind)
    move(model, weight, "default")
    layer, x = lora_layers(model)[0].base_layer, batch(f32)
    layer.bias = nn.Parameter(b.float())
    layer._bias = [layer.bias]
    optimizer = torch.optim.SGD([layer.bias], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        results = solve(model, x)
        check(results, oracle(model, weight, layer.bias.detach().to(f64), x), 1e-7, f32)
        torch.testing.assert_close(layer.bias.grad, 2 * results["y"].sum((0, 1)))
        optimizer.step()


@KINDS
@pytest.mark.parametrize("dropout", ["peft", "lora"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=["f32", "bf16"])
def test_dropout(kind, dropout, dtype):
    handle = dora_kernels.patch_peft_globally(dropout=dropout)
    try:
        model, weight, b = peft_model(kind, dtype, lora_dropout=0.4)
    finally:
        handle.restore()
    move(model, weight, "default")
    layer, x = lora_layers(model)[0], batch(dtype)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    dropped = layer.lora_dropout["default"](x).to(f64)
    a, b_, m = (
        part["default"].weight.detach().to(f64) for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
    )
    s = layer.scaling["default"]
    g, low = m / (weight + s * b_ @ a).norm(dim=1), s * dropped @ a.t() @ b_.t()
    base = x.to(f64) @ weight.t()
    wanted = base + (g - 1) * (dropped @ weight.t()) + g * low if dropout == "peft" else g * (base + low)
    check({"y": y.detach()}, {"y": wanted + b}, torch.finfo(dtype).eps, dtype)


@KINDS
def test_a_second_adapter_disabled_and_deleted(kind, everywhere):
    model, weight, b = peft_model(kind)
    move(model, weight, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", config(kind, r=2, lora_alpha=3))
        model.add_adapter("plain", config(kind, r=2, use_dora=False, init_lora_weights=False))
    move(model, weight, "second", 5)
    x = batch(f32)
    for names in (["default", "second"], ["second"]):
        model.base_model.set_adapter(names)
        check(solve(model, x, names), oracle(model, weight, b, x, names), 1e-7, f32)
    model.set_adapter("plain")
    layer = lora_layers(model)[0]
    low = layer.scaling["plain"] * layer.lora_B["plain"](layer.lora_A["plain"](x))
    torch.testing.assert_close(model(x), layer.base_layer(x) + low)
    with model.disable_adapter():
        assert torch.equal(model(x), layer.base_layer(x))
    model.delete_adapter("default")
    model.set_adapter("second")
    check(solve(model, x, ["second"]), oracle(model, weight, b, x, ["second"]), 1e-7, f32)


@KINDS
def test_saved_and_loaded(kind, everywhere, tmp_path):
    model, weight, _ = peft_model(kind)
    move(model, weight, "default")
    x = batch(f32)
    model.eval()
    y = model(x)
    keys = get_peft_model_state_dict(model).keys()
    assert any("lora_magnitude_vector" in key for key in keys)
    model.save_pretrained(tmp_path)
    lora_config = LoraConfig.from_pretrained(tmp_path)
    assert lora_config.use_dora
    lora_config._register_custom_module({Opaque: STOCK[kind]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(Net(Opaque(linear_layer(f32))), tmp_path, config=lora_config)
    torch.testing.assert_close(loaded.eval()(x), y)
    assert not any(p.requires_grad for p in loaded.parameters())  # not loaded to be trained
    assert torch.equal(copy.deepcopy(loaded)(x), loaded(x))


@KINDS
def test_hooks_of_the_base_layer_fire_once_a_forward(kind, everywhere):
    model, weight, _ = peft_model(kind)
    move(model, weight, "default")
    fired = []
    lora_layers(model)[0].base_layer.register_forward_hook(lambda *_: fired.append(1))
    for training in (True, True, False, False):
        model.train(training)(batch(f32))
    assert len(fired) == 4


def test_plain_lora_is_untouched(everywhere):
    model, _, _ = peft_model("awq", use_dora=False)
    layer = lora_layers(model)[0]
    assert type(layer) is awq.AwqLoraLinear and SWITCH not in vars(layer)
